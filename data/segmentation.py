"""The bounds of COCO's segmentations: polygons, and masks as run-length codes (RLE)."""

import re
from collections.abc import Iterator

import numpy as np
from pycocotools import mask

from detector.images import MAX_PIXELS

MAX_VALUE = 1e9
MASK = re.compile(r"[0-o]*[0-O]")  # a compressed mask: six bits a letter; the last one ends a number


def bounds(segmentation: object) -> tuple[float, float, float, float] | None:
    """x, y, width, height of a segmentation: polygons, or masks (RLE), compressed or not; None of an empty one.

    Raises ValueError for anything else.
    """
    corners = list(_corners(segmentation))
    if not corners:
        return None
    low, high = np.array(corners).reshape(-1, 2, 2).transpose(1, 0, 2)
    (x, y), (right, bottom) = low.min(axis=0).tolist(), high.max(axis=0).tolist()
    return x, y, right - x, bottom - y


def _corners(segmentation: object) -> Iterator[tuple[float, float, float, float]]:
    """x1, y1, x2, y2 of each part."""
    if isinstance(segmentation, dict):
        yield from _corners_of_mask(segmentation)
    elif isinstance(segmentation, list) and segmentation:
        if any(isinstance(part, dict | list) for part in segmentation):
            if all(isinstance(part, list) and len(part) == 2 and _plain_numbers(part) for part in segmentation):
                segmentation = [value for part in segmentation for value in part]  # pairs x, y
            else:
                for part in segmentation:
                    yield from _corners(part)
                return
        if len(segmentation) % 2 or not _plain_numbers(segmentation):
            raise ValueError("a polygon is a list x, y, x, y, ...")
        points = np.array(segmentation, float).reshape(-1, 2)
        yield (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())
    elif segmentation is not None and segmentation != []:
        raise ValueError("neither polygons nor a mask")


def _plain_numbers(values: list) -> bool:
    return all(type(value) in (int, float) and abs(value) < MAX_VALUE for value in values)


def _corners_of_mask(segmentation: dict) -> Iterator[tuple[float, float, float, float]]:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(s) is int and 0 < s < MAX_PIXELS for s in size)):
        raise ValueError("a mask has size: [height, width]")
    if isinstance(counts, str) and MASK.fullmatch(counts):
        counts = _runs(counts)
    # pycocotools does not check its input.
    if not (isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)):
        raise ValueError("a mask's counts are a list or a compressed text")
    if sum(counts) != size[0] * size[1] or sum(counts) > MAX_PIXELS:
        raise ValueError("a mask's counts add up to its height x width")
    x, y, width, height = mask.toBbox(mask.frPyObjects({"size": size, "counts": counts}, *size)).tolist()
    if width and height:
        yield x, y, x + width, y + height


def _runs(text: str) -> list[int]:
    """The counts of a compressed mask, as pycocotools packs them: six bits a letter, differences from the third on."""
    counts: list[int] = []
    value = bits = 0
    for letter in text.encode():
        letter -= ord("0")
        value |= (letter & 0x1F) << bits
        bits += 5
        if not letter & 0x20:
            if letter & 0x10:  # negative
                value -= 1 << bits
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = bits = 0
    return counts
