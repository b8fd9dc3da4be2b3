"""Images -> Predictions. No loss, no thresholds."""

import torch
from torch import Tensor, nn

from detector.anchors import Anchors
from detector.backbone import Backbone
from detector.errors import UserError
from detector.fpn import FPN
from detector.head import Head
from detector.structures import Grid, Predictions

# Of ImageNet's pixels, 0..255: the backbones' weights were trained with these.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
MAX_SIZES = 64  # sizes of padded images to compile for; others run uncompiled


class RetinaNet(nn.Module):
    """Backbone, pyramid and heads (Lin et al., Focal Loss, 2017).

    Takes uint8 images, so that a quarter of the bytes cross to the device, and normalises there.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, fpn: FPN, head: Head, anchors: Anchors):
        super().__init__()
        self.backbone, self.fpn, self.head, self.anchors = backbone, fpn, head, anchors
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, sizes: list[tuple[int, int]] | None = None) -> Predictions:
        """Images (B, 3, H, W) uint8 RGB, H and W multiples of 32; sizes: (height, width) inside the padding."""
        logits, deltas = self.head(self.fpn(self.backbone(self.normalize(images, sizes))))
        return Predictions(logits, deltas, *self.grid(images))

    def grid(self, images: Tensor) -> Grid:
        """The anchors of images of this size, on their device."""
        height, width = images.shape[-2:]
        cells = [(-(-height // 2**level), -(-width // 2**level)) for level in range(3, 8)]
        counts = tuple(rows * columns * self.anchors.per_cell for rows, columns in cells)
        return Grid(self.anchors(cells, (height, width), images.device), counts, self.anchors.per_cell)

    def compile_parts(self) -> None:
        """Compile backbone, pyramid and heads at their next call, again for each new size of images.

        Raises UserError where torch.compile does not work.
        """
        device = self.mean.device
        try:
            torch.compile(lambda x: x.cos() + 1)(torch.ones(8, device=device))
        except Exception as error:  # a compiler that is missing or too old raises all kinds
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"compile: torch.compile does not work here ({reason}); set it to false") from None
        torch._dynamo.config.recompile_limit = MAX_SIZES  # beyond the limit, 8 by default, other sizes run uncompiled
        for part in (self.backbone, self.fpn, self.head):
            part.compile(dynamic=False)

    def describe(self) -> str:
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        return f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained"

    def normalize(self, images: Tensor, sizes: list[tuple[int, int]] | None) -> Tensor:
        """To mean 0 and deviation 1; the padding to 0, which is the mean colour."""
        images = (images.to(self.mean.dtype) - self.mean) / self.std
        for image, (height, width) in zip(images, sizes or []):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images
