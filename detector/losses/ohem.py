"""Online hard example mining: cross entropy over the hardest cells only."""

import torch
from torch import Tensor, nn

from detector.losses.cells import cross_entropy, logits_against_truth, sum_cells
from detector.losses.fused import cell_sum, kth_largest, sigmoid_softplus


class OHEM(nn.Module):
    """Cross entropy over the cells with the highest loss; the others get no gradient.

        loss = (1 / num_pos) sum over kept cells of [-p* log p - (1-p*) log(1-p)]

    Kept are all positive cells and the `ratio` x (positive cells, at least 1) hardest negative ones, or with
    `top_k` the top_k hardest valid cells of either kind; all of them where fewer exist. Cells that tie for the last
    places share them, each with the same part of its loss. Chosen over all images and levels of the batch, but each
    process chooses among its own cells.

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
        threshold, tied = kth_largest(logits, labels, valid, self._places(logits, labels, valid), self.top_k is None)
        return cell_sum(_curve, logits, labels, valid, threshold, tied, self.top_k is None, num_pos=num_pos)

    def definition(self, logits: Tensor, labels: Tensor, valid: Tensor, num_pos: Tensor | float) -> Tensor:
        """The same in its plain form, by which the fast one is tested."""
        z = logits_against_truth(logits, labels, valid)
        always = (torch.arange(z.shape[1], device=z.device) == labels[:, None]) & (self.top_k is None)
        ranked = z[valid[:, None] & ~always].sort(descending=True).values
        places = min(int(self._places(logits, labels, valid)), len(ranked))
        last = ranked[places - 1] if places else z.new_tensor(torch.inf)
        above, level = (ranked > last).sum(), (ranked == last).sum().clamp(min=1)
        weight = torch.where(always, 1, (z > last) + (z == last) * (places - above) / level)
        return sum_cells(weight * cross_entropy(z), valid) / num_pos

    def _places(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor | int:
        """How many cells are kept; with a ratio, how many negative ones."""
        if self.top_k is not None:
            return self.top_k
        positives = (valid & (labels < logits.shape[1])).sum()
        return (self.ratio * positives.clamp(min=1)).round().long()


def _curve(z: Tensor, positive: Tensor | None, threshold: Tensor, tied: Tensor, always: bool) -> tuple[Tensor, Tensor]:
    p, softplus = sigmoid_softplus(z)
    weight = torch.where(z > threshold, 1.0, torch.where(z == threshold, tied, 0.0)).to(z.dtype)
    if positive is not None and always:
        weight = torch.where(positive, 1.0, weight)
    return weight * softplus, weight * p
