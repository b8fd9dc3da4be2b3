"""The types that travel between files, and the legend of shapes used everywhere.

    B images of a batch          C classes                     H, W height and width in pixels
    A anchors of one image       N = B x A anchors of a batch
    G ground-truth boxes of one image                          P positive anchors of a batch
    D detections of one image

Boxes are float32 (x1, y1, x2, y2) in pixels, x2 and y2 exclusive. Labels are 0..C-1; where background needs
a label (the class losses), it is C.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor


class Target(NamedTuple):
    """Ground truth of one image; G may be 0."""

    boxes: Tensor  # (G, 4) float32
    labels: Tensor  # (G,) int64

    def to(self, device: torch.device) -> "Target":
        return Target(self.boxes.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


class Batch(NamedTuple):
    """Images padded at the right and bottom to one size, a multiple of 32."""

    images: Tensor  # (B, 3, H, W) uint8 RGB
    targets: list[Target]
    image_ids: list[int]
    sizes: list[tuple[int, int]]  # (height, width) of each image inside its padding
    original_sizes: list[tuple[int, int]]  # (height, width) of each image on disk

    def pin_memory(self) -> "Batch":
        return self._replace(images=self.images.pin_memory())


class Predictions(NamedTuple):
    """The model's output, all levels joined: level, then row, column, anchor shape."""

    logits: Tensor  # (B, A, C)
    deltas: Tensor  # (B, A, 4)
    anchors: Tensor  # (A, 4) float32
    levels: tuple[int, ...]  # anchors in each level, adding up to A
    per_cell: int = 1  # anchors at each position of a level


class Assignment(NamedTuple):
    """The target of each anchor of one image."""

    gt_index: Tensor  # (A,) int64, meaningful only where positive
    positive: Tensor  # (A,) bool
    ignored: Tensor  # (A,) bool, never also positive


@dataclass
class Losses:
    """This process's share of the loss: summed over processes, `total` is what is minimised."""

    terms: dict[str, Tensor]  # scalars that add up to the total
    diagnostics: dict[str, Tensor] = field(default_factory=dict)  # detached, only logged

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()


class Detections(NamedTuple):
    """The objects found in one image, best first."""

    boxes: Tensor  # (D, 4) float32
    scores: Tensor  # (D,) float32
    labels: Tensor  # (D,) int64


class ClassMetrics(TypedDict):
    """Of one class, fractions 0..1 or -1 without ground truth."""

    AP: float
    AP50: float
    AP75: float
    AR100: float
    threshold: float  # the score above which F1 at an IoU of 0.5 is best
    boxes: int  # of the ground truth, crowds left out


AP = Literal["AP", "AP50", "AP75", "AP80", "AP90", "APs", "APm", "APl"]
AR = Literal["AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


class Metrics(TypedDict):
    """An evaluation, as metrics.json has it: fractions 0..1, or -1 where there is no ground truth to measure on."""

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
