"""Shared by the benchmarks: timing calls in turns, peak memory, and tables in Markdown.

Times are in milliseconds. All calls of a comparison alternate in one process, so a slow moment of the machine affects
all of them.
"""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torchvision

MIB = 2**20

Name = TypeVar("Name")  # of a call


def environment() -> str:
    """Machine and versions, in one line."""
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{_processor()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"{machine}; Python {platform.python_version()}, {versions}"


def alternate(
    calls: Mapping[Name, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[Name, list[float]]:
    """Milliseconds of each call by `clock`, the function `milliseconds` if None, round by round."""
    for call in [*calls.values()] * warmup:
        call()
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append((clock or milliseconds)(call))
    return times


def milliseconds(call: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    call()
    wait()
    return 1000 * (time.perf_counter() - start)


def gpu_milliseconds(call: Callable[[], object], calls: int = 5) -> float:
    """The GPU's mean time for a call behind other work, as in a training: it waits only if the call does."""
    matrix = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
    total = 0.0
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait()
        for _ in range(10):  # some 15 ms on an H100, in which Python starts the call
            matrix @ matrix
        start.record()
        call()
        end.record()
        wait()
        total += start.elapsed_time(end)
    return total / calls


def medians(times: dict[Name, list[float]]) -> dict[Name, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times: dict[str, list[float]], peer: str, ours: str) -> float:
    """How many times as fast as the peer ours is, as the median over rounds."""
    return statistics.median(a / b for a, b in zip(times[peer], times[ours]))


def peak(call: Callable[[], object]) -> float:
    """The most bytes that a call needs beyond those in use before it; nan without CUDA or Linux.

    On a CPU, call this before `keep_freed_memory`, because kept memory would count as used.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        wait()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = _resident("VmRSS")
        call()
        return _resident("VmHWM") - before
    except OSError:
        return float("nan")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table: the first column aligned left, the others right."""
    lines: list[Sequence[object]] = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def wait() -> None:
    """Wait until the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
