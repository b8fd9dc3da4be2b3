"""The class losses' fast form: value and gradient in one sweep over the logits.

A loss is given by its curve: value and slope of one cell as functions of z, the logit against the truth (cells.py).
With the slope in closed form nothing is kept between forward and backward but the gradient itself, and it is more
accurate than what autograd finds through powers and products. The plain form of each loss is its `definition`.

Large inputs run compiled, where torch.compile finds a compiler; otherwise the same functions run over pieces that stay
in the processor's cache.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detector.losses.cells import cross_entropy, logits_against_truth

Curve = Callable[..., tuple[Tensor, Tensor]]

COMPILED_FROM = 2**21  # cells; compiling takes seconds to a minute, which smaller inputs never earn back
MAX_VARIANTS = 128  # that are compiled of one function in a process: by loss, dtype, settings
PIECE = 2**17  # cells of a piece where nothing is compiled
PACKED_BINS = 128  # up to here counting by comparisons is the faster way
BLOCK = 127  # rows counted into one byte, short of its sign
GROUPS = 256  # of rows that count for themselves on a GPU


def cell_sum(
    curve: Curve,
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    *params: Any,
    num_pos: Tensor | float = 1.0,
    negative: float = 1.0,
    positive: float = 1.0,
) -> Tensor:
    """Sum over all valid cells of the curve's value, times `negative` or `positive`, / num_pos -> at least float32.

    curve: (z, positive, *params) -> (value, slope), cell by cell; positive says which cells are, None where none is;
        params, tensors or numbers, get no gradient
    logits (N, C) of any float type, labels (N,) int64 with C = background, valid (N,) bool
    """
    # Dividing each cell and not their sum rounds a gradient in half precision once. The scale is a tensor because each
    # new number would compile again; full() fills it on the device, without a copy that would wait.
    scale = torch.full((), 1.0, dtype=accumulator(logits), device=logits.device) / num_pos
    return _CellSum.apply(logits, labels, valid, curve, (negative * scale, positive * scale), params)


class _CellSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, valid, curve, weights, params):
        value, gradient = _value_and_gradient(curve, logits, labels, valid, weights, params)
        ctx.save_for_backward(logits, labels, valid)
        ctx.rest = curve, weights, params
        ctx.gradient = gradient if ctx.needs_input_grad[0] else None
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place: a second copy would double the memory
        if gradient is None:  # a second backward through the same graph
            curve, weights, params = ctx.rest
            _, gradient = _value_and_gradient(curve, *ctx.saved_tensors, weights, params)
        if upstream.device.type != "cpu" or upstream != 1:  # elsewhere the comparison would wait for the device
            # In float32 whatever the gradient's type: 1 / num_pos rounded to bfloat16 may be 0.4% off, and so would be
            # all of the gradient. A CPU takes a scalar as it is; a GPU would round it, but not with a dimension.
            gradient.mul_(upstream if upstream.device.type == "cpu" else upstream[None])
        return gradient.to(ctx.saved_tensors[0].dtype), None, None, None, None, None


def _value_and_gradient(
    curve: Curve, logits: Tensor, labels: Tensor, valid: Tensor, weights: tuple[Tensor, Tensor], params: tuple
) -> tuple[Tensor, Tensor]:
    if logits.device.type != "cpu":
        # Which rows have a positive is not known here; telling its cell apart in every row costs a GPU nothing.
        return _compiled_or_plain(logits, _sweep, curve, logits, valid, labels, weights, params)
    is_positive = labels < logits.shape[1]
    background = valid & ~is_positive
    if _compiles(logits):
        value, gradient = _compiled_or_plain(logits, _sweep, curve, logits, background, None, weights, params)
    else:
        value, gradient = logits.new_zeros((), dtype=accumulator(logits)), torch.empty_like(logits, dtype=_kept(logits))
        step = _rows_of_a_piece(logits)
        for start in range(0, len(logits), step):
            piece = slice(start, start + step)
            part, gradient[piece] = _sweep(curve, logits[piece], background[piece], None, weights, params)
            value = value + part
    few = (valid & is_positive).nonzero()[:, 0]
    part, gradient[few] = _sweep(curve, logits[few], valid[few], labels[few], weights, params)
    return value + part, gradient


def _sweep(
    curve: Curve, logits: Tensor, counted: Tensor, labels: Tensor | None, weights: tuple[Tensor, Tensor], params: tuple
) -> tuple[Tensor, Tensor]:
    """Sum over the rows that are `counted` (), and its gradient (N, C); without labels all cells are background."""
    negative, positive = weights
    z = logits.to(accumulator(logits))
    if labels is None:
        value, slope = curve(z, None, *params)
        value, slope = value * negative, slope * negative
    else:
        at_label = torch.arange(z.shape[1], device=z.device) == labels[:, None]
        value, slope = curve(torch.where(at_label, -z, z), at_label, *params)
        value = value * torch.where(at_label, positive, negative)
        slope = slope * torch.where(at_label, -positive, negative)
    value = torch.where(counted, value.sum(-1), 0).sum()  # by rows first: a flat float32 sum loses digits
    return value, torch.where(counted[:, None], slope, 0).to(_kept(logits))


def sigmoid_softplus(z: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(z) and softplus(z), each to full relative accuracy."""
    if not torch.compiler.is_compiling():
        return z.sigmoid(), cross_entropy(z)
    # From one exponential and one division. log(1 + e) = 2 artanh(e / (2 + e)): for e in 0..1 seven terms are exact to
    # 1.3e-8, in half the time.
    e = torch.exp(-z.abs())
    both = 1 / ((1 + e) * (2 + e))
    larger = (2 + e) * both
    s = e * ((1 + e) * both)
    q = s * s
    log1p = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))
    if z.dtype == torch.float64:
        log1p = torch.log1p(e)
    return torch.where(z >= 0, larger, e * larger), z.clamp(min=0) + log1p


@torch.no_grad()
def count_regions(logits: Tensor, labels: Tensor, valid: Tensor, bins: int) -> Tensor:
    """How many valid cells have their gradient norm in each of `bins` equal regions of 0..1, (bins,) int64."""
    logits = logits.detach()
    on_cpu = logits.device.type == "cpu"
    if not on_cpu and bins <= PACKED_BINS:
        return _count_packed(logits, valid, labels, bins)
    counts = torch.zeros(bins, dtype=torch.int64, device=logits.device)
    if on_cpu:  # which rows have a positive is known here, so that the others need no labels
        is_positive = labels < logits.shape[1]
        few = (valid & is_positive).nonzero()[:, 0]
        norms = logits_against_truth(logits[few], labels[few], valid[few]).sigmoid()
        counts += count(region_of(norms, bins), valid[few], bins)
        valid = valid & ~is_positive
        if _compiles(logits) and bins <= PACKED_BINS:
            return counts + _count_packed(logits, valid, None, bins)
    step = _rows_of_a_piece(logits)
    for start in range(0, len(logits), step):
        piece = slice(start, start + step)
        z = logits[piece].to(accumulator(logits))
        if not on_cpu:
            z = logits_against_truth(z, labels[piece], valid[piece])
        counts += count(region_of(z.sigmoid(), bins), valid[piece], bins)
    return counts


def count(region: Tensor, valid: Tensor | None, bins: int) -> Tensor:
    """How often each of 0..bins-1 occurs in `region` (N, K) int32, in rows that are valid (N,) or all -> (bins,) int64.

    Integers, since float32 stops counting at 2^24 and one image has 16 million cells.
    """
    if region.device.type == "cpu":
        return torch.bincount((region if valid is None else region[valid]).flatten(), minlength=bins)
    # bincount would wait for the device. One region too many takes what does not count; rows are counted in groups of
    # their own, since most cells share one region, and additions to a single counter would queue.
    region = (region if valid is None else region.masked_fill(~valid[:, None], bins)).long()
    group = torch.arange(len(region), device=region.device) % GROUPS
    one = torch.ones((), dtype=torch.int32, device=region.device)
    counts = torch.zeros(GROUPS * (bins + 1), dtype=torch.int32, device=region.device)
    counts.scatter_add_(0, (region + group[:, None] * (bins + 1)).flatten(), one.expand(region.numel()))
    return counts.view(GROUPS, bins + 1).sum(0)[:bins]


def region_of(norms: Tensor, bins: int) -> Tensor:
    """Which of `bins` equal regions of 0..1 each norm is in, int32; the last one for 1 itself."""
    return (norms * bins).to(torch.int32).clamp(0, bins - 1)


