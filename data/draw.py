"""Pictures of detections beside the ground truth."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import write_png
from torchvision.utils import make_grid

from data import fonts
from data.coco import CocoDataset
from detector.structures import Detections

GROUND_TRUTH = "#2ca02c"
DETECTION = "#ff7f0e"
WIDTH = 480  # pixels of one image in a picture


def validation_pictures(dataset: CocoDataset, detections: dict[int, Detections], count: int) -> Iterator[Tensor]:
    """Ground truth (left) and the detections with the highest scores (right) of `count` images spread over the set.

    `detections`: by image id, in pixels of the original image. Over the whole set, it shows as many detections as there
    are boxes: losses differ in their scale of scores, so a fixed score would not compare them.
    Yields (3, h, 2 x WIDTH) uint8.
    """
    names = dataset.class_names
    count = min(count, len(dataset))
    min_score = _score_of_rank(detections, dataset.num_boxes)
    for index in (number * len(dataset) // count for number in range(count)):
        image, target, image_id, original = dataset[index]
        zoom = WIDTH / image.shape[2]
        height = round(image.shape[1] * zoom)
        scale = torch.tensor([WIDTH / original[1], height / original[0]]).repeat(2)
        # Enlarged before anything is drawn: captions of a small image would cover it.
        image = F.interpolate(image[None].float(), size=(height, WIDTH), mode="bilinear", antialias=True)[0].byte()
        boxes, scores, labels = detections[image_id]
        shown = scores >= min_score
        captions = [f"{names[c]} {s:.2f}" for c, s in zip(labels[shown].tolist(), scores[shown].tolist())]
        truth = draw_boxes(image, target.boxes * zoom, [names[c] for c in target.labels.tolist()], GROUND_TRUTH)
        yield torch.cat([truth, draw_boxes(image, boxes[shown] * scale, captions, DETECTION)], dim=2)


def write_contact_sheet(path: Path, pictures: list[Tensor]) -> None:
    """`contact_sheet` as a PNG file."""
    write_png(contact_sheet(pictures), str(path))


def contact_sheet(pictures: list[Tensor], columns: int = 2) -> Tensor:
    """Pictures (3, h, w) uint8 of one width -> one (3, H, W) uint8, set in rows."""
    height = max(picture.shape[1] for picture in pictures)
    padded = [F.pad(picture, (0, 0, 0, height - picture.shape[1]), value=255) for picture in pictures]
    return make_grid(padded, nrow=columns, padding=6, pad_value=255)


def _score_of_rank(detections: dict[int, Detections], rank: int) -> float:
    """Score of the `rank`-th best detection of all images; infinite for rank 0, 0 where there are fewer."""
    if rank == 0:
        return float("inf")
    scores = torch.cat([of_image.scores for of_image in detections.values()])
    return scores.topk(rank).values[-1].item() if rank <= len(scores) else 0.0


def draw_boxes(image: Tensor, boxes: Tensor, captions: Sequence[str], colour: str) -> Tensor:
    """A copy of the image (3, h, w) uint8 with boxes (D, 4) in its pixels, and a caption each."""
    canvas = Image.fromarray(image.permute(1, 2, 0).numpy())
    annotate(canvas, boxes, captions, [colour] * len(captions))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def annotate(canvas: Image.Image, boxes: Tensor, captions: Sequence[str], colours: Sequence[str]) -> None:
    """Draw boxes (D, 4) in pixels with their captions and colours, larger on larger images. The first is on top."""
    pen = ImageDraw.Draw(canvas)
    longest = max(canvas.size)
    size, width = max(11, longest // 60), max(2, longest // 400)
    for box, caption, colour in reversed(list(zip(boxes.tolist(), captions, colours))):
        left, top, right, bottom = box
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
        if caption:
            parts = [(part, _font(file, size)) for part, file in fonts.stretches(caption)]
            length = sum(font.getlength(part) for part, font in parts)
            left, top = max(0, min(left, canvas.width - length)), max(0, top - size - 4)
            pen.rectangle((left, top, left + length, top + size + 4), fill=colour)
            for part, font in parts:
                pen.text((left, top + size), part, fill="black", font=font, anchor="ls")  # on one base line
                left += font.getlength(part)


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
