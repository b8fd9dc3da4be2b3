"""Which device and precision to compute in, and how memory is kept."""

import ctypes
from pathlib import Path

import torch

from detector.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of this name; `auto` is CUDA where there is a GPU, else the CPU. UserError where it is not usable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]}); try auto") from None
    return device


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision of this name, and for `auto` the reason: bfloat16 where the hardware gains by it, else float32."""
    if name != "auto":
        return name, "as configured"
    if device.type == "cuda":
        gains, units = torch.cuda.get_device_capability(device) >= (8, 0), "tensor cores"
    elif device.type == "cpu":
        gains, units = _bfloat16_units(), "matrix units"
    else:
        gains, units = False, "units that are known"
    return "bfloat16" if gains else "float32", f"the {device.type} has {'' if gains else 'no '}{units} for bfloat16"


def _bfloat16_units() -> bool:
    """AMX, or AVX512-BF16 on AMD's processors, which do it at twice the speed of float32; Intel's do not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    amd = any(line.startswith("vendor_id") and "AMD" in line for line in lines)
    return "amx_bf16" in flags or (amd and "avx512_bf16" in flags)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use at once so far: of the tensors on a GPU, of the process on a CPU; 0 where it is not told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux


def keep_freed_memory() -> None:
    """Have the C library keep what a step on the CPU frees for the next one.

    Otherwise glibc hands large blocks back and asks for them anew; where the first touch of a page is dear, as on
    virtual machines, that was half of a training step.
    """
    trim_threshold, mmap_max = -1, -4  # numbers of <malloc.h>
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)
