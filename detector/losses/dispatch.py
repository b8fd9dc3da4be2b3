"""Run a sweep over the cells: by Triton, by torch.compile, or in pieces that fit into a processor's cache."""

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

COMPILED_FROM = 2**21  # cells; compiling takes seconds to a minute, which smaller inputs never earn back
MAX_VARIANTS = 128  # compiled versions of one function in a process: by loss, dtype, settings
VECTOR_BITS = {"AVX2": 256, "AVX512": 512}  # torch detects the width of other processors
PIECE = {"cpu": 2**17, "else": 2**25}  # cells; a GPU has no such cache, and each piece costs launches

_broken: list[Exception] = []  # why torch.compile is no longer used
_without_triton: set[Callable | None] = set()  # curves that Triton cannot run; None stands for all curves


def triton_for(logits: Tensor) -> ModuleType | None:
    """The module of Triton kernels, or None if these logits cannot use it."""
    if logits.device.type != "cuda" or logits.dtype == torch.float64 or not logits.numel() or None in _without_triton:
        return None
    try:
        from detector.losses import kernels
    except Exception as error:  # not installed, or too old for our imports
        _give_up_triton(None, error)
        return None
    return kernels


def by_triton(logits: Tensor, kernel: str, curve: Callable, *arguments: Any) -> Any:
    """The result of the kernel `sweep` or `histogram` for this curve; None if Triton cannot run it."""
    kernels = None if curve in _without_triton else triton_for(logits)
    if kernels is None:
        return None
    try:
        return getattr(kernels, kernel)(curve, logits, *arguments)
    except torch.OutOfMemoryError:  # the alternatives take more memory
        raise
    except Exception as error:  # the curve uses a function that kernels.py does not know, or Triton is too old
        _give_up_triton(curve, error)
        return None


def _give_up_triton(curve: Callable | None, error: Exception) -> None:
    _without_triton.add(curve)
    subject = "the losses run" if curve is None else f"{curve.__module__}.{curve.__qualname__} runs"
    warnings.warn(f"{subject} without Triton, which is slower: {_first_line(error)}", stacklevel=3)


def pieces(logits: Tensor) -> Iterator[slice]:
    """Slices of rows, of the fastest size."""
    size = PIECE["cpu" if logits.device.type == "cpu" else "else"]
    step = max(1, size // max(logits.shape[1], 1))
    return (slice(start, start + step) for start in range(0, len(logits), step))


def compiles(logits: Tensor) -> bool:
    """Whether torch.compile is worth its time for these logits."""
    return logits.numel() >= COMPILED_FROM and logits.device.type != "meta" and not _broken


def compiled_or_plain(logits: Tensor, function: Callable, *arguments: Any) -> Any:
    """function(*arguments), compiled if that works and is worth the time."""
    if compiles(logits) and not torch.compiler.is_compiling():  # in a user's torch.compile, it joins their graph
        try:
            # All losses share one function. Dynamo would give up on it at the ninth combination of loss and dtype.
            # Options are constants: for a variable exponent, torch 2.14 may take an earlier one from its disk cache.
            with torch._dynamo.config.patch(recompile_limit=MAX_VARIANTS, specialize_float=True):
                return _compiled(function)(*arguments)
        except Exception as error:  # a missing or broken compiler raises many kinds
            _broken.append(error)
            warnings.warn(f"the losses run uncompiled, which is slower: {_first_line(error)}", stacklevel=2)
    return function(*arguments)


@cache
def _compiled(function: Callable) -> Callable:
    # Every index is clamped where it is made; checking it again would double the time of GHM's sweep.
    return torch.compile(function, dynamic=True, options={"assert_indirect_indexing": False, **vector_options()})


def vector_options() -> dict[str, Any]:
    """For torch.compile: the width of this processor's vectors.

    Options are part of the key of torch's disk cache. Without this one, torch 2.14 gives a processor with AVX2 the code
    that another one compiled for AVX512, and the sums are wrong.
    """
    return {"cpp.simdlen": VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