def _count_packed(logits: Tensor, counted: Tensor, labels: Tensor | None, bins: int) -> Tensor:
    """`count_regions` of the rows that are `counted`, in one sweep; without labels all cells are background."""
    whole = len(logits) // BLOCK * BLOCK
    counts = torch.zeros(bins, dtype=torch.int64, device=logits.device)
    for rows, height in (slice(whole), BLOCK), (slice(whole, None), len(logits) - whole):
        if height and len(logits[rows]):
            parts = logits[rows], counted[rows], None if labels is None else labels[rows]
            blocks = (None if part is None else part.unflatten(0, (-1, height)) for part in parts)
            counts += _compiled_or_plain(logits, _count_blocks, *blocks, bins)
    return counts


def _count_blocks(logits: Tensor, counted: Tensor, labels: Tensor | None, bins: int) -> Tensor:
    """The same of logits (B, R, C), counted (B, R) and labels (B, R) or None; R is at most BLOCK."""
    z = logits.to(accumulator(logits))
    if labels is not None:
        z = torch.where(torch.arange(z.shape[-1], device=z.device) == labels[..., None], -z, z)
    region = region_of(z.sigmoid(), bins)
    # Four counts share an int32, a byte each, which a class's column of a block cannot overflow. No scatter, and few
    # additions for each cell.
    one = counted[..., None].to(torch.int32) << (region & 3) * 8
    packed = [torch.where(region >> 2 == k, one, 0).sum(1, dtype=torch.int32) for k in range(-(-bins // 4))]
    counts = [((word >> shift) & 255).sum() for word in packed for shift in (0, 8, 16, 24)]
    return torch.stack(counts[:bins])


@torch.no_grad()
def kth_largest(
    logits: Tensor, labels: Tensor, valid: Tensor, k: Tensor | int, negatives: bool
) -> tuple[Tensor, Tensor]:
    """The k-th largest z of all valid cells, or of the negative ones alone, (); inf for k = 0.

    And which share of the cells that tie with it are among the k largest, (). A k beyond their number stands for it.
    On a GPU all cells are sorted, so that k may stay on the device.
    """
    logits = logits.detach()
    on_cpu = logits.device.type == "cpu"
    step = _rows_of_a_piece(logits) if on_cpu else max(len(logits), 1)
    best = logits.new_empty(0, dtype=accumulator(logits))
    bound = best.new_tensor(-torch.inf)
    for start in range(0, len(logits), step):
        piece = slice(start, start + step)
        z = logits_against_truth(logits[piece], labels[piece], valid[piece])
        left_out = ~valid[piece, None]
        if negatives:
            left_out = left_out | (torch.arange(z.shape[1], device=z.device) == labels[piece, None])
        z = z.masked_fill_(left_out, -torch.inf)
        best = torch.cat([best, z[z >= bound] if on_cpu else z.flatten()])
        if on_cpu and 0 < k < len(best):
            bound = best.topk(k, sorted=False).values.min()
            best = best[best >= bound]  # and what ties
    ranked = torch.cat([best, bound[None]]).sort(descending=True).values  # never empty
    place = torch.as_tensor(k, device=ranked.device).clamp(max=len(best))
    last = ranked.take((place - 1).clamp(min=0))
    share = (place - (ranked > last).sum()) / (best == last).sum().clamp(min=1)
    return last.masked_fill(place < 1, torch.inf), share.masked_fill(place < 1, 0)


def _rows_of_a_piece(logits: Tensor) -> int:
    cells = PIECE if logits.device.type == "cpu" else 2**25  # a GPU has no such cache, and each piece costs launches
    return max(1, cells // max(logits.shape[1], 1))


def _compiles(logits: Tensor) -> bool:
    return logits.numel() >= COMPILED_FROM and logits.device.type != "meta" and not _broken


def _compiled_or_plain(logits: Tensor, function: Callable, *arguments: Any) -> Any:
    if _compiles(logits) and not torch.compiler.is_compiling():  # where a user compiles, it becomes part of that
        try:
            # One function serves all losses, and dynamo would give it up at the ninth combination of loss and dtype.
            with torch._dynamo.config.patch(recompile_limit=MAX_VARIANTS):
                return _compiled(function)(*arguments)
        except Exception as error:  # a missing or broken compiler raises many kinds
            _broken.append(error)
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"the losses run uncompiled, which is slower: {reason}", stacklevel=2)
    return function(*arguments)


_broken: list[Exception] = []


@cache
def _compiled(function: Callable) -> Callable:
    # Every index is clamped where it is made; checking it again would double the time of GHM's sweep.
    return torch.compile(function, dynamic=True, options={"assert_indirect_indexing": False})


def _kept(logits: Tensor) -> torch.dtype:
    """Of the gradient until backward: float16 would underflow before a loss scale lifts it."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def accumulator(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
