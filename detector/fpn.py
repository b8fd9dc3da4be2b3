"""C3..C5 -> P3..P7."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """A feature pyramid with two coarser levels; every level has `channels` channels.

    P6 is a stride-2 convolution on C5 (the Focal Loss paper) or on P5 (torchvision's first RetinaNet and most
    later ones; fewer weights, same AP). P7 is another stride-2 convolution, on relu(P6).

    Source: Lin et al., Feature Pyramid Networks, 2017; Focal Loss, 2017, section 4, footnote 2.
    """

    def __init__(self, in_channels: tuple[int, int, int], channels: int = 256, p6_from: Literal["c5", "p5"] = "c5"):
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(c, channels, 1) for c in in_channels])
        self.output = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels])
        self.p6 = nn.Conv2d(in_channels[-1] if p6_from == "c5" else channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.p6_from = p6_from
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        laterals = [lateral(feature) for lateral, feature in zip(self.lateral, features)]
        for finer in (1, 0):
            size = laterals[finer].shape[-2:]
            laterals[finer] = laterals[finer] + F.interpolate(laterals[finer + 1], size=size, mode="nearest")
        p3, p4, p5 = (output(lateral) for output, lateral in zip(self.output, laterals))
        p6 = _coarser(self.p6, features[-1] if self.p6_from == "c5" else p5)
        return [p3, p4, p5, p6, _coarser(self.p7, F.relu(p6))]


def _coarser(convolution: nn.Conv2d, finer: Tensor) -> Tensor:
    """The next level; in float32 if its width is 1: on some CPUs its bfloat16 gradient is wrong (torch 2.11, 2.14)."""
    if not torch.is_autocast_enabled(finer.device.type) or finer.shape[-1] > 2:
        return convolution(finer)
    with torch.autocast(finer.device.type, enabled=False):
        return convolution(finer.float())
