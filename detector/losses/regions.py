"""Count cells by their gradient norm, or by any other index, without a copy of the logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from detector.losses import dispatch
from detector.losses.cells import compute_dtype, logits_against_truth, region_of

PACKED_BINS = 128  # up to this number, counting by comparisons is faster on a CPU
BLOCK = 127  # rows counted in one byte without its sign bit
GROUPS = 256  # of rows with separate counters on a GPU

Index = Callable[..., Tensor]


def count_regions(logits: Tensor, labels: Tensor, valid: Tensor, bins: int) -> Tensor:
    """How many valid cells have their gradient norm in each of `bins` equal regions of 0..1, (bins,) int64."""
    return histogram(_region, logits, labels, valid, bins, bins)


def _region(z: Tensor, is_positive: Tensor | None, bins: int) -> Tensor:
    return region_of(torch.sigmoid(z), bins)


@torch.no_grad()
def histogram(
    index: Index, logits: Tensor, labels: Tensor, valid: Tensor, bins: int, *params: Tensor | float
) -> Tensor:
    """How many valid cells have each index in 0..bins-1 -> (bins,) int64.

    index: (z, is_positive, *params) -> int32, at least 0; `bins` or more for cells that do not count. is_positive marks
        the positive cells; it is None if there are none.
    logits (N, C) of any float type, labels (N,) int64 with C = background, valid (N,) bool
    params: (K,) tensors first, then numbers

    Counts are integers, since float32 stops counting at 2^24 and one image has 16 million cells.
    """
    logits = logits.detach()
    if (by_triton := dispatch.by_triton(logits, "histogram", index, labels, valid, bins, params)) is not None:
        return by_triton
    counts = torch.zeros(bins, dtype=torch.int64, device=logits.device)
    if logits.device.type == "cpu":  # which rows have a positive is known here, so that the others need no labels
        is_positive = labels < logits.shape[1]
        few = (valid & is_positive).nonzero()[:, 0]
        counts += _count_cells(index, logits[few], labels[few], valid[few], bins, params)
        valid = valid & ~is_positive
        if index is _region and bins <= PACKED_BINS and dispatch.compiles(logits):
            return counts + _count_packed(logits, valid, bins)
    for rows in dispatch.pieces(logits):
        given = None if logits.device.type == "cpu" else labels[rows]
        counts += _count_cells(index, logits[rows], given, valid[rows], bins, params)
    return counts


def _count_cells(
    index: Index, logits: Tensor, labels: Tensor | None, valid: Tensor, bins: int, params: tuple
) -> Tensor:
    if labels is None:
        return count(index(logits.to(compute_dtype(logits)), None, *params), valid, bins)
    is_positive = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    return count(index(logits_against_truth(logits, labels, valid), is_positive, *params), valid, bins)


def count(index: Tensor, valid: Tensor | None, bins: int) -> Tensor:
    """How often each of 0..bins-1 occurs in `index` (N, K) int32, in rows that are valid (N,) or all -> (bins,) int64.

    Larger ones do not count.
    """
    if index.device.type == "cpu":
        return torch.bincount((index if valid is None else index[valid]).flatten(), minlength=bins)[:bins]
    index = index if valid is None else index.masked_fill(~valid[:, None], bins)
    unit = torch.ones((), dtype=torch.int32, device=index.device)
    return sums_by_index(index, unit.expand(index.shape), bins)


def sums_by_index(index: Tensor, values: Tensor, bins: int) -> Tensor:
    """The sums of the `values` (N, K) whose index is 0..bins-1 -> (bins,). index: (N, K) integers, at least 0.

    bincount would wait for the device. Groups of rows have separate sums, because most cells share one region, and
    additions to a single sum would queue on a GPU.
    """
    index = index.clamp(max=bins).long()  # an extra bin takes what does not count
    group = torch.arange(len(index), device=index.device) % GROUPS
    sums = torch.zeros(GROUPS * (bins + 1), dtype=values.dtype, device=index.device)
    sums.scatter_add_(0, (index + group[:, None] * (bins + 1)).flatten(), values.flatten())
    return sums.view(GROUPS, bins + 1).sum(0)[:bins]


def _count_packed(logits: Tensor, counted: Tensor, bins: int) -> Tensor:
    """Count the regions of the `counted` rows, all of them background, in one compiled sweep."""
    whole = len(logits) // BLOCK * BLOCK
    counts = torch.zeros(bins, dtype=torch.int64, device=logits.device)
    for rows, height in (slice(whole), BLOCK), (slice(whole, None), len(logits) - whole):
        if height and len(logits[rows]):
            blocks = (part[rows].unflatten(0, (-1, height)) for part in (logits, counted))
            counts += dispatch.compiled_or_plain(logits, _count_blocks, *blocks, bins)
    return counts


def _count_blocks(logits: Tensor, counted: Tensor, bins: int) -> Tensor:
    """The same of logits (B, R, C) and counted (B, R); R is at most BLOCK."""
    region = _region(logits.to(compute_dtype(logits)), None, bins)
    # Four counts share an int32, a byte each, which a class's column of a block cannot overflow. No scatter, and few
    # additions for each cell.
    unit = counted[..., None].to(torch.int32) << (region & 3) * 8
    packed = [torch.where(region >> 2 == k, unit, 0).sum(1, dtype=torch.int32) for k in range(-(-bins // 4))]
    counts = [((word >> shift) & 255).sum() for word in packed for shift in (0, 8, 16, 24)]
    return torch.stack(counts[:bins])
