"""Kinds of errors by hand and against hotcoco. The AP that each costs, against pycocotools without these errors."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import analysis
from data.analysis import IGNORED, RIGHT, classify_errors, costs
from data.annotations import parse_annotations


def truth(*boxes, crowd=False):
    return [{"category_id": category, "bbox": list(box), "iscrowd": int(crowd)} for category, box in boxes]


def detected(*boxes):
    return [{"category_id": c, "bbox": list(box), "score": 0.9 - 0.1 * n} for n, (c, box) in enumerate(boxes)]


BOX = (10, 10, 20, 20)
HALF = (10, 10, 20, 8)  # an IoU of 0.4 with BOX
FAR = (60, 60, 10, 10)


@pytest.mark.parametrize(
    ("detection", "kind", "missed"),
    [
        ((1, BOX), RIGHT, []),
        ((1, HALF), "localisation", []),
        ((2, BOX), "classification", []),
        ((2, HALF), "both", [0]),
        ((1, FAR), "background", [0]),
    ],
)
def test_each_kind_of_error_by_hand(detection, kind, missed):
    assert classify_errors(truth((1, BOX)), detected(detection)) == ([kind], missed)


def test_the_lower_score_is_the_duplicate_and_a_match_with_a_crowd_is_ignored():
    assert classify_errors(truth((1, BOX)), detected((1, BOX), (1, BOX))).kinds == [RIGHT, "duplicate"]
    annotations = truth((1, BOX), crowd=True) + truth((1, FAR))
    assert classify_errors(annotations, detected((1, HALF), (2, HALF))) == ([IGNORED, "background"], [1])
    assert classify_errors([], detected((1, BOX))) == (["background"], []) and classify_errors(truth((1, BOX)), []) == (
        [],
        [0],
    )
    assert classify_errors([], []) == ([], [])


def scenes(seed, images=12, classes=3):
    """Annotations, and detections: near a box, of another class, duplicates, and some anywhere."""
    rng = np.random.default_rng(seed)
    document = {
        "images": [{"id": 5 + i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in range(images)],
        "annotations": [],
    }
    document["categories"] = [{"id": 2 + 3 * c, "name": f"class {c}"} for c in range(classes)]
    results = []
    for image in document["images"]:
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = *rng.uniform(0, 60, 2), *rng.uniform(12, 38, 2)
            category = 2 + 3 * int(rng.integers(classes))
            entry = {"id": len(document["annotations"]) + 1, "image_id": image["id"], "category_id": category}
            document["annotations"].append(entry | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
            for _ in range(rng.integers(0, 4)):
                moved = np.array([x, y, w, h]) + rng.normal(0, rng.choice([1, 6]), 4)
                detected_category = category if rng.random() < 0.7 else 2 + 3 * int(rng.integers(classes))
                results.append((image["id"], detected_category, np.maximum(moved, 1).tolist()))
        for _ in range(rng.integers(0, 3)):
            results.append((image["id"], 2, [*rng.uniform(0, 80, 2), *rng.uniform(5, 20, 2)]))
    scores = rng.permutation(len(results)) / len(results)
    keys = "image_id", "category_id", "bbox", "score"
    return document, [dict(zip(keys, (*result, float(score)))) for result, score in zip(results, scores)]


def judged(document, results):
    """The kind of each detection, in the order of results, and the ids of the missed annotations."""
    kinds, missed = {}, []
    for image in document["images"]:
        boxes = [one for one in document["annotations"] if one["image_id"] == image["id"]]
        indices = [n for n, one in enumerate(results) if one["image_id"] == image["id"]]
        indices.sort(key=lambda n: -results[n]["score"])
        one = classify_errors(boxes, [results[n] for n in indices])
        kinds |= dict(zip(indices, one.kinds))
        missed += [boxes[place]["id"] for place in one.missed]
    return [kinds[n] for n in range(len(results))], missed


def ap50(document, results):
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = document
        ground_truth.createIndex()
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, -1]
    return precision[precision > -1].mean()


@pytest.mark.parametrize("seed", range(8))
def test_error_counts_equal_hotcocos(seed):
    pytest.importorskip("hotcoco")
    document, results = scenes(seed)
    evaluation = analysis._evaluation(parse_annotations(document), results)
    evaluation.evaluate()
    theirs = evaluation.tide_errors()["counts"]
    kinds, missed = judged(document, results)
    ours = {kind: kinds.count(kind) for kind in analysis.KINDS} | {analysis.MISSED: len(missed)}
    assert ours == {kind: theirs[name] for kind, name in analysis.HOTCOCO_NAMES.items()}
    assert sum(kind in ours for kind in kinds) > 10


@pytest.mark.parametrize("seed", range(8))
def test_a_kind_costs_the_ap_that_pycocotools_gains_without_its_errors(seed):
    pytest.importorskip("hotcoco")
    document, results = scenes(seed)
    kinds, missed = judged(document, results)
    cost, baseline = costs(parse_annotations(document), results), ap50(document, results)
    for kind in ("background", "duplicate"):
        corrected = [entry for entry, error_kind in zip(results, kinds) if error_kind != kind]
        assert cost[kind] == pytest.approx(ap50(document, corrected) - baseline, abs=1e-6), kind
    corrected = {**document, "annotations": [entry for entry in document["annotations"] if entry["id"] not in missed]}
    assert cost["missed"] == pytest.approx(ap50(corrected, results) - baseline, abs=1e-6)


def test_confusion_counts_each_box_and_each_detection():
    pytest.importorskip("hotcoco")
    document, results = scenes(3)
    matrix, names = analysis.confusion(parse_annotations(document), results)
    assert names == ["class 0", "class 1", "class 2", "background"]
    truth_counts = [sum(record["category_id"] == 2 + 3 * c for record in document["annotations"]) for c in range(3)]
    detection_counts = [sum(record["category_id"] == 2 + 3 * c for record in results) for c in range(3)]
    assert matrix[:3].sum(axis=1).tolist() == truth_counts
    assert matrix[:, :3].sum(axis=0).tolist() == detection_counts


def test_without_detections_or_hotcoco_there_are_no_costs_and_no_confusion(monkeypatch):
    document, results = scenes(0)
    assert (
        costs(parse_annotations(document), []) is None and analysis.confusion(parse_annotations(document), []) is None
    )
    monkeypatch.setattr(analysis, "hotcoco", None)
    assert (
        costs(parse_annotations(document), results) is None
        and analysis.confusion(parse_annotations(document), results) is None
    )
