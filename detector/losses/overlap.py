"""Overlap of pairs of boxes, in the terms that the IoU losses are made of."""

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-7  # of an area or a squared length in pixels: keeps a point-sized pair from dividing by 0


class Overlap(NamedTuple):
    """Of each pair; all (P,), at least float32, in pixels."""

    iou: Tensor
    union: Tensor
    width: Tensor  # of the smallest box that encloses both
    height: Tensor
    distance: Tensor  # squared, between the centres


def overlap(boxes: Tensor, targets: Tensor) -> Overlap:
    """boxes, targets (P, 4) x1, y1, x2, y2 with x1 <= x2 and y1 <= y2; P may be 0."""
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    boxes, targets = boxes.to(dtype), targets.to(dtype)
    shared = torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])
    intersection = shared.clamp(min=0).prod(dim=1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) + (targets[:, 2:] - targets[:, :2]).prod(dim=1) - intersection
    enclosing = torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    apart = (boxes[:, :2] + boxes[:, 2:] - targets[:, :2] - targets[:, 2:]) / 2
    return Overlap(intersection / (union + EPS), union, enclosing[:, 0], enclosing[:, 1], apart.square().sum(dim=1))
