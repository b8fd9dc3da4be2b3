"""Label files of YOLO, VOC and labelme -> boxes; see scripts/convert.py for what each format means.

A reader gets a file, the set's classes and the notes, to which it adds what it leaves out. It raises UserError if it
cannot use the file, also if the file has objects but no box, because its image is not empty.
"""

import json
import math
import re
from collections.abc import Sized
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from detector.errors import UserError
from scripts.conversion.found_files import Notes

# The shapes of labelme and similar tools that outline an object. The box is the bounds of the points.
OUTLINES = ("rectangle", "polygon", "mask", "rotation", "quadrilateral", "cuboid", "oriented_rectangle", "oriented_box")


class Box(NamedTuple):
    name: str
    sides: tuple[float, float, float, float]  # x, y, width, height
    crowd: bool = False
    area: float | None = None  # of the object itself, if known


class Labels(NamedTuple):
    """The labels of an image."""

    boxes: list[Box]
    size: tuple[int, int] | None = None  # (width, height) according to the label file
    relative: bool = False  # sides are fractions of the image's, else pixels

    def boxes_in(self, size: tuple[int, int]) -> list[Box]:
        """The boxes in pixels of an image of this (width, height)."""
        if not self.relative:
            return self.boxes
        across, down = size
        return [
            box._replace(sides=(x * across, y * down, w * across, h * down))
            for box in self.boxes
            for x, y, w, h in (box.sides,)
        ]


class Classes(NamedTuple):
    """The class names and keypoints of a YOLO set."""

    names: list[str]
    keypoints: tuple[int, int] | None = None  # (number of keypoints, numbers for each)


def read_yolo(file: Path, classes: Classes, notes: Notes) -> Labels:
    boxes = []
    text = text_of(file)
    for number, line in enumerate(text.splitlines(), start=1):
        values = line.split()
        try:
            label, numbers = float(values[0]), [float(value) for value in values[1:]]
            if label < 0 or not label.is_integer():
                raise ValueError
            sides = sides_of(numbers, classes.keypoints)
        except (ValueError, IndexError, OverflowError):
            if values:
                notes["left out: lines that are not class cx cy w h, a polygon or keypoints"].append(
                    f"{file}:{number}: {line[:60]!r}"
                )
            continue
        if classes.keypoints is None and len(numbers) > 5 and has_keypoints(numbers):
            notes["lines read as box and keypoints, because every third number is a visibility of 0, 1 or 2"].append(
                f"{file}:{number}"
            )
        label = int(label)
        if label >= len(classes.names):
            notes["boxes of a class without a name; add it to data.yaml or classes.txt"].append(
                f"{file}:{number}: {label}"
            )
        boxes.append(Box(classes.names[label] if label < len(classes.names) else f"class {label}", sides))
    return Labels(some(boxes, text.strip(), file), relative=True)


def sides_of(numbers: list[float], keypoints: tuple[int, int] | None) -> tuple[float, float, float, float]:
    """x, y, width, height from the numbers after the class in a YOLO line. Raises ValueError if no format fits."""
    count = len(numbers)
    if keypoints is not None:
        points = 4 + keypoints[0] * keypoints[1]
        is_box = count in (4, 5, points, points + 1)  # a confidence may follow
    else:
        is_box = count in (4, 5) or has_keypoints(numbers)
    if is_box:
        cx, cy, width, height = numbers[:4]
        return cx - width / 2, cy - height / 2, width, height
    if keypoints is not None or count < 6 or (count % 2 and count != 9):  # 9: an oriented box and a confidence
        raise ValueError
    count -= count % 2
    return bounds(numbers[0:count:2], numbers[1:count:2])


def has_keypoints(numbers: list[float]) -> bool:
    """Whether four numbers are followed by points x, y, visible, and this cannot be a polygon."""
    flags = numbers[6::3]
    may_be = len(numbers) >= 7 and len(numbers) % 3 == 1 and all(flag in (0, 1, 2) for flag in flags)
    return may_be and (len(numbers) % 2 == 1 or 2 in flags)


