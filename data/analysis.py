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

from data.annotations import Annotations

hotcoco: Any
try:
    import hotcoco
except ImportError:
    hotcoco = None

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
    real = [box for box in truth if not box.get("iscrowd")]
    crowds = [box for box in truth if box.get("iscrowd")]
    iou = overlaps([detection["bbox"] for detection in detections], [box["bbox"] for box in real])
    in_crowd = overlaps([detection["bbox"] for detection in detections], [box["bbox"] for box in crowds], of_first=True)
    same = np.array([[d["category_id"] == t["category_id"] for t in real] for d in detections], bool).reshape(iou.shape)
    free = np.ones(len(real), bool)
    kinds = [""] * len(detections)
    for d in range(len(detections)):  # the right ones first
        hits = np.where(same[d] & free, iou[d], 0)
        if hits.size and hits.max() >= HIT:
            free[hits.argmax()] = False
            kinds[d] = RIGHT
    near = np.zeros(len(real), bool)
    for d in range(len(detections)):
        same_class, other_class = np.where(same[d], iou[d], 0), np.where(same[d], 0, iou[d])
        best_same, best_other = same_class.max(initial=0), other_class.max(initial=0)
        if kinds[d]:
            continue
        if any(
            t["category_id"] == detections[d]["category_id"] and in_crowd[d, c] >= HIT for c, t in enumerate(crowds)
        ):
            kinds[d] = IGNORED
        elif NOTHING <= best_same < HIT:
            kinds[d] = "localisation"
            near[same_class.argmax()] = True
        elif best_other >= HIT:
            kinds[d] = "classification"
            near[other_class.argmax()] = True
        elif best_same >= HIT:
            kinds[d] = "duplicate"
        else:
            kinds[d] = "background" if max(best_same, best_other) < NOTHING else "both"
    places = [t for t, box in enumerate(truth) if not box.get("iscrowd")]
    return ImageErrors(kinds, [places[t] for t in range(len(real)) if free[t] and not near[t]])


def overlaps(boxes: list, others: list, *, of_first: bool = False) -> np.ndarray:
    """IoU of boxes (D) and others (G) in x, y, width, height -> (D, G); `of_first`: share of the first's area."""
    a, b = (np.asarray(sides, float).reshape(-1, 4) for sides in (boxes, others))
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[None, :, :2] + b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area, other_area = a[:, 2:].prod(-1)[:, None], b[:, 2:].prod(-1)[None]
    return shared / np.maximum(area if of_first else area + other_area - shared, 1e-12)


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


def _evaluation(annotations: Annotations, results: list[dict]) -> "hotcoco.COCOeval":
    image = {number: place for place, number in enumerate(annotations.image_ids.tolist())}
    category = {number: place for place, number in enumerate(annotations.names)}
    expected = hotcoco.COCO.from_arrays(
        [{"id": place} for place in image.values()],
        [{"id": category[number], "name": name} for number, name in annotations.names.items()],
        annotations.images,
        np.array([category[number] for number in annotations.categories.tolist()], np.int64),
        annotations.boxes,
        area=annotations.areas,
        iscrowd=annotations.crowds,
    )
    rows = [
        (image[result["image_id"]], *result["bbox"], result["score"], category[result["category_id"]])
        for result in results
        if result["category_id"] in category
    ]
    return hotcoco.COCOeval(expected, expected.load_res(np.array(rows, np.float64).reshape(-1, 7)), "bbox")
