"""The types that travel between files, and the legend of shapes used everywhere.

    B images of a batch          C classes                     H, W height and width in pixels
    A anchors of one image       N = B x A anchors of a batch
    G ground-truth boxes of one image                          P positive anchors of a batch
    D detections of one image

A cell is an anchor and a class; a position is a point of a level's feature map.
Boxes are float32 (x1, y1, x2, y2) in pixels, x2 and y2 exclusive. Labels are 0..C-1; where background needs
a label (the class losses), it is C.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Sizes = list[tuple[int, int]]  # (height, width) of each image of a batch


class Target(NamedTuple):
    """Ground truth of one image; G may be 0."""

    boxes: Tensor  # (G, 4) float32
    labels: Tensor  # (G,) int64


class Batch(NamedTuple):
    """Images padded at the right and bottom to one size, their sides multiples of 32, and their targets.

    All is in the memory of one tensor, so a batch takes one transfer to a GPU, and one open file to another process.
    `images`, `targets` and `sizes` are views of it: clone what you keep.
    """

    data: Tensor  # uint8: images, boxes, labels, sizes
    shape: tuple[int, ...]  # of the images
    counts: list[int]  # boxes of each image
    image_ids: list[int]
    original_sizes: Sizes  # of each image on disk

    @classmethod
    def allocate(
        cls, shape: Sequence[int], targets: list[Target], image_ids: list[int], sizes: Sizes | Tensor, originals: Sizes
    ) -> "Batch":
        """A batch on the targets' device, with room for images of this shape, which the caller writes."""
        length = math.prod(shape)
        if length % 8 or not shape[0] == len(targets) == len(image_ids) == len(sizes) == len(originals):
            raise ValueError(f"a batch needs sides that are multiples of 32, and all its values for {shape[0]} images")
        boxes, labels = map(torch.cat, zip(*targets))
        rest = boxes.float(), labels.long(), torch.as_tensor(sizes, device=boxes.device).long()
        data = torch.empty(length + sum(each.nbytes for each in rest), dtype=torch.uint8, device=boxes.device)
        torch.cat([each.flatten().view(torch.uint8) for each in rest], out=data[length:])
        return cls(data, tuple(shape), [len(target.labels) for target in targets], image_ids, originals)

    @property
    def images(self) -> Tensor:
        """(B, 3, H, W) uint8 RGB."""
        return self.data[: math.prod(self.shape)].view(self.shape)

    @property
    def targets(self) -> list[Target]:
        total = sum(self.counts)
        boxes, labels = self.data[math.prod(self.shape) : -16 * len(self.counts)].split([16 * total, 8 * total])
        columns = boxes.view(torch.float32).view(total, 4), labels.view(torch.int64)
        return [Target(*values) for values in zip(*(column.split(self.counts) for column in columns))]

    @property
    def sizes(self) -> Tensor:
        """(B, 2) int64: (height, width) of each image inside its padding."""
        return self.data[-16 * len(self.counts) :].view(torch.int64).view(-1, 2)

    def pin_memory(self) -> "Batch":
        return self._replace(data=self.data.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """The batch on the device. The transfer to a GPU is asynchronous if the batch is pinned."""
        if device.type == self.data.device.type:
            return self
        # A non-blocking copy to the CPU could be read before it has arrived.
        return self._replace(data=self.data.to(device, non_blocking=device.type == "cuda"))


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
