"""Quality focal loss: the score of a positive learns how good its box is."""

import torch
from torch import Tensor, nn

from detector.losses.cells import power, sigmoid_softplus
from detector.losses.fused import cell_sum


class QualityFocal(nn.Module):
    """Quality focal loss.

        loss = (1 / num_pos) sum |y - p|^beta [-y log p - (1-y) log(1-p)]
        y = quality on positive cells, in practice the IoU of the predicted box with its ground truth; 0 elsewhere

    Li et al., "Generalized Focal Loss", NeurIPS 2020, arXiv 2006.04388, equation 2.
    Normalised by num_pos, the positive anchors of all processes. No gradient flows into the quality.

        class_loss = QualityFocal()
        labels = torch.where(positive, gt_labels[gt_index], num_classes)  # (N,), num_classes = background
        quality = iou(boxes, gt_boxes[gt_index])  # (N,), of the decoded boxes, read where positive
        loss = class_loss(logits, labels, ~ignored, positive.sum().clamp(min=1), quality)

    Raises ValueError where beta is below 1 (its gradient would be infinite at p = y) or not finite.
    """

    takes_quality = True

    def __init__(self, beta: float = 2.0) -> None:
        super().__init__()
        if not 1 <= beta < float("inf"):
            raise ValueError(f"QualityFocal: beta is {beta}; it must be finite and at least 1")
        self.beta = beta

    def forward(
        self, logits: Tensor, labels: Tensor, valid: Tensor, num_pos: Tensor | float, quality: Tensor | None = None
    ) -> Tensor:
        """logits (N, C), labels (N,) int64 with C = background, valid (N,) bool, quality (N,) in [0, 1] -> scalar.

        Without `quality`, every positive has quality 1.
        """
        if quality is None:
            quality = torch.ones_like(labels, dtype=torch.float32)
        return cell_sum(_curve, logits, labels, valid, self.beta, num_pos=num_pos, quality=quality.detach())


def _curve(z: Tensor, is_positive: Tensor | None, quality: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    """|p - m|^beta (softplus(z) - m z) and its derivative, with p = sigmoid(z).

    m is the target of p: 1 - quality for a positive, 0 for background.
    """
    p, softplus = sigmoid_softplus(z)
    lack = 0.0 if is_positive is None or quality is None else torch.where(is_positive, 1 - quality, 0.0)
    off = p - lack
    distance = torch.abs(off)
    entropy = softplus - lack * z
    towards = beta * power(distance, beta - 1) * torch.sign(off) * p * (1 - p)
    modulator = power(distance, beta)
    return modulator * entropy, towards * entropy + modulator * off
