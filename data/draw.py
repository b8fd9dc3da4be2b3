"""Pictures of detections beside the ground truth."""

import math
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
SIDE = 800  # `enlarge` makes the longer side of an image at least so many pixels
GAP = 6  # pixels between images


def validation_pictures(
    dataset: CocoDataset, detections: dict[int, Detections], count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The labels, and the detections with the highest scores, of `count` images spread over the set.

    `detections`: by image id, in pixels of the original image. Over the whole set, it shows as many detections as there
    are boxes: losses differ in their scale of scores, so a fixed score would not compare them.
    Yields two pictures (3, h, WIDTH) uint8 of one size, each with a title.
    """
    names = dataset.class_names
    count = min(count, len(dataset))
    min_score = _score_of_rank(detections, dataset.num_boxes)
    for index in (number * len(dataset) // count for number in range(count)):
        image, target, image_id, original = dataset[index]
        zoom = WIDTH / image.shape[2]
        image = _resize(image, zoom)
        scale = torch.tensor([WIDTH / original[1], image.shape[1] / original[0]]).repeat(2)
        boxes, scores, labels = detections[image_id]
        shown = scores >= min_score
        captions = [f"{names[c]} {s:.2f}" for c, s in zip(labels[shown].tolist(), scores[shown].tolist())]
        truth = draw_boxes(image, target.boxes * zoom, [names[c] for c in target.labels.tolist()], GROUND_TRUTH)
        found = draw_boxes(image, boxes[shown] * scale, captions, DETECTION)
        words = f"detections with score >= {min_score:.2f}: as many as labels in the set"
        yield titled(truth, f"labels of {dataset.file_names[index]}"), titled(found, words)


def enlarge(image: Tensor) -> tuple[Tensor, float]:
    """A copy of an image (3, h, w) uint8 large enough for captions, which would hide a small one, and the zoom."""
    zoom = max(1.0, SIDE / max(image.shape[1:]))
    return _resize(image, zoom), zoom


def _resize(image: Tensor, zoom: float) -> Tensor:
    size = [round(side * zoom) for side in image.shape[1:]]
    return F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0].byte()


def titled(image: Tensor, title: str) -> Tensor:
    """An image (3, h, w) uint8 below a strip with a title, which is cut off where the image ends."""
    size = max(12, image.shape[2] // 40)
    canvas = _canvas(F.pad(image, (0, 0, size + 6, 0), value=255))
    _write(ImageDraw.Draw(canvas), (2, size + 1), _parts(title, size))
    return _pixels(canvas)


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """Images (3, h, w) uint8 of one height -> one (3, h, W), with gaps."""
    return torch.cat([F.pad(image, (GAP * bool(number), 0), value=255) for number, image in enumerate(images)], dim=2)


def write_contact_sheet(path: Path, pictures: list[Tensor]) -> None:
    """`contact_sheet` as a PNG file."""
    write_png(contact_sheet(pictures), str(path))


def contact_sheet(pictures: list[Tensor]) -> Tensor:
    """Pictures (3, h, w) uint8 of one width -> one (3, H, W) uint8, set in rows of two."""
    height = max(picture.shape[1] for picture in pictures)
    padded = [F.pad(picture, (0, 0, 0, height - picture.shape[1]), value=255) for picture in pictures]
    return make_grid(padded, nrow=2, padding=GAP, pad_value=255)


def _score_of_rank(detections: dict[int, Detections], rank: int) -> float:
    """Score of the `rank`-th best detection of all images; infinite for rank 0, 0 where there are fewer."""
    if rank == 0:
        return float("inf")
    scores = torch.cat([of_image.scores for of_image in detections.values()])
    return scores.topk(rank).values[-1].item() if rank <= len(scores) else 0.0


def draw_boxes(image: Tensor, boxes: Tensor, captions: Sequence[str], colours: str | Sequence[str]) -> Tensor:
    """`annotate` a copy of the image (3, h, w) uint8; `colours`: of each box, or one for all."""
    canvas = _canvas(image)
    annotate(canvas, boxes, captions, [colours] * len(captions) if isinstance(colours, str) else colours)
    return _pixels(canvas)


def annotate(canvas: Image.Image, boxes: Tensor, captions: Sequence[str], colours: Sequence[str]) -> None:
    """Draw boxes (D, 4) in pixels, and over them their captions, larger on larger images. The first is on top.

    A caption is left out if it would cover an earlier one. Give the best score first.
    """
    pen = ImageDraw.Draw(canvas)
    longest = max(canvas.size)
    size, width = max(11, longest // 60), max(2, longest // 400)
    entries = list(zip(boxes.tolist(), captions, colours))
    for (left, top, right, bottom), _, colour in reversed(entries):
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
    covered: list[tuple[int, int, int, int]] = []
    for (left, top, _, _), caption, colour in entries:
        parts = _parts(caption, size)
        length = math.ceil(sum(font.getlength(part) for part, font in parts))
        x, y = max(0, min(round(left), canvas.width - length)), max(0, round(top) - size - 4)
        area = x, y, x + length, y + size + 4
        if caption and not any(_overlap(area, other) for other in covered):
            covered.append(area)
            pen.rectangle(area, fill=colour)
            _write(pen, (x, y + size), parts)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Whether two areas, each with its last column and row, share a pixel."""
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _parts(text: str, size: int) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    return [(part, _font(file, size)) for part, file in fonts.stretches(text)]


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[float, float], parts: list[tuple[str, ImageFont.FreeTypeFont]]
) -> None:
    """Write from `place`, the left end of the base line."""
    x, y = place
    for part, font in parts:
        pen.text((x, y), part, fill="black", font=font, anchor="ls")
        x += font.getlength(part)


def _canvas(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _pixels(canvas: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
