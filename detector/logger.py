"""A run's messages and progress line. Only the first process prints."""

import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from detector import distributed
from detector.gradients import Observation
from detector.step_clock import StepClock
from detector.tensorboard_writer import TensorBoardWriter


class Logger:
    """Shows a training: `clock` times its steps, and `tensorboard` writes the files for TensorBoard.

    The training loop calls `start`, and `step` after each step that was not skipped.

    Args:
        folder: where TensorBoard's files go; None: no TensorBoard
        every: steps between two entries of the training curves
        first_step: where a resumed run goes on
        seconds_per_step: median of the run before it was resumed
        gradients_every: steps between two observations of the gradient, and one at the run's last step; 0: none
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
        self.tensorboard = TensorBoardWriter(folder, first_step)
        self.clock = StepClock(seconds_per_step)
        self._line: tqdm | None = None
        self._last_step: int | None = None

    def say(self, text: str) -> None:
        if distributed.is_main():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self, step: int, total_steps: int) -> None:
        """Show the progress line, with `step` steps done, and start the clock for the next step."""
        self._last_step = total_steps
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
        self.clock.start()

    def step(self, values: dict[str, float], terms: Iterable[str], lr: float, images: int, step: int) -> None:
        """Show and log a step: loss terms and diagnostics, learning rate, and images of all processes."""
        if not distributed.is_main():
            return
        total = sum(values[name] for name in terms)
        steps_per_second, wait = self.clock.recent()
        speed = steps_per_second * images
        if self._line is not None:
            self._line.set_postfix_str(
                f"loss {total:.4f}, lr {lr:.2e}, {speed:.1f} img/s, data wait {wait:.0%}", refresh=False
            )
            self._line.update(step - self._line.n)  # not by 1: skipped steps count too
        if step % self.every and step != 1:
            return
        scalars = {"loss/total": total, "lr": lr, "speed/images_per_second": speed, "speed/data_wait": wait}
        terms = set(terms)
        for name, value in values.items():
            scalars[f"loss/{name}" if name in terms else f"diagnostics/{name}"] = value
        self.tensorboard.scalars(scalars, step)

    def wants_gradients(self, step: int) -> bool:
        """Whether to observe the gradients of this step (counted from 1); the same on all processes."""
        return self.gradients_every > 0 and (step % self.gradients_every == 0 or step == self._last_step)

    def gradients(self, observation: Observation, step: int) -> None:
        self.tensorboard.gradients(observation, step)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
        self.tensorboard.close()
