"""From a COCO annotation file and a folder of images to samples: the border where formats are converted.

Outside: boxes x, y, width, height; category ids with gaps. Inside: boxes x1, y1, x2, y2; labels 0..C-1.
Whatever is wrong with the file is found here and told in one line.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.cache import Cache
from data.images import MAX_PIXELS, read_image
from data.transforms import scale_boxes
from detector.errors import CONTROL, UserError
from detector.structures import Target

MIN_SIDE = 1e-3  # pixels; a box thinner than this, after clipping, has no area
MAX_ID = 2**63 - 1  # pycocotools puts ids in arrays
CLIP_TOLERANCE = 0.1  # pixels; finer than this, a box outside its image is rounding in the file

# A transform: image (h, w, 3) uint8 RGB, boxes (G, 4) float32, labels (G,) int64, seed -> the first three.
Transform = Callable[[np.ndarray, np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


class CocoDataset(Dataset):
    """Samples of one annotation file.

    A validation set is given the `category_ids` (and, to have them compared, the `class_names`) of the training
    set, so that a label means the same class in both. `cache` is a folder to keep the images in, decoded and resized
    for the transform, or empty; samples are the same to the bit where the transform neither jitters nor distorts.

    Raises UserError for whatever is wrong with the annotation file, a missing image or one outside the folder, at
    once; for an image that cannot be decoded or has another size than its record says, when it is read, which is at
    once too where a cache is to be built.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        transform: Transform,
        *,
        category_ids: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        cache: str | Path = "",
    ):
        self.path, self.folder, self.transform = Path(annotations), Path(images), transform
        self.annotations = load_annotations(self.path)
        records = self.annotations["images"]
        self.image_ids: list[int] = [record["id"] for record in records]
        self.file_names: list[str] = [record["file_name"] for record in records]
        self.sizes = [(record["height"], record["width"]) for record in records]
        self.aspects: list[float] = [width / height for height, width in self.sizes]
        self._name_classes(category_ids, class_names)
        self._collect_boxes()
        self.check_files()
        self.cache = None
        if cache:
            files = [self.folder / name for name in self.file_names]
            self.cache = Cache(cache, files, self.sizes, [transform.largest(*size) for size in self.sizes])

    def _name_classes(self, category_ids: Sequence[int] | None, class_names: Sequence[str] | None) -> None:
        """Set `category_ids`, whose positions are the labels, and `class_names`."""
        names = unique_names(self.annotations["categories"])
        self.category_ids: list[int] = sorted(names) if category_ids is None else list(category_ids)
        expected = dict(zip(self.category_ids, class_names)) if class_names is not None else {}
        known = set(self.category_ids)
        for category, name in names.items():
            if category not in known:
                raise UserError(
                    f"{self.path}: category {category} ({_shortened(name)}) is unknown to the model, whose category "
                    f"ids are {_shortened(self.category_ids)}; take an annotation file of the same data set"
                )
            if expected.get(category, name) != name:
                raise UserError(
                    f"{self.path}: category {category} is {_shortened(name)} here and "
                    f"{_shortened(expected[category])} in training; give both annotation files the same categories"
                )
        names = {**names, **expected}
        self.class_names: list[str] = [names.get(category, f"category {category}") for category in self.category_ids]

    def _collect_boxes(self) -> None:
        """Gather the boxes of all images in one array, image by image, and count what is left out of it.

        One array instead of an object per box: the worker processes share it without copying.
        """
        index_of = {image_id: index for index, image_id in enumerate(self.image_ids)}
        label_of = {category: label for label, category in enumerate(self.category_ids)}
        every = self.annotations["annotations"]
        records = [record for record in every if not record["iscrowd"]]
        image = np.array([index_of[record["image_id"]] for record in records], np.int64)
        labels = np.array([label_of[record["category_id"]] for record in records], np.int64)
        raw = np.array([record["bbox"] for record in records], np.float64).reshape(-1, 4)
        raw[:, 2:] += raw[:, :2]
        boxes = np.clip(raw, 0, np.array(self.sizes)[image][:, [1, 0, 1, 0]]).astype(np.float32)
        has_area = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)

        self.num_crowd = len(every) - len(records)
        self.num_clipped = int((has_area & (np.abs(boxes - raw) > CLIP_TOLERANCE).any(axis=1)).sum())
        self.dropped_ids = [records[i]["id"] for i in np.flatnonzero(~has_area)]
        order = np.flatnonzero(has_area)
        order = order[np.argsort(image[order], kind="stable")]
        self._boxes, self._labels = boxes[order], labels[order]
        self._starts = np.searchsorted(image[order], np.arange(len(self) + 1))  # image i owns starts[i]..starts[i+1]

    def check_files(self) -> None:
        """Raise UserError unless every image of the annotation file is in the image folder, links followed."""
        found = {folder: _list_files(self.folder / folder) for folder in set(map(os.path.dirname, self.file_names))}
        files = [found[os.path.dirname(name)].get(os.path.basename(name)) for name in self.file_names]
        missing = [name for name, file in zip(self.file_names, files) if file is None]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(self)} images of {self.path} are not there, the first is "
                f"{missing[0]!r}; correct the image folder or complete it"
            )
        root = os.path.realpath(self.folder)
        # Each folder is resolved once, and of the files only the links: there may be 100,000.
        inside = {folder: _is_inside(self.folder / folder, root) for folder in found}
        for name, file in zip(self.file_names, files):
            if not inside[os.path.dirname(name)] or (file.is_symlink() and not _is_inside(file.path, root)):
                raise UserError(
                    f"{self.folder}: {name!r} of {self.path} is a link to {os.path.realpath(file)!r}, outside the "
                    "image folder; put the file itself there, or give the folder that holds both"
                )

    def summary(self) -> str:
        """One paragraph on what training sees of the file and what it does not."""
        examples = ", ".join(map(str, self.dropped_ids[:3])) + (", ..." if len(self.dropped_ids) > 3 else "")
        return (
            f"{self.path}: {len(self):,} images, {self.num_boxes:,} boxes, {len(self.category_ids)} classes; "
            f"{int((np.diff(self._starts) == 0).sum()):,} images without boxes, "
            f"{self.num_crowd:,} crowd boxes left out of training, {self.num_clipped:,} boxes clipped to their image, "
            f"{len(self.dropped_ids):,} boxes without area dropped"
            + (f" (annotation ids {examples})." if self.dropped_ids else ".")
            + (f" {self.cache.summary()}" if self.cache else "")
        )

    def fingerprint(self) -> str:
        """What must be the same in all processes of a run, wherever the files lie."""
        digest = hashlib.sha256(repr((self.image_ids, self.sizes, self.category_ids)).encode())
        digest.update(self._boxes)
        digest.update(self._labels)
        counts = f"{len(self)} images, {self.num_boxes} boxes, {len(self.category_ids)} classes"
        return f"{counts}, sha256 {digest.hexdigest()[:12]}"

    @property
    def num_boxes(self) -> int:
        return len(self._boxes)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getstate__(self) -> dict:
        # What goes to a worker process that is not forked: it needs no annotation file, which may be a gigabyte.
        return {**self.__dict__, "annotations": None}

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target, int, tuple[int, int]]:
        """Image (3, h, w) uint8 RGB, its target, its id, and its (height, width) on disk.

        The key is an index, or an index and the seed of the augmentation, which depends on nothing else.
        """
        index, seed = key if isinstance(key, tuple) else (key, 0)
        own, size = slice(self._starts[index], self._starts[index + 1]), self.sizes[index]
        if self.cache is None:
            image, boxes = read_image(self.folder / self.file_names[index], size), self._boxes[own].copy()
        else:
            image = self.cache[index]
            boxes = scale_boxes(self._boxes[own], size, image.shape[:2])
        image, boxes, labels = self.transform(image, boxes, self._labels[own].copy(), seed)
        target = Target(torch.from_numpy(boxes), torch.from_numpy(labels))
        return torch.from_numpy(image).permute(2, 0, 1), target, self.image_ids[index], size


