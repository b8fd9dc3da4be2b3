"""The two programs that compute COCO's precision and recall.

pycocotools is the reference; hotcoco, if it is installed, gives the same numbers to the bit, far faster.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
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


def pycocotools_evaluation(
    images: list[dict], categories: list[dict], boxes: list[dict], detections: list[dict]
) -> COCOeval:
    """An evaluation of COCO annotations and results, whose ids it sets. Like all of COCOeval's methods, it prints."""
    for entry in detections:
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    indexed = []
    for entries in (boxes, detections):
        for number, entry in enumerate(entries, start=1):  # COCOeval takes a match with id 0 for no match
            entry["id"] = number
        # Not COCO.loadRes, which fails on an empty list and gives every detection a polygon.
        coco = COCO()
        coco.dataset = {"images": images, "categories": categories, "annotations": entries}
        coco.createIndex()
        indexed.append(coco)
    return COCOeval(*indexed, "bbox")


def _pycocotools(truth: GroundTruth, results: np.ndarray, num_images: int, num_categories: int) -> Curves:
    images = [{"id": i} for i in range(num_images)]
    categories = [{"id": k} for k in range(num_categories)]
    boxes = [
        {"image_id": i, "category_id": k, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for i, k, box, area, crowd in zip(*(column.tolist() for column in truth))
    ]
    detections = [
        {"image_id": int(i), "category_id": int(k), "bbox": box, "score": value}
        for i, *box, value, k in results.tolist()
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = pycocotools_evaluation(images, categories, boxes, detections)
        evaluation.evaluate()
        evaluation.accumulate()
    return Curves(*(evaluation.eval[key] for key in Curves._fields))


def hotcoco_evaluation(truth: GroundTruth, results: np.ndarray, num_images: int, names: Sequence[str]) -> Any:
    """hotcoco's COCOeval; names: of the categories."""
    expected = hotcoco.COCO.from_arrays(
        [{"id": i} for i in range(num_images)],
        [{"id": k, "name": name} for k, name in enumerate(names)],
        truth.images,
        truth.categories,
        truth.boxes,
        area=truth.areas,
        iscrowd=truth.crowds,
    )
    return hotcoco.COCOeval(expected, expected.load_res(results), "bbox")


def _hotcoco(truth: GroundTruth, results: np.ndarray, num_images: int, num_categories: int) -> Curves:
    evaluation = hotcoco_evaluation(truth, results, num_images, [str(k) for k in range(num_categories)])
    evaluation.evaluate()
    evaluation.accumulate()
    return Curves(*(evaluation.eval[key] for key in Curves._fields))


# Fastest first.
ENGINES: dict[str, Engine] = {"hotcoco": _hotcoco, "pycocotools": _pycocotools}
if hotcoco is None:
    del ENGINES["hotcoco"]
