"""Boxes that no annotation file should have: of another format than COCO's, or two sets of boxes for one image."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data.annotations import Annotations, shortened
from detector.errors import UserError

SAMPLED = 100_000  # boxes that are looked at, at most


def suspicion(annotations: Annotations) -> str | None:
    """The other format of the boxes, if they are almost certainly not x, y, width, height in pixels; else None."""
    rows = np.flatnonzero(~annotations.crowds)
    rows = rows[:: len(rows) // SAMPLED + 1]
    sides = annotations.boxes[rows]
    image = annotations.sizes[annotations.images[rows]][:, ::-1]  # width, height
    with_area = (sides[:, 2:] > 0).all(axis=1)
    sides, image = sides[with_area], image[with_area]
    if not len(sides):
        return None
    corner, extent = sides[:, :2], sides[:, 2:]
    if (sides >= 0).all() and (sides <= 1.01).all() and (image > 16).all():
        return (
            f"its {len(sides):,} boxes all lie in 0..1, as {shortened(sides[0].tolist())} does: they look divided "
            "by the size of the image; multiply x and width by the image's width, y and height by its height"
        )
    # Rounding and objects at the border put few boxes outside their image, and never one in five by 5% of its size.
    beyond = int((corner + extent > 1.05 * image).any(axis=1).sum())
    if beyond < 3 or beyond < 0.2 * len(sides):
        return None
    ordered, turned = (corner > -1) & (extent > corner), image[:, ::-1]
    inside = (corner >= extent / 2 - 1) & (corner + extent / 2 <= image + 1)
    for looks, fits, cure in (
        ("corners x1, y1, x2, y2", ordered & (extent <= image + 1), "write x1, y1, x2 - x1, y2 - y1"),
        ("corners y1, x1, y2, x2", ordered & (extent <= turned + 1), "write x1, y1, x2 - x1, y2 - y1"),
        ("a centre with width and height", inside, "subtract half of the width from x and half of the height from y"),
    ):
        if fits.all(axis=1).mean() > 0.99:
            return (
                f"{beyond:,} of {len(sides):,} boxes reach out of their image, and as {looks} all would be inside "
                f"it, the first {shortened(sides[0].tolist())}; COCO's are x, y, width, height: {cure}"
            )
    return None


def refuse_unequal_repeats(
    path: Path, names: Sequence[str], image_ids: Sequence[int], boxes_of: Callable[[int], list]
) -> None:
    """Raise UserError if records of one image have different boxes: each would teach the other's as background.

    boxes_of: the sorted boxes and labels of the record at an index
    """
    if len(set(names)) == len(names):
        return
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        other = first.setdefault(name, index)
        if boxes_of(index) != boxes_of(other):
            ids = f"ids {image_ids[other]} and {image_ids[index]}"
            raise UserError(
                f"{path}: {shortened(name)} is listed twice, with different boxes ({ids}); list it once with all its "
                "boxes, as scripts/convert.py coco does"
            )
