import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detector import assigner
from detector.anchors import Anchors
from detector.assigner import IoUAssigner
from detector.structures import Assignment

SQUARE = torch.tensor([0.0, 0, 10, 10])


def random_boxes(count, seed, side):
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=rng) * side * 0.8
    return torch.cat([corner, corner + (torch.rand(count, 2, generator=rng) * 0.4 + 0.02) * side], dim=1)


def boxes_with_iou(*values):
    """Boxes inside SQUARE, as wide as SQUARE, that have these IoUs with it."""
    return torch.tensor([[0, 0, 10, 10 * value] for value in values])


def matches(assignment):
    """The assignment in torchvision's form: index of the box, -1 for background, -2 for ignored."""
    index = torch.where(assignment.positive, assignment.gt_index, -1)
    return torch.where(assignment.ignored, -2, index)


def all_anchors():
    return Anchors()([(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)], (256, 256), torch.device("cpu"))


@pytest.mark.parametrize("count", [1, 10, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_torchvision_on_grid_anchors(count, seed):
    anchors, boxes = all_anchors(), random_boxes(count, seed, 256)
    theirs = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(boxes, anchors))
    assert torch.equal(matches(IoUAssigner(0.5, 0.4)(anchors, boxes)), theirs)
    assert (theirs >= 0).any()  # the case is not empty


@pytest.mark.parametrize("count", [1, 10, 100])
def test_equals_torchvision_on_random_anchors(count):
    boxes = random_boxes(count, 0, 256)
    anchors = torch.cat([random_boxes(2000, 1, 256), boxes])  # every box touches an anchor, see IoUAssigner's docstring
    theirs = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(boxes, anchors))
    assert torch.equal(matches(IoUAssigner(0.5, 0.4)(anchors, boxes)), theirs)


def test_equals_torchvision_without_low_quality_matches():
    anchors, boxes = all_anchors(), random_boxes(30, 3, 256)
    theirs = Matcher(0.5, 0.4, allow_low_quality_matches=False)(box_iou(boxes, anchors))
    assert torch.equal(matches(IoUAssigner(0.5, 0.4, min_iou=0.5)(anchors, boxes)), theirs)


def test_without_boxes_all_is_background():
    assignment = IoUAssigner()(all_anchors(), torch.zeros(0, 4))
    assert not assignment.positive.any() and not assignment.ignored.any()
    assert len(assignment.positive) == len(assignment.ignored) == len(assignment.gt_index) == len(all_anchors())


def test_thresholds_by_hand():
    anchors = boxes_with_iou(1.0, 0.5, 0.45, 0.4, 0.3)
    assert matches(IoUAssigner(0.5, 0.4)(anchors, SQUARE[None])).tolist() == [0, 0, -2, -2, -1]


def test_low_quality_match_is_kept():
    anchors = boxes_with_iou(0.2, 0.1)
    assert matches(IoUAssigner(0.5, 0.4)(anchors, SQUARE[None])).tolist() == [0, -1]


def test_low_quality_match_may_come_from_the_ignored_band():
    anchors = boxes_with_iou(0.45, 0.42)
    assert matches(IoUAssigner(0.5, 0.4)(anchors, SQUARE[None])).tolist() == [0, -2]


def test_min_iou_forbids_low_quality_matches_below_it():
    anchors = boxes_with_iou(0.2, 0.1)
    assert matches(IoUAssigner(0.5, 0.4, min_iou=0.3)(anchors, SQUARE[None])).tolist() == [-1, -1]
    assert matches(IoUAssigner(0.5, 0.4, min_iou=0.15)(anchors, SQUARE[None])).tolist() == [0, -1]


def test_all_anchors_that_tie_for_the_best_are_positive():
    anchors = torch.tensor([[0.0, 0, 10, 2], [0, 8, 10, 10], [0, 0, 10, 1]])
    assert matches(IoUAssigner(0.5, 0.4)(anchors, SQUARE[None])).tolist() == [0, 0, -1]


def test_a_low_quality_match_belongs_to_the_box_that_the_anchor_overlaps_most():
    boxes = torch.stack([torch.tensor([0.0, 0, 10, 30]), SQUARE])
    # The only anchor is SQUARE itself, and it is the best anchor of both boxes.
    assert matches(IoUAssigner(0.5, 0.4)(SQUARE[None], boxes)).tolist() == [1]


