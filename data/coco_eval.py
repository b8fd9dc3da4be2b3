"""Detections -> AP numbers, by COCO's rules; and the tables that people read.

    metrics = score(annotations, detections, category_ids)
    print(metrics_table(metrics))

pycocotools is the reference; hotcoco, where it is installed, gives the same numbers to the bit, far faster.
Only here do detections leave xyxy boxes and labels 0..C-1 for COCO's xywh boxes and category ids.
"""

import contextlib
import io
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.annotations import Annotations
from detector.errors import UserError
from detector.structures import Detections

try:
    import hotcoco
except ImportError:
    hotcoco = None

# Places among COCOeval's thresholds 0.50, 0.55 ... 0.95.
IOUS = {"50": 0, "75": 5, "80": 6, "90": 8}

# COCOeval's areaRng after "all", of the annotation's `area`, which in COCO is the mask's.
SIZES = {
    "s": "no small boxes (area < 32^2 px)",
    "m": "no medium boxes (area 32^2 to 96^2 px)",
    "l": "no large boxes (area > 96^2 px)",
}


class GroundTruth(NamedTuple):
    """N boxes by the places of their image and category: an engine sees no ids, which may be 0, negative or huge."""

    images: np.ndarray  # (N,) int64
    categories: np.ndarray  # (N,) int64
    boxes: np.ndarray  # (N, 4) float64 xywh
    areas: np.ndarray  # (N,) float64
    crowds: np.ndarray  # (N,) bool


def score(
    annotations: Annotations, detections: dict[int, Detections], category_ids: list[int], *, engine: str | None = None
) -> dict:
    """Score detections against a COCO annotation file, on exactly the images that `detections` holds.

    annotations   the file as load_annotations reads it
    detections    by image id; boxes in pixels of the original image. An image without any counts as well
    category_ids  of each label; detections of a category that the file does not have are not counted
    engine        "pycocotools" or, where it is installed, "hotcoco"; None is the fastest

    Returns, as fractions 0..1 or -1 where there is no ground truth to measure on: AP, AP50, AP75, AP80, AP90,
    APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl; and
        by_iou     [AP at an IoU of 0.50, 0.55 ... 0.95]
        precision_by_recall  [mean of the classes' precision at a recall of 0.00, 0.01 ... 1.00], at an IoU of 0.5
        per_class  {name: {AP, AP50, AP75, AR100, threshold, boxes}}: the score above which F1 at an IoU of 0.5 is
                   best, and the ground truth without crowds
        images     how many were scored
        engine     its name and version
    Raises UserError for an image that the file does not have, FloatingPointError for a detection that is not
    finite.
    """
    unknown = sorted(detections.keys() - set(annotations.image_ids.tolist()))
    if unknown:
        raise UserError(
            f"detections of {len(unknown)} image(s) that are not in the annotation file, e.g. image id "
            f"{unknown[0]}: score with the file that the images were listed from"
        )
    names = annotations.names
    place = {category_id: k for k, category_id in enumerate(sorted(names))}
    truth = _ground_truth(annotations, sorted(detections), sorted(names))
    images, boxes, scores, labels = _found(detections)
    categories = np.array([place.get(category_id, -1) for category_id in category_ids], np.int64)[labels]
    # As an array that COCO.loadRes takes: floats, in which places are exact and ids might not be.
    results = np.column_stack([images, boxes, scores, categories])[categories >= 0]  # (N, 7)

    engine = engine or next(iter(ENGINES))
    precision, recall, thresholds = ENGINES[engine](truth, results, len(detections), len(place))
    metrics = {
        "AP": _mean(precision[..., 0, -1]),
        **{f"AP{iou}": _mean(precision[t, ..., 0, -1]) for iou, t in IOUS.items()},
        **{f"AP{size}": _mean(precision[..., a, -1]) for a, size in enumerate(SIZES, start=1)},
        **{f"AR{limit}": _mean(recall[..., 0, m]) for m, limit in enumerate((1, 10, 100))},
        **{f"AR{size}": _mean(recall[..., a, -1]) for a, size in enumerate(SIZES, start=1)},
    }
    metrics["precision_by_recall"] = [_mean(of_classes) for of_classes in precision[IOUS["50"], :, :, 0, -1]]
    metrics["by_iou"] = [_mean(at_iou[..., 0, -1]) for at_iou in precision]
    counts = np.bincount(truth.categories[~truth.crowds], minlength=len(place)).tolist()
    metrics["per_class"] = {}
    for category_id, name in names.items():
        k = place[category_id]
        curves = precision[:, :, k, 0, -1]  # (T, R)
        at_recalls, own = thresholds[IOUS["50"], :, k, 0, -1], results[results[:, 6] == k, 5]
        metrics["per_class"][name] = {
            "AP": _mean(curves),
            "AP50": _mean(curves[IOUS["50"]]),
            "AP75": _mean(curves[IOUS["75"]]),
            "AR100": _mean(recall[:, k, 0, -1]),
            "threshold": _best_threshold(curves[IOUS["50"]], at_recalls, own),
            "boxes": counts[k],
        }
    metrics["images"] = len(detections)
    metrics["engine"] = f"{engine} {version(engine)}"
    return metrics


