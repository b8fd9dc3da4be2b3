from pathlib import Path

import pytest
import torch

from data.coco import CocoDataset
from data.draw import WIDTH, _score_of_rank, contact_sheet, validation_pictures
from data.transforms import EvalTransform
from detector.structures import Detections


@pytest.fixture(scope="module")
def dataset(demo: Path) -> CocoDataset:
    return CocoDataset(demo / "val.json", demo / "val", EvalTransform(64, 96))


def nothing(dataset: CocoDataset) -> dict[int, Detections]:
    none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    return dict.fromkeys(dataset.image_ids, none)


@pytest.mark.parametrize("count, drawn", [(0, 0), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_as_many_pictures_as_asked_for_and_there_are(dataset, count, drawn):
    pictures = list(validation_pictures(dataset, nothing(dataset), count))
    assert len(pictures) == drawn
    assert all(picture.dtype == torch.uint8 and picture.shape[0] == 3 for picture in pictures)


def test_detections_are_drawn_where_they_are(dataset):
    height, width = dataset.sizes[0]
    box = torch.tensor([[width * 0.25, height * 0.25, width * 0.75, height * 0.75]])
    found = nothing(dataset)
    blank = next(validation_pictures(dataset, found, 1))
    found[dataset.image_ids[0]] = Detections(box, torch.tensor([0.1]), torch.zeros(1, dtype=torch.int64))
    changed = (next(validation_pictures(dataset, found, 1)) != blank).any(0)
    h, w = changed.shape[0], changed.shape[1] // 2
    assert not changed[:, :w].any()  # the left half shows the ground truth
    # The right edge of the box is the rightmost of what is drawn outside its caption.
    assert changed[h // 2 :, w:].nonzero()[:, 1].max().item() == pytest.approx(0.75 * w, abs=3)


@pytest.mark.parametrize("highest", [0.9, 0.05])  # losses differ in their scale of scores
def test_the_surest_are_drawn_as_many_as_the_set_has_boxes(dataset, highest):
    height, width = dataset.sizes[0]
    corner = torch.linspace(0, 0.5, dataset.num_boxes + 2)[:, None]
    boxes = torch.cat([corner, corner, corner + 0.4, corner + 0.4], dim=1)
    boxes *= torch.tensor([width, height, width, height])
    scores = torch.linspace(highest, 0.01, len(boxes))

    def drawn(count: int) -> torch.Tensor:
        found = nothing(dataset)
        labels = torch.zeros(count, dtype=torch.int64)
        found[dataset.image_ids[0]] = Detections(boxes[:count], scores[:count], labels)
        return next(validation_pictures(dataset, found, 1))

    as_many = drawn(dataset.num_boxes)
    assert torch.equal(drawn(len(boxes)), as_many)
    assert not torch.equal(drawn(dataset.num_boxes - 1), as_many)


def test_nothing_is_drawn_where_there_is_nothing_to_find(dataset):
    assert _score_of_rank({1: Detections(torch.zeros(1, 4), torch.ones(1), torch.zeros(1))}, 0) == float("inf")


def test_a_sheet_has_room_for_all(dataset):
    pictures = list(validation_pictures(dataset, nothing(dataset), 3))
    sheet = contact_sheet(pictures, columns=2)
    assert sheet.shape[2] == 2 * 2 * WIDTH + 3 * 6 and sheet.shape[1] > sheet.shape[2] / 4
