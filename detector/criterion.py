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
        gt_index, positive, ignored = (torch.stack(values) for values in zip(*assignments))  # (B, A) each
        labels = torch.stack([_labels(a, t, num_classes) for a, t in zip(assignments, targets)])
        num_pos = distributed.all_sum(positive.sum()).clamp(min=1)

        logits = predictions.logits.float().flatten(0, 1)
        class_loss = self.class_loss(logits, labels.flatten(), ~ignored.flatten(), num_pos)

        image, anchor = positive.nonzero(as_tuple=True)
        counts = torch.tensor([0] + [len(t.boxes) for t in targets[:-1]], device=gt_index.device)
        in_batch = gt_index[image, anchor] + counts.cumsum(0)[image]  # position among the boxes of all images
        matched = torch.cat([t.boxes for t in targets])[in_batch]
        box_targets = self.coder.encode(matched, predictions.anchors[anchor])
        box_loss = self.box_loss(predictions.deltas[image, anchor].float(), box_targets, num_pos)

        return Losses(
            terms={"class": self.class_weight * class_loss, "box": self.box_weight * box_loss},
            diagnostics={
                "true_class_probability": _true_class_probability(predictions.logits, labels, image, anchor, num_pos),
                "positives_per_image": positive.sum() / len(positive),
            },
        )


def _labels(assignment: Assignment, target: Target, num_classes: int) -> Tensor:
    """(A,) class of each anchor; background, and whatever is ignored, is `num_classes`."""
    if len(target.labels) == 0:
        return torch.full_like(assignment.gt_index, num_classes)
    return torch.where(assignment.positive, target.labels[assignment.gt_index], num_classes)


@torch.no_grad()
def _true_class_probability(logits: Tensor, labels: Tensor, image: Tensor, anchor: Tensor, num_pos: Tensor) -> Tensor:
    """Mean over all positives of all processes; this process's share of it, scaled to be averaged over them."""
    probability = logits[image, anchor, labels[image, anchor]].float().sigmoid()
    return probability.sum() / num_pos * distributed.world_size()
