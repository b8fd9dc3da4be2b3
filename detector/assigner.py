"""Anchors + ground truth -> which anchor learns which box."""

from collections.abc import Iterator

import torch
from torch import Tensor

from detector import boxes as box_ops
from detector.structures import Assignment

CACHED_PAIRS = 2**17  # pairs of an anchor and a box at a time, on a CPU
MAX_PAIRS = 2**24  # elsewhere
MIN_BLOCK = 4096  # anchors


class IoUAssigner:
    """RetinaNet's rule: an anchor belongs to the box it overlaps most.

    An anchor is positive if that IoU >= `fg_iou`, background if it is < `bg_iou`, and ignored between. Each box's best
    anchors are positive too, if their IoU is above 0 and at least `min_iou`; such an anchor still learns the box it
    overlaps most. Without this rule, boxes far from all anchor shapes are never learnt. `min_iou` = `fg_iou` switches
    the rule off.

    Source: Lin et al., Focal Loss, 2017, section 4; the low-quality matches are Faster R-CNN's (Ren et al.,
    2015, section 3.1.2). Same result as torchvision's Matcher, except for a box that overlaps no anchor:
    then torchvision makes every anchor positive.
    """

    def __init__(self, fg_iou: float = 0.5, bg_iou: float = 0.4, min_iou: float = 0.0):
        if not 0 < bg_iou <= fg_iou <= 1:
            raise ValueError(f"bg_iou {bg_iou} and fg_iou {fg_iou}: need 0 < bg_iou <= fg_iou <= 1")
        if not 0 <= min_iou <= fg_iou:
            raise ValueError(f"min_iou {min_iou}: must be between 0 and fg_iou ({fg_iou})")
        self.fg_iou, self.bg_iou, self.min_iou = fg_iou, bg_iou, min_iou

    @torch.no_grad()
    def __call__(self, anchors: Tensor, gt_boxes: Tensor, *_: object) -> Assignment:
        """Anchors (A, 4), boxes (G, 4) of one image or (B, G, 4) of several, padded with zeros -> Assignment.

        G may be 0. Other arguments, such as the levels, are ignored.
        """
        anchors = anchors.t().contiguous().t()  # each coordinate contiguous in memory
        best_iou = anchors.new_zeros(*gt_boxes.shape[:-2], len(anchors))
        gt_index = torch.zeros_like(best_iou, dtype=torch.int64)
        best_of_some_box = torch.zeros_like(best_iou, dtype=torch.bool)
        best_of_box = gt_boxes.new_zeros(gt_boxes.shape[:-1])
        reached = []
        for block, near in _blocks(anchors, gt_boxes):
            iou = box_ops.iou(gt_boxes[..., near, :], anchors[block])  # (..., k, a)
            best_iou[..., block], index = iou.max(dim=-2)
            gt_index[..., block] = near[index]
            highest = iou.amax(dim=-1)
            best_of_box[..., near] = best_of_box[..., near].maximum(highest)
            reached.append((block, near, highest, iou == highest[..., None]))
        for block, near, highest, equal in reached:
            is_best = (highest == best_of_box[..., near]) & (highest > 0) & (highest >= self.min_iou)
            best_of_some_box[..., block] = (equal & is_best[..., None]).any(dim=-2)
        positive = (best_iou >= self.fg_iou) | best_of_some_box
        ignored = (best_iou >= self.bg_iou) & ~positive
        return Assignment(gt_index, positive, ignored)


