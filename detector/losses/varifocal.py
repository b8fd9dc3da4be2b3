"""Varifocal loss: positives weigh by how good their box is, easy background is turned down."""

import torch
from torch import Tensor, nn

from detector.losses.cells import power, sigmoid_softplus
from detector.losses.checks import check_cells
from detector.losses.fused import cell_sum


class Varifocal(nn.Module):
    """Varifocal loss.

        loss = (1 / num_pos) sum  q [-q log p - (1-q) log(1-p)]  where q > 0,  -alpha p^gamma log(1-p)  where q = 0
        q = quality on positive cells, in practice the IoU of the predicted box with its ground truth; 0 elsewhere

    Zhang et al., "VarifocalNet", CVPR 2021, arXiv 2008.13367, equation 2.
    Normalised by num_pos, the positive anchors of all processes. No gradient flows into the quality.

        class_loss = Varifocal()
        labels = torch.where(positive, gt_labels[gt_index], num_classes)  # (N,), num_classes = background
        quality = iou(boxes, gt_boxes[gt_index])  # (N,), of the decoded boxes, read where positive
        loss = class_loss(logits, labels, ~ignored, positive.sum().clamp(min=1), quality)

    Raises ValueError where alpha or gamma is negative or not finite.
    """

    takes_quality = True

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("gamma", gamma)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"Varifocal: {name} is {value}; it must be finite and at least 0")
        self.alpha = alpha
        self.gamma = gamma

    def forward(
        self, logits: Tensor, labels: Tensor, valid: Tensor, num_pos: Tensor | float, quality: Tensor | None = None
    ) -> Tensor:
        """logits (N, C), labels (N,) int64 with C = background, valid (N,) bool, quality (N,) in [0, 1] -> scalar.

        Without `quality`, every positive has quality 1.
        """
        if quality is None:
            quality = torch.ones_like(labels, dtype=torch.float32)
        check_cells(logits, labels, valid, quality)  # before other shapes broadcast
        # An anchor whose box misses its object altogether is background.
        labels = torch.where(quality <= 0, logits.shape[1], labels)  # not NaN, which has to reach the loss
        options = self.alpha, self.gamma
        return cell_sum(_curve, logits, labels, valid, *options, num_pos=num_pos, quality=quality.detach())


def _curve(
    z: Tensor, is_positive: Tensor | None, quality: Tensor | None, alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """Background: alpha p^gamma softplus(z). Positives: q (softplus(z) - (1 - q) z). And their derivatives."""
    p, softplus = sigmoid_softplus(z)
    modulator = alpha * power(p, gamma, z - softplus)
    value, slope = modulator * softplus, modulator * (gamma * (1 - p) * softplus + p)
    if is_positive is not None and quality is not None:
        value = torch.where(is_positive, quality * (softplus - (1 - quality) * z), value)
        slope = torch.where(is_positive, quality * (p - (1 - quality)), slope)
    return value, slope
