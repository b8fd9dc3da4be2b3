"""A COCO annotation file as columns: its images, classes and boxes in arrays.

A file that follows the format is decoded directly into typed records. Otherwise its records are checked one by one: a
value with one clear meaning is accepted and counted in a remark, any other is refused in one line. Polygons, the
largest part of a file, are read only if a box is missing.
"""

import json
import math
import posixpath
import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, cast

import msgspec
import numpy as np

from data.json_lists import read_lists
from data.segmentation import bounds
from detector.errors import CONTROL, UserError
from detector.images import MAX_PIXELS, image_size

MAX_ID = 2**63 - 1  # pycocotools puts ids in arrays
NO_ID = -(2**63)  # stands for a missing id
MAX_BOX, MAX_AREA = 1e9, 1e18
LISTS = ("images", "categories", "annotations")
# A file name that only leads down: not absolute; no drive, backslash, control characters or dot at a part's start.
PLAIN_NAME = re.compile(r"(?![./\\])(?!.*(?:/[./]|[\\:\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]))[^/](?:.*[^/])?")
WHOLE = re.compile(r"\s*([+-]?\d{1,40})(?:\.0*)?\s*", re.ASCII)  # a number in quotes
NUMBER = re.compile(r"\s*[+-]?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})(?:[eE][+-]?\d{1,3})?\s*", re.ASCII)

Whole = Annotated[int, msgspec.Meta(ge=-MAX_ID, le=MAX_ID)]


Sides = tuple[float, float, float, float]  # x, y, width, height


class Image(msgspec.Struct, gc=False):
    id: Whole
    file_name: str
    width: Whole  # 0 where the file does not say
    height: Whole


class Category(msgspec.Struct, gc=False):
    id: Whole
    name: str


class Box(msgspec.Struct, gc=False):
    id: Whole
    image_id: Whole
    category_id: Whole
    bbox: Sides  # NaN where the record has none
    area: float | None = None
    iscrowd: Whole = 0


Record = Image | Category | Box


@dataclass
class Annotations:
    """I images, K classes, N boxes, in the order of the file."""

    path: str
    image_ids: np.ndarray  # (I,) int64
    file_names: list[str]  # as the file writes them
    sizes: np.ndarray  # (I, 2) int64 height, width; 0 where the file does not say
    names: dict[int, str]  # category id -> name; no two are the same
    ids: np.ndarray  # (N,) int64
    images: np.ndarray  # (N,) int64, indices of their images
    categories: np.ndarray  # (N,) int64, ids
    boxes: np.ndarray  # (N, 4) float64 x, y, width, height
    areas: np.ndarray  # (N,) float64, in COCO those of the masks
    crowds: np.ndarray  # (N,) bool
    remarks: list[str]  # accepted deviations from the format, one line for each kind

    def complete_sizes(self, folder: Path, names: Sequence[str]) -> list[str]:
        """Read the sizes that are 0 from the images, which have these names in the folder; returns remarks."""
        missing = np.flatnonzero((self.sizes == 0).any(axis=1))
        if not len(missing):
            return []
        with ThreadPoolExecutor() as pool:
            self.sizes[missing] = list(pool.map(image_size, [folder / names[place] for place in missing.tolist()]))
        first = self.image_ids[missing[0]]
        return [
            f"{len(missing):,} images without width and height, which are read from the image "
            f"(the first is image id {first})"
        ]

    def document(self, places: Sequence[int] | None = None) -> dict:
        """The content of a COCO file with these annotations; with `places`, of the images at these indices only."""
        chosen = np.arange(len(self.image_ids)) if places is None else np.asarray(places, np.int64)
        rows = np.flatnonzero(np.isin(self.images, chosen))
        columns = (self.ids, self.image_ids[self.images], self.categories, self.boxes, self.areas, self.crowds)
        each = zip(*(column[rows].tolist() for column in columns))
        sides = zip(self.image_ids[chosen].tolist(), chosen.tolist(), self.sizes[chosen].tolist())
        return {
            "images": [
                {"id": number, "file_name": self.file_names[place], "width": width, "height": height}
                for number, place, (height, width) in sides
            ],
            "annotations": [
                {"id": number, "image_id": image, "category_id": k, "bbox": box, "area": area, "iscrowd": int(crowd)}
                for number, image, k, box, area, crowd in each
            ],
            "categories": [{"id": number, "name": name} for number, name in self.names.items()],
        }


