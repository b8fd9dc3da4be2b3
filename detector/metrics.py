"""The results of an evaluation, as in metrics.json: dicts, as JSON has them, with keys that mypy checks."""

from typing import Literal, NotRequired, TypedDict


class ClassMetrics(TypedDict):
    """Results of one class: fractions 0..1, or -1 without ground truth."""

    AP: float
    AP50: float
    AP75: float
    AR100: float
    threshold: float  # the score above which F1 at an IoU of 0.5 is best
    boxes: int  # of the ground truth, crowds left out


AP = Literal["AP", "AP50", "AP75", "AP80", "AP90", "APs", "APm", "APl"]
AR = Literal["AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


class RunFigures(TypedDict):
    """Figures of the run whose weights were scored."""

    step: int | None
    epoch: int | None
    seconds_per_step: float | None
    peak_memory: int  # bytes


class Metrics(TypedDict):
    """An evaluation, as in metrics.json: fractions 0..1, or -1 without ground truth to measure on."""

    AP: float
    AP50: float
    AP75: float
    AP80: float
    AP90: float
    APs: float
    APm: float
    APl: float
    AR1: float
    AR10: float
    AR100: float
    ARs: float
    ARm: float
    ARl: float
    by_iou: list[float]  # AP at an IoU of 0.50, 0.55 ... 0.95
    precision_by_recall: list[float]  # mean over classes at a recall of 0.00, 0.01 ... 1.00, at an IoU of 0.5
    per_class: dict[str, ClassMetrics]
    images: int  # how many were scored
    engine: str  # name and version
    step: NotRequired[int | None]  # of the weights
    epoch: NotRequired[int | None]
    seconds_per_step: NotRequired[float | None]  # of the training
    peak_memory: NotRequired[int]  # bytes
