"""Absolute error of encoded boxes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.losses.checks import check_boxes


class L1(nn.Module):
    """Absolute error.

        loss = (1 / num_pos) sum |d|,   d = delta - target, over the four coordinates of every positive anchor

    Its gradient is 0 at d = 0. Normalised by num_pos, the positive anchors of all processes.

        box_loss = L1()
        targets = encode(gt_boxes[gt_index[positive]], anchors[positive])  # (P, 4)
        loss = box_loss(deltas[positive], targets, positive.sum().clamp(min=1))

    Raises ValueError where deltas and targets are not both (P, 4), as all box losses do.
    """

    def __init__(self) -> None:  # its signature shows that there are no options
        super().__init__()

    def forward(self, deltas: Tensor, targets: Tensor, num_pos: Tensor | float) -> Tensor:
        """deltas, targets (P, 4), in encoded box coordinates; P may be 0 -> scalar."""
        check_boxes(deltas, targets)
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        return F.l1_loss(deltas.to(dtype), targets.to(dtype), reduction="sum") / num_pos
