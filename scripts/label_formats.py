"""Label files of YOLO, VOC and labelme -> boxes in pixels; see scripts/convert.py for what each format means.

A reader takes a file, the (width, height) of its upright image, the names of the classes where the format has them
apart, and the notes, to which it adds what it leaves out. UserError for a file that it can make nothing of.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image

from data.images import ORIENTATION
from detector.errors import UserError

Notes = dict[str, list[str]]  # kind of remark -> where


class Box(NamedTuple):
    name: str
    sides: tuple[float, float, float, float]  # x, y, width, height in pixels
    crowd: bool = False


class Labels(NamedTuple):
    """Of one image."""

    boxes: list[Box]
    size: tuple[int, int] | None = None  # (width, height) that the label file says


def sizes_of(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) as stored, and as the camera says that it is to be turned."""
    try:
        with Image.open(path) as image:
            stored, orientation = image.size, image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # decoders raise all kinds
        raise UserError(f"{path}: cannot be read as an image ({type(error).__name__})") from None
    return stored, stored[::-1] if orientation in (5, 6, 7, 8) else stored


def read_yolo(file: Path, size: tuple[int, int], names: list[str], notes: Notes) -> Labels:
    boxes = []
    for number, line in enumerate(text_of(file).splitlines(), start=1):
        values = line.split()
        try:
            label, numbers = int(float(values[0])), [float(value) for value in values[1:]]
            if label < 0 or len(numbers) < 4:
                raise ValueError
        except (ValueError, IndexError, OverflowError):
            if values:
                notes["left out: lines that are not class cx cy w h"].append(f"{file}:{number}: {line[:60]!r}")
            continue
        if len(numbers) >= 6 and len(numbers) % 2 == 0:  # a polygon; a box may have a confidence behind it
            box = bounds(numbers[0::2], numbers[1::2])
        else:
            cx, cy, width, height = numbers[:4]
            box = cx - width / 2, cy - height / 2, width, height
        if label >= len(names):
            notes["classes without a name"].append(f"{file}:{number}: {label}")
        name = names[label] if label < len(names) else f"class {label}"
        boxes.append(Box(name, (box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1])))
    return Labels(boxes)


def read_voc(file: Path, size: tuple[int, int], names: list[str], notes: Notes) -> Labels:
    text = text_of(file)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # an entity may stand for more than memory holds
        raise UserError(f"{file}: declares a document type; take that line out")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"{file}: is not XML ({error})") from None
    told = tuple(number(root.findtext(f"size/{side}")) or 0 for side in ("width", "height"))
    told = told if all(map(math.isfinite, told)) else (0, 0)
    boxes = []
    for thing in root.iter("object"):
        name = (thing.findtext("name") or "").strip()
        edges = [number(thing.findtext(f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")]
        if not name or None in edges:
            notes["left out: objects without a name or a box"].append(f"{file}: {name or 'no name'}")
            continue
        x1, y1, x2, y2 = edges
        boxes.append(Box(name, (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1), thing.findtext("difficult") == "1"))
        if boxes[-1].crowd:
            notes["difficult objects, neither taught nor scored"].append(f"{file}: {name}")
    return Labels(boxes, (int(told[0]), int(told[1])) if all(told) else None)


def read_labelme(file: Path, size: tuple[int, int], names: list[str], notes: Notes) -> Labels:
    try:
        content = json.loads(text_of(file))
        shapes = [(str(one["label"]), one.get("shape_type", "polygon"), one["points"]) for one in content["shapes"]]
        told = content.get("imageWidth"), content.get("imageHeight")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: is not labelme's ({type(error).__name__} {str(error)[:60]})") from None
    boxes = []
    for name, kind, points in shapes:
        try:
            xs, ys = ([float(point[axis]) for point in points] for axis in (0, 1))
            if kind == "circle":
                radius = math.hypot(xs[1] - xs[0], ys[1] - ys[0])
                xs, ys = [xs[0] - radius, xs[0] + radius], [ys[0] - radius, ys[0] + radius]
            if kind not in ("rectangle", "polygon", "circle") or len(xs) < 2 or not name.strip():
                raise ValueError
            boxes.append(Box(name.strip(), bounds(xs, ys)))
        except (ValueError, TypeError, IndexError):
            notes["left out: shapes that are no rectangle, polygon or circle"].append(f"{file}: {name} {kind}")
    return Labels(boxes, told if all(isinstance(one, int) and one > 0 for one in told) else None)


def bounds(xs: list[float], ys: list[float]) -> tuple[float, float, float, float]:
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__})") from None


READERS = {"yolo": read_yolo, "voc": read_voc, "labelme": read_labelme}