def split_boxes(compared: Tensor, gt_boxes: Tensor, counts: list[int]) -> list[Tensor] | tuple[Tensor, ...]:
    """A batch's boxes (B, G, 4) in parts (b, g, 4) for an assigner. Image i has counts[i] boxes, then zeros.

    compared: the anchors (n, 4) that the assigner compares with each box

    On a CPU each image is a part, so _blocks can skip boxes far from a run of anchors. Elsewhere a part has as many
    images as memory allows, for few kernel launches. Boxes of zeros overlap no anchor.
    """
    if compared.device.type == "cpu":
        return [boxes[None, :count] for boxes, count in zip(gt_boxes, counts)]
    return gt_boxes.split(max(1, MAX_PAIRS // max(1, gt_boxes.shape[1] * len(compared))))


def _blocks(anchors: Tensor, gt_boxes: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Runs of anchors, each with the indices (k,) of the boxes that may overlap it.

    On a CPU a run is short: its pairs fit the cache, and in a crowded image most boxes do not reach its part of it.
    Elsewhere it is as long as memory allows, often all anchors, and gets all boxes: selecting some would wait for the
    device.
    """
    on_cpu = anchors.device.type == "cpu"
    length = max((CACHED_PAIRS if on_cpu else MAX_PAIRS) // max(gt_boxes.shape[:-1].numel(), 1), MIN_BLOCK)
    near = torch.arange(gt_boxes.shape[-2], device=anchors.device)
    for start in range(0, len(anchors), length):
        block = slice(start, start + length)
        if on_cpu:
            low, high = anchors[block, :2].amin(dim=0), anchors[block, 2:].amax(dim=0)
            overlaps = ((gt_boxes[..., :2] < high) & (gt_boxes[..., 2:] > low)).all(dim=-1)
            near = torch.atleast_2d(overlaps).any(dim=0).nonzero().squeeze(1)
        if len(near):
            yield block, near


class ATSSAssigner:
    """Adaptive training sample selection: every box sets its own threshold.

    A box's candidates on each level are the anchors at the `topk` positions nearest its centre. A candidate is
    positive if its centre is in the box and its IoU is at least mean + standard deviation of all candidates' IoUs. If
    several boxes claim an anchor, it learns the one it overlaps most. All others are background; none is ignored.

    Source: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection", CVPR 2020,
    arXiv 1912.02424, algorithm 1, with every anchor shape of a position a candidate, as in its section 4.4.
    """

    def __init__(self, topk: int = 9):
        if topk < 1:
            raise ValueError(f"topk {topk}: must be at least 1")
        self.topk = topk

    @torch.no_grad()
    def __call__(self, anchors: Tensor, gt_boxes: Tensor, levels: tuple[int, ...], per_position: int) -> Assignment:
        """Like IoUAssigner's, with the number of anchors in each level and at each position."""
        candidates = self._candidates(anchors, gt_boxes, levels, per_position)
        centres = (anchors[:, :2] + anchors[:, 2:])[candidates] / 2
        boxes = gt_boxes[..., None, :]
        iou = box_ops.iou_of_pairs(anchors[candidates], boxes)  # (..., G, K)
        mean = iou.mean(dim=-1, keepdim=True)
        variance = (iou - mean).square().sum(dim=-1, keepdim=True) / max(iou.shape[-1] - 1, 1)
        threshold = mean + variance.sqrt()
        inside = ((centres > boxes[..., :2]) & (centres < boxes[..., 2:])).all(dim=-1)
        iou = torch.where((iou >= threshold) & inside, iou, 0).flatten(-2)  # (..., G x K)

        candidates = candidates.flatten(-2)
        best_iou = anchors.new_zeros(*gt_boxes.shape[:-2], len(anchors)).scatter_reduce(-1, candidates, iou, "amax")
        positive = best_iou > 0
        # If several boxes overlap an anchor equally, it learns the first.
        count = gt_boxes.shape[-2]
        index = torch.arange(count, device=anchors.device).repeat_interleave(iou.shape[-1] // max(count, 1))
        index = torch.where((iou == best_iou.gather(-1, candidates)) & (iou > 0), index, count)
        gt_index = torch.full_like(best_iou, count, dtype=torch.int64).scatter_reduce(-1, candidates, index, "amin")
        return Assignment(torch.where(positive, gt_index, 0), positive, torch.zeros_like(positive))

    def _candidates(self, anchors: Tensor, gt_boxes: Tensor, levels: tuple[int, ...], per_position: int) -> Tensor:
        """Indices of the anchors at each box's nearest positions, (..., G, K)."""
        first = anchors[::per_position]  # all anchors of a position have one centre
        twice_centre = (gt_boxes[..., :2] + gt_boxes[..., 2:])[..., None, :]
        away = (first[:, :2] + first[:, 2:] - twice_centre).square().sum(dim=-1)  # (..., G, positions)
        nearest, start = [], 0
        for distance in away.split([count // per_position for count in levels], dim=-1):
            positions = distance.shape[-1]
            nearest.append(start + distance.topk(min(self.topk, positions), largest=False, sorted=False).indices)
            start += positions
        shapes = torch.arange(per_position, device=anchors.device)
        return (torch.cat(nearest, dim=-1)[..., None] * per_position + shapes).flatten(-2)