def load_annotations(path: str | Path) -> dict:
    """Read a COCO annotation file and check all that is later relied on.

    Returns the file's object, with `area` and `iscrowd` filled in where they lack, and without `segmentation`:
    only boxes are used, and the polygons are nine tenths of the memory. Raises UserError at the first flaw.
    """
    try:
        document = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot read the annotation file ({error.strerror}); correct its path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); export or download the file again") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a {type(document).__name__}, not an object; give a COCO annotation file")
    images = _records(path, document, "images")
    categories = _records(path, document, "categories")
    annotations = _records(path, document, "annotations")
    for name, records in (("images", images), ("categories", categories)):
        if not records:
            raise UserError(f"{path}: the list {name!r} is empty; give a file that has at least one")

    for index, record in enumerate(images):
        if flaw := _image_flaw(record):
            raise _at(path, "images", index, record, flaw)
    for index, record in enumerate(categories):
        name = record.get("name")
        if not isinstance(name, str) or not name or CONTROL.search(name):
            flaw = f"name is {_shortened(name)}; give the class a name, without control characters"
            raise _at(path, "categories", index, record, flaw)
    image_ids, category_ids = {record["id"] for record in images}, {record["id"] for record in categories}
    for index, record in enumerate(annotations):
        if flaw := _annotation_flaw(record, image_ids, category_ids):
            raise _at(path, "annotations", index, record, flaw)
        width, height = record["bbox"][2:]
        record.setdefault("area", max(width, 0) * max(height, 0))
        record.setdefault("iscrowd", 0)
        record.pop("segmentation", None)
    return document


