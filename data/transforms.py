"""From a read image and its boxes to the augmented ones: distortion (optional), resizing, flips.

A transform takes an image (h, w, 3) uint8 RGB, boxes (G, 4) float32 xyxy in pixels, labels (G,) and a seed, and
returns the first three; G may be 0. The same seed gives the same result, whatever was transformed before.
`cache_size(height, width)` is the size in which the image cache keeps an image of that size: see cache.py.
"""

import os
import random

import cv2
import numpy as np

from detector.errors import UserError
from detector.resize import resize_image, target_size

MIN_VISIBLE = 0.25  # drop a box if a smaller share remains in the image: it would teach guessing

Augmented = tuple[np.ndarray, np.ndarray, np.ndarray]


class EvalTransform:
    """Only resizes: short side to `short_side`, or less if the long side would exceed `long_side`."""

    def __init__(self, short_side: int, long_side: int):
        _check_sides(short_side, long_side)
        self.short_side, self.long_side = short_side, long_side

    def __call__(self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, seed: int = 0) -> Augmented:
        old_height, old_width = image.shape[:2]
        height, width = target_size(old_height, old_width, self.short_side, self.long_side)
        return *resize(image, boxes, height, width), labels

    def cache_size(self, height: int, width: int) -> tuple[int, int]:
        return target_size(height, width, self.short_side, self.long_side)


class TrainTransform:
    """Augmentation, and resizing as in evaluation.

    horizontal_flip, vertical_flip: probabilities. scale_jitter: both sides are multiplied by a factor drawn
    log-uniformly from this range. strong: before resizing, also shifts, zooms, rotations, crops and colour changes.
    """

    def __init__(
        self,
        short_side: int,
        long_side: int,
        *,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        scale_jitter: tuple[float, float] = (1.0, 1.0),
        strong: bool = False,
    ):
        _check_sides(short_side, long_side)
        for name, probability in (("horizontal_flip", horizontal_flip), ("vertical_flip", vertical_flip)):
            if not 0 <= probability <= 1:
                raise UserError(f"{name} is {probability}; give a probability from 0 to 1")
        if not 0 < scale_jitter[0] <= scale_jitter[1] < float("inf"):
            raise UserError(f"scale_jitter is {tuple(scale_jitter)}; give a range of factors such as (0.8, 1.25)")
        self.short_side, self.long_side, self.scale_jitter = short_side, long_side, tuple(scale_jitter)
        self.flips = (horizontal_flip, vertical_flip)
        self.distort = _distortion() if strong else None

    def __call__(self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, seed: int) -> Augmented:
        if self.distort is not None:
            # Not set_random_seed: it seeds every step alike, so all steps would apply to the same images.
            self.distort.set_random_state(np.random.default_rng(seed), random.Random(seed))
            result = self.distort(image=image, bboxes=boxes, rows=np.arange(len(boxes)))
            image = result["image"]
            boxes = np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
            labels = labels[np.asarray(result["rows"], np.int64)]
        draw = np.random.default_rng((seed, 1))
        factor = float(np.exp(draw.uniform(*np.log(self.scale_jitter))))
        old_height, old_width = image.shape[:2]
        height, width = target_size(old_height, old_width, self.short_side * factor, self.long_side * factor)
        image, boxes = resize(image, boxes, height, width)
        # Flip last: images from the cache are resized already and must give the same pixels.
        return *flip(image, boxes, *(draw.random(2) < self.flips)), labels

    def cache_size(self, height: int, width: int) -> tuple[int, int]:
        low, high = self.scale_jitter
        size = target_size(height, width, self.short_side * high, self.long_side * high)
        # If each sample is resized anyway, an enlarged image would only take more room in the cache.
        return min(size, (height, width)) if self.distort or low < high else size


def resize(image: np.ndarray, boxes: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and boxes at another size; boxes by each axis's own ratio, since sides are whole pixels."""
    size = image.shape[:2]
    if (height, width) == size:
        return image, boxes
    return resize_image(image, height, width), scale_boxes(boxes, size, (height, width))


def scale_boxes(boxes: np.ndarray, size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """Boxes (G, 4) in an image of `size` -> float32 ones in that image at `new_size`, both (height, width)."""
    ratio = np.array([new_size[1] / size[1], new_size[0] / size[0]] * 2)
    return (boxes * ratio).astype(np.float32)


def flip(image: np.ndarray, boxes: np.ndarray, horizontal: bool, vertical: bool) -> tuple[np.ndarray, np.ndarray]:
    """Image and boxes mirrored left to right and top to bottom."""
    (height, width), boxes = image.shape[:2], boxes.copy()
    if horizontal:
        image, boxes[:, [0, 2]] = cv2.flip(image, 1), width - boxes[:, [2, 0]]
    if vertical:
        image, boxes[:, [1, 3]] = cv2.flip(image, 0), height - boxes[:, [3, 1]]
    return image, boxes


def _distortion():
    """The albumentations pipeline."""
    # Imported here, because it takes seconds and few runs need it. The variable keeps it from looking for a newer
    # version of itself over the network.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    steps = [
        A.Affine(scale=(0.9, 1.1), translate_percent=(-0.06, 0.06), rotate=(-5, 5), balanced_scale=True, p=0.5),
        # Not albumentations' box-aware crops: they zoom in on a single small object without limit.
        A.RandomCropFromBorders(crop_left=0.2, crop_right=0.2, crop_top=0.2, crop_bottom=0.2, p=0.5),
        A.ColorJitter(brightness=(0.7, 1.3), contrast=(0.7, 1.3), saturation=(0.7, 1.3), hue=(-0.03, 0.03), p=0.8),
    ]
    boxes = A.BboxParams(
        format="pascal_voc",
        label_fields=["rows"],
        min_visibility=MIN_VISIBLE,
        # Checked once at the end, after shift and crop have both removed their part. So the crop comes after
        # the shift: it shows nothing that the shift has pushed out.
        check_each_transform=False,
    )
    return A.Compose(steps, bbox_params=boxes)


def _check_sides(short_side: int, long_side: int) -> None:
    if not 0 < short_side <= long_side:
        raise UserError(f"image sides are {short_side} (short) and {long_side} (long); give 0 < short <= long")
