"""P3..P7 -> logits and deltas, in anchor order."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from detector.conv import ConvReLU


class Head(nn.Module):
    """Two towers of 3x3 convolutions shared by all levels: one for classes, one for boxes.

    Args:
        channels: channels of the pyramid
        anchors_per_position: anchors at each position
        num_classes: C; there is no output for background, whatever the loss
        depth, width: convolutions in each tower, and their channels
        norm: "gn" puts a GroupNorm after each convolution of the towers
        prior: probability of every class from an untrained head. If it is low, the many background cells do not
            dominate the first steps (Lin et al., Focal Loss, 2017, section 3.3)
    """

    def __init__(
        self,
        channels: int,
        anchors_per_position: int,
        num_classes: int,
        depth: int = 4,
        width: int = 256,
        norm: Literal["none", "gn"] = "none",
        prior: float = 0.01,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.class_tower = _tower(channels, depth, width, norm)
        self.box_tower = _tower(channels, depth, width, norm)
        inputs = width if depth else channels
        self.logits = nn.Conv2d(inputs, anchors_per_position * num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(inputs, anchors_per_position * 4, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.logits.bias is not None
        nn.init.constant_(self.logits.bias, -math.log((1 - prior) / prior))

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Pyramid levels (B, channels, h, w) -> logits (B, A, C), deltas (B, A, 4)."""
        logits = [_by_anchor(self.logits(level), self.num_classes) for level in _run_tower(self.class_tower, levels)]
        deltas = [_by_anchor(self.deltas(level), 4) for level in _run_tower(self.box_tower, levels)]
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)


def _tower(channels: int, depth: int, width: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(depth):
        inputs = channels if i == 0 else width
        if norm == "gn":
            conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
            layers += [conv, nn.GroupNorm(32, width), nn.ReLU(inplace=True)]
        else:
            layers += [ConvReLU(inputs, width, 3, padding=1), nn.Identity()]  # Identity: later layers keep their names
    return nn.Sequential(*layers)


def _run_tower(tower: nn.Sequential, levels: list[Tensor]) -> list[Tensor]:
    for layer in tower:
        levels = layer(levels) if isinstance(layer, ConvReLU) else [layer(level) for level in levels]
    return levels


def _by_anchor(output: Tensor, values: int) -> Tensor:
    """(B, shapes x values, h, w) -> (B, h x w x shapes, values)."""
    return output.permute(0, 2, 3, 1).reshape(output.shape[0], -1, values)
