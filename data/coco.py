"""From a COCO annotation file and a folder of images to samples.

COCO's format is converted here: from boxes x, y, width, height and category ids with gaps to boxes x1, y1, x2, y2 and
labels 0..C-1. Detections are converted back in coco_results.py. An error in the file raises a one-line UserError when
the data set is built.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.annotations import load_annotations, shortened
from data.cache import Cache
from data.classes import match_classes
from data.image_folder import ImageFolder, elsewhere, find_folder
from data.plausibility import refuse_unequal_repeats, suspicion
from data.transforms import Augmented, scale_boxes
from detector.errors import UserError, counted
from detector.images import Remarks, add_remarks, read_image
from detector.structures import Target

MIN_SIDE = 1e-3  # pixels; a box thinner than this, after clipping, has no area
CLIP_TOLERANCE = 0.1  # pixels; a box that sticks out by less is a rounding error of the file

Sample = tuple[Tensor, Target, int, tuple[int, int]]  # see CocoDataset.__getitem__


class Transform(Protocol):
    def __call__(self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, seed: int) -> Augmented:
        """Image (h, w, 3) uint8 RGB, boxes (G, 4) float32, labels (G,) int64 -> the same, changed."""

    def cache_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) in which the image cache keeps an image of this size."""


class CocoDataset(Dataset):
    """Samples of one annotation file.

    Without `images`, it looks for their folder where common exporters put it. Give a validation set the training set's
    `category_ids` and `class_names`, so that a label means the same class in both. `cache` is a folder to keep the
    images in, decoded and resized for the transform, or empty. Unless the transform jitters or distorts, samples with
    and without a cache are identical bit for bit. With `trust`, boxes are accepted even if they look like another
    format.

    Raises UserError for an error in the annotation file or its boxes and for a missing image. Images are checked when
    read (all at once with a cache): UserError if one cannot be decoded or its size differs from its record.
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
        trust: bool = False,
    ):
        self.path, self.transform = Path(annotations), transform
        self.annotations = load_annotations(self.path)
        names = self.annotations.file_names
        self.folder = Path(images) if images else find_folder(self.path, names)
        try:
            self.file_names, other = ImageFolder(self.folder).locate(names, self.path)
        except UserError as error:
            raise UserError(f"{error}{elsewhere(self.path, names, self.folder)}") from None
        self.remarks = [*self.annotations.remarks, *other]
        self.image_ids: list[int] = self.annotations.image_ids.tolist()
        self.remarks += self.annotations.complete_sizes(self.folder, self.file_names)
        self.sizes: list[tuple[int, int]] = list(map(tuple, self.annotations.sizes.tolist()))
        self.aspects: list[float] = [width / height for height, width in self.sizes]
        # The id that each label has in this file.
        self.category_ids, self.class_names, other = match_classes(
            self.path, self.annotations, category_ids, class_names
        )
        self.remarks += other
        if not trust and (flaw := suspicion(self.annotations)):
            cure = "to use them unchanged, set data.trust=true (convert.py: --trust)"
            raise UserError(f"{self.path}: {flaw}; {cure}")
        self._collect_boxes()
        refuse_unequal_repeats(self.path, self.file_names, self.image_ids, self._labelled_boxes)
        self._digest = self._digest_of_contents()
        self.image_remarks: Remarks = {}  # on the images read so far; the loader adds those of its processes
        self.cache = None
        if cache:
            files = [self.folder / name for name in self.file_names]
            self.cache = Cache(cache, files, self.sizes, [transform.cache_size(*size) for size in self.sizes])
            add_remarks(self.image_remarks, self.cache.remarks)

    def _collect_boxes(self) -> None:
        """Gather the boxes of all images in one array, image by image, and count those left out.

        One array instead of an object per box: the worker processes share it without copying.
        """
        rows = np.flatnonzero(~self.annotations.crowds)
        image = self.annotations.images[rows]
        order = np.argsort(self.category_ids)
        labels = order[np.searchsorted(self.category_ids, self.annotations.categories[rows], sorter=order)]
        boxes, clipped = self._clipped(rows, image)
        has_area = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)

        self.num_crowd = len(self.annotations.ids) - len(rows)
        self.num_clipped = int((has_area & clipped).sum())
        self.dropped_ids = self.annotations.ids[rows[~has_area]].tolist()
        order = np.flatnonzero(has_area)
        order = order[np.argsort(image[order], kind="stable")]
        self._boxes, self._labels = boxes[order], labels[order]
        self._starts = np.searchsorted(image[order], np.arange(len(self) + 1))  # image i owns starts[i]..starts[i+1]

    def _clipped(self, rows: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x1, y1, x2, y2 of these annotations clipped to their images, and whether that cuts off anything."""
        boxes, clipped = np.empty((len(rows), 4), np.float32), np.zeros(len(rows), bool)
        for axis, side in ((0, 1), (1, 0)):  # a column at a time, which takes the least memory
            low, extent = self.annotations.boxes[rows, axis], self.annotations.boxes[rows, axis + 2]
            limit = self.annotations.sizes[image, side]
            for column, edge in ((axis, low), (axis + 2, low + extent)):
                boxes[:, column] = np.clip(edge, 0, limit)
                clipped |= np.abs(boxes[:, column] - edge) > CLIP_TOLERANCE
        return boxes, clipped

    def refuse_without_boxes(self) -> None:
        """Raise UserError if there is no box to learn from."""
        if not self.num_boxes:
            left_out = "".join(f"; {remark}" for remark in self.annotations.remarks if "left out" in remark)
            raise UserError(
                f"{self.path}: no box to learn from: {self.num_crowd:,} boxes are crowds (iscrowd 1), "
                f"{len(self.dropped_ids):,} have no area inside their image{left_out}; correct the file, or set "
                "data.trust=true to train anyway"
            )

    def summary(self) -> str:
        """A paragraph on the parts of the file that training uses and leaves out."""
        counts = [counted(len(self), "image"), counted(self.num_boxes, "box"), counted(len(self.category_ids), "class")]
        odd = (
            (int((np.diff(self._starts) == 0).sum()), "image", "without boxes"),
            (self.num_crowd, "crowd box", "left out of training"),
            (self.num_clipped, "box", "clipped to the image"),
            (len(self.dropped_ids), "box", f"without area dropped (annotation ids {shortened(self.dropped_ids)})"),
        )
        counts += [f"{counted(count, what)} {rest}" for count, what, rest in odd if count]
        accepted = f" Accepted: {'; '.join(self.remarks)}." if self.remarks else ""
        return f"{self.path}: {', '.join(counts)}.{accepted}" + (f" {self.cache.summary()}" if self.cache else "")

    def fingerprint(self) -> str:
        """A digest that must be equal in all processes of a run, wherever the files are."""
        counts = f"{len(self)} images, {self.num_boxes} boxes, {len(self.category_ids)} classes"
        return f"{counts}, sha256 {self._digest}"

    def _labelled_boxes(self, index: int) -> list[tuple]:
        rows = slice(self._starts[index], self._starts[index + 1])
        return sorted(zip(self._labels[rows].tolist(), self._boxes[rows].tolist()))

    def _digest_of_contents(self) -> str:
        """A digest of what training uses, wherever the images are: no areas, class names or annotation ids."""
        known = self.annotations
        digest = hashlib.sha256(repr((self.image_ids, known.file_names, self.sizes, self.category_ids)).encode())
        for values in (known.images, known.categories, known.boxes, known.crowds):
            digest.update(values.tobytes())
        return digest.hexdigest()[:12]

    @property
    def num_boxes(self) -> int:
        return len(self._boxes)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getstate__(self) -> dict:
        # For a worker process that is not forked. It does not need the annotations: _boxes has them.
        return {**self.__dict__, "annotations": None}

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Image (3, h, w) uint8 RGB, its target, its id, and its (height, width) on disk.

        The key is an index, or an index and the seed of the augmentation, which depends on nothing else.
        """
        index, seed = key if isinstance(key, tuple) else (key, 0)
        rows, size = slice(self._starts[index], self._starts[index + 1]), self.sizes[index]
        if self.cache is None:
            image = read_image(self.folder / self.file_names[index], size, self.image_remarks)
            boxes = self._boxes[rows].copy()
        else:
            image = self.cache[index]
            boxes = scale_boxes(self._boxes[rows], size, image.shape[:2])
        image, boxes, labels = self.transform(image, boxes, self._labels[rows].copy(), seed)
        target = Target(torch.from_numpy(boxes), torch.from_numpy(labels))
        return torch.from_numpy(image).permute(2, 0, 1), target, self.image_ids[index], size
