"""Which kind of error each detection is, and what each kind costs.

The kinds are TIDE's (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020). An
IoU of at least 0.5 is a hit, and one below 0.1 counts as none. A detection that is not right has the first kind that
applies:

    localisation    0.1 to 0.5 with a box of its class
    classification  a hit on a box of another class
    duplicate       a hit on a box of its class that a detection with a higher score has
    background      below 0.1 with every box
    both            0.1 to 0.5 with a box of another class

A box is missed if no detection is right about it, nor a localisation or classification error on it.
"""

from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask

from data.annotations import Annotations
from data.coco_engines import GroundTruth, hotcoco, hotcoco_evaluation

HIT, NOTHING = 0.5, 0.1
RIGHT, IGNORED, MISSED = "right", "ignored", "missed"
KINDS = ("classification", "localisation", "both", "duplicate", "background", MISSED)
HOTCOCO_NAMES = dict(zip(KINDS, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")))  # in hotcoco


class ImageErrors(NamedTuple):
    """The errors of one image."""

    kinds: list[str]  # of each detection: RIGHT, IGNORED (it is on a crowd) or one of KINDS
    missed: list[int]  # indices of the missed boxes


def classify_errors(truth: list[dict], detections: list[dict]) -> ImageErrors:
    """truth: an image's boxes (COCO annotations). detections: COCO results, best first, all of which count."""
    boxes, others = ([entry["bbox"] for entry in entries] for entries in (detections, truth))
    crowd = np.array([bool(box.get("iscrowd")) for box in truth], bool)
    shape = len(detections), len(truth)
    iou = np.reshape(mask.iou(boxes, others, crowd), shape)  # with a crowd: the share of the detection's area
    same = np.array([[d["category_id"] == t["category_id"] for t in truth] for d in detections], bool).reshape(shape)
    in_crowd = (same & crowd & (iou >= HIT)).any(axis=1)
    same_class, other_class = np.where(same & ~crowd, iou, 0), np.where(~same & ~crowd, iou, 0)
    free = ~crowd
    kinds = [""] * len(detections)
    for d in range(len(detections)):  # the right ones first
        hits = np.where(free, same_class[d], 0)
        if hits.max(initial=0) >= HIT:
            free[hits.argmax()] = False
            kinds[d] = RIGHT
    near = np.zeros(len(truth), bool)
    for d in range(len(detections)):
        best_same, best_other = same_class[d].max(initial=0), other_class[d].max(initial=0)
        if kinds[d]:
            continue
        if in_crowd[d]:
            kinds[d] = IGNORED
        elif NOTHING <= best_same < HIT:
            kinds[d] = "localisation"
            near[same_class[d].argmax()] = True
        elif best_other >= HIT:
            kinds[d] = "classification"
            near[other_class[d].argmax()] = True
        elif best_same >= HIT:
            kinds[d] = "duplicate"
        else:
            kinds[d] = "background" if max(best_same, best_other) < NOTHING else "both"
    return ImageErrors(kinds, np.flatnonzero(free & ~near).tolist())


def costs(annotations: Annotations, results: list[dict]) -> dict[str, float] | None:
    """For each kind of error, the AP at an IoU of 0.5 (0..1) gained if only this kind were fixed.

    None without detections, or without hotcoco, which computes it.
    """
    if hotcoco is None or not results:
        return None
    evaluation = _evaluation(annotations, results)
    evaluation.evaluate()
    gains = evaluation.tide_errors(pos_thr=HIT, bg_thr=NOTHING)["delta_ap"]
    return {kind: float(gains[name]) for kind, name in HOTCOCO_NAMES.items()}


def confusion(annotations: Annotations, results: list[dict]) -> tuple[np.ndarray, list[str]] | None:
    """How often a box of one class (row) is detected as another (column), (K + 1, K + 1), and the classes' names.

    The last row counts detections on no box, the last column boxes without a detection. None if `costs` is None.
    """
    if hotcoco is None or not results:
        return None
    confused = _evaluation(annotations, results).confusion_matrix(iou_thr=HIT)
    return confused["matrix"].astype(np.int64), [*confused["cat_names"], "background"]


def _evaluation(annotations: Annotations, results: list[dict]) -> Any:
    image = {number: place for place, number in enumerate(annotations.image_ids.tolist())}
    category = {number: place for place, number in enumerate(annotations.names)}
    categories = np.array([category[number] for number in annotations.categories.tolist()], np.int64)
    truth = GroundTruth(annotations.images, categories, annotations.boxes, annotations.areas, annotations.crowds)
    rows = [
        (image[result["image_id"]], *result["bbox"], result["score"], category[result["category_id"]])
        for result in results
        if result["category_id"] in category
    ]
    table = np.array(rows, np.float64).reshape(-1, 7)
    return hotcoco_evaluation(truth, table, len(image), list(annotations.names.values()))