def unique_names(categories: list[dict]) -> dict[int, str]:
    """Category id -> name; categories that share one, as in some exports, are told apart by their ids."""
    count = Counter(category["name"] for category in categories)
    names = {c["id"]: c["name"] if count[c["name"]] == 1 else f"{c['name']} (id {c['id']})" for c in categories}
    if len(set(names.values())) == len(names):
        return names
    return {c["id"]: f"{c['name']} (id {c['id']})" for c in categories}  # one was called "cat (id 3)" already


def _records(path: str | Path, document: dict, name: str) -> list[dict]:
    """The list `name` of the document, all of it objects with ids of their own."""
    records = document.get(name)
    if not isinstance(records, list):
        raise UserError(f"{path}: has no list {name!r}; give a COCO file with images, annotations and categories")
    seen: set[int] = set()
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}: {name}[{index}] is {_shortened(record)}, not an object; remove it")
        number = record.get("id")
        if type(number) is not int:  # not isinstance: True is an int to Python
            raise UserError(f"{path}: {name}[{index}]: id is {_shortened(number)}; give it a whole number of its own")
        if abs(number) > MAX_ID:
            raise UserError(f"{path}: {name}[{index}]: id {_shortened(number)} exceeds 64 bits; give a smaller one")
        if number in seen:
            raise UserError(f"{path}: {name}[{index}]: id {number} is taken by an earlier record; make ids unique")
        seen.add(number)
    return records


def _image_flaw(record: dict) -> str | None:
    for key in ("width", "height"):
        if type(record.get(key)) is not int or record[key] <= 0:
            return f"{key} is {_shortened(record.get(key))}; give the image's {key} in pixels"
    if record["width"] * record["height"] > MAX_PIXELS:
        size = f"{_shortened(record['width'])} x {_shortened(record['height'])}"
        return f"width x height is {size}, more than {MAX_PIXELS} pixels; correct it or make the image smaller"
    name = record.get("file_name")
    # The Windows flavour knows both separators and drives, so that it finds every way out of the folder.
    file = PureWindowsPath(name) if isinstance(name, str) else None
    if file is None or file.anchor or not file.parts or ".." in file.parts or CONTROL.search(name):
        return f"file_name is {_shortened(name)}; give a path inside the image folder, relative to it"
    return None


def _annotation_flaw(record: dict, image_ids: set[int], category_ids: set[int]) -> str | None:
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        if type(record.get(key)) is not int or record[key] not in known:
            return f"{key} is {_shortened(record.get(key))}, which the file does not list; correct or remove it"
    bbox = record.get("bbox")
    # The comparison is false for NaN as well as for infinity.
    if not (
        isinstance(bbox, list)
        and len(bbox) == 4
        and all(type(value) in (int, float) and -1e9 < value < 1e9 for value in bbox)
    ):
        return f"bbox is {_shortened(bbox)}; give four finite numbers x, y, width, height in pixels, or remove it"
    area = record.get("area", 0)
    if not (type(area) in (int, float) and -1e18 < area < 1e18):
        return f"area is {_shortened(area)}; give a finite number or leave it out"
    if record.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd is {_shortened(record['iscrowd'])}; give 0 or 1 or leave it out"
    return None


def _at(path: str | Path, name: str, index: int, record: dict, flaw: str) -> UserError:
    return UserError(f"{path}: {name}[{index}] (id {record['id']}): {flaw}")


def _shortened(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _list_files(folder: Path) -> dict[str, os.DirEntry]:
    """The folder's files by name; no folders, and none of what is read without an end, such as a pipe."""
    try:
        with os.scandir(folder) as entries:
            # A link that leads round in a circle is no file to isfile, and an OSError to is_file.
            return {e.name: e for e in entries if (os.path.isfile(e) if e.is_symlink() else e.is_file())}
    except OSError as error:
        raise UserError(f"{folder}: cannot read the image folder ({error.strerror}); correct its path") from None


def _is_inside(path: str | Path, root: str) -> bool:
    """Whether a path leads, links followed, into the folder `root`, itself free of links."""
    return Path(os.path.realpath(path)).is_relative_to(root)
