"""ATSS against the paper's algorithm in plain loops."""

import statistics

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

from detector.anchors import Anchors
from detector.assigner import ATSSAssigner

MAP_SIZES = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]


def anchors_and_boxes(seed, count, octaves=1, ratios=(1.0,)):
    anchor_generator = Anchors(octaves=octaves, ratios=list(ratios))
    anchors = anchor_generator(MAP_SIZES, (128, 128), torch.device("cpu"))
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=rng) * 80
    boxes = torch.cat([corner, corner + 6 + torch.rand(count, 2, generator=rng) * 60], dim=1)
    levels = tuple(h * w * anchor_generator.per_position for h, w in MAP_SIZES)
    return anchors, boxes, levels, anchor_generator.per_position


def by_hand(anchors, boxes, levels, per_position, topk):
    """Index of the box of each anchor, or -1 for background."""
    iou = box_iou(anchors.double(), boxes.double()).tolist()
    owner, best_iou = [-1] * len(anchors), [0.0] * len(anchors)
    centres = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in anchors.tolist()]
    for g, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        candidates, start = [], 0
        for size in levels:
            level = range(start, start + size)
            centre = (x1 + x2) / 2, (y1 + y2) / 2
            level = sorted(level, key=lambda a: (centres[a][0] - centre[0]) ** 2 + (centres[a][1] - centre[1]) ** 2)
            candidates += level[: topk * per_position]
            start += size
        ious = [iou[a][g] for a in candidates]
        threshold = statistics.mean(ious) + statistics.stdev(ious)
        for a in candidates:
            inside = x1 < centres[a][0] < x2 and y1 < centres[a][1] < y2
            if iou[a][g] >= threshold and inside and iou[a][g] > best_iou[a]:
                owner[a], best_iou[a] = g, iou[a][g]
    return owner


@pytest.mark.parametrize("shapes", [{}, {"octaves": 3, "ratios": (0.5, 1.0, 2.0)}], ids=["1 shape", "9 shapes"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("topk", [1, 9])
def test_equals_plain_loops(seed, topk, shapes):
    anchors, boxes, levels, per_position = anchors_and_boxes(seed, 12, **shapes)
    assignment = ATSSAssigner(topk)(anchors, boxes, levels, per_position)
    ours = torch.where(assignment.positive, assignment.gt_index, -1).tolist()
    assert ours == by_hand(anchors, boxes, levels, per_position, topk)
    assert max(ours) >= 0
    assert not assignment.ignored.any()


def test_images_in_a_batch_are_matched_as_if_alone():
    anchors, boxes, levels, per_position = anchors_and_boxes(0, 12, octaves=3)
    images = [boxes[:0], boxes, boxes[:2], boxes[5:]]
    batched = ATSSAssigner()(anchors, pad_sequence(images, batch_first=True), levels, per_position)
    for index, positive, ignored, image_boxes in zip(*batched, images):
        single = ATSSAssigner()(anchors, image_boxes, levels, per_position)
        assert torch.equal(positive, single.positive) and torch.equal(index[positive], single.gt_index[positive])
        assert not ignored.any() and positive.any() == (len(image_boxes) > 0)


def test_without_boxes_all_is_background():
    anchors, boxes, levels, per_position = anchors_and_boxes(0, 0)
    assignment = ATSSAssigner()(anchors, boxes, levels, per_position)
    assert not assignment.positive.any() and not assignment.ignored.any()


def test_refuses_no_candidates():
    with pytest.raises(ValueError, match="topk"):
        ATSSAssigner(topk=0)
