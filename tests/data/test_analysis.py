"""Kinds of errors by hand and against hotcoco's; what they cost against pycocotools, with the errors corrected."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from data import analysis
from data.analysis import IGNORED, RIGHT, classify_errors, costs, overlaps
from data.annotations import parse_annotations


def truth(*boxes, crowd=False):
    return [{"category_id": category, "bbox": list(box), "iscrowd": int(crowd)} for category, box in boxes]


def found(*boxes):
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
def test_each_kind_by_hand(detection, kind, missed):
    assert classify_errors(truth((1, BOX)), found(detection)) == ([kind], missed)


def test_a_duplicate_is_the_less_sure_one_and_a_crowd_is_no_error():
    assert classify_errors(truth((1, BOX)), found((1, BOX), (1, BOX))).kinds == [RIGHT, "duplicate"]
    one = truth((1, BOX), crowd=True) + truth((1, FAR))
    assert classify_errors(one, found((1, HALF), (2, HALF))) == ([IGNORED, "background"], [1])
    assert classify_errors([], found((1, BOX))) == (["background"], []) and classify_errors(truth((1, BOX)), []) == (
        [],
        [0],
    )
    assert classify_errors([], []) == ([], [])


def test_overlaps_are_torchvisions():
    rng = np.random.default_rng(0)
    a, b = (np.column_stack([rng.uniform(0, 50, (n, 2)), rng.uniform(1, 40, (n, 2))]) for n in (7, 5))
    corners = [torch.tensor(np.column_stack([one[:, :2], one[:, :2] + one[:, 2:]])) for one in (a, b)]
    np.testing.assert_allclose(overlaps(a, b), box_iou(*corners).numpy(), atol=1e-12)
    assert overlaps([], b).shape == (0, 5) and overlaps(a, []).shape == (7, 0)


def scenes(seed, images=12, classes=3):
    """Boxes, and detections near them, of other classes, twice and elsewhere."""
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
                other = category if rng.random() < 0.7 else 2 + 3 * int(rng.integers(classes))
                results.append((image["id"], other, np.maximum(moved, 1).tolist()))
        for _ in range(rng.integers(0, 3)):
            results.append((image["id"], 2, [*rng.uniform(0, 80, 2), *rng.uniform(5, 20, 2)]))
    scores = rng.permutation(len(results)) / len(results)
    keys = "image_id", "category_id", "bbox", "score"
    return document, [dict(zip(keys, (*one, float(score)))) for one, score in zip(results, scores)]


def judged(document, results):
    """(kind of each detection in the order of results, the annotations that are missed)"""
    kinds, missed = {}, []
    for image in document["images"]:
        boxes = [one for one in document["annotations"] if one["image_id"] == image["id"]]
        own = [n for n, one in enumerate(results) if one["image_id"] == image["id"]]
        own.sort(key=lambda n: -results[n]["score"])
        one = classify_errors(boxes, [results[n] for n in own])
        kinds |= dict(zip(own, one.kinds))
        missed += [boxes[place]["id"] for place in one.missed]
    return [kinds[n] for n in range(len(results))], missed


def ap50(document, results):
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = document
        known.createIndex()
        scored = COCOeval(known, known.loadRes(results), "bbox")
        scored.evaluate()
        scored.accumulate()
    precision = scored.eval["precision"][0, :, :, 0, -1]
    return precision[precision > -1].mean()


@pytest.mark.parametrize("seed", range(8))
def test_counts_are_hotcocos(seed):
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
def test_a_kind_costs_what_pycocotools_gives_more_without_it(seed):
    pytest.importorskip("hotcoco")
    document, results = scenes(seed)
    kinds, missed = judged(document, results)
    cost, base = costs(parse_annotations(document), results), ap50(document, results)
    for kind in ("background", "duplicate"):
        rest = [one for one, own in zip(results, kinds) if own != kind]
        assert cost[kind] == pytest.approx(ap50(document, rest) - base, abs=1e-6), kind
    rest = {**document, "annotations": [one for one in document["annotations"] if one["id"] not in missed]}
    assert cost["missed"] == pytest.approx(ap50(rest, results) - base, abs=1e-6)


def test_confusion_counts_each_box_and_each_detection():
    pytest.importorskip("hotcoco")
    document, results = scenes(3)
    matrix, names = analysis.confusion(parse_annotations(document), results)
    assert names == ["class 0", "class 1", "class 2", "background"]
    truth_counts = [sum(one["category_id"] == 2 + 3 * c for one in document["annotations"]) for c in range(3)]
    found_counts = [sum(one["category_id"] == 2 + 3 * c for one in results) for c in range(3)]
    assert matrix[:3].sum(axis=1).tolist() == truth_counts
    assert matrix[:, :3].sum(axis=0).tolist() == found_counts


def test_nothing_to_analyse(monkeypatch):
    document, results = scenes(0)
    assert (
        costs(parse_annotations(document), []) is None and analysis.confusion(parse_annotations(document), []) is None
    )
    monkeypatch.setattr(analysis, "hotcoco", None)
    assert (
        costs(parse_annotations(document), results) is None
        and analysis.confusion(parse_annotations(document), results) is None
    )
