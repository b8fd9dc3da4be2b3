"""Online hard example mining: cross entropy over the hardest cells only."""

import torch
from torch import Tensor, nn

from detector.losses import dispatch
from detector.losses.cells import compute_dtype, logits_against_truth, lookup, ordered_bits, sigmoid_softplus
from detector.losses.checks import check_cells
from detector.losses.fused import cell_sum
from detector.losses.regions import histogram


class OHEM(nn.Module):
    """Cross entropy over the cells with the highest loss; the others get no gradient.

        loss = (1 / num_pos) sum over kept cells of [-p* log p - (1-p*) log(1-p)]

    It keeps all positive cells and the `ratio` x (positive cells, at least 1) hardest negative ones; with `top_k`, the
    top_k hardest valid cells of either kind; all of them if fewer exist. Cells that tie for the last places share them:
    each counts with the same part of its loss. The choice is over all images and levels of the batch, but each process
    chooses among its own cells.

    Shrivastava, Gupta, Girshick, "Training Region-based Object Detectors with Online Hard Example Mining",
    CVPR 2016, arXiv 1604.03540; for one-stage detectors and the 3:1 ratio Lin et al., arXiv 1708.02002, 5.1.
    Normalised by num_pos, the positive anchors of all processes.

        class_loss = OHEM(ratio=3.0)
        labels = torch.where(positive, gt_labels[gt_index], num_classes)  # (N,), num_classes = background
        loss = class_loss(logits, labels, ~ignored, positive.sum().clamp(min=1))

    Raises ValueError where ratio is not positive and finite, or top_k is below 1.
    """

    def __init__(self, ratio: float = 3.0, *, top_k: int | None = None) -> None:
        super().__init__()
        if not 0 < ratio < float("inf"):
            raise ValueError(
                f"OHEM: ratio is {ratio}; it must be positive and finite: negatives kept for each positive cell"
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"OHEM: top_k is {top_k}; it must be at least 1, or None to use ratio")
        self.ratio = ratio
        self.top_k = top_k

    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor, num_pos: Tensor | float) -> Tensor:
        """logits (N, C), labels (N,) int64 with C = background, valid (N,) bool -> scalar."""
        check_cells(logits, labels, valid)
        keep_positives = self.top_k is None
        limits = kth_largest(logits, labels, valid, self._places(logits, labels, valid), negatives=keep_positives)
        return cell_sum(_curve, logits, labels, valid, limits, keep_positives, num_pos=num_pos)

    def _places(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor | int:
        """The number of cells to keep; with a ratio, of negative cells."""
        if self.top_k is not None:
            return self.top_k
        positives = (valid & (labels < logits.shape[1])).sum()
        return (self.ratio * positives.clamp(min=1)).round().long()


def _curve(z: Tensor, is_positive: Tensor | None, limits: Tensor, keep_positives: bool) -> tuple[Tensor, Tensor]:
    norm, softplus = sigmoid_softplus(z)
    weight = torch.where(z == lookup(limits, 0), lookup(limits, 1), torch.where(z > lookup(limits, 0), 1.0, 0.0))
    if is_positive is not None and keep_positives:
        weight = torch.where(is_positive, 1.0, weight)
    return weight * softplus, weight * norm


@torch.no_grad()
def kth_largest(logits: Tensor, labels: Tensor, valid: Tensor, k: Tensor | int, negatives: bool) -> Tensor:
    """The k-th largest z of all valid cells, or of the negative ones only (inf for k = 0); and of the cells that tie
    with it, the share among the k largest -> (2,). A k above the number of cells counts as that number.
    """
    logits = logits.detach()
    if logits.device.type != "cpu" and logits.dtype != torch.float64:
        return _by_digits(logits, labels, valid, k, negatives)
    hardest = logits.new_empty(0, dtype=compute_dtype(logits))
    bound: Tensor | float = -torch.inf
    k = int(k)
    for rows in dispatch.pieces(logits):
        z = logits_against_truth(logits[rows], labels[rows], valid[rows])
        ranks = valid[rows, None] & (z >= bound)
        if negatives:
            ranks &= torch.arange(z.shape[1], device=z.device) != labels[rows, None]
        hardest = torch.cat([hardest, z[ranks]])
        if 0 < k < len(hardest):
            bound = hardest.topk(k, sorted=False).values.min()
            hardest = hardest[hardest >= bound]  # and what ties
    k = min(k, len(hardest))
    if k == 0:
        return hardest.new_tensor([torch.inf, 0])
    last = hardest.kthvalue(len(hardest) - k + 1).values
    tied = (k - (hardest > last).sum()) / (hardest == last).sum()
    return torch.stack([last, tied.to(last.dtype)])


# A GPU does not sort. It finds the number's bits, a few at a time, by counting the cells for each value of these bits.
# Triton is slow with many bins: for 258 million bfloat16 logits, an H100 took 3 ms for three digits of at most 6 bits,
# and 45 ms for two of 11 bits.
DIGITS = ((26, 6), (21, 5), (16, 5), (10, 6), (5, 5), (0, 5))  # lowest bit, and width
NEEDED = {torch.bfloat16: 3, torch.float16: 4}  # digits; the other bits are 0


def _by_digits(logits: Tensor, labels: Tensor, valid: Tensor, k: Tensor | int, negatives: bool) -> Tensor:
    digits = DIGITS[: NEEDED.get(logits.dtype)]
    place = k if isinstance(k, Tensor) else torch.full((), k, device=logits.device)  # a copy from the host would wait
    prefix = torch.zeros(1, dtype=torch.int32, device=logits.device)
    for low, width in digits:
        first = low + width == 32
        counts = histogram(_digit, logits, labels, valid, 2**width, prefix, negatives, low, width, first)
        at_least = counts.flip(0).cumsum(0).flip(0)
        place = place.clamp(max=at_least[0])
        digit = ((at_least >= place).sum() - 1).clamp(min=0)
        ties = counts.take(digit)
        place = place - at_least.take(digit) + ties
        prefix = ((digit - 2 ** (width - 1)) if first else (prefix << width) + digit).to(torch.int32).view(1)
    low = digits[-1][0]
    bits = (prefix << low) + torch.where(prefix < 0, 2**low - 1, 0)  # a negative number's other bits are ones
    last = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    some = place > 0
    return torch.stack([torch.where(some, last[0], torch.inf), torch.where(some, place / ties.clamp(min=1), 0)])


def _digit(
    z: Tensor, is_positive: Tensor | None, prefix: Tensor, negatives: bool, low: int, width: int, first: bool
) -> Tensor:
    """`width` bits of each z from bit `low` on, if the bits above them are `prefix`; otherwise 2 ** width."""
    bits = ordered_bits(z)
    if first:
        digit = (bits >> low) + 2 ** (width - 1)  # flips the sign bit
    else:
        digit = (bits >> low) & (2**width - 1)
        digit = torch.where((bits >> (low + width)) == lookup(prefix, 0), digit, 2**width)
    if is_positive is not None and negatives:
        digit = torch.where(is_positive, 2**width, digit)
    return digit
