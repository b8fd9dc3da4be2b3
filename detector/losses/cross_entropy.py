"""Binary cross entropy over every cell: the baseline."""

from torch import Tensor, nn

from detector.losses.cells import sigmoid_softplus
from detector.losses.fused import cell_sum


class CrossEntropy(nn.Module):
    """Binary cross entropy, optionally alpha-balanced.

        loss = (1 / num_pos) sum w [-p* log p - (1-p*) log(1-p)]
        w = 1, or with alpha: alpha where p* = 1, 1 - alpha where p* = 0

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002, equations 1 and 3.
    Normalised by num_pos, the positive anchors of all processes. Start the class bias at a prior of 0.01:
    with a zero bias this loss diverges (there, section 5.1).

        class_loss = CrossEntropy()
        labels = torch.where(positive, gt_labels[gt_index], num_classes)  # (N,), num_classes = background
        loss = class_loss(logits, labels, ~ignored, positive.sum().clamp(min=1))

    Raises ValueError where alpha is outside [0, 1].
    """

    def __init__(self, alpha: float | None = None) -> None:
        super().__init__()
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"CrossEntropy: alpha is {alpha}; it must be in [0, 1], or None for no balancing")
        self.alpha = alpha

    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor, num_pos: Tensor | float) -> Tensor:
        """logits (N, C), labels (N,) int64 with C = background, valid (N,) bool -> scalar."""
        negative, positive = (1.0, 1.0) if self.alpha is None else (1 - self.alpha, self.alpha)
        return cell_sum(
            _curve, logits, labels, valid, num_pos=num_pos, negative_weight=negative, positive_weight=positive
        )


def _curve(z: Tensor, is_positive: Tensor | None) -> tuple[Tensor, Tensor]:
    norm, softplus = sigmoid_softplus(z)
    return softplus, norm
