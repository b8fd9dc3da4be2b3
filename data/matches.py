"""How reliable numbers are: bootstrap intervals of AP over the images, and the calibration of scores.

    outcomes = match(annotations, results)
    calibration_error(outcomes)
    draws = draw_images(outcomes.images, count=500)
    np.std([average_precision(outcomes, draw).mean() for draw in draws])

All runs on one validation set get the same draws, so that their differences are paired.
"""

import contextlib
import io
from typing import NamedTuple

import numpy as np

from data.annotations import Annotations
from data.coco_engines import pycocotools_evaluation

RECALLS = np.linspace(0, 1, 101)


class ClassOutcomes(NamedTuple):
    """The D detections of one class by COCO's rules, best score first: right, wrong or ignored."""

    image: np.ndarray  # (D,) int64, place of the image
    score: np.ndarray  # (D,) float64
    right: np.ndarray  # (T, D) bool, at each IoU threshold
    wrong: np.ndarray  # (T, D) bool; an ignored detection is neither right nor wrong
    truth: np.ndarray  # (I,) int64, ground-truth boxes in each image


class Outcomes(NamedTuple):
    """The outcomes of a run's detections on a set of images."""

    images: int  # I
    classes: list[ClassOutcomes]


def match(annotations: Annotations, results: list[dict]) -> Outcomes:
    """Match detections in COCO's results format with a loaded annotation file, once for all draws.

    All images of the file count, in the order of their ids.
    """
    document, detections = annotations.document(), [result.copy() for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = pycocotools_evaluation(
            document["images"], document["categories"], document["annotations"], detections
        )
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.evaluate()
    count = len(evaluation.params.imgIds)
    categories = len(evaluation.params.catIds)
    return Outcomes(count, [_of_class(evaluation.evalImgs[k * count : (k + 1) * count]) for k in range(categories)])


def draw_images(images: int, count: int, seed: int = 0) -> np.ndarray:
    """Bootstrap draws with replacement: how often each image is in each, (count, images) int64."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=count)


def average_precision(outcomes: Outcomes, draw: np.ndarray) -> np.ndarray:
    """AP at each IoU threshold 0.50, 0.55 ... 0.95, (10,), where each image counts `draw` (I,) times.

    All are -1 without ground truth.
    """
    values = [_of_draw(of_class, draw) for of_class in outcomes.classes if of_class.truth @ draw > 0]
    return np.mean(values, axis=0) if values else np.full(10, -1.0)


def calibration_error(outcomes: Outcomes, bins: int = 10) -> float:
    """Expected calibration error at an IoU of 0.5: |mean score - share that is right|, over equal bins of the score.

    The mean over all detections of all classes, ignored ones left out (Guo et al., On Calibration of Modern Neural
    Networks, 2017); -1 without any.
    """
    counts, scores, right = reliability(outcomes, bins)
    return float(np.abs(scores - right).sum() / counts.sum()) if counts.any() else -1.0


def reliability(outcomes: Outcomes, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In each of `bins` equal parts of the score 0..1: detections, the sum of their scores, and how many are right.

    All (bins,), over all classes, at an IoU of 0.5; ignored detections are left out.
    """
    sums = np.zeros((3, bins))
    for of_class in outcomes.classes:
        counted = of_class.right[0] | of_class.wrong[0]
        score, right = of_class.score[counted], of_class.right[0][counted]
        place = np.minimum((score * bins).astype(np.int64), bins - 1)
        sums += [np.bincount(place, weights, minlength=bins) for weights in (np.ones(len(score)), score, right)]
    return sums[0].astype(np.int64), sums[1], sums[2]


def precision_recall(of_class: ClassOutcomes, threshold: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each detection (D,), best score first, at the IoU threshold of that index."""
    right, wrong = np.cumsum(of_class.right[threshold]), np.cumsum(of_class.wrong[threshold])
    return right / np.maximum(right + wrong, 1), right / max(of_class.truth.sum(), 1)


def _of_draw(of_class: ClassOutcomes, draw: np.ndarray) -> np.ndarray:
    times = draw[of_class.image]
    right, wrong = (np.cumsum(flags * times, axis=1, dtype=np.float64) for flags in (of_class.right, of_class.wrong))
    recall = right / (of_class.truth @ draw)
    precision = right / (right + wrong + np.spacing(1))
    # At each recall the best precision at that recall or a higher one.
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 1)))  # 0 at a recall that is never reached
    places = [np.searchsorted(row, RECALLS, side="left") for row in recall]
    return np.array([row[place].mean() for row, place in zip(precision, places)])


def _of_class(images: list[dict | None]) -> ClassOutcomes:
    """From COCOeval's record of each image for one class; None where it has neither boxes nor detections."""
    truth = np.array(
        [0 if record is None else int((1 - np.asarray(record["gtIgnore"])).sum()) for record in images], np.int64
    )
    records = [(place, record) for place, record in enumerate(images) if record is not None]
    if not records:
        return ClassOutcomes(
            np.zeros(0, np.int64), np.zeros(0), np.zeros((10, 0), bool), np.zeros((10, 0), bool), truth
        )
    scores = np.concatenate([record["dtScores"] for _, record in records])
    order = np.argsort(-scores, kind="mergesort")  # as COCOeval sorts, so that ties have the same order
    image = np.repeat([place for place, _ in records], [len(record["dtScores"]) for _, record in records])[order]
    matched, ignored = (
        np.concatenate([record[key] for _, record in records], axis=1)[:, order] for key in ("dtMatches", "dtIgnore")
    )
    ignored = ignored.astype(bool)
    return ClassOutcomes(image, scores[order], (matched > 0) & ~ignored, (matched == 0) & ~ignored, truth)
