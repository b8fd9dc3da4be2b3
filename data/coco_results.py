"""COCO's results format, for exchanging and scoring detections.

Only this file converts detections from xyxy boxes and labels 0..C-1 to COCO's xywh boxes and category ids, and back.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from detector import atomic
from detector.errors import UserError
from detector.metrics import Metrics
from detector.structures import Detections


class Columns(NamedTuple):
    """N detections of several images as arrays, in the order of the image ids."""

    images: np.ndarray  # (N,) int64, place of the image among the sorted ids
    boxes: np.ndarray  # (N, 4) float64 xywh
    scores: np.ndarray  # (N,) float64
    labels: np.ndarray  # (N,) int64


def columns(detections: dict[int, Detections]) -> Columns:
    """All detections, given by image id. Raises FloatingPointError where a box or score is not finite."""
    image_ids = sorted(detections)
    nothing = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))
    parts = [detections[image_id] for image_id in image_ids] or [nothing]  # torch.cat refuses an empty list
    images = np.repeat(np.arange(len(parts)), [len(part.labels) for part in parts])
    boxes, scores = (torch.cat([part[i] for part in parts]).cpu().double().numpy() for i in (0, 1))
    labels = torch.cat([part.labels for part in parts]).cpu().numpy()
    # COCOeval matches a NaN box to any ground truth, since NaN < threshold is false.
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    if not finite.all():
        image_id = image_ids[images[finite.argmin()]]
        raise FloatingPointError(f"detections of image id {image_id} are not finite: the model diverged")
    boxes[:, 2:] -= boxes[:, :2]
    return Columns(images, boxes, scores, labels)


def coco_results(detections: dict[int, Detections], category_ids: list[int]) -> list[dict[str, Any]]:
    """Detections in COCO's results format, ready for json.dump, in the order of the image ids.

    Boxes are rounded to 1/1000 pixel and scores to 5 decimals, which keeps the file small. `score` rounds nothing, so
    scoring this file again may differ in the last decimals.
    """
    image_ids = sorted(detections)
    images, boxes, scores, labels = columns(detections)
    rows = zip(images.tolist(), labels.tolist(), boxes.round(3).tolist(), scores.round(5).tolist())
    return [
        {"image_id": image_ids[image], "category_id": category_ids[label], "bbox": box, "score": score}
        for image, label, box, score in rows
    ]


def from_coco_results(
    results: list[dict[str, Any]], image_ids: list[int], category_ids: list[int]
) -> dict[int, Detections]:
    """Detections of every image of `image_ids`, best first, from `coco_results` or another program.

    Raises UserError for an entry that lacks a key, or whose image or category is not listed.
    """
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    by_image: dict[int, list[tuple[float, int, list[float]]]] = {image_id: [] for image_id in image_ids}
    for number, result in enumerate(results):
        try:
            x, y, width, height = map(float, result["bbox"])
            entry = float(result["score"]), label_of[result["category_id"]], [x, y, x + width, y + height]
            by_image[result["image_id"]].append(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"detection {number}: {type(error).__name__} {error}: it needs bbox, score, category_id and image_id, "
                "the last two as in the annotation file"
            ) from None
    detections = {}
    for image_id, entries in by_image.items():
        entries.sort(key=lambda entry: -entry[0])
        boxes = torch.tensor([box for _, _, box in entries]).reshape(-1, 4)
        labels = torch.tensor([label for _, label, _ in entries], dtype=torch.int64)
        detections[image_id] = Detections(boxes, torch.tensor([score for score, _, _ in entries]), labels)
    return detections


def write_results(folder: Path, metrics: Metrics, results: list[dict[str, Any]]) -> None:
    """Write metrics.json and detections.json. Raises UserError if that fails."""
    try:
        atomic.write(folder / "detections.json", json.dumps(results))
        atomic.write(folder / "metrics.json", json.dumps(metrics, indent=1))
    except OSError as error:
        raise UserError(f"{folder}: the results cannot be written ({error.strerror}); free some space") from None
