"""The types that travel between files, and the legend of shapes used everywhere.

    B images of a batch          C classes                     H, W height and width in pixels
    A anchors of one image       N = B x A anchors of a batch
    G ground-truth boxes of one image                          P positive anchors of a batch
    D detections of one image

A cell is an anchor and a class; a position is a point of a level's feature map.
Boxes are float32 (x1, y1, x2, y2) in pixels, x2 and y2 exclusive. Labels are 0..C-1; where background needs
a label (the class losses), it is C.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """Ground truth of one image; G may be 0."""

    boxes: Tensor  # (G, 4) float32
    labels: Tensor  # (G,) int64


class Batch(NamedTuple):
    """Images padded at the right and bottom to one size, a multiple of 32."""

    images: Tensor  # (B, 3, H, W) uint8 RGB
    targets: list[Target]
    image_ids: list[int]
    sizes: list[tuple[int, int]]  # (height, width) of each image inside its padding
    original_sizes: list[tuple[int, int]]  # (height, width) of each image on disk

    def pin_memory(self) -> "Batch":
        return self._replace(images=self.images.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """The batch on the device, in three transfers. The transfer of pinned images to a GPU is asynchronous."""
        if device.type == self.images.device.type:
            return self
        non_blocking = device.type == "cuda"  # a non-blocking copy to the CPU could be read before it has arrived
        images, joined, *rest = self._joined()
        moved = Target(*(values.to(device, non_blocking=non_blocking) for values in joined))
        return _split(images.to(device, non_blocking=non_blocking), moved, *rest)

    def __reduce__(self) -> tuple:
        """Send three tensors to another process, however many images: each takes an open file and 0.1 ms there."""
        return _split, self._joined()

    def _joined(self) -> tuple:
        """The arguments of `_split` that make this batch."""
        targets = Target(*map(torch.cat, zip(*self.targets)))
        return self.images, targets, [len(target.labels) for target in self.targets], *self[2:]


def _split(images: Tensor, joined: Target, counts: list[int], *rest: list) -> Batch:
    """The batch whose targets, `counts` boxes in each image, are joined."""
    return Batch(images, [Target(*values) for values in zip(*(values.split(counts) for values in joined))], *rest)


class Grid(NamedTuple):
    """The anchors of an image, all levels joined: level, then row, column, anchor shape."""

    anchors: Tensor  # (A, 4) float32
    levels: tuple[int, ...]  # anchors in each level, adding up to A
    per_position: int = 1  # anchors at each position of a level


class Predictions(NamedTuple):
    """The model's output for each anchor of a Grid."""

    logits: Tensor  # (B, A, C)
    deltas: Tensor  # (B, A, 4)
    anchors: Tensor  # (A, 4) float32
    levels: tuple[int, ...]  # anchors in each level, adding up to A
    per_position: int = 1  # anchors at each position of a level


class Assignment(NamedTuple):
    """The target of each anchor, (A,) of one image or (B, A) of several."""

    gt_index: Tensor  # int64, meaningful only where positive
    positive: Tensor  # bool
    ignored: Tensor  # bool, never also positive


@dataclass
class Losses:
    """This process's share of the loss. Training minimises the sum of `total` over processes."""

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
