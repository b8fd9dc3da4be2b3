"""Varifocal loss: positives weigh by how good their box is, easy background is turned down."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.losses.cells import cross_entropy, label_logits, logits_against_truth, sum_cells, with_positives


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

        Without a quality every positive has 1.
        """
        z = logits_against_truth(logits, labels, valid)
        background = self._background(z)
        x = label_logits(logits, labels, valid)
        q = torch.ones_like(x) if quality is None else quality.detach().to(x.dtype)[:, None]
        positive = torch.where(q > 0, q * (cross_entropy(x) - q * x), self._background(x))
        return sum_cells(with_positives(background, labels, positive), valid) / num_pos

    def _background(self, x: Tensor) -> Tensor:
        return self.alpha * torch.exp(self.gamma * F.logsigmoid(x)) * cross_entropy(x)