def coco_results(detections: dict[int, Detections], category_ids: list[int]) -> list[dict]:
    """Detections in COCO's results format, ready for json.dump, by image id.

    Boxes are xywh rounded to 1/1000 pixel and scores to 5 decimals, which keeps the file small; `score`
    rounds nothing, so scoring this file again may differ in the last decimals.
    """
    image_ids = sorted(detections)
    images, boxes, scores, labels = _found(detections)
    columns = (images, labels, boxes.round(3), scores.round(5))
    return [
        {"image_id": image_ids[image], "category_id": category_ids[label], "bbox": box, "score": value}
        for image, label, box, value in zip(*(column.tolist() for column in columns))
    ]


def from_coco_results(results: list[dict], image_ids: list[int], category_ids: list[int]) -> dict[int, Detections]:
    """What `coco_results` wrote, or another of that format: detections of every image of `image_ids`, best first.

    Raises UserError for an entry that lacks something, or is of an image or category that is not listed.
    """
    label = {category: place for place, category in enumerate(category_ids)}
    by_image: dict[int, list[tuple[float, int, list[float]]]] = {image: [] for image in image_ids}
    for number, one in enumerate(results):
        try:
            x, y, width, height = map(float, one["bbox"])
            entry = -float(one["score"]), label[one["category_id"]], [x, y, x + width, y + height]
            by_image[one["image_id"]].append(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"detection {number}: {type(error).__name__} {error}: it needs bbox, score, category_id and image_id, "
                "the last two as in the annotation file"
            ) from None
    found = {}
    for image, ones in by_image.items():
        ones.sort(key=lambda one: one[0])
        boxes = torch.tensor([box for _, _, box in ones]).reshape(-1, 4)
        labels = torch.tensor([place for _, place, _ in ones], dtype=torch.int64)
        found[image] = Detections(boxes, torch.tensor([-score for score, _, _ in ones]), labels)
    return found


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


def _ground_truth(annotations: Annotations, image_ids: list[int], category_ids: list[int]) -> GroundTruth:
    """What is scored of each annotation, in the order of the file; both lists of ids are sorted."""
    owners = annotations.image_ids[annotations.images]
    kept = np.isin(owners, image_ids)
    return GroundTruth(
        images=np.searchsorted(image_ids, owners[kept]),
        categories=np.searchsorted(category_ids, annotations.categories[kept]),
        boxes=annotations.boxes[kept],
        areas=annotations.areas[kept],
        crowds=annotations.crowds[kept],
    )


def _found(detections: dict[int, Detections]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All detections by image id: place of the image (N,), boxes (N, 4) xywh, scores (N,), labels (N,)."""
    image_ids = sorted(detections)
    nothing = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))
    each = [detections[image_id] for image_id in image_ids] or [nothing]  # torch.cat refuses an empty list
    images = np.repeat(np.arange(len(each)), [len(one.labels) for one in each])
    boxes, scores, labels = (torch.cat(column).cpu() for column in zip(*each))
    boxes, scores = boxes.double().numpy(), scores.double().numpy()
    # COCOeval matches a NaN box to any ground truth, since NaN < threshold is false.
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    if not finite.all():
        image_id = image_ids[images[finite.argmin()]]
        raise FloatingPointError(f"detections of image id {image_id} are not finite: the model diverged")
    boxes[:, 2:] -= boxes[:, :2]
    return images, boxes, scores, labels.numpy()


def _pycocotools(
    truth: GroundTruth, results: np.ndarray, num_images: int, num_categories: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    found = [
        {"id": number, "image_id": int(i), "category_id": int(k), "bbox": box, "area": box[2] * box[3], "score": value}
        for number, (i, *box, value, k) in enumerate(results.tolist(), start=1)
    ]
    # COCOeval cannot be told to be quiet.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(index(expected), index(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return tuple(evaluation.eval[key] for key in ("precision", "recall", "scores"))


def _hotcoco(
    truth: GroundTruth, results: np.ndarray, num_images: int, num_categories: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    return tuple(evaluation.eval[key] for key in ("precision", "recall", "scores"))


def _mean(values: np.ndarray) -> float:
    """Mean over what has ground truth, as COCOeval.summarize; -1 where nothing has."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _best_threshold(precision: np.ndarray, at_recalls: np.ndarray, scores: np.ndarray) -> float:
    """Where F1 is best, given precision (R,) and scores (R,) at R recalls, and all scores; -1 where nothing is found.

    That is halfway to the next lower score: the lowest one that counts must also reach it in another batch, precision
    or machine, where its last digits differ.
    """
    recall = np.linspace(0, 1, len(precision))
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    if f1.max() <= 0:
        return -1.0
    lowest = at_recalls[f1.argmax()]
    return float(lowest + scores[scores < lowest].max(initial=0)) / 2


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"


# Fastest first. Each takes ground truth, results (N, 7), the number of images and that of categories K, and returns
# COCOeval's precision (T, R, K, 4, 3), recall (T, K, 4, 3) and scores (T, R, K, 4, 3): T IoU thresholds, R recalls;
# all, small, medium and large areas; at most 1, 10 and 100 detections of an image and category.
ENGINES = {"hotcoco": _hotcoco, "pycocotools": _pycocotools}
if hotcoco is None:
    del ENGINES["hotcoco"]
