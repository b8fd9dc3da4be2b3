"""What a run writes for TensorBoard: curves, histograms, pictures, and its config."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from detector import distributed
from detector.gradients import Observation
from detector.metrics import Metrics

# The columns of TensorBoard's table of runs: all options would fill five screens.
HPARAMS = (
    "class_loss",
    "box_loss",
    "assigner.name",
    "model.backbone",
    "model.head.prior",
    "seed",
    "solver.lr",
    "solver.batch_size",
    "solver.epochs",
    "precision",
)

# Charts of TensorBoard's "custom scalars" tab, each with all runs in it.
COMPARED = {
    "compare": {
        "AP": ["Multiline", ["^eval/AP$"]],
        "AP at IoU 0.5, 0.75, 0.9": ["Multiline", ["^eval/AP50$", "^eval/AP75$", "^eval/AP90$"]],
        "mean probability of the true class": ["Multiline", ["^diagnostics/true_class_probability$"]],
        "share of the gradient from outliers": ["Multiline", ["^gradient/class_outlier$", "^gradient/box_outlier$"]],
    }
}


class TensorBoardWriter:
    """Writes TensorBoard's files into a folder, in the first process only.

    If they cannot be written, training continues without them, and a line says so.

    Args:
        folder: None writes nothing
        first_step: where the run goes on; TensorBoard hides older entries beyond it
    """

    def __init__(self, folder: Path | None, first_step: int = 0):
        self._writer: SummaryWriter | None = None
        if distributed.is_main() and folder is not None:
            with self._going_on():
                self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            reason = error.strerror or error
            tqdm.write(f"TensorBoard: its files cannot be written ({reason}); going on without curves", file=sys.stdout)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            with self._going_on():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def images(self, name: str, images: Sequence[Tensor], step: int) -> None:
        """Images (3, h, w) uint8."""
        if self._writer is not None:
            with self._going_on():
                for number, image in enumerate(images):
                    self._writer.add_image(f"{name}/{number}", image, step)

    def gradients(self, observation: Observation, step: int) -> None:
        """Shares of the gradient as scalars; counts, density and GHM's beta over the gradient norm as histograms."""
        for name, regions in zip(("class", "box"), observation):
            self.scalars({f"gradient/{name}_{band}": share for band, share in regions.shares().items()}, step)
            curves = {
                "count_log10": regions.counts.double().clamp(min=1).log10(),
                "density_log10_plus_6": regions.density.clamp(min=1e-6).log10() + 6,  # bars must be above 0
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
        with self._going_on():
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

    def metrics(self, metrics: Metrics, step: int) -> None:
        """AP numbers of an evaluation under eval/, each class's under eval_per_class/; -1 (undefined) is left out."""
        numbers = {f"eval/{key}": cast(float, value) for key, value in metrics.items() if key[:2] in ("AP", "AR")}
        numbers |= {f"eval_per_class/{name}": values["AP"] for name, values in metrics["per_class"].items()}
        self.scalars({key: value for key, value in numbers.items() if value >= 0}, step)
        if self._writer is not None:
            with self._going_on():
                self._precision_recall(self._writer, metrics, step)
                self._writer.flush()

    def _precision_recall(self, writer: SummaryWriter, metrics: Metrics, step: int) -> None:
        """The curve at an IoU of 0.5, with counts as if all classes were one."""
        precision = np.array(metrics.get("precision_by_recall", [-1]), dtype=float)[::-1]  # TensorBoard's order
        if (precision < 0).any():  # no ground truth
            return
        boxes = sum(values["boxes"] for values in metrics["per_class"].values())
        recall = np.linspace(1, 0, len(precision))
        right = boxes * recall
        wrong = right * (1 / np.maximum(precision, 1e-3) - 1)
        counts = right.round(), wrong.round(), 0 * right, (boxes - right).round()
        writer.add_pr_curve_raw("eval/precision_recall", *counts, precision, recall, step, len(precision))

    def config(self, text: str, settings: dict[str, Any]) -> None:
        """The config as text, and some of it as hyper-parameters, beside which TensorBoard shows AP."""
        if self._writer is None:
            return
        # add_hparams would open a second folder for the run; these three records are what it writes there.
        shown = {
            key: value if isinstance(value, (str, int, float, bool)) else str(value)
            for key, value in settings.items()
            if key.startswith(HPARAMS)
        }
        with self._going_on():
            self._writer.add_custom_scalars(COMPARED)
            self._writer.add_text("config", "```yaml\n" + text + "\n```")
            for record in hparams(shown, {f"eval/{name}": 0 for name in ("AP", "AP50", "AP75", "AP80", "AP90")}):
                self._writer._get_file_writer().add_summary(record)

    def close(self) -> None:
        if self._writer is not None:
            with self._going_on():
                self._writer.close()
