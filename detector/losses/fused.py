"""The class losses' sum over all cells: value and gradient in one sweep over the logits.

A loss gives its curve: value and slope of one cell as functions of z, the logit against the truth (cells.py). Only the
curve has the loss's formula. Since the slope is in closed form, forward keeps only its inputs and the gradient for
backward. This gradient is also more accurate than autograd's through powers and products.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detector.losses import dispatch
from detector.losses.cells import compute_dtype
from detector.losses.checks import check_cells

Curve = Callable[..., tuple[Tensor, Tensor]]


def cell_sum(
    curve: Curve,
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    *params: Tensor | float,
    num_pos: Tensor | float = 1.0,
    negative_weight: float = 1.0,
    positive_weight: float = 1.0,
    quality: Tensor | None = None,
) -> Tensor:
    """Sum over all valid cells of the curve's value x the cell's weight / num_pos -> at least float32.

    curve: (z, is_positive, *params) -> (value, slope), cell by cell. is_positive marks the positive cells; None if all
        are background. A loss that knows its slope only through autograd wraps its curve in `SlopeByAutograd`.
    logits (N, C) of any float type, labels (N,) int64 with C = background, valid (N,) bool
    params: (K,) tensors first, then numbers; none gets a gradient
    quality (N,): how good each positive's box is. The curve gets it as its third argument, None where is_positive is.
    """
    check_cells(logits, labels, valid, quality)
    # Divide each cell, not the sum: then a gradient in half precision is rounded once. The scale is a tensor, because
    # torch.compile compiles again for each new number. full() makes it on the device, so nothing waits for a copy.
    scale = torch.full((), 1.0, dtype=compute_dtype(logits), device=logits.device) / num_pos
    return _CellSum.apply(logits, labels, valid, quality, curve, (scale, negative_weight, positive_weight), params)


class SlopeByAutograd:
    """A curve whose slope comes from autograd. value: (z, is_positive, *params) -> value, in torch functions."""

    def __init__(self, value: Callable[..., Tensor]):
        self.value = value

    def __call__(self, z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self.value(z, *rest)
            (slope,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), slope


class _CellSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, valid, quality, curve, weights, params):
        value, gradient = _value_and_gradient(curve, logits, labels, valid, quality, weights, params)
        ctx.save_for_backward(logits, labels, valid, quality)
        ctx.rest = curve, weights, params
        ctx.gradient = gradient if ctx.needs_input_grad[0] else None
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place: a second copy would double the memory
        if gradient is None:  # a second backward through the same graph
            curve, *rest = ctx.rest
            _, gradient = _value_and_gradient(curve, *ctx.saved_tensors, *rest)
        logits = ctx.saved_tensors[0]
        if (kernels := dispatch.triton_for(logits)) is not None:
            kernels.scale_(gradient, upstream)
        elif upstream.device.type != "cpu" or upstream != 1:  # elsewhere the comparison would wait for the device
            # Multiply in float32: `upstream` rounded to bfloat16 would be up to 0.4% off. A GPU rounds a 0-d tensor to
            # the gradient's type, not a 1-d one; a CPU rounds neither.
            gradient.mul_(upstream if upstream.device.type == "cpu" else upstream[None])
        return gradient.to(logits.dtype), *[None] * 6


def _value_and_gradient(
    curve: Curve,
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    quality: Tensor | None,
    weights: tuple[Tensor, float, float],
    params: tuple,
) -> tuple[Tensor, Tensor]:
    if not isinstance(curve, SlopeByAutograd):
        given = (labels, valid, quality, weights, params, _gradient_dtype(logits))
        if (result := dispatch.by_triton(logits, "sweep", curve, *given)) is not None:
            return result
    scale, negative, positive = weights
    scales = negative * scale, positive * scale
    if logits.device.type != "cpu":
        # Selecting the rows with a positive would wait for the GPU. Looking for its cell in every row costs nothing.
        return _all_rows(curve, logits, valid, labels, quality, scales, params)
    # A CPU sweeps all rows as background, then replaces the few that have a positive.
    is_positive = labels < logits.shape[1]
    value, gradient = _all_rows(curve, logits, valid & ~is_positive, None, quality, scales, params)
    few = (valid & is_positive).nonzero()[:, 0]
    quality = None if quality is None else quality[few]
    part, gradient[few] = _sweep(curve, logits[few], valid[few], labels[few], quality, scales, params)
    return value + part, gradient


def _all_rows(
    curve: Curve,
    logits: Tensor,
    counted: Tensor,
    labels: Tensor | None,
    quality: Tensor | None,
    scales: tuple[Tensor, Tensor],
    params: tuple,
) -> tuple[Tensor, Tensor]:
    if dispatch.compiles(logits) and not isinstance(curve, SlopeByAutograd):
        return dispatch.compiled_or_plain(logits, _sweep, curve, logits, counted, labels, quality, scales, params)
    value, gradient = (
        logits.new_zeros((), dtype=compute_dtype(logits)),
        torch.empty_like(logits, dtype=_gradient_dtype(logits)),
    )
    for rows in dispatch.pieces(logits):
        labels_here, quality_here = (None if given is None else given[rows] for given in (labels, quality))
        part, gradient[rows] = _sweep(curve, logits[rows], counted[rows], labels_here, quality_here, scales, params)
        value = value + part
    return value, gradient


def _sweep(
    curve: Curve,
    logits: Tensor,
    counted: Tensor,
    labels: Tensor | None,
    quality: Tensor | None,
    scales: tuple[Tensor, Tensor],
    params: tuple,
) -> tuple[Tensor, Tensor]:
    """The sum over the `counted` rows, a scalar, and its gradient (N, C). Without labels, all cells are background."""
    negative, positive = scales
    z = logits.to(compute_dtype(logits))
    if labels is None:
        if quality is not None:
            params = (None, *params)
        value, slope = _value_and_slope(curve, z, None, *params)
        value, slope = value * negative, slope * negative
    else:
        if quality is not None:
            params = (quality.to(z.dtype)[:, None], *params)
        at_label = torch.arange(z.shape[1], device=z.device) == labels[:, None]
        value, slope = _value_and_slope(curve, torch.where(at_label, -z, z), at_label, *params)
        value = value * torch.where(at_label, positive, negative)
        slope = slope * torch.where(at_label, -positive, negative)
    value = torch.where(counted, value.sum(-1), 0).sum()  # by rows first: a flat float32 sum loses digits
    return value, torch.where(counted[:, None], slope, 0).to(_gradient_dtype(logits))


def _value_and_slope(curve: Curve, *arguments: Any) -> tuple[Tensor, Tensor]:
    result = curve(*arguments)
    if isinstance(result, Tensor):
        raise TypeError("the curve returns a value without its slope; give SlopeByAutograd(curve) to cell_sum")
    return result


def _gradient_dtype(logits: Tensor) -> torch.dtype:
    """The gradient's dtype until backward: float16 would underflow before a loss scale is applied."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype
