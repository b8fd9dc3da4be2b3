"""Online hard example mining: cross entropy over the hardest cells only."""

import torch
from torch import Tensor, nn

from detector.losses.cells import cross_entropy, logits_against_truth, sum_cells


class OHEM(nn.Module):
    """Cross entropy over the cells with the highest loss; the others get no gradient.

        loss = (1 / num_pos) sum over kept cells of [-p* log p - (1-p*) log(1-p)]

    Kept are all positive cells and the `ratio` x (positive cells, at least 1) hardest negative ones, or with
    `top_k` the top_k hardest valid cells of either kind: exactly as many, ties or not, as far as so many exist.
    Chosen over all images and levels of the batch, but each process chooses among its own cells.

    Shrivastava, Gupta, Girshick, "Training Region-based Object Detectors with Online Hard Example Mining",
    CVPR 2016, arXiv 1604.03540; for one-stage detectors and the 3:1 ratio Lin et al., arXiv 1708.02002, 5.1.
    Normalised by num_pos, the positive anchors of all processes. On a GPU it sorts all cells.

        class_loss = OHEM(ratio=3.0)
        labels = torch.where(positive, gt_labels[gt_index], num_classes)  # (N,), num_classes = background
        loss = class_loss(logits, labels, ~ignored, positive.sum().clamp(min=1))

    Raises ValueError where ratio is not positive and finite, or top_k is below 1.
    """

    def __init__(self, ratio: float = 3.0, *, top_k: int | None = None) -> None:
        super().__init__()
        if not 0 < ratio < float("inf"):
            raise ValueError(f"OHEM: ratio is {ratio}; it must be positive: negatives kept for each positive cell")
        if top_k is not None and top_k < 1:
            raise ValueError(f"OHEM: top_k is {top_k}; it must be at least 1, or None to use ratio")
        self.ratio = ratio
        self.top_k = top_k

    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor, num_pos: Tensor | float) -> Tensor:
        """logits (N, C), labels (N,) int64 with C = background, valid (N,) bool -> scalar."""
        z = logits_against_truth(logits, labels, valid)
        kept = self._select(z, labels, valid)
        return sum_cells(cross_entropy(z).masked_fill(~kept, 0), valid) / num_pos

    @torch.no_grad()
    def _select(self, z: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Which cells are kept, (N, C) bool."""
        classes = z.shape[1]
        # Cross entropy grows with z, so z ranks the cells. The number to keep lives on the device: comparing
        # positions in the sorted order with it needs no host copy, and is exact where scores tie. Ignored cells
        # come last: where more is asked for than there is, they are kept too, and the sum leaves them out.
        scores = z.masked_fill(~valid[:, None], -torch.inf)
        count = self.top_k
        if count is None:
            positive = valid & (labels < classes)
            index = labels.clamp(0, classes - 1)[:, None]
            first = scores.gather(1, index).masked_fill(positive[:, None], torch.inf)
            scores = scores.scatter(1, index, first)  # positive cells lead the order
            positives = positive.sum()
            count = positives + (self.ratio * positives.clamp(min=1)).round().long()
        if z.device.type == "cpu":  # the number is at hand, and finding so few is much faster than sorting all
            best = scores.flatten().topk(min(int(count), scores.numel()), sorted=False).indices
            return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill_(0, best, True).view_as(z)
        order = scores.flatten().argsort(descending=True)
        ranked = torch.arange(order.numel(), device=order.device) < count
        return torch.zeros_like(ranked).scatter_(0, order, ranked).view_as(z)
