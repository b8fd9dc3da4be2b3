"""Anchors + ground truth -> what each anchor is taught."""

import torch
from torch import Tensor

from detector import boxes as box_ops
from detector.structures import Assignment


class IoUAssigner:
    """RetinaNet's rule: an anchor belongs to the box it overlaps most.

    Positive where that IoU >= `fg_iou`, background where it is < `bg_iou`, ignored between. Besides, for
    every box, all anchors that reach the box's best IoU are positive for the box that *they* overlap most,
    whatever the IoU, if it is above 0 and at least `min_iou`; without this, boxes far from all anchor shapes
    are never learnt (+0.7 AP on COCO). `min_iou` = `fg_iou` switches this off.

    Source: Lin et al., Focal Loss, 2017, section 4; the low-quality matches are Faster R-CNN's (Ren et al.,
    2015, section 3.1.2). Same result as torchvision's Matcher, but where a box overlaps no anchor at all:
    there torchvision makes every anchor positive.
    """

    def __init__(self, fg_iou: float = 0.5, bg_iou: float = 0.4, min_iou: float = 0.0):
        if not 0 < bg_iou <= fg_iou <= 1:
            raise ValueError(f"bg_iou {bg_iou} and fg_iou {fg_iou}: need 0 < bg_iou <= fg_iou <= 1")
        if not 0 <= min_iou <= fg_iou:
            raise ValueError(f"min_iou {min_iou}: must be between 0 and fg_iou ({fg_iou})")
        self.fg_iou, self.bg_iou, self.min_iou = fg_iou, bg_iou, min_iou

    @torch.no_grad()
    def __call__(self, anchors: Tensor, gt_boxes: Tensor, *_: object) -> Assignment:
        """Anchors (A, 4), boxes of one image (G, 4); G may be 0 -> Assignment. Levels and cells do not matter to it."""
        # A running maximum over boxes: the (A, G) matrix of a crowd never exists.
        best_iou = anchors.new_zeros(len(anchors))
        gt_index = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        best_of_some_box = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
        for index, box in enumerate(gt_boxes):
            iou = box_ops.iou_with_one(anchors, box)
            closer = iou > best_iou
            best_iou = torch.where(closer, iou, best_iou)
            gt_index.masked_fill_(closer, index)
            highest = iou.max()
            best_of_some_box |= (iou == highest) & (highest > 0) & (highest >= self.min_iou)
        positive = (best_iou >= self.fg_iou) | best_of_some_box
        ignored = (best_iou >= self.bg_iou) & ~positive
        return Assignment(gt_index, positive, ignored)


class ATSSAssigner:
    """Adaptive training sample selection: every box sets its own threshold.

    Candidates of a box are, on each level, the anchors of the `cells` cells nearest its centre. Positive are those
    whose IoU with it is at least mean + standard deviation of all candidates' IoUs, and whose centre it contains; an
    anchor that several boxes claim goes to the one it overlaps most. The rest is background, nothing is ignored.

    Source: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection", CVPR 2020,
    arXiv 1912.02424, algorithm 1, with every anchor shape of a cell a candidate, as in its section 4.4.
    """

    def __init__(self, cells: int = 9):
        if cells < 1:
            raise ValueError(f"cells {cells}: must be at least 1")
        self.cells = cells

    @torch.no_grad()
    def __call__(self, anchors: Tensor, gt_boxes: Tensor, levels: tuple[int, ...], per_cell: int) -> Assignment:
        """Anchors (A, 4), boxes of one image (G, 4), anchors in each level and in each cell; G may be 0."""
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        best_iou = anchors.new_zeros(len(anchors))
        gt_index = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        for index, box in enumerate(gt_boxes):
            distance = (centres - (box[:2] + box[2:]) / 2).square().sum(dim=1)
            nearest, start = [], 0
            for level in distance.split(levels):
                count = min(self.cells * per_cell, len(level))
                nearest.append(start + level.topk(count, largest=False, sorted=False).indices)
                start += len(level)
            candidates = torch.cat(nearest)
            iou = box_ops.iou_with_one(anchors[candidates], box)
            threshold = iou.mean() + (iou.std() if len(iou) > 1 else 0)
            inside = (centres[candidates] > box[:2]).all(dim=1) & (centres[candidates] < box[2:]).all(dim=1)
            taken = (iou >= threshold) & inside & (iou > best_iou[candidates])
            best_iou[candidates] = torch.where(taken, iou, best_iou[candidates])
            gt_index[candidates] = torch.where(taken, index, gt_index[candidates])
        positive = best_iou > 0
        return Assignment(gt_index, positive, torch.zeros_like(positive))
