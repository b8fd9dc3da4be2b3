"""Joins assigner, box coder and losses; they meet nowhere else."""

from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from detector import boxes as box_ops
from detector import distributed
from detector.assigner import ATSSAssigner, IoUAssigner, split_boxes
from detector.box_coder import BoxCoder
from detector.structures import Assignment, Grid, Losses, Predictions, Target
from detector.transfer import PendingCopy


class Criterion(nn.Module):
    """Predictions and targets of a batch -> Losses.

    Each loss sums and normalises by itself: most divide by the number of positives, GHM-C by that of valid cells.
    One call of a loss gets all images and levels. With `scope` "level" it is called once for each level, and the values
    are added. Losses and boxes are float32, whatever the model's precision. The losses' state (GHM's moving averages)
    changes in training mode only, and is saved in this module's state dict.
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

    def forward(self, predictions: Predictions, targets: list[Target], matches: "Matches | None" = None) -> Losses:
        """Targets on the predictions' device, one for each image. `matches`: from `match`, if called before."""
        matches = matches or self.match(predictions, targets)
        positive_deltas = predictions.deltas.flatten(0, 1)[matches.rows].float()
        return Losses(
            terms={
                "class": self.class_weight * self._class_loss(predictions, matches, positive_deltas.detach()),
                "box": self.box_weight * self._box_loss(predictions, matches, positive_deltas),
            },
            diagnostics={
                "true_class_probability": _true_class_probability(predictions.logits, matches),
                "positives_per_image": matches.count / len(targets),
            },
        )

    def _class_loss(self, predictions: Predictions, matches: "Matches", positive_deltas: Tensor) -> Tensor:
        cells = [predictions.logits, matches.anchor_labels(predictions.logits.shape[-1]), matches.valid]
        if getattr(self.class_loss, "takes_quality", False):
            quality = positive_deltas.new_zeros(matches.valid.numel())
            decoded = self.coder.decode(positive_deltas, matches.anchors)
            quality[matches.rows] = box_ops.iou_of_pairs(decoded, matches.boxes)
            cells.append(quality.view_as(matches.valid))
        parts = predictions.levels if _by_level(self.class_loss) else (sum(predictions.levels),)
        losses = []
        for part in zip(*(value.split(parts, dim=1) for value in cells)):
            logits, labels, valid, *rest = (value.flatten(0, 1) for value in part)
            losses.append(self.class_loss(logits, labels, valid, matches.num_pos, *rest))
        return sum(losses)

    def _box_loss(self, predictions: Predictions, matches: "Matches", positive_deltas: Tensor) -> Tensor:
        if getattr(self.box_loss, "takes_boxes", False):
            predicted, truth = self.coder.decode(positive_deltas, matches.anchors), matches.boxes
        else:
            predicted, truth = positive_deltas, self.coder.encode(matches.boxes, matches.anchors)
        if not (_by_level(self.box_loss) and getattr(self.box_loss, "takes_valid", False)):
            return self.box_loss(predicted, truth, matches.num_pos)
        anchor = matches.rows % sum(predictions.levels)
        ends = zip(accumulate(predictions.levels), predictions.levels)
        of_level = [(anchor >= end - count) & (anchor < end) for end, count in ends]
        return sum(self.box_loss(predicted, truth, matches.num_pos, mask) for mask in of_level)

    def match(self, grid: Grid | Predictions, targets: list[Target]) -> "Matches":
        """The box that each anchor learns.

        On a GPU call it before the model, so the count of positives reaches the CPU before the losses need it.
        """
        anchors = grid.anchors
        boxes, labels = (pad_sequence(list(values), batch_first=True) for values in zip(*targets))
        # ATSS compares boxes with positions, so more images fit into memory at once.
        compared = anchors[:: grid.per_position] if isinstance(self.assigner, ATSSAssigner) else anchors
        parts = split_boxes(compared, boxes, [len(target.labels) for target in targets])
        assignments = [self.assigner(anchors, part, grid.levels, grid.per_position) for part in parts]
        return Matches(anchors, boxes, labels, Assignment(*(torch.cat(values) for values in zip(*assignments))))


class Matches:
    """The anchors of a batch, and the class and box that each learns.

    `valid` (not ignored) and `positive`: (B, A) bool. `num_pos`: positive anchors of all processes, at least 1.
    `count`: P, the number of this process's positive anchors, as a tensor. Of these P: `rows` (P,) among B x A,
    `labels` (P,), `boxes` and `anchors` (P, 4).
    """

    def __init__(self, anchors: Tensor, boxes: Tensor, classes: Tensor, assignment: Assignment):
        self.positive, self.valid = assignment.positive, ~assignment.ignored
        self.count = self.positive.sum()
        self.num_pos = distributed.all_sum(self.count).clamp(min=1)
        self._count_on_cpu = PendingCopy(self.count)
        self._anchors, self._boxes, self._classes, self._gt_index = anchors, boxes, classes, assignment.gt_index

    @cached_property
    def rows(self) -> Tensor:
        positive = self.positive.flatten()
        if positive.is_cuda:
            return torch.nonzero_static(positive, size=int(self._count_on_cpu.get())).squeeze(1)
        return positive.nonzero().squeeze(1)

    @cached_property
    def _learnt(self) -> tuple[Tensor, Tensor]:
        """Of each positive, the image (P,) and the index of its box in that image (P,)."""
        return self.rows // self.positive.shape[1], self._gt_index.flatten()[self.rows]

    @cached_property
    def labels(self) -> Tensor:
        return self._classes[self._learnt]

    @cached_property
    def boxes(self) -> Tensor:
        return self._boxes[self._learnt]

    @cached_property
    def anchors(self) -> Tensor:
        return self._anchors[self.rows % self.positive.shape[1]]

    def anchor_labels(self, background: int) -> Tensor:
        """(B, A) int64: the class of the positive ones, `background` elsewhere."""
        labels = self.rows.new_full((self.positive.numel(),), background)
        labels[self.rows] = self.labels
        return labels.view_as(self.positive)


def _by_level(loss: nn.Module) -> bool:
    return getattr(loss, "scope", "batch") == "level"


@torch.no_grad()
def _true_class_probability(logits: Tensor, matches: Matches) -> Tensor:
    """This process's part of the mean over all positives, so that averaging over processes gives the mean."""
    logit = logits.flatten(0, 1)[matches.rows].gather(1, matches.labels[:, None])
    return logit.float().sigmoid().sum() / matches.num_pos * distributed.world_size()
