"""The two programs that compute COCO's precision and recall.

pycocotools is the reference; hotcoco, if it is installed, gives the same numbers to the bit, far faster.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

hotcoco: Any
try:
    import hotcoco
except ImportError:
    hotcoco = None


class GroundTruth(NamedTuple):
    """N boxes. Images and categories are given by index, because ids may be 0, negative or huge."""

    images: np.ndarray  # (N,) int64
    categories: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) float64 xywh
    areas: np.ndarray  # (N,) float64
    crowds: np.ndarray  # (N,) bool


class Curves(NamedTuple):
    """COCOeval's arrays for T IoU thresholds, R recalls, K categories; all, small, medium and large areas; and at most
    1, 10 and 100 detections of an image and category."""

    precision: np.ndarray  # (T, R, K, 4, 3)
    recall: np.ndarray  # (T, K, 4, 3)
    scores: np.ndarray  # (T, R, K, 4, 3), where that recall is reached


# Ground truth, results (N, 7), the number of images, and that of categories.
Engine = Callable[[GroundTruth, np.ndarray, int, int], Curves]


def _pycocotools(truth: GroundTruth, results: np.ndarray, num_images: int, num_categories: int) -> Curves:
    images = [{"id": i} for i in range(num_images)]
    categories = [{"id": k} for k in range(num_categories)]

    def index(boxes: list[dict]) -> COCO:
        # Not COCO.loadRes, which fails on an empty list and gives every detection a polygon.
        coco = COCO()
        coco.dataset = {"images": images, "categories": categories, "annotations": boxes}
        coco.createIndex()
        return coco

    # COCOeval takes a match with id 0 for no match.
    expected = [
        {"id": number, "image_id": i, "category_id": k, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for number, (i, k, box, area, crowd) in enumerate(zip(*(column.tolist() for column in truth)), start=1)
    ]
    detections = [
        {"id": number, "image_id": int(i), "category_id": int(k), "bbox": box, "area": box[2] * box[3], "score": value}
        for number, (i, *box, value, k) in enumerate(results.tolist(), start=1)
    ]
    # COCOeval always prints.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(index(expected), index(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return Curves(*(evaluation.eval[key] for key in Curves._fields))


def _hotcoco(truth: GroundTruth, results: np.ndarray, num_images: int, num_categories: int) -> Curves:
    expected = hotcoco.COCO.from_arrays(
        [{"id": i} for i in range(num_images)],
        [{"id": k, "name": str(k)} for k in range(num_categories)],
        truth.images,
        truth.categories,
        truth.boxes,
        area=truth.areas,
        iscrowd=truth.crowds,
    )
    evaluation = hotcoco.COCOeval(expected, expected.load_res(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return Curves(*(evaluation.eval[key] for key in Curves._fields))


# Fastest first.
ENGINES: dict[str, Engine] = {"hotcoco": _hotcoco, "pycocotools": _pycocotools}
if hotcoco is None:
    del ENGINES["hotcoco"]
