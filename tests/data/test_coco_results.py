"""COCO's results format: results follow it, and reading them gives the same detections."""

import json

import pytest
import torch

from data.coco_results import coco_results, from_coco_results, write_results
from detector.errors import UserError
from tests.data.helpers import detections_of


def test_results_follow_the_format_of_coco():
    detections = {
        900100581904: detections_of([[1.23456, 2, 11.5, 22]], [0.123456], [1]),
        581929: detections_of([[0, 0, 5, 6], [1, 1, 2, 2]], [0.9, 0.8], [0, 1]),
    }
    results = coco_results(detections, [3, 90])
    assert results == json.loads(json.dumps(results))
    assert results == [
        {"image_id": 581929, "category_id": 3, "bbox": [0, 0, 5, 6], "score": 0.9},
        {"image_id": 581929, "category_id": 90, "bbox": [1, 1, 1, 1], "score": 0.8},
        {"image_id": 900100581904, "category_id": 90, "bbox": [1.235, 2, 10.265, 20], "score": 0.12346},
    ]


def test_results_are_read_back_best_first():
    detections = {7: detections_of([[0, 0, 5, 6], [1, 1, 2, 3]], [0.9, 0.25], [0, 1]), 8: detections_of([], [], [])}
    results = coco_results(detections, [3, 90])
    detections_read = from_coco_results(results[::-1], [7, 8], [3, 90])
    assert list(detections_read) == [7, 8]
    for image_id, expected in detections.items():
        for value, other in zip(detections_read[image_id], expected):
            assert torch.allclose(value, other) and value.shape == other.shape and value.dtype == other.dtype


@pytest.mark.parametrize(
    "change", [{"image_id": 9}, {"category_id": 4}, {"bbox": [0, 0, 1]}, {"score": "high"}, {"bbox": None}], ids=str
)
def test_an_entry_that_breaks_the_format_is_named(change):
    (result,) = coco_results({7: detections_of([[0, 0, 5, 6]], [0.9], [0])}, [3])
    with pytest.raises(UserError, match=r"detection 1: .* it needs bbox, score, category_id and image_id"):
        from_coco_results([result, {**result, **change}], [7], [3])


def test_a_full_disk_is_one_line_and_leaves_the_old_files(tmp_path, full_disk):
    write_results(tmp_path, {"AP": 0.5}, [])
    with full_disk(100), pytest.raises(UserError, match=r"the results cannot be written \(File too large\)"):
        write_results(tmp_path, {"AP": 0.6}, [{"score": 1.0}] * 100)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"AP": 0.5}


def test_two_files_are_written_and_nothing_else(tmp_path):
    write_results(tmp_path, {"AP": 0.5}, [{"score": 1.0}])
    contents = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert contents == {"metrics.json": {"AP": 0.5}, "detections.json": [{"score": 1.0}]}
