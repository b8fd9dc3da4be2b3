"""How long training steps take, and how long they wait for data."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

from detector.structures import Batch
from detector.transfer import PendingCopy

WARM_UP = 5  # first steps, left out of the median: caches, kernels and loading processes warm up in them


class StepClock:
    """Times the steps. The training loop calls `start`, `next_batch` for each batch, and `step_done` after each step.

    Args:
        seconds_per_step: median of the run before it was resumed
    """

    def __init__(self, seconds_per_step: float | None = None):
        self._before_resuming = seconds_per_step
        self._steps = 0
        self._durations: deque[float] = deque(maxlen=1000)
        self._recent: deque[tuple[float, float]] = deque(maxlen=50)  # seconds of a step, and of its wait for data
        self._waits: list[Callable[[], float]] = []  # for batches of the step, in seconds
        self.start()

    def start(self) -> None:
        """Let a step begin now."""
        self._step_began, self._waits = time.perf_counter(), []

    def next_batch(self, batches: Iterator[Batch], pending_losses: PendingCopy | None = None) -> Batch | None:
        """The next batch; None after the last. On a GPU, a wait begins only when `pending_losses` arrive."""
        began = time.perf_counter()
        batch = next(batches, None)
        seconds = time.perf_counter() - began
        self._waits.append((pending_losses and pending_losses.idle()) or (lambda: seconds))
        return batch

    def step_done(self) -> None:
        """End the step, and let the next begin."""
        now = time.perf_counter()
        self._steps += 1
        if self._steps > WARM_UP:
            self._durations.append(now - self._step_began)
        self._recent.append((now - self._step_began, sum(wait() for wait in self._waits)))
        self._step_began, self._waits = now, []

    @property
    def seconds_per_step(self) -> float | None:
        """Median wall-clock seconds of a training step, with the wait for data."""
        return statistics.median(self._durations) if self._durations else self._before_resuming

    def recent(self) -> tuple[float, float]:
        """Steps per second of the last 50 steps, and the share of their time that was a wait for data."""
        seconds, waited = map(sum, zip(*self._recent)) if self._recent else (0.0, 0.0)
        return (len(self._recent) / seconds, waited / seconds) if seconds else (0.0, 0.0)
