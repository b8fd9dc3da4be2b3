"""Joins assigner, box coder and losses; they meet nowhere else."""

import torch
from torch import Tensor, nn

from detector import distributed
from detector.assigner import IoUAssigner
from detector.box_coder import BoxCoder
from detector.structures import Assignment, Losses, Predictions, Target


class Criterion(nn.Module):
    """Predictions and targets of a batch -> Losses.

    Each loss is called once, on all images and levels joined: per-level calls would be another loss with
    another scale. Everything is float32 whatever the model ran in. The losses' state (GHM's moving averages)
    moves in training mode only, and is saved with this module's state dict.
    """

    def __init__(
        self,
        assigner: IoUAssigner,
        coder: BoxCoder,
        class_loss: nn.Module,
        box_loss: nn.Module,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
    ):
        super().__init__()
        self.assigner, self.coder = assigner, coder
        self.class_loss, self.box_loss = class_loss, box_loss
        self.class_weight, self.box_weight = class_weight, box_weight

    def forward(self, predictions: Predictions, targets: list[Target]) -> Losses:
        """Targets on the predictions' device, one for each image."""
        num_classes = predictions.logits.shape[-1]
        assignments = [self.assigner(predictions.anchors, target.boxes) for target in targets]
        positive = torch.stack([a.positive for a in assignments])  # (B, A)
        valid = ~torch.stack([a.ignored for a in assignments])
        labels = torch.stack([_labels(a, t, num_classes) for a, t in zip(assignments, targets)])
        num_pos = distributed.all_sum(positive.sum()).clamp(min=1)

        logits = predictions.logits.float().flatten(0, 1)
        class_loss = self.class_loss(logits, labels.flatten(), valid.flatten(), num_pos)

        image, anchor = positive.nonzero(as_tuple=True)
        matched = torch.cat([t.boxes[a.gt_index[a.positive]] for a, t in zip(assignments, targets)])
        box_targets = self.coder.encode(matched, predictions.anchors[anchor])
        box_loss = self.box_loss(predictions.deltas[image, anchor].float(), box_targets, num_pos)

        return Losses(
            terms={"class": self.class_weight * class_loss, "box": self.box_weight * box_loss},
            diagnostics=_diagnostics(logits.detach(), labels.flatten(), positive),
        )


def _labels(assignment: Assignment, target: Target, num_classes: int) -> Tensor:
    """(A,) class of each anchor; background, and whatever is ignored, is `num_classes`."""
    if len(target.labels) == 0:
        return torch.full_like(assignment.gt_index, num_classes)
    return torch.where(assignment.positive, target.labels[assignment.gt_index], num_classes)


def _diagnostics(logits: Tensor, labels: Tensor, positive: Tensor) -> dict[str, Tensor]:
    """What means the same whatever the loss: of this process's batch, detached."""
    positive_rows = positive.flatten().nonzero().squeeze(1)
    true_class = logits[positive_rows, labels[positive_rows]].sigmoid()
    return {
        "true_class_probability": true_class.sum() / max(len(positive_rows), 1),
        "positives_per_image": positive.sum() / len(positive),
    }
