"""A run's messages and progress line, and the time of its steps. Only the first process prints."""

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from detector import distributed
from detector.curves import Curves
from detector.device import PendingCopy
from detector.gradients import Observation
from detector.structures import Batch

WARM_UP = 5  # first steps, left out of the median: caches, kernels and loading processes warm up in them


class Logger:
    """Prints and times the training; `curves` are TensorBoard's.

    The training loop calls `start`, and `next_batch` for each batch. After each step it calls `step`, unless the step
    was skipped, and `step_done`.

    Args:
        folder: where TensorBoard's files go; None: no TensorBoard
        every: steps between two entries of the training curves
        first_step: where a resumed run goes on
        seconds_per_step: median of the run before it was resumed
        gradients_every: steps between two observations of the gradient; 0: none
    """

    def __init__(
        self,
        folder: Path | None,
        every: int,
        first_step: int = 0,
        seconds_per_step: float | None = None,
        gradients_every: int = 0,
    ):
        self.every = every
        self.gradients_every = gradients_every if folder is not None else 0
        self.curves = Curves(folder, first_step)
        self._before_resuming = seconds_per_step
        self._steps = 0
        self._durations: deque[float] = deque(maxlen=1000)
        self._recent: deque[tuple[float, float]] = deque(maxlen=50)  # seconds of a step, and of its wait for data
        self._step_began = 0.0
        self._waits: list[Callable[[], float]] = []  # for batches of the step, in seconds
        self._line: tqdm | None = None

    @property
    def seconds_per_step(self) -> float | None:
        """Median wall-clock seconds of a training step, with the wait for data."""
        return statistics.median(self._durations) if self._durations else self._before_resuming

    def say(self, text: str) -> None:
        if distributed.is_main():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, step: int, total_steps: int) -> None:
        """Show the progress line, with `step` steps done, and start the clock for the next step."""
        if self._line is None:
            terminal = sys.stderr.isatty()
            self._line = tqdm(
                total=total_steps,
                initial=step,
                desc="train",
                unit="step",
                disable=not distributed.is_main(),
                dynamic_ncols=terminal,
                ncols=None if terminal else 160,
                mininterval=0.5 if terminal else 30,  # a log file gets a line twice a minute
                maxinterval=10 if terminal else 60,
            )
        self._step_began, self._waits = time.perf_counter(), []

    def next_batch(self, batches: Iterator[Batch], unread: PendingCopy | None = None) -> Batch | None:
        """The next batch; None after the last. On a GPU, only the time after `unread` arrives counts as a wait."""
        began = time.perf_counter()
        batch = next(batches, None)
        seconds = time.perf_counter() - began
        self._waits.append((unread and unread.idle()) or (lambda: seconds))
        return batch

    def step_done(self) -> None:
        now = time.perf_counter()
        self._steps += 1
        if self._steps > WARM_UP:
            self._durations.append(now - self._step_began)
        self._recent.append((now - self._step_began, sum(wait() for wait in self._waits)))
        self._step_began, self._waits = now, []

    def step(self, values: dict[str, float], terms: Iterable[str], lr: float, images: int, step: int) -> None:
        """Show and log a step: loss terms and diagnostics, learning rate, and images of all processes."""
        if not distributed.is_main():
            return
        total = sum(values[name] for name in terms)
        seconds, waited = map(sum, zip(*self._recent)) if self._recent else (0.0, 0.0)
        speed = len(self._recent) * images / seconds if seconds else 0.0
        wait = waited / seconds if seconds else 0.0
        if self._line is not None:
            self._line.set_postfix_str(
                f"loss {total:.4f}, lr {lr:.2e}, {speed:.1f} img/s, data wait {wait:.0%}", refresh=False
            )
            self._line.update()
        if step % self.every and step != 1:
            return
        scalars = {"loss/total": total, "lr": lr, "speed/images_per_second": speed, "speed/data_wait": wait}
        terms = set(terms)
        for name, value in values.items():
            scalars[f"loss/{name}" if name in terms else f"diagnostics/{name}"] = value
        self.curves.scalars(scalars, step)

    def wants_gradients(self, step: int) -> bool:
        """Whether to observe the gradients of this step (counted from 1); the same on all processes."""
        return self.gradients_every > 0 and step % self.gradients_every == 0

    def gradients(self, observation: Observation, step: int) -> None:
        self.curves.gradients(observation, step)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
        self.curves.close()
