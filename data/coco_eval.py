"""Detections -> AP numbers, by pycocotools' own COCOeval; and the tables that people read.

    metrics = score(annotations, detections, category_ids)
    print(metrics_table(metrics))

Only here do detections leave xyxy boxes and labels 0..C-1 for COCO's xywh boxes and category ids.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Container
from importlib.metadata import version

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.coco import unique_names
from detector.errors import UserError
from detector.structures import Detections

# The order of COCOeval.stats.
STANDARD = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

# Bounds as in COCOeval's areaRng, of the annotation's `area`, which in COCO is the mask's.
SIZES = {
    "s": "no small boxes (area < 32^2 px)",
    "m": "no medium boxes (area 32^2 to 96^2 px)",
    "l": "no large boxes (area > 96^2 px)",
}


def score(annotations: dict, detections: dict[int, Detections], category_ids: list[int]) -> dict:
    """Score detections against a COCO annotation file, on exactly the images that `detections` holds.

    annotations   the loaded file; `area` (then w * h) and `iscrowd` (then 0) may be missing. Not modified
    detections    by image id; boxes in pixels of the original image. An image without any counts as well
    category_ids  of each label; detections of a category that the file does not have are not counted

    Returns, as fractions 0..1 or -1 where there is no ground truth to measure on: AP, AP50, AP75, AP80, AP90,
    APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl; and
        per_class  {name: {AP, AP50, AP75, AR100, boxes}}, boxes being the ground truth without crowds
        images     how many were scored
        engine     pycocotools and its version
    Raises UserError for an image that the file does not have, FloatingPointError for a detection that is not
    finite.
    """
    unknown = sorted(detections.keys() - {image["id"] for image in annotations["images"]})
    if unknown:
        raise UserError(
            f"detections of {len(unknown)} image(s) that are not in the annotation file, e.g. image id "
            f"{unknown[0]}: score with the file that the images were listed from"
        )
    truth = _ground_truth(annotations, detections)
    found = _found(detections, category_ids)
    # COCOeval cannot be told to be quiet.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(annotations, truth), _index(annotations, found), "bbox")
        evaluation.params.imgIds = list(detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    # Of all areas and 100 detections per image and class; T IoU thresholds, R recalls, K categories.
    precision = evaluation.eval["precision"][..., 0, -1]  # (T, R, K)
    recall = evaluation.eval["recall"][..., 0, -1]  # (T, K)
    t50, t75, t80, t90 = (_nearest(evaluation.params.iouThrs, iou) for iou in (0.5, 0.75, 0.8, 0.9))

    metrics = {name: float(value) for name, value in zip(STANDARD, evaluation.stats)}
    metrics["AP80"] = _mean(precision[t80])
    metrics["AP90"] = _mean(precision[t90])

    boxes = Counter(box["category_id"] for box in truth if not box["iscrowd"])
    column = {category_id: k for k, category_id in enumerate(evaluation.params.catIds)}  # COCOeval sorts them
    metrics["per_class"] = {}
    for category_id, name in unique_names(annotations["categories"]).items():
        k = column[category_id]
        metrics["per_class"][name] = {
            "AP": _mean(precision[:, :, k]),
            "AP50": _mean(precision[t50, :, k]),
            "AP75": _mean(precision[t75, :, k]),
            "AR100": _mean(recall[:, k]),
            "boxes": boxes[category_id],
        }
    metrics["images"] = len(detections)
    metrics["engine"] = f"pycocotools {version('pycocotools')}"
    return metrics


def coco_results(detections: dict[int, Detections], category_ids: list[int]) -> list[dict]:
    """Detections in COCO's results format, ready for json.dump, by image id.

    Boxes are xywh rounded to 1/1000 pixel and scores to 5 decimals, which keeps the file small; `score`
    rounds nothing, so scoring this file again may differ in the last decimals.
    """
    return [
        {
            "image_id": found["image_id"],
            "category_id": found["category_id"],
            "bbox": [round(value, 3) for value in found["bbox"]],
            "score": round(found["score"], 5),
        }
        for found in _found(detections, category_ids)
    ]


def metrics_table(metrics: dict) -> str:
    """The numbers over all classes, in percent; "-" for -1 and, below, why."""
    ap = ("AP", "AP50", "AP75", "AP80", "AP90", "APs", "APm", "APl")
    ar = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    lines = [f"{metrics['images']} images, {metrics['engine']}, in percent", ""]
    for names in (ap, ar):
        lines.append("".join(f"{name:>7}" for name in names))
        lines.append("".join(f"{_percent(metrics[name]):>7}" for name in names))
    missing = explain_missing(metrics)
    return "\n".join(lines + (["", *missing] if missing else []))


def per_class_table(metrics: dict) -> str:
    """One line a class, in the order of the file: ground-truth boxes; AP, AP50, AP75 in percent."""
    per_class = metrics["per_class"]
    width = max(len(name) for name in ["class", *per_class])
    lines = [f"{'class':<{width}}{'boxes':>9}{'AP':>7}{'AP50':>7}{'AP75':>7}"]
    for name, values in per_class.items():
        numbers = "".join(f"{_percent(values[key]):>7}" for key in ("AP", "AP50", "AP75"))
        lines.append(f"{name:<{width}}{values['boxes']:>9}{numbers}")
    return "\n".join(lines)


def explain_missing(metrics: dict) -> list[str]:
    """Why numbers are -1, a line a reason; empty where none is."""
    if metrics["images"] == 0:
        return ["all numbers are -1: no images were scored"]
    if metrics["AP"] < 0:
        return ["all numbers are -1: the validation set has no boxes (crowd boxes are not counted)"]
    lines = [
        f"AP{size} and AR{size} are -1: the validation set has {reason}"
        for size, reason in SIZES.items()
        if metrics[f"AP{size}"] < 0
    ]
    empty = [name for name, values in metrics["per_class"].items() if values["AP"] < 0]
    if empty:
        names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        lines.append(f"AP of a class is -1, and not in the mean: the validation set has no boxes of {names}")
    return lines


def _index(annotations: dict, boxes: list[dict]) -> COCO:
    """Boxes as the object that COCOeval wants, of the file's images and categories.

    Built without COCO.loadRes, which fails on an empty list and gives every detection a polygon.
    """
    coco = COCO()
    coco.dataset = {
        "images": annotations["images"],
        "categories": annotations["categories"],
        "annotations": boxes,
    }
    coco.createIndex()
    return coco


def _ground_truth(annotations: dict, image_ids: Container[int]) -> list[dict]:
    """What COCOeval reads of each annotation, copied, since it writes into them."""
    kept = [a for a in annotations["annotations"] if a["image_id"] in image_ids]
    return [
        {
            # COCOeval takes a match with id 0 for no match; some files count from 0.
            "id": number,
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "area": a.get("area", a["bbox"][2] * a["bbox"][3]),
            "iscrowd": a.get("iscrowd", 0),
        }
        for number, a in enumerate(kept, start=1)
    ]


def _found(detections: dict[int, Detections], category_ids: list[int]) -> list[dict]:
    """Detections as COCOeval wants them: what COCO.loadRes makes, but for the polygon it adds."""
    results = []
    for image_id in sorted(detections):
        boxes, scores, labels = detections[image_id]
        # COCOeval matches a NaN box to any ground truth, since NaN < threshold is false.
        if not (boxes.isfinite().all() and scores.isfinite().all()):
            raise FloatingPointError(f"detections of image id {image_id} are not finite: the model diverged")
        x1, y1, x2, y2 = boxes.cpu().double().unbind(1)
        xywh = torch.stack([x1, y1, x2 - x1, y2 - y1], dim=1).tolist()
        # Dicts, not COCO's (D, 7) array: ids stay integers, exact whatever their size.
        for box, value, label in zip(xywh, scores.tolist(), labels.tolist()):
            results.append(
                {
                    "id": len(results) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": box,
                    "score": value,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    return results


def _mean(values: np.ndarray) -> float:
    """Mean over what has ground truth, as COCOeval.summarize; -1 where nothing has."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _nearest(thresholds: np.ndarray, iou: float) -> int:
    # Not ==: the threshold 0.9 is 0.8999999999999999.
    return int(np.abs(thresholds - iou).argmin())


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"
