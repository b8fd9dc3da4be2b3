"""Images -> Predictions. No loss, no thresholds."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detector.anchors import Anchors
from detector.backbone import Backbone
from detector.fpn import FPN
from detector.head import Head
from detector.structures import Grid, Predictions, Sizes

if TYPE_CHECKING:
    from detector.graphs import Graphs

# Mean and deviation of ImageNet's pixels, 0..255, with which the backbones' weights were trained.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class RetinaNet(nn.Module):
    """Backbone, pyramid and heads (Lin et al., Focal Loss, 2017).

    Takes uint8 images, a quarter of float32's bytes to transfer, and normalises them on the device.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, fpn: FPN, head: Head, anchors: Anchors):
        super().__init__()
        self.backbone, self.fpn, self.head, self.anchors = backbone, fpn, head, anchors
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.graphs: Graphs | None = None  # runs the training passes unless None

    def forward(self, images: Tensor, sizes: Tensor | Sizes | None = None) -> Predictions:
        """Images (B, 3, H, W) uint8 RGB, H and W multiples of 32; sizes (B, 2): (height, width) inside the padding."""
        if sizes is not None and not isinstance(sizes, Tensor):
            sizes = torch.tensor(sizes, pin_memory=images.is_cuda)
        if sizes is not None:
            sizes = sizes.to(images.device, non_blocking=images.is_cuda)
        if sizes is not None and self.graphs is not None and self.training and self.graphs.take(images):
            logits, deltas = self.graphs(images, sizes)
        else:
            logits, deltas = self.outputs(images, sizes)
        return Predictions(logits, deltas, *self.grid(images))

    def outputs(self, images: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits and deltas of images (B, 3, H, W); sizes (B, 2): (height, width) inside the padding."""
        return self.head(self.fpn(self.backbone(self.normalize(images, sizes))))

    def grid(self, images: Tensor) -> Grid:
        """The anchors of images of this size, on their device."""
        height, width = images.shape[-2:]
        map_sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(3, 8)]
        counts = tuple(rows * columns * self.anchors.per_position for rows, columns in map_sizes)
        return Grid(self.anchors(map_sizes, (height, width), images.device), counts, self.anchors.per_position)

    def describe(self) -> str:
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        return f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained"

    def normalize(self, images: Tensor, sizes: Tensor | None) -> Tensor:
        """Normalise images to mean 0 and deviation 1. Padding becomes 0, the mean colour."""
        images = (images.to(self.mean.dtype) - self.mean) / self.std
        if sizes is None:
            return images
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        outside = (rows[:, None] >= sizes[:, 0, None, None]) | (columns >= sizes[:, 1, None, None])
        return images.masked_fill_(outside[:, None], 0)
