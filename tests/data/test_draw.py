from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.coco import CocoDataset
from data.draw import (
    GAP,
    WIDTH,
    _score_of_rank,
    annotate,
    contact_sheet,
    draw_boxes,
    enlarge,
    side_by_side,
    titled,
    validation_pictures,
)
from data.transforms import EvalTransform
from detector.structures import Detections


@pytest.fixture(scope="module")
def dataset(demo: Path) -> CocoDataset:
    return CocoDataset(demo / "val.json", demo / "val", EvalTransform(64, 96))


def nothing(dataset: CocoDataset) -> dict[int, Detections]:
    no_detections = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    return dict.fromkeys(dataset.image_ids, no_detections)


@pytest.mark.parametrize("count, drawn", [(0, 0), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_count_limits_the_number_of_pictures(dataset, count, drawn):
    pairs = list(validation_pictures(dataset, nothing(dataset), count))
    assert len(pairs) == drawn
    for truth, found in pairs:
        assert (
            truth.dtype == found.dtype == torch.uint8 and truth.shape == found.shape and truth.shape[::2] == (3, WIDTH)
        )


def test_a_detection_is_drawn_at_its_box(dataset):
    height, width = dataset.sizes[0]
    box = torch.tensor([[width * 0.25, height * 0.25, width * 0.75, height * 0.75]])
    detections = nothing(dataset)
    truth, blank = next(validation_pictures(dataset, detections, 1))
    detections[dataset.image_ids[0]] = Detections(box, torch.tensor([0.1]), torch.zeros(1, dtype=torch.int64))
    same_truth, found = next(validation_pictures(dataset, detections, 1))
    assert torch.equal(truth, same_truth)
    rows, columns = (found != blank).any(0).nonzero().unbind(1)
    # Below the caption, the right edge of the box is the rightmost pixel that changes.
    assert columns[rows > found.shape[1] // 2].max().item() == pytest.approx(0.75 * WIDTH, abs=3)
    strip = found.shape[1] - round(height * WIDTH / width)  # above the image
    assert rows.max().item() == pytest.approx(strip + 0.75 * (found.shape[1] - strip), abs=3)


@pytest.mark.parametrize("highest", [0.9, 0.05])  # losses differ in their scale of scores
def test_the_highest_scores_are_drawn_up_to_the_number_of_boxes_in_the_set(dataset, highest):
    height, width = dataset.sizes[0]
    corner = torch.linspace(0, 0.5, dataset.num_boxes + 2)[:, None]
    boxes = torch.cat([corner, corner, corner + 0.4, corner + 0.4], dim=1)
    boxes *= torch.tensor([width, height, width, height])
    scores = torch.linspace(highest, 0.01, len(boxes))

    def drawn(count: int) -> torch.Tensor:
        detections = nothing(dataset)
        labels = torch.zeros(count, dtype=torch.int64)
        detections[dataset.image_ids[0]] = Detections(boxes[:count], scores[:count], labels)
        return next(validation_pictures(dataset, detections, 1))[1]

    expected = drawn(dataset.num_boxes)
    assert torch.equal(drawn(len(boxes)), expected)
    assert not torch.equal(drawn(dataset.num_boxes - 1), expected)


def test_no_detection_is_drawn_for_a_set_without_boxes(dataset):
    assert _score_of_rank({1: Detections(torch.zeros(1, 4), torch.ones(1), torch.zeros(1))}, 0) == float("inf")


def test_a_contact_sheet_has_room_for_all_pictures(dataset):
    pictures = [side_by_side(pair) for pair in validation_pictures(dataset, nothing(dataset), 3)]
    sheet = contact_sheet(pictures)
    assert sheet.shape[2] == 2 * 2 * WIDTH + 5 * GAP and sheet.shape[1] > sheet.shape[2] / 4


def test_pictures_side_by_side_have_a_gap_and_a_title_only_adds_a_strip():
    black = torch.zeros(3, 40, 100, dtype=torch.uint8)
    both = side_by_side([black, black])
    assert both.shape == (3, 40, 200 + GAP)
    assert (both[:, :, 100 : 100 + GAP] == 255).all() and both.sum() == 3 * 40 * GAP * 255
    with_title = titled(black, "x" * 100)
    assert torch.equal(with_title[:, -40:], black) and with_title.shape[2] == 100
    assert not torch.equal(with_title, titled(black, ""))


@pytest.mark.parametrize("size, expected", [((60, 80), (600, 800)), ((900, 300), (900, 300))])
def test_small_images_are_enlarged(size, expected):
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    larger, zoom = enlarge(image)
    assert larger.shape == (3, *expected) and zoom == expected[0] / size[0]
    assert zoom > 1 or torch.equal(image, larger)


CAPTIONS = ["Zellkörper é", "Ελλάς", "Жук"]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_letters_of_a_caption_differ(caption):
    """A font without them draws the same square for each letter, so that a caption and its reverse look the same."""

    def drawn(text):
        return draw_boxes(torch.zeros(3, 60, 300, dtype=torch.uint8), torch.tensor([[5, 30, 290, 50]]), [text], "white")

    assert not torch.equal(drawn(caption), drawn(caption[::-1]))
    squares = [drawn("\ufffe" * length) for length in range(1, 20)]
    assert not any(torch.equal(drawn(caption), picture) for picture in squares)


def test_a_caption_stays_within_the_picture():
    canvas = Image.new("RGB", (200, 100))
    corners = np.array([[180.0, 1.0, 199.0, 20.0], [-50.0, 60.0, 20.0, 80.0]])
    annotate(canvas, corners, ["mmmmmmmm", "mmmmmmmm"], ["red", "lime"])
    pixels = np.asarray(canvas)
    red, lime = ((pixels == colour).all(axis=2) for colour in ((255, 0, 0), (0, 255, 0)))
    assert (
        red[1:14, 130].any() and red[1:14, 199].any() and not red[1:14, 60].any()
    )  # moved to the left, to end at the edge of the picture
    assert lime[48:58, 0].any() and not lime[48:58, 150].any()


def test_a_caption_is_whole_or_left_out_for_an_earlier_one():
    """No line and no caption runs through a caption: all its pixels have its colour, or none."""
    rng = np.random.default_rng(0)
    corners = rng.integers(20, 300, (40, 2)).astype(float)
    boxes = np.concatenate([corners, corners + rng.integers(5, 90, (40, 2))], axis=1)

    def drawn(boxes, caption):
        canvas = Image.new("RGB", (400, 400))
        annotate(canvas, boxes, [caption] * len(boxes), [f"#{number:02x}ff00" for number in range(len(boxes))])
        return np.asarray(canvas)

    whole = drawn(boxes, "     ")  # a caption of spaces is an area of one colour
    areas: list[np.ndarray] = []
    for number, box in enumerate(boxes):
        area = (drawn(box[None], "     ") != drawn(box[None], "")).any(axis=2)
        visible = (whole == (number, 255, 0)).all(axis=2)[area]
        assert visible.all() or not visible.any()
        if visible.all():
            areas.append(area)
        else:
            rows, columns = area.nonzero()
            near = np.s_[rows.min() - 1 : rows.max() + 5, columns.min() - 1 : columns.max() + 2]  # with its box's line
            assert any(earlier[near].any() for earlier in areas)
    assert 10 < len(areas) < 40


def test_the_first_box_is_on_top():
    canvas = Image.new("RGB", (100, 100))
    annotate(canvas, np.array([[10.0, 30.0, 90.0, 90.0]] * 2), ["", ""], ["red", "lime"])
    assert canvas.getpixel((10, 50)) == (255, 0, 0)


def test_boxes_are_drawn_on_a_copy_and_may_be_odd():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    box = torch.tensor([[5.0, 5.0, 5.0, 5.0], [30.0, 30.0, 10.0, 10.0]])
    assert draw_boxes(image, box, ["", "a\nb"], "red").any() and not image.any()
    assert torch.equal(draw_boxes(image, torch.zeros(0, 4), [], "red"), image)
