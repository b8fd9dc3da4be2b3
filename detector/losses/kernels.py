"""The class losses' sweep and histogram as Triton kernels, for logits on a GPU.

Each reads the logits once and stores nothing of their size except the gradient. A loss's curve is not written twice:
the kernel calls the Python function that a CPU runs, in which `torch` means Triton's functions (`translated`).
"""

import ast
import inspect
import linecache
import math
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from detector.losses import cells

BLOCK = 2048  # cells of a program
LONGEST_RUN = 8  # cells that a thread reads at once: 16 bytes of bfloat16
COUNTED_BLOCK = 4096  # cells that a program counts at once
COUNTED_BINS = 512  # the most that a program counts in registers; for more, it adds to memory atomically
PROGRAMS = 4096  # the most of a kernel whose programs loop over blocks


# ---- The kernels. A block is (BLOCK / RUN, RUN) cells, in the order of memory. The cells of a run belong to one row,
# which is found once for them instead of by a division for each cell.


@triton.jit
def _cells(x_ptr, codes_ptr, block, total, CLASSES: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):
    first = block * BLOCK
    first_row = first // CLASSES
    offset = tl.arange(0, BLOCK // RUN) * RUN  # of each run
    inside = (first - first_row * CLASSES).to(tl.int32) + offset
    row = inside // CLASSES
    exists = offset < total - first
    code = tl.load(codes_ptr + first_row + row, mask=exists, other=-1)
    cell = tl.expand_dims(offset, 1) + tl.expand_dims(tl.arange(0, RUN), 0)
    counted = code >= 0
    x = tl.load(x_ptr + first + cell, mask=tl.expand_dims(counted, 1), other=0.0).to(tl.float32)
    at_label = tl.expand_dims(code - (inside - row * CLASSES), 1) == tl.expand_dims(tl.arange(0, RUN), 0)
    return first + cell, exists, first_row + row, code, at_label, tl.where(at_label, -x, x)


@triton.jit
def _sweep(
    x_ptr,
    codes_ptr,
    quality_ptr,
    scale_ptr,
    gradient_ptr,
    sums_ptr,
    total,
    negative,
    positive,
    tables,
    CURVE: tl.constexpr,
    CLASSES: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    cell, exists, row, code, at_label, z = _cells(x_ptr, codes_ptr, block, total, CLASSES, RUN, BLOCK)
    if quality_ptr is None:
        value, slope = CURVE(z, at_label, *tables)
    else:
        quality = tl.load(quality_ptr + row, mask=(code >= 0) & (code < CLASSES), other=0.0).to(tl.float32)
        value, slope = CURVE(z, at_label, tl.expand_dims(quality, 1), *tables)
    scale = tl.load(scale_ptr)
    weight = tl.expand_dims(tl.where(code >= 0, scale * negative, 0.0), 1)
    weight = tl.where(at_label, -scale * positive, weight)  # dz/dx is -1 at the label
    tl.store(gradient_ptr + cell, (slope * weight).to(gradient_ptr.dtype.element_ty), mask=tl.expand_dims(exists, 1))
    tl.store(sums_ptr + block, tl.sum(value * tl.abs(weight)))


@triton.jit
def _histogram(
    x_ptr,
    codes_ptr,
    counts_ptr,
    total,
    tables,
    INDEX: tl.constexpr,
    BINS: tl.constexpr,
    PADDED: tl.constexpr,
    CLASSES: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    counts_ptr += tl.program_id(0).to(tl.int64) * BINS  # separate counts, because additions to one number queue
    in_first = tl.zeros((), tl.int32)
    if PADDED > 0:
        counts = tl.zeros((PADDED,), tl.int32)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(total, BLOCK), tl.num_programs(0)):
        _, _, _, code, at_label, z = _cells(x_ptr, codes_ptr, block, total, CLASSES, RUN, BLOCK)
        index = INDEX(z, at_label, *tables)
        counted = tl.expand_dims(code >= 0, 1) & (index < BINS)
        if PADDED == 0:
            tl.atomic_add(counts_ptr + index, 1, mask=counted, sem="relaxed")
        else:  # two counts in one sum: of all cells, and 65536 times that of cells outside the first bin
            both = tl.sum(tl.ravel(tl.where(counted, tl.where(index > 0, 65537, 1), 0)))
            if both >= 65536:
                counts += tl.histogram(tl.ravel(index), PADDED, mask=tl.ravel(counted))
            else:  # on an H200 a block of easy cells takes 0.6 of the time, and any other 1.2
                in_first += both
    if PADDED > 0:
        bin = tl.arange(0, PADDED)
        tl.store(counts_ptr + bin, counts + tl.where(bin == 0, in_first, 0), mask=bin < BINS)


@triton.jit
def _scale(gradient_ptr, factor_ptr, total, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:  # in the usual case of 1, nothing is read or written
        for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(total, BLOCK), tl.num_programs(0)):
            cell = block * BLOCK + tl.arange(0, BLOCK)
            gradient = tl.load(gradient_ptr + cell, mask=cell < total)
            scaled = gradient.to(tl.float32) * factor
            tl.store(gradient_ptr + cell, scaled.to(gradient.dtype), mask=cell < total)


# ---- Starting them.


@torch.compiler.disable
def sweep(
    curve: Callable,
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    quality: Tensor | None,
    weights: tuple[Tensor, float, float],
    params: tuple,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Value () and gradient (N, C) of `dtype`, as `fused.cell_sum` asks for them."""
    logits = logits.contiguous()
    blocks = triton.cdiv(logits.numel(), BLOCK)
    gradient = torch.empty_like(logits, dtype=dtype)
    sums = torch.empty(blocks, dtype=torch.float32, device=logits.device)
    quality = None if quality is None else quality.contiguous()
    tables, numbers = _split(params)
    with _device(logits):
        _sweep[(blocks,)](
            logits,
            _codes(labels, valid),
            quality,
            weights[0],
            gradient,
            sums,
            logits.numel(),
            *weights[1:],
            tables,
            CURVE=translated(curve, numbers),
            CLASSES=logits.shape[1],
            RUN=math.gcd(logits.shape[1], LONGEST_RUN),
            BLOCK=BLOCK,
        )
    return sums.sum(dtype=torch.float64).float(), gradient


@torch.compiler.disable
def histogram(index: Callable, logits: Tensor, labels: Tensor, valid: Tensor, bins: int, params: tuple) -> Tensor:
    """Counts (bins,) int64, as `regions.histogram` asks for them."""
    logits = logits.contiguous()
    programs = min(triton.cdiv(logits.numel(), COUNTED_BLOCK), PROGRAMS)
    counts = torch.zeros(programs, bins, dtype=torch.int32, device=logits.device)
    tables, numbers = _split(params)
    with _device(logits):
        _histogram[(programs,)](
            logits,
            _codes(labels, valid),
            counts,
            logits.numel(),
            tables,
            INDEX=translated(index, numbers),
            BINS=bins,
            PADDED=triton.next_power_of_2(bins) if bins <= COUNTED_BINS else 0,
            CLASSES=logits.shape[1],
            RUN=math.gcd(logits.shape[1], LONGEST_RUN),
            BLOCK=COUNTED_BLOCK,
        )
    return counts.sum(0)


@torch.compiler.disable
def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (), in float32, without a wait and without any work where the factor is 1."""
    if gradient.numel():
        with _device(gradient):
            programs = min(triton.cdiv(gradient.numel(), BLOCK), PROGRAMS)
            _scale[(programs,)](gradient, factor, gradient.numel(), BLOCK=BLOCK)


def _codes(labels: Tensor, valid: Tensor) -> Tensor:
    """Labels (N,) int32, -1 in rows that do not count: one number to read for each cell instead of two."""
    return torch.where(valid, labels.to(torch.int32), -1)


def _split(params: tuple) -> tuple[tuple, tuple]:
    """Split into tensors and numbers. The numbers are options of a loss; each choice of them gets its own kernel."""
    tables = tuple(value for value in params if isinstance(value, Tensor))
    return tables, params[len(tables) :]


def _device(tensor: Tensor) -> torch.cuda.device | nullcontext:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# ---- Triton's versions of the functions that curves use.

INTERPRETED = not isinstance(_scale, triton.JITFunction)
# Triton's exp and division also handle numbers below 1e-38, which takes a fifth of CE's instructions.
NVIDIA = tl.constexpr(not INTERPRETED and torch.version.cuda is not None)


@triton.jit
def _instruction(NAME: tl.constexpr, x):
    return tl.inline_asm_elementwise(NAME + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _exp(x):
    if NVIDIA:
        return _instruction("ex2.approx.ftz.f32", x * 1.4426950408889634)
    else:
        return tl.exp(x)


@triton.jit
def _reciprocal(x):
    if NVIDIA:
        return _instruction("rcp.approx.ftz.f32", x)
    else:
        return 1 / x


@triton.jit
def _log(x):
    return tl.log(x)


@triton.jit
def _abs(x):
    return tl.abs(x)


@triton.jit
def _sigmoid(x):
    return _reciprocal(1 + _exp(-x))


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0)


@triton.jit
def _sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def _pow(x, y):
    return tl.exp2(y * tl.log2(x))


@triton.jit
def _lookup(table, index):
    return tl.load(table + index)


@triton.jit
def _ordered_bits(z):
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


TORCH = ModuleType("torch")  # a module, since Triton lets kernels use modules' functions
for _name, _meaning in {
    "exp": _exp,
    "reciprocal": _reciprocal,
    "log": _log,
    "abs": _abs,
    "sign": _sign,
    "sigmoid": _sigmoid,
    "relu": _relu,
    "clamp": _clamp,
    "pow": _pow,
    "where": _where,
    "int32": tl.int32,
}.items():
    setattr(TORCH, _name, _meaning)

CELLS = {cells.lookup: _lookup, cells.ordered_bits: _ordered_bits}


@cache
def translated(function: Callable, numbers: tuple = ()) -> triton.JITFunction:
    """A curve, or a function called by one, as a Triton function: the same source with TORCH for `torch`.

    Its last arguments, the loss's options, become the constants `numbers`.
    """
    if function in CELLS:
        return CELLS[function]
    if function is cells.sigmoid_softplus:
        return translated(cells.sigmoid_softplus_in_one_sweep)
    names = dict(function.__globals__, tl=tl)
    for name in function.__code__.co_names:
        value = names.get(name)
        if value is torch:
            names[name] = TORCH
        elif inspect.isfunction(value):
            names[name] = translated(value)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.returns = None  # Triton would look annotations up among its own types
    arguments = definition.args.args
    for argument in arguments:
        argument.annotation = None
    for argument, number in zip(reversed(arguments), reversed(numbers)):
        names[argument.arg] = number if INTERPRETED else tl.constexpr(number)
    del arguments[len(arguments) - len(numbers) :]
    source, file = ast.unparse(tree), f"<{function.__module__}.{function.__qualname__} for Triton>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # where Triton reads it from
    exec(compile(source, file, "exec"), names)
    return triton.jit(names[function.__name__])
