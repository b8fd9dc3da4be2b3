"""How far numbers may be trusted: AP of the same detections on images drawn anew, and what their scores promise.

    matches = match(annotations, results)
    calibration_error(matches)
    draws = draw_images(matches.images, count=500)
    np.std([average_precision(matches, draw).mean() for draw in draws])

All runs scored on one validation set get the same draws, so that their differences are paired.
"""

import contextlib
import io
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.annotations import Annotations

RECALLS = np.linspace(0, 1, 101)


class ClassMatches(NamedTuple):
    """What COCO's rules say of the D detections of one class, best score first."""

    image: np.ndarray  # (D,) int64, place of the image
    score: np.ndarray  # (D,) float64
    right: np.ndarray  # (T, D) bool, at each IoU threshold
    wrong: np.ndarray  # (T, D) bool; neither where the detection is ignored
    truth: np.ndarray  # (I,) int64, boxes to be found in each image


class Matches(NamedTuple):
    images: int  # I
    classes: list[ClassMatches]


def match(annotations: Annotations, results: list[dict]) -> Matches:
    """Detections in COCO's results format matched with a loaded annotation file, once for all draws.

    All images of the file count, by the order of their ids.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # COCOeval cannot be told to be quiet
        truth, found = COCO(), COCO()
        truth.dataset = annotations.document()
        found.dataset = {key: truth.dataset[key] for key in ("images", "categories")}
        found.dataset["annotations"] = [
            {**one, "id": number, "area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0}
            for number, one in enumerate(results, start=1)
        ]
        truth.createIndex()
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.evaluate()
    count = len(evaluation.params.imgIds)
    categories = len(evaluation.params.catIds)
    by_class = [evaluation.evalImgs[k * count : (k + 1) * count] for k in range(categories)]
    return Matches(count, [_of_class(one) for one in by_class])


def draw_images(images: int, count: int, seed: int = 0) -> np.ndarray:
    """How often each image is in each of `count` draws of as many with replacement, (count, images) int64."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=count)


def average_precision(matches: Matches, draw: np.ndarray) -> np.ndarray:
    """AP at each IoU threshold 0.50, 0.55 ... 0.95, (10,), where each image counts `draw` (I,) times.

    All are -1 where nothing is to be found.
    """
    values = [_of_draw(one, draw) for one in matches.classes if one.truth @ draw > 0]
    return np.mean(values, axis=0) if values else np.full(10, -1.0)


def calibration_error(matches: Matches, bins: int = 10) -> float:
    """Expected calibration error at an IoU of 0.5: |mean score - share that is right| over equal bins of the score.

    The mean over all detections that count, of all classes (Guo et al., On Calibration of Modern Neural Networks,
    2017); -1 without any.
    """
    counts, scores, right = reliability(matches, bins)
    return float(np.abs(scores - right).sum() / counts.sum()) if counts.any() else -1.0


def reliability(matches: Matches, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of `bins` equal parts of the score 0..1: detections, the sum of their scores, and how many are right.

    All (bins,), over all classes, at an IoU of 0.5, of those detections that count.
    """
    sums = np.zeros((3, bins))
    for one in matches.classes:
        mask = one.right[0] | one.wrong[0]
        score, right = one.score[mask], one.right[0][mask]
        place = np.minimum((score * bins).astype(np.int64), bins - 1)
        sums += [np.bincount(place, weights, minlength=bins) for weights in (np.ones(len(score)), score, right)]
    return sums[0].astype(np.int64), sums[1], sums[2]


def precision_recall(one: ClassMatches, threshold: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each detection (D,), best score first, at the IoU threshold of that index."""
    right, wrong = np.cumsum(one.right[threshold]), np.cumsum(one.wrong[threshold])
    return right / np.maximum(right + wrong, 1), right / max(one.truth.sum(), 1)


def _of_draw(matches: ClassMatches, draw: np.ndarray) -> np.ndarray:
    times = draw[matches.image]
    right, wrong = (np.cumsum(flags * times, axis=1, dtype=np.float64) for flags in (matches.right, matches.wrong))
    recall = right / (matches.truth @ draw)
    precision = right / (right + wrong + np.spacing(1))
    # At each recall the best precision at that recall or a higher one.
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 1)))  # 0 at a recall that is never reached
    places = [np.searchsorted(row, RECALLS, side="left") for row in recall]
    return np.array([row[place].mean() for row, place in zip(precision, places)])


def _of_class(images: list[dict | None]) -> ClassMatches:
    """From COCOeval's findings on each image for one class; None where it has neither boxes nor detections."""
    truth = np.array([0 if one is None else int((1 - np.asarray(one["gtIgnore"])).sum()) for one in images], np.int64)
    seen = [(place, one) for place, one in enumerate(images) if one is not None]
    if not seen:
        return ClassMatches(np.zeros(0, np.int64), np.zeros(0), np.zeros((10, 0), bool), np.zeros((10, 0), bool), truth)
    scores = np.concatenate([one["dtScores"] for _, one in seen])
    order = np.argsort(-scores, kind="mergesort")  # COCOeval's own, so that ties fall alike
    image = np.repeat([place for place, _ in seen], [len(one["dtScores"]) for _, one in seen])[order]
    matched, ignored = (
        np.concatenate([one[key] for _, one in seen], axis=1)[:, order] for key in ("dtMatches", "dtIgnore")
    )
    ignored = ignored.astype(bool)
    return ClassMatches(image, scores[order], (matched > 0) & ~ignored, (matched == 0) & ~ignored, truth)
