"""The device: which one, in which precision and memory format, and how much memory it took."""

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from detector.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of this name; `auto` is CUDA if there is a GPU, else the CPU. Raises UserError if it is not usable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # PyTorch goes on about all its backends
        raise UserError(f"device: {name!r} cannot be used here ({reason}); try auto") from None
    return device


def place(model: nn.Module, device: torch.device, *, channels_last: bool) -> None:
    """Move a model to the device, and to the channels_last or the default memory format."""
    model.to(device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which a model computes in this precision; float32 leaves it alone."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision and the reason for it. `auto` is bfloat16 if the hardware computes faster with it, else float32."""
    if name != "auto":
        return name, "as configured"
    if device.type == "cuda":
        gains, units = torch.cuda.get_device_capability(device) >= (8, 0), "tensor cores"
    elif device.type == "cpu":
        gains, units = _bfloat16_units(), "matrix units"
    else:
        gains, units = False, "known units"
    return "bfloat16" if gains else "float32", f"the {device.type} has {'' if gains else 'no '}{units} for bfloat16"


def _bfloat16_units() -> bool:
    """Whether there is AMX, or AVX512-BF16 on an AMD CPU, where it is twice as fast as float32, unlike on Intel's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    amd = any(line.startswith("vendor_id") and "AMD" in line for line in lines)
    return "amx_bf16" in flags or (amd and "avx512_bf16" in flags)


def pick_workers(number: int | Literal["auto"], device: torch.device) -> int:
    """The number of processes that load images for this one; `auto` fits it to the cores that this process may use.

    With a GPU, they take all cores but one, at most 16. On a CPU the training needs the cores, and one process can load
    the next batch meanwhile. Processes that torchrun starts on one machine share its cores.
    """
    if number != "auto":
        return number
    cores = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(cores > 1) if device.type == "cpu" else min(max(cores - 1, 1), 16)


def usable_cores() -> int:
    """PYTHON_CPU_COUNT if that is set, else the cores that this process may use, also by cgroup v2."""
    if (count := os.environ.get("PYTHON_CPU_COUNT", "")).isdecimal():
        return int(count)
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file; "max 100000" is no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def peak_memory(device: torch.device) -> int:
    """The peak of bytes in use so far: of tensors on a GPU, of the process on a CPU; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux


def keep_freed_memory(device: torch.device | None = None) -> None:
    """Have the C library keep the memory that a step on the CPU frees, for the next step. On a GPU, do nothing.

    By default glibc returns large blocks to the system and asks for them again. If the first access to a page is
    slow, as on virtual machines, this took half of a training step.
    """
    if device is not None and device.type != "cpu":
        return
    trim_threshold, mmap_max = -1, -4  # numbers of <malloc.h>
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)
