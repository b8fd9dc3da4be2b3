"""What kind of error each detection is, and what the kinds cost.

The kinds are TIDE's (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020): of a
detection that is not right, where IoUs of at least 0.5 are a hit and below 0.1 nothing,

    localisation    0.1 to 0.5 with a box of its class
    classification  a hit on a box of another class
    duplicate       a hit on a box of its class that a surer detection has
    background      below 0.1 with every box
    both            0.1 to 0.5 with a box of another class

in this order; and a box is missed where no detection is right about it and none a localisation or classification error
on it.
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
THEIRS = dict(zip(KINDS, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")))  # in hotcoco


class Judged(NamedTuple):
    """Of one image."""

    kinds: list[str]  # of each detection: RIGHT, IGNORED (it is on a crowd) or one of KINDS
    missed: list[int]  # places of the boxes that are


def judge(truth: list[dict], found: list[dict]) -> Judged:
    """Boxes of an image (COCO annotations) and detections (COCO results), best first, of which all count."""
    real = [one for one in truth if not one.get("iscrowd")]
    crowds = [one for one in truth if one.get("iscrowd")]
    iou = overlaps([one["bbox"] for one in found], [one["bbox"] for one in real])
    in_crowd = overlaps([one["bbox"] for one in found], [one["bbox"] for one in crowds], of_first=True)
    same = np.array([[d["category_id"] == t["category_id"] for t in real] for d in found], bool).reshape(iou.shape)
    free = np.ones(len(real), bool)
    kinds = [""] * len(found)
    for d in range(len(found)):  # who is right is known first: a duplicate may come before what it duplicates
        hits = np.where(same[d] & free, iou[d], 0)
        if hits.size and hits.max() >= HIT:
            free[hits.argmax()] = False
            kinds[d] = RIGHT
    near = np.zeros(len(real), bool)
    for d in range(len(found)):
        own, other = np.where(same[d], iou[d], 0), np.where(same[d], 0, iou[d])
        best_own, best_other = own.max(initial=0), other.max(initial=0)
        if kinds[d]:
            continue
        if any(t["category_id"] == found[d]["category_id"] and in_crowd[d, c] >= HIT for c, t in enumerate(crowds)):
            kinds[d] = IGNORED
        elif NOTHING <= best_own < HIT:
            kinds[d] = "localisation"
            near[own.argmax()] = True
        elif best_other >= HIT:
            kinds[d] = "classification"
            near[other.argmax()] = True
        elif best_own >= HIT:
            kinds[d] = "duplicate"
        else:
            kinds[d] = "background" if max(best_own, best_other) < NOTHING else "both"
    places = [t for t, one in enumerate(truth) if not one.get("iscrowd")]
    return Judged(kinds, [places[t] for t in range(len(real)) if free[t] and not near[t]])


def overlaps(boxes: list, others: list, *, of_first: bool = False) -> np.ndarray:
    """IoU of boxes (D) and others (G) in x, y, width, height -> (D, G); `of_first`: share of the first's area."""
    a, b = (np.asarray(one, float).reshape(-1, 4) for one in (boxes, others))
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[None, :, :2] + b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area, other_area = a[:, 2:].prod(-1)[:, None], b[:, 2:].prod(-1)[None]
    return shared / np.maximum(area if of_first else area + other_area - shared, 1e-12)


def costs(annotations: Annotations, results: list[dict]) -> dict[str, float] | None:
    """AP at an IoU of 0.5 (0..1) that each kind costs: how much is won where it is mended alone.

    None without hotcoco, whose analysis it is, and where there is nothing to analyse.
    """
    if hotcoco is None or not results:
        return None
    evaluation = _evaluation(annotations, results)
    evaluation.evaluate()
    won = evaluation.tide_errors(pos_thr=HIT, bg_thr=NOTHING)["delta_ap"]
    return {kind: float(won[name]) for kind, name in THEIRS.items()}


def confusion(annotations: Annotations, results: list[dict]) -> tuple[np.ndarray, list[str]] | None:
    """How often a box of one class (row) is found as another (column), (K + 1, K + 1), and the classes' names.

    The last row is background: detections on no box; the last column boxes that are not found. None as `costs`.
    """
    if hotcoco is None or not results:
        return None
    found = _evaluation(annotations, results).confusion_matrix(iou_thr=HIT)
    return found["matrix"].astype(np.int64), [*found["cat_names"], "background"]


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
        (image[one["image_id"]], *one["bbox"], one["score"], category[one["category_id"]])
        for one in results
        if one["category_id"] in category
    ]
    return hotcoco.COCOeval(expected, expected.load_res(np.array(rows, np.float64)), "bbox")
