"""Predictions -> Detections: score, top-k, decode, clip, NMS. All in float32."""

import math

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from detector import boxes as box_ops
from detector.box_coder import BoxCoder
from detector.structures import Detections, Predictions


class NonFiniteOutput(FloatingPointError):
    """A model's output is NaN or infinite; `images` are the indices in the batch."""

    reason = (
        "the model's output is not finite: it diverged in training (take an earlier checkpoint, or train with a lower "
        "solver.lr or with solver.clip_norm), or half precision overflows (set precision=float32)"
    )

    def __init__(self, images: list[int]):
        super().__init__(self.reason)
        self.images = images


class Postprocess:
    """From RetinaNet's outputs to detections.

    Args:
        score_threshold: cells that do not exceed it are dropped before anything is sorted or decoded
        top_k: best cells kept of each pyramid level of an image, before NMS
        nms_iou: if two boxes of a class overlap more than this, only the one with the higher score is kept
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
    def __call__(self, predictions: Predictions, sizes: Tensor | list[tuple[int, int]]) -> list[Detections]:
        """Sizes (B, 2): (height, width) inside the padding -> each image's Detections, in pixels of the resized image.

        Raises NonFiniteOutput if a logit or delta is NaN or infinite. Without this check a diverged model would
        silently find nothing, because NaN passes no threshold.
        """
        logits = predictions.logits.float()
        num_images, num_anchors, num_classes = logits.shape
        # The sigmoid is monotonic: compare logits, and take the sigmoid of the few that remain.
        low = math.log(self.score_threshold / (1 - self.score_threshold)) if self.score_threshold > 0 else -math.inf
        cell = (logits.flatten() > low).nonzero().squeeze(1)
        anchor = cell // num_classes % num_anchors
        ends = torch.tensor(predictions.levels, device=logits.device).cumsum(0)
        level = torch.bucketize(anchor, ends, right=True)
        image = cell // (num_classes * num_anchors)
        best = _best(logits.flatten()[cell], image * len(ends) + level, self.top_k)

        cell, anchor, image = cell[best], anchor[best], image[best]
        label, scores = cell % num_classes, logits.flatten()[cell].sigmoid()
        limits = torch.as_tensor(sizes, device=logits.device)[image]
        boxes = self.coder.decode(predictions.deltas[image, anchor], predictions.anchors[anchor])
        boxes = box_ops.clip(boxes, limits.unbind(1))
        # In float64: batched_nms separates groups by large offsets, which would round float32 pixels.
        keep = batched_nms(boxes.double(), scores.double(), image * num_classes + label, self.nms_iou)
        keep = keep[_best(scores[keep], image[keep], self.max_detections)]
        finite = _finite(logits) & _finite(predictions.deltas)
        counts, finite = torch.stack([image[keep].bincount(minlength=num_images), finite]).tolist()  # one copy for both
        if not all(finite):
            raise NonFiniteOutput([index for index, is_finite in enumerate(finite) if not is_finite])
        return [Detections(*parts) for parts in zip(*(values[keep].split(counts) for values in (boxes, scores, label)))]


def _finite(values: Tensor) -> Tensor:
    """Whether all values (B, ...) of each image are finite, (B,) bool. Unlike isfinite(), it makes no copy of them."""
    values = values.flatten(1)
    return values.amax(1).isfinite() & values.amin(1).isfinite()  # both are NaN if a value is


def _best(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values (N,) of each group (N,), best first, group by group."""
    order = values.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    ordered = groups[order]
    first = torch.searchsorted(ordered, ordered)  # where the group starts
    return order[torch.arange(len(order), device=order.device) - first < count]
