"""Detections -> AP numbers, by COCO's rules.

    metrics = score(annotations, detections, category_ids)
    print(metrics_table(metrics))

The numbers are those of pycocotools, whichever engine computes them.
"""

from importlib.metadata import version
from typing import cast

import numpy as np

from data.annotations import Annotations
from data.coco_engines import ENGINES, GroundTruth
from data.coco_results import columns
from detector.errors import UserError
from detector.metrics import ClassMetrics, Metrics
from detector.structures import Detections

IOUS = {"50": 0, "75": 5, "80": 6, "90": 8}  # indices among COCOeval's thresholds 0.50, 0.55 ... 0.95
SIZES = ("s", "m", "l")  # COCOeval's areaRng after "all"


def score(
    annotations: Annotations, detections: dict[int, Detections], category_ids: list[int], *, engine: str | None = None
) -> Metrics:
    """Score detections against a COCO annotation file, on exactly the images that `detections` holds.

    Args:
        annotations: the file as load_annotations reads it
        detections: by image id; boxes in pixels of the original image. An image without detections counts as well
        category_ids: of each label; detections of a category that the file does not have are left out
        engine: "pycocotools" or, where it is installed, "hotcoco"; None is the fastest

    Raises UserError for an image that the file does not have, FloatingPointError for a detection that is not finite.
    """
    unknown = sorted(detections.keys() - set(annotations.image_ids.tolist()))
    if unknown:
        raise UserError(
            f"detections of {len(unknown)} image(s) that are not in the annotation file, e.g. image id "
            f"{unknown[0]}: score with the file that the images were listed from"
        )
    names = annotations.names
    index = {category_id: k for k, category_id in enumerate(sorted(names))}
    truth = _ground_truth(annotations, sorted(detections), sorted(names))
    images, boxes, scores, labels = columns(detections)
    categories = np.array([index.get(category_id, -1) for category_id in category_ids], np.int64)[labels]
    # COCO.loadRes takes an array of floats, which hold indices exactly, but not every id.
    results = np.column_stack([images, boxes, scores, categories])[categories >= 0]  # (N, 7)

    engine = engine or next(iter(ENGINES))
    precision, recall, score_at_recall = ENGINES[engine](truth, results, len(detections), len(index))
    counts = np.bincount(truth.categories[~truth.crowds], minlength=len(index)).tolist()
    per_class: dict[str, ClassMetrics] = {}
    for category_id, name in names.items():
        k = index[category_id]
        curves = precision[:, :, k, 0, -1]  # (T, R)
        scores_of_class = results[results[:, 6] == k, 5]
        per_class[name] = {
            "AP": _mean(curves),
            "AP50": _mean(curves[IOUS["50"]]),
            "AP75": _mean(curves[IOUS["75"]]),
            "AR100": _mean(recall[:, k, 0, -1]),
            "threshold": _best_threshold(curves[IOUS["50"]], score_at_recall[IOUS["50"], :, k, 0, -1], scores_of_class),
            "boxes": counts[k],
        }
    metrics = {
        "AP": _mean(precision[..., 0, -1]),
        **{f"AP{iou}": _mean(precision[t, ..., 0, -1]) for iou, t in IOUS.items()},
        **{f"AP{size}": _mean(precision[..., a, -1]) for a, size in enumerate(SIZES, start=1)},
        **{f"AR{limit}": _mean(recall[..., 0, m]) for m, limit in enumerate((1, 10, 100))},
        **{f"AR{size}": _mean(recall[..., a, -1]) for a, size in enumerate(SIZES, start=1)},
        "precision_by_recall": [_mean(of_classes) for of_classes in precision[IOUS["50"], :, :, 0, -1]],
        "by_iou": [_mean(at_iou[..., 0, -1]) for at_iou in precision],
        "per_class": per_class,
        "images": len(detections),
        "engine": f"{engine} {version(engine)}",
    }
    return cast(Metrics, metrics)


def _ground_truth(annotations: Annotations, image_ids: list[int], category_ids: list[int]) -> GroundTruth:
    """The annotations of these images, in the order of the file; both lists of ids are sorted."""
    image_of = annotations.image_ids[annotations.images]
    scored = np.isin(image_of, image_ids)
    return GroundTruth(
        images=np.searchsorted(image_ids, image_of[scored]),
        categories=np.searchsorted(category_ids, annotations.categories[scored]),
        boxes=annotations.boxes[scored],
        areas=annotations.areas[scored],
        crowds=annotations.crowds[scored],
    )


def _mean(values: np.ndarray) -> float:
    """Mean over the entries with ground truth, as in COCOeval.summarize; -1 without any."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _best_threshold(precision: np.ndarray, score_at_recall: np.ndarray, scores: np.ndarray) -> float:
    """The score threshold with the best F1; -1 if no object was found.

    precision, score_at_recall (R,): precision and score at R recalls; scores: all scores of the class.
    Halfway between the lowest score that counts and the next lower one, so rounding by batch, precision or machine does
    not drop it.
    """
    recall = np.linspace(0, 1, len(precision))
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    if f1.max() <= 0:
        return -1.0
    lowest = score_at_recall[f1.argmax()]
    return float(lowest + scores[scores < lowest].max(initial=0)) / 2
