"""ASL1: smooth everywhere; its gradient norm shows how hard a coordinate is."""

import torch
from torch import Tensor, nn

from detector.losses.checks import check_boxes


class ASL1(nn.Module):
    """Authentic smooth L1.

        loss = (1 / num_pos) sum sqrt(d^2 + mu^2) - mu,   d = delta - target

    Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, arXiv 1811.05181.
    |d| as mu -> 0. Normalised by num_pos, the positive anchors of all processes.

        box_loss = ASL1(mu=0.02)
        targets = encode(gt_boxes[gt_index[positive]], anchors[positive])  # (P, 4)
        loss = box_loss(deltas[positive], targets, positive.sum().clamp(min=1))

    Raises ValueError where mu is not positive and finite.
    """

    def __init__(self, mu: float = 0.02) -> None:
        super().__init__()
        if not 0 < mu < float("inf"):
            raise ValueError(f"ASL1: mu is {mu}; it must be positive and finite (for mu 0 use L1)")
        self.mu = mu

    def forward(self, deltas: Tensor, targets: Tensor, num_pos: Tensor | float) -> Tensor:
        """deltas, targets (P, 4), in encoded box coordinates; P may be 0 -> scalar."""
        check_boxes(deltas, targets)
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        d = deltas.to(dtype) - targets.to(dtype)
        # hypot, because the square of a large d would overflow. At 0 its gradient is 0.
        return (torch.hypot(d, torch.full_like(d, self.mu)) - self.mu).sum() / num_pos
