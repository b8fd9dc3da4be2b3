"""TensorBoard and the progress line; silence on all processes but the first."""

import contextlib
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from detector import distributed
from detector.gradients import Observation
from detector.solver import Solver
from detector.structures import Batch

# Steps left out of the seconds a step: caches, kernels and workers warm up in them.
WARM_UP = 5

# Of TensorBoard's table of runs: all options would be five screens of columns.
HPARAMS = ("class_loss", "box_loss", "assigner.name", "model.backbone", "model.head.prior", "seed")
HPARAMS += ("solver.lr", "solver.batch_size", "solver.epochs", "precision")

# Charts of TensorBoard's "custom scalars" tab, each with all runs in it.
COMPARED = {
    "compare": {
        "AP": ["Multiline", ["^eval/AP$"]],
        "AP at IoU 0.5, 0.75, 0.9": ["Multiline", ["^eval/AP50$", "^eval/AP75$", "^eval/AP90$"]],
        "mean probability of the true class": ["Multiline", ["^diagnostics/true_class_probability$"]],
        "share of the gradient from outliers": ["Multiline", ["^gradient/class_outlier$", "^gradient/box_outlier$"]],
    }
}


class Logger:
    """Everything a run tells while it trains.

    Args:
        folder: the run folder; TensorBoard's files go there. None: no TensorBoard
        every: steps between two entries of the training curves
        first_step: where the run goes on; older entries past it are hidden
        seconds_per_step: median of the part of the run before, when resumed
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
        self._writer = None
        if distributed.is_main() and folder is not None:
            with self._curves():
                self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self._durations: deque[float] = deque(maxlen=1000)
        self._before = seconds_per_step
        self._steps = 0
        self._line: tqdm | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=50)  # seconds of a step, and of it waiting for data

    @property
    def seconds_per_step(self) -> float | None:
        """Median wall-clock seconds of a training step, waiting for data included."""
        return statistics.median(self._durations) if self._durations else self._before

    @contextlib.contextmanager
    def _curves(self) -> Iterator[None]:
        """Where TensorBoard's files cannot be written, training goes on without them, and says so."""
        try:
            yield
        except OSError as error:
            self._writer = None
            self.say(f"TensorBoard: its files cannot be written ({error.strerror or error}); going on without curves")

    def say(self, text: str) -> None:
        if distributed.is_main():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, batches: Iterable[Batch], solver: Solver) -> Iterator[Batch]:
        """The batches, with a line of loss, lr, images per second, share of time waiting for data, and time left."""
        if self._line is None:
            terminal = sys.stderr.isatty()
            self._line = tqdm(
                total=solver.total_steps,
                initial=solver.step_count,
                desc="train",
                unit="step",
                disable=not distributed.is_main(),
                dynamic_ncols=terminal,
                ncols=None if terminal else 160,
                mininterval=0.5 if terminal else 30,  # a log file gets a line twice a minute
                maxinterval=10 if terminal else 60,
            )
        start = time.perf_counter()
        for batch in batches:
            arrived = time.perf_counter()
            yield batch
            end = time.perf_counter()
            self._steps += 1
            if self._steps > WARM_UP:
                self._durations.append(end - start)
            self._recent.append((end - start, arrived - start))
            start = end

    def step(self, values: dict[str, float], terms: Iterable[str], lr: float, images: int, step: int) -> None:
        """Note a training step: loss terms and diagnostics, learning rate, and images of all processes."""
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
        self.scalars(scalars, step)

    def wants_gradients(self, step: int) -> bool:
        """Whether the gradients of this step (from 1) are to be observed; the same on all processes."""
        return self.gradients_every > 0 and step % self.gradients_every == 0

    def gradients(self, observation: Observation, step: int) -> None:
        """Shares of the gradient as scalars; counts, density and GHM's beta over the gradient norm as histograms."""
        for name, regions in zip(("class", "box"), observation):
            self.scalars({f"gradient/{name}_{band}": share for band, share in regions.shares().items()}, step)
            curves = {
                "count_log10": regions.counts.double().clamp(min=1).log10(),
                "density_log10_plus_6": regions.density.clamp(min=1e-6).log10() + 6,  # above 0, as bars must be
                "beta_log10_plus_3": regions.beta.clamp(min=1e-3).log10() + 3,
                "gradient": regions.gradient,
            }
            for curve, values in curves.items():
                self._histogram(f"gradient_{name}/{curve}", values.tolist(), step)

    def _histogram(self, name: str, bars: list[float], step: int) -> None:
        """Bars over equal regions of 0..1."""
        if self._writer is None:
            return
        edges = [(j + 1) / len(bars) for j in range(len(bars))]
        middles = [edge - 0.5 / len(bars) for edge in edges]
        total = sum(bars)
        with self._curves():
            self._writer.add_histogram_raw(
                name,
                min=0.0,
                max=1.0,
                num=total,
                sum=sum(bar * g for bar, g in zip(bars, middles)),
                sum_squares=sum(bar * g * g for bar, g in zip(bars, middles)),
                bucket_limits=edges,
                bucket_counts=bars,
                global_step=step,
            )

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            with self._curves():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def metrics(self, metrics: dict[str, Any], step: int) -> None:
        """AP numbers of an evaluation under eval/, each class's under eval_per_class/; -1 (undefined) is left out."""
        numbers = {f"eval/{key}": value for key, value in metrics.items() if key[:2] in ("AP", "AR")}
        numbers |= {f"eval_per_class/{name}": values["AP"] for name, values in metrics["per_class"].items()}
        self.scalars({key: value for key, value in numbers.items() if value >= 0}, step)
        if self._writer is not None:
            with self._curves():
                self._precision_recall(metrics, step)
                self._writer.flush()

    def _precision_recall(self, metrics: dict[str, Any], step: int) -> None:
        """The curve at an IoU of 0.5; its counts as if all classes were one."""
        precision = np.array(metrics.get("precision_by_recall", [-1]), dtype=float)[::-1]  # TensorBoard's order
        if (precision < 0).any():  # nothing is there to be found
            return
        boxes = sum(values["boxes"] for values in metrics["per_class"].values())
        recall = np.linspace(1, 0, len(precision))
        right = boxes * recall
        wrong = right * (1 / np.maximum(precision, 1e-3) - 1)
        counts = right.round(), wrong.round(), 0 * right, (boxes - right).round()
        self._writer.add_pr_curve_raw("eval/precision_recall", *counts, precision, recall, step, len(precision))

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Image (3, h, w) uint8."""
        if self._writer is not None:
            with self._curves():
                self._writer.add_image(name, image, step)

    def config(self, text: str, settings: dict[str, Any]) -> None:
        """The config as text, and what runs are compared by as hyper-parameters beside which TensorBoard shows AP."""
        if self._writer is None:
            return
        # add_hparams would open a second folder for the run; these three records are what it writes there.
        shown = {
            key: value if isinstance(value, (str, int, float, bool)) else str(value)
            for key, value in settings.items()
            if key.startswith(HPARAMS)
        }
        with self._curves():
            self._writer.add_custom_scalars(COMPARED)
            self._writer.add_text("config", "```yaml\n" + text + "\n```")
            for record in hparams(shown, {f"eval/{name}": 0 for name in ("AP", "AP50", "AP75", "AP80", "AP90")}):
                self._writer.file_writer.add_summary(record)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._writer is not None:
            with self._curves():
                self._writer.close()
