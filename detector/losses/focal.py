"""Focal loss: cross entropy that down-weights easy cells."""

from torch import Tensor, nn

from detector.losses.cells import power, sigmoid_softplus
from detector.losses.fused import cell_sum


class Focal(nn.Module):
    """Alpha-balanced focal loss.

        loss = (1 / num_pos) sum alpha_t (1 - p_t)^gamma (-log p_t)
        p_t, alpha_t = p, alpha where p* = 1;  1 - p, 1 - alpha where p* = 0

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002, equation 5.
    Normalised by num_pos, the positive anchors of all processes. gamma 0 is balanced cross entropy.

        class_loss = Focal(alpha=0.25, gamma=2.0)
        labels = torch.where(positive, gt_labels[gt_index], num_classes)  # (N,), num_classes = background
        loss = class_loss(logits, labels, ~ignored, positive.sum().clamp(min=1))

    Raises ValueError where alpha is outside [0, 1], or gamma negative or not finite.
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"Focal: alpha is {alpha}; it must be in [0, 1]")
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"Focal: gamma is {gamma}; it must be finite and at least 0")
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor, num_pos: Tensor | float) -> Tensor:
        """logits (N, C), labels (N,) int64 with C = background, valid (N,) bool -> scalar."""
        return cell_sum(
            _curve,
            logits,
            labels,
            valid,
            self.gamma,
            num_pos=num_pos,
            negative_weight=1 - self.alpha,
            positive_weight=self.alpha,
        )


def _curve(z: Tensor, is_positive: Tensor | None, gamma: float) -> tuple[Tensor, Tensor]:
    """norm^gamma softplus(z) and its derivative; norm, the gradient norm of cells.py, is sigmoid(z) = 1 - p_t."""
    norm, softplus = sigmoid_softplus(z)
    modulator = power(norm, gamma, z - softplus)
    return modulator * softplus, modulator * (gamma * (1 - norm) * softplus + norm)
