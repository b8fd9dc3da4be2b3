import torch
from torchvision.ops import box_iou, clip_boxes_to_image

from detector import boxes


def random_boxes(count, seed=0, side=100.0):
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=rng) * side - side / 4
    return torch.cat([corner, corner + torch.rand(count, 2, generator=rng) * side + 1], dim=1)


def test_area_by_hand():
    assert boxes.area(torch.tensor([[1.0, 2, 4, 7], [3, 3, 3, 9]])).tolist() == [15, 0]


def test_area_keeps_leading_dimensions():
    assert boxes.area(torch.zeros(2, 5, 4)).shape == (2, 5)


def test_clip_by_hand_takes_height_before_width():
    clipped = boxes.clip(torch.tensor([[-5.0, -6, 500, 600], [10, 20, 30, 40]]), (100, 200))
    assert clipped.tolist() == [[0, 0, 200, 100], [10, 20, 30, 40]]


def test_clip_equals_torchvision():
    unclipped = random_boxes(50, side=300)
    assert torch.equal(boxes.clip(unclipped, (90, 140)), clip_boxes_to_image(unclipped, (90, 140)))


def test_clip_leaves_its_argument_unchanged():
    argument = torch.tensor([[-5.0, -6, 500, 600]])
    boxes.clip(argument, (10, 10))
    assert argument.tolist() == [[-5, -6, 500, 600]]


def test_rescale_by_hand():
    scaled = boxes.rescale(torch.tensor([[10.0, 20, 30, 40]]), (100, 200), (50, 800))
    assert scaled.tolist() == [[40, 10, 120, 20]]


def test_rescale_there_and_back_is_identity():
    original = random_boxes(20)
    rescaled = boxes.rescale(boxes.rescale(original, (480, 640), (750, 1000)), (750, 1000), (480, 640))
    torch.testing.assert_close(rescaled, original)


def test_iou_equals_torchvision():
    anchors, gt_boxes = random_boxes(60), random_boxes(7, seed=1)
    ours = torch.stack([boxes.iou_of_pairs(anchors, box) for box in gt_boxes])
    assert torch.equal(ours, box_iou(gt_boxes, anchors))
    assert ours.max() > 0.3 and ours.min() == 0  # some boxes overlap and some do not


def test_iou_by_hand():
    # 2 x 2 shared of 16 + 16; the box itself; a neighbour that only shares an edge; far away in both directions
    candidates = torch.tensor([[2.0, 2, 6, 6], [0, 0, 4, 4], [4, 0, 8, 4], [90, 90, 94, 94]])
    assert boxes.iou_of_pairs(candidates, torch.tensor([0.0, 0, 4, 4])).tolist() == [
        torch.tensor(4 / 28).item(),
        1,
        0,
        0,
    ]


def test_no_boxes_give_empty_results():
    no_boxes = torch.zeros(0, 4)
    assert boxes.area(no_boxes).shape == (0,)
    assert boxes.clip(no_boxes, (4, 4)).shape == (0, 4)
    assert boxes.rescale(no_boxes, (4, 4), (8, 8)).shape == (0, 4)
    assert boxes.iou_of_pairs(no_boxes, torch.tensor([0.0, 0, 4, 4])).shape == (0,)


def test_iou_of_all_pairs_equals_torchvision():
    first, second = random_boxes(5), random_boxes(70, seed=1)
    assert torch.equal(boxes.iou(first, second), box_iou(first, second))
