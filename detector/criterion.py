"""Joins assigner, box coder and losses; they meet nowhere else."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from detector import boxes as box_ops
from detector import distributed
from detector.assigner import ATSSAssigner, IoUAssigner, groups
from detector.box_coder import BoxCoder
from detector.structures import Losses, Predictions, Target


class Criterion(nn.Module):
    """Predictions and targets of a batch -> Losses.

    Each loss is called once, on all images and levels joined, unless its `scope` is "level": then once for each
    level, and the values are added up. Losses and boxes are float32 whatever the model ran in. The losses' state (GHM's
    moving averages) moves in training mode only, and is saved with this module's state dict.

    On a GPU nothing waits for the device: see Matches.
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
        matches = self.match(predictions, targets)
        deltas = predictions.deltas.flatten(0, 1)[matches.rows].float()
        return Losses(
            terms={
                "class": self.class_weight * self._class_loss(predictions, matches, deltas.detach()),
                "box": self.box_weight * self._box_loss(predictions, matches, deltas),
            },
            diagnostics={
                "true_class_probability": _true_class_probability(predictions.logits, matches),
                "positives_per_image": matches.positive.sum() / len(matches.labels),
            },
        )

    def _class_loss(self, predictions: Predictions, matches: "Matches", deltas: Tensor) -> Tensor:
        cells = [predictions.logits, matches.labels, matches.valid]
        if getattr(self.class_loss, "takes_quality", False):
            iou = box_ops.iou_of_pairs(self.coder.decode(deltas, matches.anchors), matches.boxes)
            quality = iou.new_zeros(matches.labels.numel())
            quality[matches.rows] = iou if matches.is_positive is None else torch.where(matches.is_positive, iou, 0)
            cells.append(quality.view_as(matches.labels))
        parts = predictions.levels if _by_level(self.class_loss) else (sum(predictions.levels),)
        return sum(
            self.class_loss(
                *(value.flatten(0, 1) for value in part[:3]), matches.num_pos, *(q.flatten() for q in part[3:])
            )
            for part in zip(*(value.split(parts, dim=1) for value in cells))
        )

    def _box_loss(self, predictions: Predictions, matches: "Matches", deltas: Tensor) -> Tensor:
        is_positive = matches.is_positive
        if is_positive is not None:
            deltas = torch.where(is_positive[:, None], deltas, 0)
        if getattr(self.box_loss, "takes_boxes", False):
            predicted, truth = self.coder.decode(deltas, matches.anchors), matches.boxes
        else:
            predicted, truth = deltas, self.coder.encode(matches.boxes, matches.anchors)
        if is_positive is not None:  # the other rows are given as perfect: their loss and gradient are 0
            truth = torch.where(is_positive[:, None], truth, predicted.detach())
        masks = [is_positive]
        if _by_level(self.box_loss):
            level = torch.cat([matches.labels.new_full((count,), i) for i, count in enumerate(predictions.levels)])
            level = level.repeat(len(matches.labels))[matches.rows]
            of_level = [level == i for i in range(len(predictions.levels))]
            masks = [mask if is_positive is None else mask & is_positive for mask in of_level]
        if getattr(self.box_loss, "takes_valid", False):
            return sum(self.box_loss(predicted, truth, matches.num_pos, mask) for mask in masks)
        return self.box_loss(predicted, truth, matches.num_pos)

    def match(self, predictions: Predictions, targets: list[Target]) -> "Matches":
        """Which box each anchor of each image learns."""
        anchors, grid = predictions.anchors, (predictions.levels, predictions.per_cell)
        # Of equal length; with a box at least, since anchors without any point at one too.
        nothing = Target(anchors.new_zeros(1, 4), anchors.new_zeros(1, dtype=torch.int64))
        boxes, classes = (pad_sequence(list(values), batch_first=True) for values in zip(*targets, nothing))
        parts = groups(anchors, boxes[:-1], [len(target.labels) for target in targets])
        assignments = [self.assigner(anchors, part, *grid) for part in parts]
        gt_index, positive, ignored = (torch.cat(values) for values in zip(*assignments))  # (B, A) each
        num_pos = distributed.all_sum(positive.sum()).clamp(min=1)
        gt_index += torch.arange(len(targets), device=gt_index.device)[:, None] * boxes.shape[1]
        labels = torch.where(positive, classes.flatten()[gt_index], predictions.logits.shape[-1])
        rows: Tensor | slice = slice(None)
        is_positive: Tensor | None = positive.flatten()
        if _may_wait(labels.device):
            rows, is_positive = positive.flatten().nonzero().squeeze(1), None
        anchors = anchors.repeat(len(targets), 1)[rows]
        boxes = boxes.flatten(0, 1)[gt_index.flatten()[rows]]
        return Matches(labels, ~ignored, positive, num_pos, rows, is_positive, anchors, boxes)


class Matches(NamedTuple):
    """The anchors of a batch, and the class and box that each learns.

    Boxes are learnt by P anchors, `rows` of the B x A. On a CPU these are the positives. On other devices they are all
    anchors, and `is_positive` marks the positives, because counting them would wait for the device.
    """

    labels: Tensor  # (B, A) int64, C for background and ignored anchors
    valid: Tensor  # (B, A) bool, not ignored
    positive: Tensor  # (B, A) bool
    num_pos: Tensor  # positive anchors of all processes, at least 1
    rows: Tensor | slice  # (P,)
    is_positive: Tensor | None  # (P,) bool; None: all are
    anchors: Tensor  # (P, 4)
    boxes: Tensor  # (P, 4) their ground truth; any box where not positive


def _may_wait(device: torch.device) -> bool:
    return device.type == "cpu"


def _by_level(loss: nn.Module) -> bool:
    return getattr(loss, "scope", "batch") == "level"


@torch.no_grad()
def _true_class_probability(logits: Tensor, matches: Matches) -> Tensor:
    """Mean over all positives of all processes; this process's share of it, scaled to be averaged over them."""
    label = matches.labels.flatten()[matches.rows].clamp(max=logits.shape[-1] - 1)  # background has no logit
    logit = logits.flatten(0, 1)[matches.rows].gather(1, label[:, None]).squeeze(1)
    probability = logit.float().sigmoid()
    if matches.is_positive is not None:
        probability = torch.where(matches.is_positive, probability, 0)
    return probability.sum() / matches.num_pos * distributed.world_size()
