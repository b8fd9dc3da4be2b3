"""CIoU: overlap, how far the centres are apart, and how much the shapes differ."""

import math

import torch
from torch import Tensor, nn

from detector.losses.overlap import EPS, overlap


class CIoU(nn.Module):
    """Complete IoU loss.

        loss = (1 / num_pos) sum 1 - IoU + d^2 / c^2 + a v
        v = (4 / pi^2) (atan(w_t / h_t) - atan(w / h))^2,   a = v / (1 - IoU + v), a constant for the backward pass

    with d and c as in DIoU. Zheng et al., "Distance-IoU Loss", AAAI 2020, arXiv 1911.08287.
    Normalised by num_pos, the positive anchors of all processes. Takes boxes, not deltas.

        box_loss = CIoU()
        boxes = decode(deltas[positive], anchors[positive])  # (P, 4) x1, y1, x2, y2
        loss = box_loss(boxes, gt_boxes[gt_index[positive]], positive.sum().clamp(min=1))

    Raises nothing of its own.
    """

    takes_boxes = True

    def __init__(self) -> None:  # so that its signature says that there is nothing to set
        super().__init__()

    def forward(self, boxes: Tensor, targets: Tensor, num_pos: Tensor | float) -> Tensor:
        """boxes, targets (P, 4) x1, y1, x2, y2 in pixels; P may be 0 -> scalar."""
        pair = overlap(boxes, targets)
        diagonal = pair.width.square() + pair.height.square()
        v = 4 / math.pi**2 * (_angle(targets) - _angle(boxes)).square()
        with torch.no_grad():
            a = v / (1 - pair.iou + v + EPS)
        return (1 - pair.iou + pair.distance / (diagonal + EPS) + a * v).sum() / num_pos


def _angle(boxes: Tensor) -> Tensor:
    """Of the diagonal, (P,)."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=EPS)
    return torch.atan2(sides[:, 0], sides[:, 1])
