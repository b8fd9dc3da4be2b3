from pathlib import Path

import pytest
import torch

from data.coco import CocoDataset
from data.draw import contact_sheet, validation_pictures
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


def test_detections_are_drawn_where_they_are_and_the_unsure_are_not(dataset):
    height, width = dataset.sizes[0]
    box = torch.tensor([[width * 0.25, height * 0.25, width * 0.75, height * 0.75]])
    found = nothing(dataset)
    label = torch.zeros(1, dtype=torch.int64)
    blank = next(validation_pictures(dataset, found, 1))
    for score, changed in ((0.9, True), (0.1, False)):
        found[dataset.image_ids[0]] = Detections(box, torch.tensor([score]), label)
        picture = next(validation_pictures(dataset, found, 1))
        h, w = picture.shape[1], picture.shape[2] // 2
        right = (picture != blank).any(0)[:, w:]
        assert not (picture != blank).any(0)[:, :w].any()  # the left half shows the ground truth
        assert right.any() == changed
        if changed:  # the right edge of the box is the rightmost of what is drawn outside its caption
            assert right[h // 2 :, :].nonzero()[:, 1].max().item() == pytest.approx(0.75 * w, abs=3)


def test_a_sheet_has_room_for_all(dataset):
    pictures = list(validation_pictures(dataset, nothing(dataset), 3))
    sheet = contact_sheet(pictures, columns=2, width=100)
    assert sheet.shape[2] == 2 * 100 + 3 * 6 and sheet.shape[1] > sheet.shape[2] / 4
