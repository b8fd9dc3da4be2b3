"""Smooth L1: squared error near 0, absolute error beyond."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.losses.checks import check_boxes


class SmoothL1(nn.Module):
    """Smooth L1.

        loss = (1 / num_pos) sum  d^2 / (2 beta)  where |d| < beta,  |d| - beta / 2  elsewhere,   d = delta - target

    Girshick, "Fast R-CNN", ICCV 2015, arXiv 1504.08083, equation 3, with beta as in Detectron (the GHM paper calls
    it delta and takes 1/9). Normalised by num_pos, the positive anchors of all processes.

        box_loss = SmoothL1(beta=1 / 9)
        targets = encode(gt_boxes[gt_index[positive]], anchors[positive])  # (P, 4)
        loss = box_loss(deltas[positive], targets, positive.sum().clamp(min=1))

    Raises ValueError where beta is not positive and finite.
    """

    def __init__(self, beta: float = 1 / 9) -> None:
        super().__init__()
        if not 0 < beta < float("inf"):
            raise ValueError(f"SmoothL1: beta is {beta}; it must be positive and finite (for beta 0 use L1)")
        self.beta = beta

    def forward(self, deltas: Tensor, targets: Tensor, num_pos: Tensor | float) -> Tensor:
        """deltas, targets (P, 4), in encoded box coordinates; P may be 0 -> scalar."""
        check_boxes(deltas, targets)
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        return F.smooth_l1_loss(deltas.to(dtype), targets.to(dtype), reduction="sum", beta=self.beta) / num_pos
