"""Which device to compute on, and how its memory is kept."""

import ctypes

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
