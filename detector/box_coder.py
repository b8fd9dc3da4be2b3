"""Boxes <-> deltas relative to anchors."""

import math

import torch
from torch import Tensor

# A decoded side is at most 1000 / 16 times its anchor's, which keeps exp() finite on an untrained head.
MAX_LOG_SCALE = math.log(1000 / 16)


class BoxCoder:
    """(dx, dy, dw, dh): centre shift in anchor sides and log of the side ratio, each times its weight.

    Source: Girshick et al., Rich feature hierarchies (R-CNN), 2014, appendix C. Both directions compute in float32.
    """

    def __init__(self, weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)):
        if min(weights) <= 0:
            raise ValueError(f"weights {tuple(weights)}: all four must be above 0")
        self.weights = tuple(weights)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (P, 4) and their anchors (P, 4) -> deltas (P, 4)."""
        anchor_centre, anchor_side = _centre_side(anchors.float())
        centre, side = _centre_side(boxes.float())
        shift = (centre - anchor_centre) / anchor_side
        scale = (side / anchor_side).log()
        return torch.cat([shift, scale], dim=-1) * self._factors(boxes)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., 4) and their anchors (..., 4) -> boxes (..., 4); undoes `encode`."""
        deltas = deltas.float() / self._factors(deltas)
        anchor_centre, anchor_side = _centre_side(anchors.float())
        centre = anchor_centre + deltas[..., :2] * anchor_side
        half = deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * anchor_side / 2
        return torch.cat([centre - half, centre + half], dim=-1)

    def _factors(self, like: Tensor) -> Tensor:
        """The weights (4,), made on the device of `like`: a copy from the CPU would wait for the GPU."""
        return torch.cat([torch.full((1,), weight, device=like.device) for weight in self.weights])


def _centre_side(boxes: Tensor) -> tuple[Tensor, Tensor]:
    side = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + side / 2, side
