"""Pictures of detections beside the ground truth."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, make_grid

from data.coco import CocoDataset
from detector.structures import Detections

GROUND_TRUTH = "#2ca02c"
DETECTION = "#ff7f0e"


def validation_pictures(
    dataset: CocoDataset, detections: dict[int, Detections], count: int, min_score: float = 0.3
) -> Iterator[Tensor]:
    """Ground truth (left) and detections above `min_score` (right) of `count` images spread over the set.

    `detections`: by image id, in pixels of the original image. Yields (3, h, 2 w) uint8.
    """
    names = dataset.class_names
    count = min(count, len(dataset))
    for index in (number * len(dataset) // count for number in range(count)):
        image, target, image_id, original = dataset[index]
        scale = torch.tensor([image.shape[2] / original[1], image.shape[1] / original[0]]).repeat(2)
        found = detections[image_id]
        sure = found.scores > min_score
        captions = [f"{names[c]} {s:.2f}" for c, s in zip(found.labels[sure].tolist(), found.scores[sure].tolist())]
        truth = _draw(image, target.boxes, [names[c] for c in target.labels.tolist()], GROUND_TRUTH)
        yield torch.cat([truth, _draw(image, found.boxes[sure] * scale, captions, DETECTION)], dim=2)


def contact_sheet(pictures: list[Tensor], columns: int = 2, width: int = 800) -> Tensor:
    """Pictures (3, h, w) uint8 -> one (3, H, W) uint8, each scaled to `width` and set in rows."""
    scaled = []
    for picture in pictures:
        size = (round(picture.shape[1] * width / picture.shape[2]), width)
        scaled.append(F.interpolate(picture[None].float(), size=size, mode="bilinear", antialias=True)[0].byte())
    height = max(picture.shape[1] for picture in scaled)
    padded = [F.pad(picture, (0, 0, 0, height - picture.shape[1]), value=255) for picture in scaled]
    return make_grid(padded, nrow=columns, padding=6, pad_value=255)


def _draw(image: Tensor, boxes: Tensor, captions: list[str], colour: str) -> Tensor:
    if not captions:
        return image
    # torchvision refuses a box whose corners touch once rounded; a hair of width is invisible.
    boxes = torch.cat([boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)], dim=1)
    return draw_bounding_boxes(image, boxes, captions, colors=colour, width=2, fill_labels=False)