def test_the_first_of_equal_boxes_is_matched():
    boxes = torch.stack([SQUARE + 50, SQUARE, SQUARE])
    assert matches(IoUAssigner()(boxes_with_iou(1.0, 0.6), boxes)).tolist() == [1, 1]


def test_a_box_that_touches_no_anchor_makes_nothing_positive():
    assignment = IoUAssigner()(all_anchors(), torch.tensor([[9000.0, 9000, 9010, 9010]]))
    assert not assignment.positive.any() and not assignment.ignored.any()


def test_a_box_that_touches_no_anchor_takes_none_from_another():
    far_box = torch.tensor([9000.0, 9000, 9010, 9010])
    anchors = boxes_with_iou(1.0, 0.45, 0.1)
    assert matches(IoUAssigner()(anchors, torch.stack([far_box, SQUARE]))).tolist() == [1, -2, -1]


@pytest.mark.parametrize(
    "options", [{}, {"min_iou": 0.3}, {"fg_iou": 0.5, "bg_iou": 0.5}, {"fg_iou": 0.9, "bg_iou": 0.1}]
)
def test_never_positive_and_ignored_at_once(options):
    assignment = IoUAssigner(**options)(all_anchors(), random_boxes(50, 5, 256))
    assert assignment.positive.any()
    assert not (assignment.positive & assignment.ignored).any()


def test_dtypes_of_an_assignment():
    assignment = IoUAssigner()(all_anchors(), random_boxes(3, 0, 256))
    assert [value.dtype for value in assignment] == [torch.int64, torch.bool, torch.bool]


@pytest.mark.parametrize(
    "options",
    [{"fg_iou": 0.4, "bg_iou": 0.5}, {"bg_iou": 0.0}, {"fg_iou": 1.1}, {"min_iou": -0.1}, {"min_iou": 0.6}],
)
def test_refuses_thresholds_out_of_order(options):
    with pytest.raises(ValueError, match="iou"):
        IoUAssigner(**options)


@pytest.mark.parametrize("length", [1, 100, 1000])
def test_the_block_length_does_not_change_the_matches(length, monkeypatch):
    anchors, boxes = all_anchors()[::7], random_boxes(20, 5, 256)
    theirs = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(boxes, anchors))
    monkeypatch.setattr(assigner, "CACHED_PAIRS", 0)
    monkeypatch.setattr(assigner, "MIN_BLOCK", length)
    assert torch.equal(matches(IoUAssigner()(anchors, boxes)), theirs)


def padded(counts, side=256):
    """Boxes of several images, padded with zeros to the same length."""
    return pad_sequence([random_boxes(count, seed, side) for seed, count in enumerate(counts)], batch_first=True)


@pytest.mark.parametrize("counts", [[3, 0, 20, 1], [7], [0, 0]])
def test_images_in_a_batch_are_matched_as_if_alone(counts):
    anchors, boxes = all_anchors(), padded(counts)
    batched = IoUAssigner()(anchors, boxes)
    for i, count in enumerate(counts):
        single = IoUAssigner()(anchors, boxes[i, :count])
        assert torch.equal(matches(Assignment(*(value[i] for value in batched))), matches(single))
        assert single.positive.any() == (count > 0)


def test_parts_of_a_batch_hold_every_box_and_few_pairs(monkeypatch):
    counts = [3, 0, 20, 1, 7]
    anchors, boxes = all_anchors(), padded(counts)
    cpu_parts = assigner.split_boxes(anchors, boxes, counts)
    assert [part.shape for part in cpu_parts] == [(1, count, 4) for count in counts]
    assert all(torch.equal(part[0], boxes[i, :count]) for i, (part, count) in enumerate(zip(cpu_parts, counts)))
    for images_per_part, pairs in ((1, 1), (2, 50 * len(anchors)), (5, 100 * len(anchors))):
        monkeypatch.setattr(assigner, "MAX_PAIRS", pairs)
        parts = assigner.split_boxes(anchors.to("meta"), boxes, counts)
        assert torch.equal(torch.cat(parts), boxes) and len(parts[0]) == images_per_part
