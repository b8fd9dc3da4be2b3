"""Rank & sort: positives above negatives, and among positives the better box above the worse one."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from detector import distributed
from detector.losses import dispatch
from detector.losses.cells import compute_dtype
from detector.losses.checks import check_cells

DELTA = 0.5  # half the width of the smoothed step, in logits: the released code's
PAIRS = 2**20  # of positives that are compared at once


class RankSort(nn.Module):
    """Rank & sort loss. It has no options.

        loss = (1 / num_pos) sum over positive cells i of  ranking error + sorting error

        ranking error  share of negatives among the cells at or above i
        sorting error  mean of 1 - quality over the positives at or above i, less the same mean without those whose
                       quality is below i's

    Cell j is above i by H(x_j - x_i), which rises from 0 at 0.5 below to 1 at 0.5 above. So negatives at least 0.5
    below every positive cost nothing, however many there are. The value is flat nearly everywhere, so its gradient is
    replaced: i's ranking error pushes down the negatives above i, in proportion to H, and pulls up i by as much.
    i's sorting error moves i and the worse positives above it in the same way.

    Oksuz, Cam, Akbas, Kalkan, "Rank & Sort Loss for Object Detection and Instance Segmentation", ICCV 2021,
    arXiv 2107.11669, section 3. The paper also sets the box loss's weight, to class loss / box loss in each step;
    here this weight is a normal option, tuned for each loss alike. Ranks are those among the cells of all processes,
    and the loss is normalised by num_pos, the positive anchors of all processes. No gradient flows into the quality.

        class_loss = RankSort()
        labels = torch.where(positive, gt_labels[gt_index], num_classes)  # (N,), num_classes = background
        quality = iou(boxes, gt_boxes[gt_index])  # (N,), of the decoded boxes, read where positive
        loss = class_loss(logits, labels, ~ignored, positive.sum().clamp(min=1), quality)

    Only differences of logits count, so a score alone means nothing: start the class bias at 0 (`prior`), otherwise a
    score threshold drops most objects. Without positives the loss is 0. On a GPU it waits for the device several times
    a step. Raises ValueError for arguments of other shapes, as all class losses do.
    """

    takes_quality = True
    prior = 0.5  # of model.head, unless the config sets one

    def __init__(self) -> None:  # its signature shows that there are no options
        super().__init__()

    def forward(
        self, logits: Tensor, labels: Tensor, valid: Tensor, num_pos: Tensor | float, quality: Tensor | None = None
    ) -> Tensor:
        """logits (N, C), labels (N,) int64 with C = background, valid (N,) bool, quality (N,) in [0, 1] -> scalar.

        Without `quality`, every positive has quality 1.
        """
        check_cells(logits, labels, valid, quality)
        return _ErrorDriven.apply(logits, labels, valid, quality, num_pos)


class _ErrorDriven(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, valid, quality, num_pos):
        value, gradient = _value_and_gradient(logits, labels, valid, quality, num_pos)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return (ctx.saved_tensors[0] * upstream).to(ctx.dtype), *[None] * 4


def _value_and_gradient(
    logits: Tensor, labels: Tensor, valid: Tensor, quality: Tensor | None, num_pos: Tensor | float
) -> tuple[Tensor, Tensor]:
    gradient = torch.zeros_like(logits, dtype=compute_dtype(logits))
    rows = (valid & (labels < logits.shape[1])).nonzero()[:, 0]
    cells = rows, labels[rows]
    x = distributed.all_cat(logits[cells].double())
    is_own = distributed.all_cat(torch.full_like(rows, distributed.rank())) == distributed.rank()
    if quality is not None:
        quality = distributed.all_cat(quality[rows].double())
    if not len(x):
        return gradient.new_zeros(()), gradient
    steps = _Steps.at(x)
    rank_among_positives, sorting, pull = _sort(x, quality)
    negatives = steps.above(logits, labels, valid)
    rank = rank_among_positives + negatives
    ranking = negatives / rank
    gradient[cells] = ((pull - ranking)[is_own] / num_pos).to(gradient.dtype)
    steps.add_up(1 / rank / num_pos, logits, labels, valid, out=gradient)
    return ((ranking + sorting)[is_own].sum() / num_pos).to(gradient.dtype), gradient


def _sort(x: Tensor, quality: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """For the positives: rank among themselves, sorting error, and the sum of these errors' gradients, (P,) each."""
    rank, errors, gradient = (torch.zeros_like(x) for _ in range(3))
    ones = torch.ones_like(x)
    count_and_lack = torch.stack([ones, 1 - (ones if quality is None else quality)], dim=1)
    height = x / (2 * DELTA)
    size = max(1, PAIRS // len(x))
    for part in (slice(start, start + size) for start in range(0, len(x), size)):
        above = (height - (height[part, None] - 0.5)).clamp_(0, 1)
        rank[part] = above.sum(1)
        if quality is None:
            continue  # all have quality 1: nothing to sort
        right = above * (quality >= quality[part, None])
        wrong = above.sub_(right)
        rightly, lack = (right @ count_and_lack).unbind(1)
        wrongly, wrong_lack = (wrong @ count_and_lack).unbind(1)
        errors[part] = error = (wrong_lack - lack / rightly * wrongly) / rank[part]
        gradient[part] -= error
        gradient += torch.where(wrongly > 0, error / wrongly, 0) @ wrong
    return rank, errors, gradient


class _Steps(NamedTuple):
    """H around each positive as lines between 2 P edges, so that no negative is compared with every positive.

    A negative needs only its interval and its distance from that interval's lower edge.
    """

    edges: Tensor  # (2 P,) float64, ascending: where an H leaves 0 or reaches 1
    order: Tensor  # (2 P,) the owner of each edge: positive i has i and P + i
    low: Tensor  # (P,) index of each positive's first edge
    high: Tensor  # (P,) and of its second

    @classmethod
    def at(cls, x: Tensor) -> "_Steps":
        edges, order = torch.cat([x - DELTA, x + DELTA]).sort(stable=True)
        return cls(edges, order, *order.argsort().chunk(2))

    def above(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """For each positive, the sum of H over the negatives of all processes, (P,)."""
        counts, offsets = torch.zeros_like(self.edges, dtype=torch.int64), torch.zeros_like(self.edges)
        for _, _, interval, offset in self._negatives(logits, labels, valid):
            counts += interval.bincount(minlength=len(counts))
            whole = offset.mul_(2**28).round_()  # whole numbers, whose sum is the same in any order
            offsets += interval.bincount(whole, minlength=len(counts))
        counts, offsets = distributed.all_sum(counts), distributed.all_sum(offsets)
        # The sum of H is the mean number of higher negatives over its step. Summing from the top loses no digits.
        higher = _from_the_top(counts) - counts
        area = _from_the_top(higher * self._widths() + offsets / 2**28)
        return (area[self.low] - area[self.high]) / (2 * DELTA)

    def add_up(self, weights: Tensor, logits: Tensor, labels: Tensor, valid: Tensor, out: Tensor) -> None:
        """Write into `out`, for each negative above a positive, the sum of the positives' weights (P,) x H."""
        slopes = torch.cat([weights, -weights])[self.order].cumsum(0).clamp_(min=0) / (2 * DELTA)
        rises = slopes * self._widths()
        heights = torch.cat([rises.new_zeros(1), rises[:-1].cumsum(0)])
        for rows, chosen, interval, offset in self._negatives(logits, labels, valid):
            out[rows][chosen] = (heights[interval] + slopes[interval] * offset).to(out.dtype)

    def _widths(self) -> Tensor:
        """Widths of the intervals between edges. An interval wider than a step is a gap in which no H changes."""
        return self.edges.diff(append=self.edges[-1:]).clamp_(max=2 * DELTA)

    def _negatives(
        self, logits: Tensor, labels: Tensor, valid: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Piece by piece: rows, which of their cells are negative and not below all positives, interval, offset."""
        classes = torch.arange(logits.shape[1], device=logits.device)
        for rows in dispatch.pieces(logits):
            x = logits[rows].to(compute_dtype(logits))
            chosen = ~(x < self.edges[0]) & valid[rows, None] & (classes != labels[rows, None])  # NaN stays
            x = x[chosen].double()
            interval = torch.bucketize(x, self.edges, right=True).sub_(1).clamp_(min=0)
            yield rows, chosen, interval, (x - self.edges[interval]).clamp_(max=2 * DELTA)  # as widths are


def _from_the_top(values: Tensor) -> Tensor:
    """Sum of each value and all after it."""
    return values.flip(0).cumsum(0).flip(0)
