"""Predictions -> Detections: score, top-k, decode, clip, NMS. All in float32."""

import math

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from detector import boxes as box_ops
from detector.box_coder import BoxCoder
from detector.structures import Detections, Predictions


class Postprocess:
    """What RetinaNet does with its outputs at test time.

    Args:
        score_threshold: cells that score no more than this are dropped before anything is sorted or decoded
        top_k: best cells kept of each pyramid level of an image, before NMS
        nms_iou: of two boxes of one class that overlap more than this, the better stays
        max_detections: kept for an image
    """

    def __init__(
        self,
        coder: BoxCoder,
        score_threshold: float = 0.05,
        top_k: int = 1000,
        nms_iou: float = 0.5,
        max_detections: int = 100,
    ):
        self.coder = coder
        self.score_threshold, self.top_k = score_threshold, top_k
        self.nms_iou, self.max_detections = nms_iou, max_detections

    @torch.no_grad()
    def __call__(self, predictions: Predictions, sizes: list[tuple[int, int]]) -> list[Detections]:
        """Sizes: (height, width) of each image inside its padding -> Detections of each, in input pixels."""
        return [
            self._one_image(logits.float(), deltas, predictions.anchors, predictions.levels, size)
            for logits, deltas, size in zip(predictions.logits, predictions.deltas, sizes)
        ]

    def _one_image(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, levels: tuple[int, ...], size: tuple[int, int]
    ) -> Detections:
        num_classes = logits.shape[1]
        # The sigmoid is monotonous: compare logits, and take the sigmoid of the few that are left.
        low = math.log(self.score_threshold / (1 - self.score_threshold)) if self.score_threshold > 0 else -math.inf
        cells, start = [], 0
        for count in levels:
            level = logits[start : start + count].flatten()
            candidates = torch.nonzero(level > low).squeeze(1)
            best = level[candidates].topk(min(self.top_k, len(candidates))).indices
            cells.append(candidates[best] + start * num_classes)
            start += count
        cell = torch.cat(cells)
        anchor, label = cell // num_classes, cell % num_classes
        scores = logits.flatten()[cell].sigmoid()
        boxes = box_ops.clip(self.coder.decode(deltas[anchor], anchors[anchor]), size)
        keep = batched_nms(boxes, scores, label, self.nms_iou)[: self.max_detections]
        return Detections(boxes[keep], scores[keep], label[keep])