def load_annotations(path: str | Path) -> Annotations:
    """Read a COCO annotation file. Raises UserError, with record, value and cure, for ambiguous values."""
    try:
        with open(path, "rb") as file:
            reader = _Reader(path)
            for name, part in read_lists(file, LISTS):
                reader.add(name, part)
            return reader.result()
    except OSError as error:
        raise UserError(f"{path}: cannot read the annotation file ({error.strerror}); correct its path") from None
    except (ValueError, RecursionError):
        pass  # another encoding, or broken: Python's own parser reads it or explains the error
    try:
        document = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); export or download the file again") from None
    return parse_annotations(document, path)


def parse_annotations(document: object, path: str | Path = "annotations") -> Annotations:
    """Like `load_annotations` for a file with this content."""
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a {type(document).__name__}, not an object; give a COCO annotation file")
    reader = _Reader(path)
    for name in LISTS:
        if not isinstance(document.get(name), list):
            raise UserError(f"{path}: has no list {name!r}; give a COCO file with images, annotations and categories")
        reader.add(name, document[name])
    return reader.result()


class _Column:
    """Joins parts to an array or a list, without a second copy in memory, as np.concatenate would make."""

    def __init__(self) -> None:
        self._list: list = []
        self._array: array | None = None

    def add(self, values: np.ndarray | list) -> None:
        if isinstance(values, list):
            self._list += values
            return
        if self._array is None:
            self._array, self._shape = array(values.dtype.char), values.shape[1:]
        self._array.frombytes(values.tobytes())

    @property
    def values(self) -> np.ndarray | list:
        if self._array is None:
            return self._list
        return np.frombuffer(self._array, self._array.typecode).reshape(-1, *self._shape)


class _Flaw(Exception):
    """A flaw of a record, and what to do about it."""


