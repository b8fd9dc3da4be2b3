"""The class losses' fast form: value and gradient in one sweep over the logits.

A loss is given by its curve: value and slope of one cell as functions of z, the logit against the truth (cells.py).
With the slope in closed form nothing is kept between forward and backward but the gradient itself, and it is more
accurate than what autograd finds through powers and products. The plain form of each loss is its `definition`.

Large inputs run compiled, where torch.compile finds a compiler; otherwise the same functions run over pieces that stay
in the processor's cache.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Curve = Callable[..., tuple[Tensor, Tensor]]

COMPILED_FROM = 2**21  # cells; compiling takes seconds, which smaller inputs never earn back
PIECE = 2**17  # cells of a piece where nothing is compiled


def cell_sum(
    curve: Curve,
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    *params: Any,
    negative: float = 1.0,
    positive: float = 1.0,
) -> Tensor:
    """Sum over all valid cells of the curve's value, times `negative` or `positive` -> scalar, at least float32.

    curve: (z, *params) -> (value, slope), cell by cell; params, tensors or numbers, get no gradient
    logits (N, C) of any float type, labels (N,) int64 with C = background, valid (N,) bool
    """
    return _CellSum.apply(logits, labels, valid, curve, (negative, positive), params)


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
        return gradient.mul_(upstream.to(gradient.dtype)), None, None, None, None, None


def _value_and_gradient(
    curve: Curve, logits: Tensor, labels: Tensor, valid: Tensor, weights: tuple[float, float], params: tuple
) -> tuple[Tensor, Tensor]:
    if logits.device.type != "cpu":
        # Which rows have a positive is not known here; telling its cell apart in every row costs a GPU nothing.
        return _compiled_or_plain(logits, _sweep, curve, logits, valid, labels, weights, params)
    is_positive = labels < logits.shape[1]
    background = valid & ~is_positive
    if _compiles(logits):
        value, gradient = _compiled_or_plain(logits, _sweep, curve, logits, background, None, weights, params)
    else:
        value, gradient = logits.new_zeros((), dtype=accumulator(logits)), torch.empty_like(logits)
        for piece in _pieces(logits):
            part, gradient[piece] = _sweep(curve, logits[piece], background[piece], None, weights, params)
            value = value + part
    few = (valid & is_positive).nonzero()[:, 0]
    part, gradient[few] = _sweep(curve, logits[few], valid[few], labels[few], weights, params)
    return value + part, gradient


def _sweep(
    curve: Curve, logits: Tensor, counted: Tensor, labels: Tensor | None, weights: tuple[float, float], params: tuple
) -> tuple[Tensor, Tensor]:
    """Sum over the rows that are `counted` (), and its gradient (N, C); without labels all cells are background."""
    negative, positive = weights
    z = logits.to(accumulator(logits))
    if labels is None:
        value, slope = curve(z, *params)
        value, slope = value * negative, slope * negative
    else:
        at_label = torch.arange(z.shape[1], device=z.device) == labels[:, None]
        value, slope = curve(torch.where(at_label, -z, z), *params)
        value = value * torch.where(at_label, positive, negative)
        slope = slope * torch.where(at_label, -positive, negative)
    value = torch.where(counted, value.sum(-1), 0).sum()  # by rows first: a flat float32 sum loses digits
    return value, torch.where(counted[:, None], slope, 0).to(logits.dtype)


def sigmoids(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigmoid(z), sigmoid(-z) and softplus(z) from one exponential, each to full relative accuracy."""
    e = torch.exp(-z.abs())
    larger = 1 / (1 + e)
    smaller = e * larger
    if z.dtype == torch.float64:
        log1p = torch.log1p(e)
    else:
        # log(1 + e) = 2 artanh(e / (2 + e)): for e in 0..1 seven terms are exact to 1.3e-8, in half the time.
        s = e / (2 + e)
        q = s * s
        log1p = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q / 13))))))
    up = z >= 0
    return torch.where(up, larger, smaller), torch.where(up, smaller, larger), z.clamp(min=0) + log1p


def count_regions(logits: Tensor, labels: Tensor, valid: Tensor, bins: int) -> Tensor:
    """How many valid cells have their gradient norm in each of `bins` equal regions of 0..1, (bins,) int64.

    Integers, since float32 stops counting at 2^24 and one image has 16 million cells.
    """
    everything = valid.sum()[None] * logits.shape[1]
    if bins == 1:
        return everything
    if logits.device.type != "cpu":
        at_least = _compiled_or_plain(logits, _count_at_least, logits, valid, labels, bins)
    else:
        is_positive = labels < logits.shape[1]
        rows = valid & ~is_positive
        if len(logits) and logits.shape[1]:
            # Most rows are background with every cell in the first region, which their largest logit tells.
            rows &= logits.amax(-1) >= _edges(bins)[0]
        hard = rows.nonzero()[:, 0]
        few = (valid & is_positive).nonzero()[:, 0]
        at_least = _count_at_least(logits[few], valid[few], labels[few], bins)
        if len(hard) > len(logits) / 2 and _compiles(logits):
            at_least += _compiled_or_plain(logits, _count_at_least, logits, rows, None, bins)
        else:
            for piece in _pieces(logits[:1].expand(len(hard), -1)):
                part = logits[hard[piece]]
                at_least += _count_at_least(part, rows[hard[piece]], None, bins)
    return -torch.diff(at_least, prepend=everything, append=torch.zeros_like(everything))


def _count_at_least(logits: Tensor, counted: Tensor, labels: Tensor | None, bins: int) -> Tensor:
    """Cells whose gradient norm is at least k / bins, k = 1 .. bins - 1, in the rows that are `counted`, int64."""
    z = logits.to(accumulator(logits))
    if labels is not None:
        z = torch.where(torch.arange(z.shape[1], device=z.device) == labels[:, None], -z, z)
    z = torch.where(counted[:, None], z, -math.inf)
    # Compared where z lives, so that no cell needs an exponential. Three counts share one float: a row has fewer than
    # 256 cells, and float32 is exact up to 256^3. Wider rows take a float for each.
    shared = 3 if z.shape[1] < 256 else 1
    edges, columns = _edges(bins), []
    for start in range(0, len(edges), shared):
        packed = torch.zeros((), dtype=torch.float32, device=z.device)
        for k, edge in enumerate(edges[start : start + shared]):
            packed = torch.where(z >= edge, float(sum(256**i for i in range(k + 1))), packed)
        columns.append(packed.sum(-1))
    rows = torch.stack(columns, -1).to(torch.int64)
    if shared > 1:
        rows = torch.stack([rows & 255, (rows >> 8) & 255, rows >> 16], -1).flatten(1)
    return rows.sum(0)[: len(edges)]


def _edges(bins: int) -> list[float]:
    """The logits at which the gradient norm is k / bins, k = 1 .. bins - 1."""
    return [math.log(k / (bins - k)) for k in range(1, bins)]


def _pieces(logits: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // max(logits.shape[1], 1))
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _compiles(logits: Tensor) -> bool:
    return logits.numel() >= COMPILED_FROM and logits.device.type != "meta" and not _broken


def _compiled_or_plain(logits: Tensor, function: Callable, *arguments: Any) -> Any:
    if _compiles(logits):
        try:
            return _compiled(function)(*arguments)
        except Exception as error:  # a missing or broken compiler raises many kinds
            _broken.append(error)
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"the losses run uncompiled, which is slower: {reason}", stacklevel=2)
    return function(*arguments)


_broken: list[Exception] = []


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def accumulator(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
