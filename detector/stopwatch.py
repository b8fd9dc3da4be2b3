"""Seconds by stage."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Stopwatch:
    """How long each stage of a loop takes: `with watch("network"): ...`, and `watch.each("loading", batches)`.

    device: synchronised at both ends of a stage, so its work counts for the stage that queued it. None: not
    synchronised, so on a GPU only the time to queue the work is measured.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[stage] += time.perf_counter() - start

    def each(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items; the time to get each of them counts for the stage."""
        iterator = iter(items)
        while True:
            with self(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    break
            yield item

    def _wait(self) -> None:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