class _Reader:
    """Turns records into columns, and counts the deviations from the format that are accepted."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.where = ""  # the current record
        self.read = dict.fromkeys(LISTS, 0)  # records
        self.columns: dict[str, list[_Column]] = {}

    def add(self, name: str, part: bytes | list) -> None:
        """Add records of a list, decoded or not. Raises ValueError if they are not JSON."""
        kinds: dict[str, tuple[type[Record], Callable[[list], tuple], Callable[[dict], Record]]] = {
            "images": (Image, _image_columns, self.image),
            "categories": (Category, _category_columns, self.category),
            "annotations": (Box, _box_columns, self.box),
        }
        kind, columns_of, repair = kinds[name]
        columns = _decoded(part, kind, columns_of) if isinstance(part, bytes) else None
        if columns is None:
            records = json.loads(part) if isinstance(part, bytes) else part
            columns = columns_of(
                [self.repaired(name, self.read[name] + n, record, repair) for n, record in enumerate(records)]
            )
        self.read[name] += len(columns[0])
        for column, values in zip(self.columns.setdefault(name, [_Column() for _ in columns]), columns):
            column.add(values)

    def result(self) -> Annotations:
        for name in ("images", "categories"):
            if not self.read[name]:
                raise UserError(f"{self.path}: the list {name!r} is empty; give a file that has at least one")
        columns: dict[str, list[Any]] = {
            name: [column.values for column in columns] for name, columns in self.columns.items()
        }
        image_ids, file_names, sizes = columns["images"]
        category_ids, names = columns["categories"]
        ids, owners, kinds, crowds, boxes, areas = columns["annotations"]
        self.unique("images", image_ids)
        self.unique("categories", category_ids)
        count = Counter(names)
        if shared := [number for number, name in zip(category_ids.tolist(), names) if count[name] > 1]:
            kind = "categories with the name of another, kept apart by their ids"
            self.counts[kind], self.first[kind] = len(shared), f"the first is category id {shared[0]}"
        self.number(ids)
        self.unique("annotations", ids)
        places = self.known("image_id", owners, image_ids, ids)
        self.known("category_id", kinds, category_ids, ids)

        there = ~np.isnan(boxes[:, 0])
        full = np.maximum(boxes[:, 2], 0) * np.maximum(boxes[:, 3], 0)
        missing = np.isnan(areas) | (areas <= 0) & (full > 0)
        areas = np.where(missing, full, areas)
        self.note("boxes without an area, which is taken as width x height", missing & (full > 0), ids)
        self.note("annotations with neither bbox nor segmentation left out", ~there, ids)
        records = (ids, places, kinds, boxes, areas, crowds > 0)
        if not there.all():
            records = tuple(column[there] for column in records)
        return Annotations(
            self.path,
            image_ids,
            file_names,
            sizes,
            _unique_names(category_ids.tolist(), names),
            *records,
            remarks=[f"{count:,} {kind} ({self.first[kind]})" for kind, count in self.counts.items()],
        )

    # ------------------------------------------------------------------------ records that are not as they should be

    def repaired(self, name: str, index: int, record: object, repair: Callable[[dict], Any]) -> Any:
        self.where = f"{name}[{index}]"
        if not isinstance(record, dict):
            raise UserError(f"{self.path}: {self.where} is {shortened(record)}, not an object; remove it")
        try:
            return repair(record)
        except _Flaw as flaw:
            number = record.get("id")
            of = "" if number is None or str(flaw).startswith("id ") else f" (id {shortened(number)})"
            raise UserError(f"{self.path}: {self.where}{of}: {flaw}") from None

    def image(self, record: dict) -> Image:
        number = self.id(record)
        sides = []
        for key in ("width", "height"):
            side = self.whole(record.get(key), f"{key} is {{}}; give the image's {key} in pixels or leave it out") or 0
            if side < 0:
                raise _Flaw(f"{key} is {side}; give the image's {key} in pixels or leave it out")
            sides.append(side)
        if sides[0] * sides[1] > MAX_PIXELS:
            size = f"{shortened(sides[0])} x {shortened(sides[1])}"
            raise _Flaw(
                f"width x height is {size}, more than {MAX_PIXELS} pixels; correct it or make the image smaller"
            )
        name = record.get("file_name")
        if not isinstance(name, str) or not name.strip("./\\ ") or CONTROL.search(name) or leads_out(name):
            raise _Flaw(f"file_name is {shortened(name)}; give a path inside the image folder, relative to it")
        return Image(number, name, *(sides if all(sides) else (0, 0)))

    def category(self, record: dict) -> Category:
        number, name = self.id(record), record.get("name")
        if type(name) is int and abs(name) <= MAX_ID:
            self.count("class names that are numbers")
            name = str(name)
        if not isinstance(name, str) or not name or CONTROL.search(name):
            raise _Flaw(f"name is {shortened(name)}; give the class a name, without control characters")
        return Category(number, name)

    def box(self, record: dict) -> Box:
        number = NO_ID if self.is_empty(record.get("id")) else self.id(record)
        unknown = "{key} is {{}}, which the file does not list; correct or remove it"
        owners = []
        for key in ("image_id", "category_id"):
            owner = self.whole(record.get(key), unknown.format(key=key))
            if owner is None or abs(owner) > MAX_ID:
                raise _Flaw(unknown.format(key=key).format(shortened(record.get(key))))
            owners.append(owner)
        area = self.finite(record.get("area"), MAX_AREA, "area is {}; give a finite number or leave it out")
        crowd = record.get("iscrowd", 0)
        flaw = "iscrowd is {}; give 0 or 1 or leave it out"
        if self.is_empty(crowd):
            self.count("empty iscrowd taken as 0")
            crowd = 0
        crowd = int(crowd) if isinstance(crowd, bool) else self.whole(crowd, flaw)
        if crowd not in (0, 1):
            raise _Flaw(flaw.format(shortened(crowd)))
        image_id, category_id = owners
        return Box(number, image_id, category_id, self.sides(record), area, crowd)

    def sides(self, record: dict) -> Sides:
        bbox, segmentation = record.get("bbox"), record.get("segmentation")
        if bbox is not None and bbox != []:
            flaw = f"bbox is {shortened(bbox)}; give four finite numbers x, y, width, height in pixels, or remove it"
            if not isinstance(bbox, list) or len(bbox) != 4:
                raise _Flaw(flaw)
            numbers = tuple(self.finite(value, MAX_BOX, flaw.replace("{", "{{").replace("}", "}}")) for value in bbox)
            if None in numbers:
                raise _Flaw(flaw)
            return cast(Sides, numbers)
        try:
            sides = bounds(segmentation)
        except (ValueError, RecursionError) as error:
            raise _Flaw(
                f"bbox is {shortened(bbox)} and segmentation {shortened(segmentation)} ({error}); give four numbers x, "
                "y, width, height, or polygons or a mask, or remove it"
            ) from None
        if sides is None:
            return (math.nan,) * 4
        self.count("boxes taken as the bounds of their segmentation")
        return sides

    # --------------------------------------------------------------------------------------------- values to numbers

    def id(self, record: dict) -> int:
        number = self.whole(record.get("id"), "id is {}; give it a whole number of its own")
        if number is None:
            raise _Flaw("id is None; give it a whole number of its own")
        if abs(number) > MAX_ID:
            raise _Flaw(f"id {shortened(number)} exceeds 64 bits; give a smaller one")
        return number

    def is_empty(self, value: object) -> bool:
        """Whether a value means "none": null, an empty text, or the NaN of pandas."""
        return value is None or value == "" or (isinstance(value, float) and math.isnan(value))

    def value(self, value: object, flaw: str) -> int | float | None:
        """A number, in quotes or not; None if the value is empty."""
        if self.is_empty(value):
            return None
        if isinstance(value, str) and ((whole := WHOLE.fullmatch(value)) or NUMBER.fullmatch(value)):
            self.count("numbers in quotes")
            return int(whole[1]) if whole else float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _Flaw(flaw.format(shortened(value)))
        return value

    def whole(self, value: object, flaw: str) -> int | None:
        number = self.value(value, flaw)
        if isinstance(number, float):
            if not number.is_integer():  # nor is infinity
                raise _Flaw(flaw.format(shortened(value)))
            if isinstance(value, float):
                self.count("whole numbers with a decimal point")
            number = int(number)
        return number

    def finite(self, value: object, limit: float, flaw: str) -> float | None:
        number = self.value(value, flaw)
        if number is not None and not abs(number) < limit:
            raise _Flaw(flaw.format(shortened(value)))
        return None if number is None else float(number)

    # ---------------------------------------------------------------------------------------- what all have together

    def number(self, ids: np.ndarray) -> None:
        """Give ids to annotations without one."""
        without = np.flatnonzero(ids == NO_ID)
        if len(without):
            ids[without] = np.setdiff1d(np.arange(1, 2 * len(ids) + 1), ids)[: len(without)]
            self.note("annotations without an id numbered", np.isin(np.arange(len(ids)), without), ids)

    def unique(self, name: str, ids: np.ndarray) -> None:
        _, first = np.unique(ids, return_index=True)
        if len(first) < len(ids):
            index = int(np.setdiff1d(np.arange(len(ids)), first)[0])
            raise UserError(
                f"{self.path}: {name}[{index}]: id {ids[index]} is taken by an earlier record; make ids unique"
            )

    def known(self, key: str, wanted: np.ndarray, ids: np.ndarray, of: np.ndarray) -> np.ndarray:
        """The places of `wanted` among `ids`."""
        order = np.argsort(ids)
        places = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
        wrong = np.flatnonzero(ids[places] != wanted)
        if len(wrong):
            index = int(wrong[0])
            raise UserError(
                f"{self.path}: annotations[{index}] (id {of[index]}): {key} is {wanted[index]}, which the file does "
                "not list; correct or remove it"
            )
        return places

    def count(self, kind: str) -> None:
        self.counts[kind] += 1
        self.first.setdefault(kind, f"the first in {self.where}")

    def note(self, kind: str, which: np.ndarray, ids: np.ndarray) -> None:
        places = np.flatnonzero(which)
        if len(places):
            self.counts[kind] = len(places)
            self.first[kind] = f"the first is annotation id {ids[places[0]]}"


def leads_out(name: str) -> bool:
    """Whether the dots of a file name lead out of the folder it starts in."""
    return posixpath.normpath(name.replace("\\", "/")).split("/")[0] == ".."


def shortened(value: object) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # a whole number of more than 4,300 digits
        return f"a deeply nested or huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _unique_names(ids: list[int], names: list[str]) -> dict[int, str]:
    """Category id -> name. If several share a name, as in some exports, each id is added to it."""
    count = Counter(names)
    unique = {id: name if count[name] == 1 else f"{name} (id {id})" for id, name in zip(ids, names)}
    if len(set(unique.values())) == len(unique):
        return unique
    return {id: f"{name} (id {id})" for id, name in zip(ids, names)}  # a class was called "cat (id 3)" already


def _decoded(part: bytes, kind: type[Record], columns_of: Callable[[list], tuple]) -> tuple | None:
    """The columns of records, if all have the type `kind` and are sound; otherwise None."""
    try:
        columns = columns_of(msgspec.json.decode(part, type=GenericAlias(list, kind)))
    except (msgspec.MsgspecError, RecursionError):
        return None
    return columns if SOUND[kind](*columns) else None


def _image_columns(images: list[Image]) -> tuple[np.ndarray, list[str], np.ndarray]:
    sizes = np.array([(image.height, image.width) for image in images], np.int64).reshape(-1, 2)
    return np.array([image.id for image in images], np.int64), [image.file_name for image in images], sizes


def _category_columns(categories: list[Category]) -> tuple[np.ndarray, list[str]]:
    return np.array([category.id for category in categories], np.int64), [category.name for category in categories]


def _box_columns(boxes: list[Box]) -> tuple[np.ndarray, ...]:
    whole = [(box.id, box.image_id, box.category_id, box.iscrowd) for box in boxes]
    ids, images, categories, crowds = np.array(whole, np.int64).reshape(-1, 4).T
    sides = np.array([box.bbox for box in boxes], np.float64).reshape(-1, 4)
    return ids, images, categories, crowds, sides, np.array([box.area for box in boxes], np.float64)


def _sound_images(ids: np.ndarray, names: list[str], sizes: np.ndarray) -> bool:
    # If both sides are within bounds, their product is within int64.
    return bool(((sizes > 0) & (sizes <= MAX_PIXELS)).all() and (sizes.prod(axis=1) <= MAX_PIXELS).all()) and all(
        map(PLAIN_NAME.fullmatch, names)
    )


def _sound_categories(ids: np.ndarray, names: list[str]) -> bool:
    return all(name and not CONTROL.search(name) for name in names)


def _sound_boxes(ids, images, categories, crowds: np.ndarray, sides: np.ndarray, areas: np.ndarray) -> bool:
    in_bounds = (np.abs(sides) < MAX_BOX).all() and not (np.abs(areas) >= MAX_AREA).any()
    return bool(in_bounds and ((crowds == 0) | (crowds == 1)).all())


SOUND: dict[type[Record], Callable[..., bool]] = {Image: _sound_images, Category: _sound_categories, Box: _sound_boxes}