def read_voc(file: Path, classes: Classes, notes: Notes) -> Labels:
    """Corners as in the file. From all files together, `from_zero` decides whether they count from 0 or 1."""
    root = voc_root(file)
    stated = tuple(number(root.findtext(f"size/{side}")) or 0 for side in ("width", "height"))
    stated = stated if all(map(math.isfinite, stated)) else (0, 0)
    boxes = []
    objects = root.findall(".//object")
    for thing in objects:
        name = (thing.findtext("name") or "").strip()
        texts = [thing.findtext(f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")]
        edges = [edge for edge in map(number, texts) if edge is not None]
        if not name or len(edges) < 4:
            notes["left out: objects without a name or a box"].append(f"{file}: {name or 'no name'}")
            continue
        x1, y1, x2, y2 = edges
        if x1 > x2 or y1 > y2:
            notes["boxes whose corners were exchanged, now sorted"].append(f"{file}: {name}")
        difficult = (thing.findtext("difficult") or "").strip().lower() in ("1", "true")
        boxes.append(Box(name, bounds([x1, x2], [y1, y2]), difficult))
        if difficult:
            notes["difficult objects, neither trained on nor scored"].append(f"{file}: {name}")
    return Labels(some(boxes, objects, file), (int(stated[0]), int(stated[1])) if all(stated) else None)


def from_zero(labels: list[Labels], notes: Notes) -> bool:
    """Whether the corners of a VOC set are positions counted from 0, and not pixels counted from 1.

    They are if most boxes have fractions or enough start at 0. A few of either, as in VOC2012, are flaws of a set whose
    boxes at the border start at 1.
    """
    boxes = [box.sides for image in labels for box in image.boxes if all(map(math.isfinite, box.sides))]
    fractions = sum(not all(side.is_integer() for side in map(float, sides)) for sides in boxes)
    zeros, ones = (sum(min(sides[:2]) == start for sides in boxes) for start in (0, 1))
    if fractions * 2 > len(boxes) or zeros * 10 > ones:
        notes["corners read as counted from 0, since some are 0 or most are fractions"].append(
            f"{zeros} with a 0 and {fractions} with fractions among {len(boxes)} boxes"
        )
        return True
    if fractions or zeros:
        notes["corners read as pixels counted from 1, though some are 0 or fractions"].append(
            f"{zeros} with a 0 and {fractions} with fractions among {len(boxes)} boxes, {ones} of which start at 1"
        )
    return False


def as_pixels(labels: Labels) -> Labels:
    """The labels with corners read as pixels counted from 1, both ends included."""
    boxes = [box._replace(sides=(x - 1, y - 1, w + 1, h + 1)) for box in labels.boxes for x, y, w, h in (box.sides,)]
    return labels._replace(boxes=boxes)


def voc_root(file: Path) -> ElementTree.Element:
    declared = re.match(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""", bytes_of(file)[:200])
    encoding = declared[1].decode().lower() if declared else "utf-8"
    text = text_of(file, "gb18030" if encoding in ("gb2312", "gbk") else encoding)  # a superset of both
    if "<!ENTITY" in text:  # an entity may stand for more than memory holds
        raise UserError(f"{file}: declares entities; take these lines out")
    try:
        return ElementTree.fromstring(re.sub(r"^\s*<\?xml.*?\?>", "", text, flags=re.DOTALL))
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{file}: is not XML ({error})") from None


def read_labelme(file: Path, classes: Classes, notes: Notes) -> Labels:
    content = labelme_content(file)
    objects: dict[tuple, tuple[str, list[float], list[float]]] = {}  # the name and points of each
    for place, shape in enumerate(content["shapes"]):
        try:
            name, kind = str(shape["label"] or "").strip(), shape.get("shape_type") or "polygon"
        except (TypeError, KeyError, AttributeError):
            notes["left out: shapes without a label"].append(f"{file}: {str(shape)[:60]}")
            continue
        try:
            xs, ys = ([float(point[axis]) for point in shape["points"]] for axis in (0, 1))
            if kind == "circle":
                radius = math.hypot(xs[1] - xs[0], ys[1] - ys[0])
                xs, ys = [xs[0] - radius, xs[0] + radius], [ys[0] - radius, ys[0] + radius]
            if kind not in (*OUTLINES, "circle") or len(xs) < 2 or not name:
                raise ValueError
        except (ValueError, TypeError, KeyError, IndexError, OverflowError):
            notes["left out: shapes that outline nothing, such as points and lines"].append(f"{file}: {name} {kind}")
            continue
        group = shape.get("group_id")
        key = (name, place if group is None else str(group))
        if key in objects:
            notes["shapes of one label and group_id, joined to one box"].append(f"{file}: {name} {group}")
        _, all_xs, all_ys = objects.setdefault(key, (name, [], []))
        all_xs += xs
        all_ys += ys
    boxes = [Box(name, bounds(xs, ys)) for name, xs, ys in objects.values()]
    width, height = (number(content.get(side)) or 0 for side in ("imageWidth", "imageHeight"))
    stated = all(math.isfinite(side) and side > 0 for side in (width, height))
    return Labels(some(boxes, content["shapes"], file), (int(width), int(height)) if stated else None)


def labelme_content(file: Path) -> dict:
    try:
        content = json.loads(text_of(file))
        if not isinstance(content["shapes"], list):
            raise TypeError("shapes is no list")
        return content
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: is not labelme's ({type(error).__name__} {str(error)[:60]})") from None


def name_inside(form: str, file: Path) -> str | None:
    """The name of its image inside a label file."""
    try:
        if form == "voc":
            root = voc_root(file)
            return (root.findtext("filename") or root.findtext("path") or "").strip() or None
        if form == "labelme":
            name = labelme_content(file).get("imagePath")
            return name if isinstance(name, str) and name else None
    except UserError:  # its reader raises this again
        pass
    return None


def some(boxes: list[Box], objects: Sized, file: Path) -> list[Box]:
    if objects and not boxes:
        raise UserError(f"{file}: none of what it holds is a box")
    return boxes


def bounds(xs: list[float], ys: list[float]) -> tuple[float, float, float, float]:
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None


def bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def text_of(file: Path, encoding: str = "utf-8") -> str:
    """A text file's content. A byte order mark at its start overrides `encoding`."""
    data = bytes_of(file)
    for mark, marked in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            encoding = marked
    try:
        return data.decode(encoding)
    except (UnicodeError, LookupError):
        raise UserError(
            f"{file}: is not text in {encoding.upper()}; save it as UTF-8, as iconv -f GBK -t UTF-8 does"
        ) from None


READERS = {"yolo": read_yolo, "voc": read_voc, "labelme": read_labelme}
