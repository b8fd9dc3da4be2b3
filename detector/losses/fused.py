"""The class losses' fast form: value and gradient in one sweep over the logits.

A loss is given by its curve: value and slope of one cell as functions of z, the logit against the truth (cells.py).
With the slope in closed form nothing is kept between forward and backward but the gradient itself, and it is more
accurate than what autograd finds through powers and products. The plain form of each loss is its `definition`.

Large inputs run compiled, where torch.compile finds a compiler; otherwise the same functions run over pieces that stay
in the processor's cache.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detector.losses.cells import logits_against_truth

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


def given_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """`value`, whose gradient with respect to `x` is `gradient`."""
    return _GivenGradient.apply(x, value, gradient)


class _GivenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


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
        gradient = gradient.mul_(upstream.to(gradient.dtype)).to(ctx.saved_tensors[0].dtype)
        return gradient, None, None, None, None, None


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
    return value, torch.where(counted[:, None], slope, 0).to(_kept(logits))


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


@torch.no_grad()
def count_regions(logits: Tensor, labels: Tensor, valid: Tensor, bins: int) -> Tensor:
    """How many valid cells have their gradient norm in each of `bins` equal regions of 0..1, (bins,) int64.

    Integers, since float32 stops counting at 2^24 and one image has 16 million cells.
    """
    logits = logits.detach()
    if logits.device.type != "cpu":
        return _compiled_or_plain(logits, _count_packed, logits, valid, labels, bins)
    is_positive = labels < logits.shape[1]
    rows = valid & ~is_positive
    counts = torch.zeros(bins, dtype=torch.int64)
    if bins > 1 and logits.numel():
        # Most rows are background with every cell in the first region, which their largest logit tells.
        easy = rows & (_compiled_or_plain(logits, _largest, logits) < _edges(bins)[0])
        counts[0] = easy.sum() * logits.shape[1]
        rows &= ~easy
    hard = rows.nonzero()[:, 0]
    if _compiles(logits) and len(hard) * 2 > len(logits):
        counts += _compiled_or_plain(logits, _count_packed, logits, rows, None, bins)
    elif _compiles(logits) and len(hard) > 100:
        counts += _compiled_or_plain(logits, _count_packed, logits[hard], rows[hard], None, bins)
    else:
        for piece in hard.split(_rows_of_a_piece(logits)):
            counts += _count(logits[piece], bins)
    few = (valid & is_positive).nonzero()[:, 0]
    return counts + _count(logits_against_truth(logits[few], labels[few], valid[few]), bins)


def _largest(logits: Tensor) -> Tensor:
    return logits.amax(-1)


def _count(z: Tensor, bins: int) -> Tensor:
    edges = torch.tensor(_edges(bins), dtype=accumulator(z))
    region = torch.bucketize(z.to(edges.dtype), edges, right=True)
    return torch.bincount(region.flatten(), minlength=bins)


def _count_packed(logits: Tensor, counted: Tensor, labels: Tensor | None, bins: int) -> Tensor:
    """The same of the rows that are `counted`, in one sweep; without labels all cells are background."""
    everything = counted.sum()[None] * logits.shape[1]
    if bins == 1:
        return everything
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
    at_least = rows.sum(0)[: len(edges)]
    return torch.cat([everything, at_least]) - torch.cat([at_least, torch.zeros_like(everything)])


def _edges(bins: int) -> list[float]:
    """The logits at which the gradient norm is k / bins, k = 1 .. bins - 1."""
    return [math.log(k / (bins - k)) for k in range(1, bins)]


def _rows_of_a_piece(logits: Tensor) -> int:
    return max(1, PIECE // max(logits.shape[1], 1))


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
    # Every index is clamped where it is made; checking it again would double the time of GHM's sweep.
    return torch.compile(function, dynamic=True, options={"assert_indirect_indexing": False})


def _kept(logits: Tensor) -> torch.dtype:
    """Of the gradient until backward: float16 would underflow before a loss scale lifts it."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def accumulator(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
