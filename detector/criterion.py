"""Joins assigner, box coder and losses; they meet nowhere else."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from detector import boxes as box_ops
from detector import distributed
from detector.assigner import ATSSAssigner, IoUAssigner
from detector.box_coder import BoxCoder
from detector.structures import Assignment, Losses, Predictions, Target


class Criterion(nn.Module):
    """Predictions and targets of a batch -> Losses.

    Each loss is called once, on all images and levels joined, unless its `scope` is "level": then once for each
    level, and the values are added up. Losses and boxes are float32 whatever the model ran in. The losses' state (GHM's
    moving averages) moves in training mode only, and is saved with this module's state dict.
    """

    def __init__(
        self,
        assigner: IoUAssigner | ATSSAssigner,
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
        labels, valid, num_pos, image, anchor, matched = self.match(predictions, targets)
        levels = predictions.levels
        deltas, anchors = predictions.deltas[image, anchor].float(), predictions.anchors[anchor]

        cells = [predictions.logits, labels, valid]
        if getattr(self.class_loss, "takes_quality", False):
            quality = predictions.anchors.new_zeros(labels.shape)
            quality[image, anchor] = box_ops.iou_of_pairs(self.coder.decode(deltas.detach(), anchors), matched)
            cells.append(quality)
        parts = levels if _by_level(self.class_loss) else (sum(levels),)
        class_losses = [
            self.class_loss(*(value.flatten(0, 1) for value in part[:3]), num_pos, *(q.flatten() for q in part[3:]))
            for part in zip(*(value.split(parts, dim=1) for value in cells))
        ]

        pair = deltas, self.coder.encode(matched, anchors)
        if getattr(self.box_loss, "takes_boxes", False):
            pair = self.coder.decode(deltas, anchors), matched
        chosen = [slice(None)]
        if _by_level(self.box_loss):
            ends = torch.tensor(levels, device=anchor.device).cumsum(0)
            level = torch.bucketize(anchor, ends, right=True)
            chosen = [level == number for number in range(len(levels))]
        box_losses = [self.box_loss(pair[0][which], pair[1][which], num_pos) for which in chosen]

        return Losses(
            terms={"class": self.class_weight * sum(class_losses), "box": self.box_weight * sum(box_losses)},
            diagnostics={
                "true_class_probability": _true_class_probability(predictions.logits, labels, image, anchor, num_pos),
                "positives_per_image": torch.tensor(len(image) / len(labels), device=labels.device),
            },
        )

    def match(self, predictions: Predictions, targets: list[Target]) -> "Matches":
        """What each anchor of each image is taught."""
        grid = (predictions.levels, predictions.per_cell)
        assignments = [self.assigner(predictions.anchors, target.boxes, *grid) for target in targets]
        gt_index, positive, ignored = (torch.stack(values) for values in zip(*assignments))  # (B, A) each
        labels = torch.stack([_labels(a, t, predictions.logits.shape[-1]) for a, t in zip(assignments, targets)])
        image, anchor = positive.nonzero(as_tuple=True)
        counts = torch.tensor([0] + [len(t.boxes) for t in targets[:-1]], device=gt_index.device)
        in_batch = gt_index[image, anchor] + counts.cumsum(0)[image]  # position among the boxes of all images
        boxes = torch.cat([t.boxes for t in targets])[in_batch]
        return Matches(labels, ~ignored, distributed.all_sum(positive.sum()).clamp(min=1), image, anchor, boxes)


class Matches(NamedTuple):
    """Anchors of a batch and what they are taught."""

    labels: Tensor  # (B, A) int64, C for background and whatever is ignored
    valid: Tensor  # (B, A) bool, not ignored
    num_pos: Tensor  # positive anchors of all processes, at least 1
    image: Tensor  # (P,) index of the image of each positive
    anchor: Tensor  # (P,) index of its anchor
    boxes: Tensor  # (P, 4) its ground truth


def _by_level(loss: nn.Module) -> bool:
    return getattr(loss, "scope", "batch") == "level"


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
