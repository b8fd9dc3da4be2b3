"""The IoU losses compare whole boxes; the other box losses compare four numbers.

They equal torchvision's (a test compares them) but need torch alone, and their backward pass does not wait for a GPU.

All take boxes, not deltas, and are normalised by num_pos, the positive anchors of all processes:

    box_loss = GIoU()
    boxes = decode(deltas[positive], anchors[positive])  # (P, 4) x1, y1, x2, y2
    loss = box_loss(boxes, gt_boxes[gt_index[positive]], positive.sum().clamp(min=1))
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detector.losses.checks import check_boxes

EPS = 1e-7  # added to an area or squared length in pixels, so that two points do not divide by 0


class Overlap(NamedTuple):
    """Measures of each pair of boxes; all (P,), at least float32, in pixels."""

    iou: Tensor
    union: Tensor
    enclosing: Tensor  # area of the smallest box that encloses both
    diagonal: Tensor  # of that box, squared
    distance: Tensor  # between the centres, squared
    turn: Tensor  # angle between the two boxes' diagonals, squared


class _IoULoss(nn.Module):
    takes_boxes = True

    def __init__(self) -> None:  # its signature shows that there are no options
        super().__init__()

    def forward(self, boxes: Tensor, targets: Tensor, num_pos: Tensor | float) -> Tensor:
        """boxes, targets (P, 4) x1, y1, x2, y2 in pixels; P may be 0 -> scalar."""
        check_boxes(boxes, targets)
        pair = overlap(boxes, targets)
        return (1 - pair.iou + self.penalty(pair)).sum() / num_pos

    def penalty(self, pair: Overlap) -> Tensor:
        """(P,)"""
        raise NotImplementedError


class GIoU(_IoULoss):
    """Generalized IoU: overlap, and where there is none, how much emptiness lies between.

        loss = (1 / num_pos) sum 1 - IoU + (E - U) / E,   U union, E the smallest box that encloses both

    Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, arXiv 1902.09630. Each box adds 0 to 2.
    """

    def penalty(self, pair: Overlap) -> Tensor:
        return (pair.enclosing - pair.union) / (pair.enclosing + EPS)


class DIoU(_IoULoss):
    """Distance IoU: overlap, and how far the centres are apart.

        loss = (1 / num_pos) sum 1 - IoU + d^2 / c^2,   d between the centres, c the enclosing box's diagonal

    Zheng et al., "Distance-IoU Loss", AAAI 2020, arXiv 1911.08287. Each box adds 0 to 2.
    """

    def penalty(self, pair: Overlap) -> Tensor:
        return pair.distance / (pair.diagonal + EPS)


class CIoU(DIoU):
    """Complete IoU: overlap, how far the centres are apart, and how much the shapes differ.

        loss = (1 / num_pos) sum 1 - IoU + d^2 / c^2 + a v
        v = (4 / pi^2) (atan(w_t / h_t) - atan(w / h))^2,   a = v / (1 - IoU + v), a constant for the backward pass

    with d and c as in DIoU. Zheng et al., "Distance-IoU Loss", AAAI 2020, arXiv 1911.08287.
    """

    def penalty(self, pair: Overlap) -> Tensor:
        v = 4 / math.pi**2 * pair.turn
        with torch.no_grad():
            a = v / (1 - pair.iou + v + EPS)
        return super().penalty(pair) + a * v


def overlap(boxes: Tensor, targets: Tensor) -> Overlap:
    """boxes, targets (P, 4) x1, y1, x2, y2 with x1 <= x2 and y1 <= y2; P may be 0."""
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    boxes, targets = boxes.to(dtype), targets.to(dtype)
    sides, target_sides = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shared = torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])
    intersection = _area(shared.clamp(min=0))
    union = _area(sides) + _area(target_sides) - intersection
    enclosing = torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    apart = (boxes[:, :2] + boxes[:, 2:] - targets[:, :2] - targets[:, 2:]) / 2
    return Overlap(
        iou=intersection / (union + EPS),
        union=union,
        enclosing=_area(enclosing),
        diagonal=enclosing.square().sum(dim=1),
        distance=apart.square().sum(dim=1),
        turn=(_angle(target_sides) - _angle(sides)).square(),
    )


def _area(sides: Tensor) -> Tensor:
    """(P,). Not by prod(), whose backward pass waits for a GPU."""
    return sides[:, 0] * sides[:, 1]


def _angle(sides: Tensor) -> Tensor:
    """Of the diagonal, (P,)."""
    width, height = sides.clamp(min=EPS).unbind(1)
    return torch.atan2(width, height)
