"""Laws of scoring: it gives the numbers of pycocotools, and right ones where pycocotools is wrong."""

import contextlib
import copy
import importlib.util
import io
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import coco_engines, coco_eval
from data.annotations import parse_annotations
from data.tables import explain_missing, metrics_table
from detector.errors import UserError
from detector.structures import Detections
from tests.data.helpers import NOTHING, detections_of, file_of

STATS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
OVERALL = [*STATS, "AP80", "AP90"]


@pytest.fixture(params=["pycocotools", "hotcoco"])
def score(request):
    """`score` by each engine."""
    pytest.importorskip(request.param)
    return partial(score_by, engine=request.param)


def score_by(document, *rest, engine=None) -> dict:
    return coco_eval.score(parse_annotations(document), *rest, engine=engine)


def random_case(seed: int) -> tuple[dict, dict[int, Detections], list[int]]:
    """Crowds, tied scores, crowded images, images without boxes, category gaps, classes without boxes."""
    rng = np.random.default_rng(seed)
    category_ids = [3, 7, 18, 90]  # 90 has no box
    image_ids = [900100581904, 581929, 16777217, 16777216, 5, 8]  # float32 cannot tell the middle two apart
    annotations = file_of([], image_ids, [(90, "d"), (7, "b"), (3, "a"), (18, "c")])
    detections = {}
    for image_id in image_ids:
        boxes, labels = [], []
        for _ in range(0 if image_id == 5 else rng.integers(4, 15)):
            w, h = np.exp(rng.uniform(np.log(8), np.log(250), 2))
            x, y, label = rng.uniform(0, 640 - w), rng.uniform(0, 480 - h), rng.integers(3)
            annotations["annotations"].append(
                {
                    "id": len(annotations["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": [x, y, w, h],
                    "area": 0.7 * w * h,  # a mask covers less than its box
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(rng.integers(0, 4)):
                boxes.append(np.array([x, y, x + w, y + h]) + rng.normal(0, 0.06, 4) * [w, h, w, h])
                labels.append(label if rng.random() < 0.9 else rng.integers(4))
        for _ in range(350 if image_id == 8 else 10):  # over 100 of one class
            x, y = rng.uniform(0, 400, 2)
            boxes.append([x, y, *(np.array([x, y]) + rng.uniform(5, 200, 2))])
            labels.append(rng.integers(4) if image_id != 8 else 1)
        scores = rng.integers(1, 20, len(boxes)) / 20  # many ties
        detections[image_id] = detections_of(np.array(boxes), scores, labels)
    return annotations, detections, category_ids


def hard_case(seed: int) -> tuple[dict, dict[int, Detections], list[int]]:
    """Where engines may differ: boxes on a grid, so that they repeat, and IoUs and areas are exactly at the limits.

    Ids of 0, below it and beyond what a float64 holds; boxes without area or inside out; crowds; images without boxes,
    without detections, with over 100, or not scored; tied scores; a label of a category that the file does not have.
    """
    rng = np.random.default_rng(seed)
    image_ids, category_ids = [-7, 0, 3, 2**53, 2**53 + 1, 2**63 - 1], [-1, 0, 2**53, 2**53 + 1]
    areas = [side**2 * scale for side in (32, 96, 1e5) for scale in (1 - 1e-15, 1, 1 + 1e-15)]

    def boxes_on_grid(count: int) -> np.ndarray:
        sides = rng.choice([-8, 0, 4, 16, 32, 64, 96, 160], (count, 2), p=[0.02, 0.03, 0.15, *[0.16] * 5])
        return np.concatenate([8 * rng.integers(0, 12, (count, 2)), sides], axis=1).astype(float)

    annotations = file_of([], image_ids, zip(category_ids, "abcd"))
    detections = {}
    for image_id in image_ids:
        boxes, labels = boxes_on_grid(rng.integers(0, 9)), rng.integers(4, size=9)
        for box, label in zip(boxes.tolist(), labels):
            annotations["annotations"].append(
                {
                    "id": len(annotations["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": box,
                    "area": rng.choice([*areas, 0, -1]) if rng.random() < 0.6 else box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
        near_indices = rng.integers(len(boxes), size=rng.choice([0, 10, 30])) if len(boxes) else []
        false_positives = boxes_on_grid(rng.choice([0, 5, 800], p=[0.3, 0.6, 0.1]))
        shift = 4 * rng.integers(-1, 2, (len(near_indices), 4)) * (rng.random((len(near_indices), 1)) < 0.5)
        xywh = np.concatenate([boxes[near_indices] + shift, false_positives])
        classes = np.concatenate([labels[near_indices], rng.integers(5, size=len(false_positives))])
        if rng.random() < 0.8:
            xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
            detections[image_id] = detections_of(xyxy, rng.integers(0, 6, len(xyxy)) / 5, classes)
    return annotations, detections, [*category_ids, 12345]


def official(annotations: dict, detections, category_ids, folder, image_ids=None) -> COCOeval:
    """Score two JSON files as the demo of pycocotools does. It shares no code with the modules under test."""
    annotations = copy.deepcopy(annotations)
    for annotation in annotations["annotations"]:  # an impossible area is replaced by width x height
        width, height = annotation["bbox"][2:]
        if annotation["area"] <= 0 < min(width, height):
            annotation["area"] = width * height
    (folder / "gt.json").write_text(json.dumps(annotations))
    results = []
    for image_id, (boxes, scores, labels) in detections.items():
        for box, value, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": image_id, "category_id": category_ids[label], "bbox": xywh, "score": value})
    (folder / "dt.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "gt.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / "dt.json")), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(6))
def test_metrics_equal_those_of_pycocotools(score, seed, tmp_path, capfd):
    case = random_case(seed)
    metrics = score(*case)
    assert capfd.readouterr() == ("", "")
    expected = official(*case, tmp_path)
    assert [metrics[name] for name in STATS] == expected.stats.tolist()
    assert 0.1 < metrics["AP"] < 0.9  # the case is hard, but not hopeless
    assert all(type(metrics[name]) is float for name in OVERALL)
    json.dumps(metrics)


@pytest.mark.parametrize("seed", range(40))
def test_engines_agree_to_the_bit(seed, tmp_path, capfd):
    pytest.importorskip("hotcoco")
    case = hard_case(seed)
    fast, slow = (score_by(*case, engine=engine) for engine in ("hotcoco", "pycocotools"))
    assert capfd.readouterr() == ("", "")
    assert (fast.pop("engine")[:7], slow.pop("engine")[:11]) == ("hotcoco", "pycocotools")
    assert fast == slow
    annotations, detections, category_ids = case
    expected = official(annotations, detections, category_ids, tmp_path, image_ids=list(detections))
    assert [fast[name] for name in STATS] == expected.stats.tolist()


def test_without_hotcoco_pycocotools_is_the_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)  # now its import fails
    spec = importlib.util.spec_from_file_location("without_hotcoco", coco_engines.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(coco_eval, "ENGINES", module.ENGINES)
    metrics = score_by(*random_case(0))
    monkeypatch.undo()
    assert metrics["engine"].startswith("pycocotools 2.")
    assert metrics == score_by(*random_case(0)) | {"engine": metrics["engine"]}


def test_the_fastest_engine_is_the_default():
    pytest.importorskip("hotcoco")
    assert score_by(*random_case(0))["engine"].startswith("hotcoco 1.")


@pytest.mark.parametrize("side, sizes", [(31, "s"), (32, "sm"), (33, "m"), (96, "ml"), (97, "l")])
def test_a_box_exactly_at_a_size_limit_counts_in_both_sizes(score, side, sizes):
    annotations = file_of([(1, 1, (0, 0, side, side))])
    metrics = score(annotations, {1: detections_of([[0, 0, side, side]], [0.5], [0])}, [1])
    assert "".join(size for size in "sml" if metrics[f"AP{size}"] > 0) == sizes


def test_metrics_of_a_class_are_those_of_pycocotools_on_that_class_alone(score, tmp_path):
    annotations, detections, category_ids = random_case(11)
    metrics = score(annotations, detections, category_ids)
    assert list(metrics["per_class"]) == ["d", "b", "a", "c"]  # as in the file
    for category in annotations["categories"]:
        class_annotations = [a for a in annotations["annotations"] if a["category_id"] == category["id"]]
        class_document = {**annotations, "categories": [category], "annotations": class_annotations}
        stats = official(class_document, detections, category_ids, tmp_path).stats
        values = metrics["per_class"][category["name"]]
        assert [values[k] for k in ("AP", "AP50", "AP75", "AR100")] == [stats[i] for i in (0, 1, 2, 8)]
        assert values["boxes"] == sum(not a["iscrowd"] for a in class_annotations)
    unknown = dict.fromkeys(("AP", "AP50", "AP75", "AR100", "threshold"), -1.0)
    assert metrics["per_class"]["d"] == unknown | {"boxes": 0}
    with_boxes = [values["AP"] for values in metrics["per_class"].values() if values["AP"] >= 0]
    assert metrics["AP"] == pytest.approx(np.mean(with_boxes), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_threshold_of_a_class_is_where_its_f1_is_best(score, seed):
    rng = np.random.default_rng(seed)
    cells = [[x, y, x + 20, y + 20] for x in range(0, 200, 40) for y in range(0, 200, 40)]
    truth_cells = rng.permutation(25)[:10]  # with ten boxes, each is a step of ten in COCO's 101 recalls
    truth = file_of([(1, 1, [*cells[i][:2], 20, 20]) for i in truth_cells])
    detected_cells, scores = rng.permutation(25)[:15], rng.permutation(np.linspace(0.1, 0.9, 15)).astype(np.float32)
    is_correct = np.isin(detected_cells, truth_cells)
    f1 = [2 * is_correct[scores >= s].sum() / ((scores >= s).sum() + 10) for s in scores]
    metrics = score(truth, {1: detections_of([cells[i] for i in detected_cells], scores, [0] * 15)}, [1])
    best = scores[np.argmax(f1)]
    below = scores[scores < best].max(initial=0)
    threshold = metrics["per_class"]["cat"]["threshold"]
    assert below < threshold < best and threshold == pytest.approx((best + below) / 2)


def test_ap_is_the_mean_over_the_iou_thresholds(score):
    metrics = score(*random_case(5))
    assert len(metrics["by_iou"]) == 10 and np.mean(metrics["by_iou"]) == pytest.approx(metrics["AP"], abs=1e-12)
    values = [metrics["by_iou"][index] for index in (0, 5, 6, 8)]
    assert values == [metrics[name] for name in ("AP50", "AP75", "AP80", "AP90")]


def test_ap50_is_the_mean_of_precision_over_recall(score):
    metrics = score(*random_case(5))
    assert len(metrics["precision_by_recall"]) == 101
    assert np.mean(metrics["precision_by_recall"]) == pytest.approx(metrics["AP50"], abs=1e-12)


def test_only_the_images_of_the_detections_count(score, tmp_path):
    annotations, detections, category_ids = random_case(3)
    subset = {i: detections[i] for i in (581929, 5, 900100581904)}
    metrics = score(annotations, subset, category_ids)
    expected = official(annotations, detections, category_ids, tmp_path, image_ids=list(subset))
    assert [metrics[name] for name in STATS] == expected.stats.tolist()
    assert metrics["images"] == 3
    assert metrics["AP"] != score(annotations, detections, category_ids)["AP"]
    scored_annotations = [a for a in annotations["annotations"] if a["image_id"] in subset and not a["iscrowd"]]
    assert sum(values["boxes"] for values in metrics["per_class"].values()) == len(scored_annotations)


def test_an_image_without_detections_still_counts_its_boxes(score):
    annotations = file_of([(1, 1, (0, 0, 50, 50)), (2, 1, (0, 0, 50, 50))], image_ids=(1, 2))
    detections = detections_of([[0, 0, 50, 50]], [0.9], [0])
    assert score(annotations, {1: detections}, [1])["AR100"] == 1
    assert score(annotations, {1: detections, 2: NOTHING}, [1])["AR100"] == 0.5


@pytest.mark.parametrize("first_id", [0, 1])
def test_ground_truth_as_detections_scores_1(score, first_id):
    # With ids from 0, pycocotools alone would take the match with annotation 0 for a miss.
    boxes = [(1, 4, (10, 10, 20, 20)), (1, 9, (50, 50, 60, 60)), (900100581904, 4, (0, 0, 200, 150))]
    annotations = file_of(boxes, image_ids=(1, 900100581904), categories=((4, "a"), (9, "b")))
    for annotation in annotations["annotations"]:
        annotation["id"] += first_id - 1
    detections = {
        1: detections_of([[10, 10, 30, 30], [50, 50, 110, 110]], [0.9, 0.8], [0, 1]),
        900100581904: detections_of([[0, 0, 200, 150]], [0.7], [0]),
    }
    metrics = score(annotations, detections, [4, 9])
    assert {name: metrics[name] for name in OVERALL if not name.startswith("AR1")} == pytest.approx(
        {name: 1.0 for name in OVERALL if not name.startswith("AR1")}
    )
    assert metrics["AR100"] == 1


def test_boxes_are_not_rounded_to_float32(score):
    # No float32 equals the width, and the nearest one is smaller. With that one the IoU would be just below 0.5.
    left = float(np.float32(0.4))
    annotations = file_of([(1, 1, (left, 0, 2 * (1000 - left), 10))])
    assert float(np.float32(1000 - left)) < 1000 - left
    assert score(annotations, {1: detections_of([[left, 0, 1000, 10]], [0.5], [0])}, [1])["AP50"] == pytest.approx(1)


@pytest.mark.parametrize("height, ap, ap80, ap90", [(78, 0.6, 0, 0), (82, 0.7, 1, 0), (87, 0.8, 1, 0), (92, 0.9, 1, 1)])
def test_one_box_by_hand(score, height, ap, ap80, ap90):
    # IoU is height / 100; AP is the share of the thresholds 0.50, 0.55 ... 0.95 up to this IoU.
    annotations = file_of([(1, 1, (20, 30, 100, 100))])
    metrics = score(annotations, {1: detections_of([[20, 30, 120, 30 + height]], [0.5], [0])}, [1])
    assert (metrics["AP80"], metrics["AP90"]) == pytest.approx((ap80, ap90))
    assert metrics["AP"] == pytest.approx(ap)
    assert metrics["APl"] == pytest.approx(ap)  # area is w * h where the file has none: 100 * 100 > 96^2
    assert metrics["APs"] == metrics["APm"] == -1


def test_without_detections_metrics_are_0_where_there_are_boxes(score):
    annotations = file_of([(1, 1, (0, 0, 50, 50))], categories=((1, "cat"), (2, "dog")))
    metrics = score(annotations, {1: NOTHING}, [1, 2])
    missing = {"APs", "APl", "ARs", "ARl"}
    assert {name: metrics[name] for name in OVERALL} == {n: -1.0 if n in missing else 0.0 for n in OVERALL}
    assert (metrics["per_class"]["cat"]["AP"], metrics["per_class"]["dog"]["AP"]) == (0.0, -1.0)


@pytest.mark.parametrize("detections", [{1: detections_of([[0, 0, 9, 9]], [0.5], [0])}, {1: NOTHING}, {}])
def test_without_ground_truth_metrics_are_minus_one(score, detections):
    metrics = score(file_of([]), detections, [1])
    assert {metrics[name] for name in OVERALL} == {-1.0}
    (line,) = explain_missing(metrics)
    assert ("no boxes" if detections else "no images") in line
    assert line in metrics_table(metrics)


def test_detections_of_categories_that_the_file_lacks_are_ignored(score):
    annotations = file_of([(1, 5, (0, 0, 50, 50))], categories=((5, "cat"),))
    detections = detections_of([[0, 0, 50, 50], [0, 0, 50, 50]], [0.5, 0.9], [1, 0])
    metrics = score(annotations, {1: detections}, [2, 5, 77])
    assert metrics["AP"] == pytest.approx(1)
    assert list(metrics["per_class"]) == ["cat"]


def test_categories_of_the_same_name_are_both_shown(score):
    annotations = file_of([(1, 1, (0, 0, 50, 50))], categories=((0, "cell"), (1, "cell"), (2, "dog")))
    metrics = score(annotations, {1: NOTHING}, [0, 1, 2])
    assert [(n, v["boxes"]) for n, v in metrics["per_class"].items()] == [
        ("cell (id 0)", 0),
        ("cell (id 1)", 1),
        ("dog", 0),
    ]


def test_an_unknown_image_is_a_user_error(score):
    with pytest.raises(UserError, match=r"1 image.*not in the annotation file.*581929"):
        score(file_of([]), {1: NOTHING, 581929: NOTHING}, [1])


@pytest.mark.parametrize("box, value", [([0, 0, float("nan"), 9], 0.5), ([0, 0, 9, 9], float("inf"))])
def test_detections_that_are_not_finite_are_refused(score, box, value):
    # pycocotools would count the first as a match of any box.
    with pytest.raises(FloatingPointError, match="image id 1"):
        score(file_of([(1, 1, (200, 200, 50, 50))]), {1: detections_of([box], [value], [0])}, [1])


def test_input_is_not_modified(score):
    annotations, detections, category_ids = random_case(5)
    for annotation in annotations["annotations"][::2]:
        del annotation["area"], annotation["iscrowd"]
    before = copy.deepcopy((annotations, detections))
    first = score(annotations, detections, category_ids)
    assert annotations == before[0]
    for image_id, original in before[1].items():
        assert all(torch.equal(a, b) for a, b in zip(original, detections[image_id]))
    assert score(annotations, detections, category_ids) == first
