"""Quality focal loss: the score of a positive is taught how good its box is."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.losses.cells import cross_entropy, label_logits, logits_against_truth, sum_cells, with_positives


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

        Without a quality every positive has 1.
        """
        z = logits_against_truth(logits, labels, valid)
        background = torch.exp(self.beta * F.logsigmoid(z)) * cross_entropy(z)
        x = label_logits(logits, labels, valid)
        y = torch.ones_like(x) if quality is None else quality.detach().to(x.dtype)[:, None]
        positive = (y - x.sigmoid()).abs() ** self.beta * (cross_entropy(x) - y * x)
        return sum_cells(with_positives(background, labels, positive), valid) / num_pos
