"""Bootstrap draws of images, and calibration."""

import numpy as np
import pytest
import torch

from data import analysis
from data.annotations import parse_annotations
from data.coco_eval import score
from data.matches import average_precision, calibration_error, draw_images, match
from detector.structures import Detections


def case(seed, images=12, classes=3):
    """Random boxes, crowds among them, and detections near some of them; class 3 has no box."""
    rng = np.random.default_rng(seed)
    annotations = {
        "images": [{"id": 10 * i, "width": 400, "height": 400, "file_name": f"{i}.jpg"} for i in range(images)],
        "categories": [{"id": k + 5, "name": f"class {k}"} for k in range(classes + 1)],
        "annotations": [],
    }
    detections = {}
    for i in range(images):
        boxes = rng.integers(0, 300, (rng.integers(0, 6), 2))
        boxes = np.column_stack([boxes, boxes + rng.integers(10, 90, boxes.shape)]).astype(float)
        labels = rng.integers(0, classes, len(boxes))
        for box, label in zip(boxes, labels):
            xywh = [*box[:2], *(box[2:] - box[:2])]
            record = {"id": len(annotations["annotations"]) + 1, "image_id": 10 * i, "category_id": int(label) + 5}
            area, crowd = xywh[2] * xywh[3], int(rng.random() < 0.1)
            annotations["annotations"].append(record | {"bbox": xywh, "area": area, "iscrowd": crowd})
        detected_boxes = np.concatenate([boxes + rng.normal(0, 4, boxes.shape), boxes[:2] + 60])
        detections[10 * i] = Detections(
            torch.from_numpy(detected_boxes).float(),
            torch.from_numpy(rng.random(len(detected_boxes)).round(1)).float(),  # with ties
            torch.from_numpy(np.concatenate([labels, labels[:2]])),
        )
    return annotations, detections


def results(detections):
    """COCO's results format, nothing rounded."""
    rows = []
    for image_id, predictions in detections.items():
        for box, value, label in zip(
            predictions.boxes.double().tolist(), predictions.scores.double().tolist(), predictions.labels
        ):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            rows.append({"image_id": image_id, "category_id": int(label) + 5, "bbox": bbox, "score": value})
    return rows


def repeated(annotations, detections, draw):
    """The data set in which each image appears as often as it was drawn, under new ids."""
    document, drawn_detections = {**annotations, "images": [], "annotations": []}, {}
    for image, times in zip(annotations["images"], draw):
        for _ in range(times):
            new_id = len(document["images"]) + 1
            document["images"].append({**image, "id": new_id})
            drawn_detections[new_id] = detections[image["id"]]
            entries = [entry for entry in annotations["annotations"] if entry["image_id"] == image["id"]]
            start = len(document["annotations"]) + 1
            document["annotations"] += [
                {**entry, "image_id": new_id, "id": start + n} for n, entry in enumerate(entries)
            ]
    return document, drawn_detections


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("first_id", [1, 0, -5])  # COCOeval takes a match with id 0 for no match
def test_a_draw_of_each_image_once_gives_the_ap_of_the_data_set(seed, first_id):
    annotations, detections = case(seed)
    for number, annotation in enumerate(annotations["annotations"], start=first_id):
        annotation["id"] = number
    expected = score(parse_annotations(annotations), detections, [5, 6, 7])
    matches = match(parse_annotations(annotations), results(detections))
    ap_by_iou = average_precision(matches, np.ones(12, np.int64))
    assert ap_by_iou == pytest.approx(expected["by_iou"], abs=1e-12)
    assert ap_by_iou.mean() == pytest.approx(expected["AP"], abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_draw_scores_as_the_data_set_of_its_images(seed):
    annotations, detections = case(seed)
    for predictions in detections.values():  # without ties, because a repeated image may change their order
        predictions.scores.copy_(torch.rand(len(predictions.scores), generator=torch.Generator().manual_seed(seed)))
        seed += 10
    matches = match(parse_annotations(annotations), results(detections))
    for draw in draw_images(12, 5, seed):
        document, predictions = repeated(annotations, detections, draw)
        expected = score(parse_annotations(document), predictions, [5, 6, 7])["AP"]
        # Repeated detections tie with themselves: precision is read between two equal ones.
        assert average_precision(matches, draw).mean() == pytest.approx(expected, abs=0.02)
    assert (average_precision(matches, np.zeros(12, np.int64)) == -1).all()


def test_a_draw_has_as_many_images_as_the_set_and_depends_only_on_the_seed():
    draws = draw_images(50, 200)
    assert draws.shape == (200, 50) and (draws.sum(axis=1) == 50).all()
    assert np.array_equal(draws, draw_images(50, 200)) and not np.array_equal(draws, draw_images(50, 200, seed=1))
    assert draws.mean() == 1 and 0.8 < draws.var() < 1.2  # nearly that of a Poisson distribution with mean 1


def test_the_spread_of_the_draws_is_the_standard_error_of_the_ap():
    """Each image has one box, detected or not. AP is nearly the share of detected boxes, whose deviation is known."""
    rng = np.random.default_rng(0)
    hit = rng.random(200) < 0.6
    boxes = [
        {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
        for i in range(200)
    ]
    document = {
        "images": [{"id": i, "file_name": str(i)} for i in range(200)],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": boxes,
    }
    entries = [{"image_id": int(i), "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.5} for i in np.flatnonzero(hit)]
    matches = match(parse_annotations(document), entries)
    values = [average_precision(matches, draw).mean() for draw in draw_images(200, 400)]
    assert np.std(values) == pytest.approx(np.sqrt(hit.mean() * (1 - hit.mean()) / 200), rel=0.15)


def test_calibration_error_by_hand():
    """Four boxes. Of two detections with a score of 0.95 one is right. The one with 0.35 is wrong."""
    annotations, _ = case(0)
    annotations["annotations"] = [
        {"id": n + 1, "image_id": 10 * n, "category_id": 5, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": n == 3}
        for n in range(4)
    ]
    rows = [(0, 0, 0.95), (10, 200, 0.95), (20, 200, 0.35), (30, 0, 0.75)]  # the last, on a crowd, does not count
    entries = [{"image_id": i, "category_id": 5, "bbox": [x, 0, 50, 50], "score": s} for i, x, s in rows]
    expected = (abs(0.95 - 0.5) * 2 + 0.35) / 3
    assert calibration_error(match(parse_annotations(annotations), entries)) == pytest.approx(expected)
    assert calibration_error(match(parse_annotations(annotations), [])) == -1


def test_without_detections_ap_is_0():
    annotations, _ = case(0)
    assert (average_precision(match(parse_annotations(annotations), []), np.ones(12, np.int64)) == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_equals_hotcocos(seed):
    pytest.importorskip("hotcoco")
    document, detections = case(seed)
    annotations, entries = parse_annotations(document), results(detections)
    evaluation = analysis._evaluation(annotations, entries)
    evaluation.evaluate()
    theirs = evaluation.calibration(n_bins=10, iou_threshold=0.5)
    assert calibration_error(match(annotations, entries)) == pytest.approx(theirs["ece"], rel=1e-12)
