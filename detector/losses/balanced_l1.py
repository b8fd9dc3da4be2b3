"""Balanced L1: smooth L1 with more of the gradient for coordinates that are already close."""

import math

import torch
from torch import Tensor, nn

from detector.losses.checks import check_boxes


class BalancedL1(nn.Module):
    """Balanced L1.

        d loss / d u = alpha log(b u + 1)  where u < 1,  gamma  elsewhere,      u = |delta - target| / beta
        loss = (beta / num_pos) sum of its integral from 0 to u

    b = e^(gamma / alpha) - 1, so that both parts agree at u = 1. A smaller alpha raises the gradient of small errors,
    gamma bounds the gradient of large ones, and from beta on the gradient is constant.

    Pang et al., "Libra R-CNN: Towards Balanced Learning for Object Detection", CVPR 2019, arXiv 1904.02701,
    equations 7 and 8, where beta is 1. Normalised by num_pos, the positive anchors of all processes.

        box_loss = BalancedL1()
        targets = encode(gt_boxes[gt_index[positive]], anchors[positive])  # (P, 4)
        loss = box_loss(deltas[positive], targets, positive.sum().clamp(min=1))

    Raises ValueError where alpha, gamma or beta is not positive and finite, or gamma / alpha is above 50.
    """

    def __init__(self, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0) -> None:
        super().__init__()
        for name, value in {"alpha": alpha, "gamma": gamma, "beta": beta}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"BalancedL1: {name} is {value}; it must be positive and finite")
        if gamma / alpha > 50:  # float32 holds no more than e^88
            raise ValueError(f"BalancedL1: gamma / alpha is {gamma / alpha:g}; it must be at most 50")
        self.alpha, self.gamma, self.beta = alpha, gamma, beta
        self.b = math.expm1(gamma / alpha)

    def forward(self, deltas: Tensor, targets: Tensor, num_pos: Tensor | float) -> Tensor:
        """deltas, targets (P, 4), in encoded box coordinates; P may be 0 -> scalar."""
        check_boxes(deltas, targets)
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        distance = (deltas.to(dtype) - targets.to(dtype)).abs()
        is_near = distance < self.beta
        u = torch.where(is_near, distance, self.beta) / self.beta  # no clamp or relu: at beta both have slope 0
        near = self.alpha * ((u + 1 / self.b) * torch.log1p(self.b * u) - u)
        far = torch.where(is_near, 0, distance - self.beta)
        return (self.beta * near + self.gamma * far).sum() / num_pos
