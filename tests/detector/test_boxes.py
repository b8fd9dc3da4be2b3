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
    given = random_boxes(50, side=300)
    assert torch.equal(boxes.clip(given, (90, 140)), clip_boxes_to_image(given, (90, 140)))


def test_clip_leaves_its_argument_alone():
    given = torch.tensor([[-5.0, -6, 500, 600]])
    boxes.clip(given, (10, 10))
    assert given.tolist() == [[-5, -6, 500, 600]]


def test_rescale_by_hand():
    scaled = boxes.rescale(torch.tensor([[10.0, 20, 30, 40]]), (100, 200), (50, 800))
    assert scaled.tolist() == [[40, 10, 120, 20]]


def test_rescale_there_and_back_is_identity():
    given = random_boxes(20)
    back = boxes.rescale(boxes.rescale(given, (480, 640), (750, 1000)), (750, 1000), (480, 640))
    torch.testing.assert_close(back, given)


def test_iou_equals_torchvision():
    many, few = random_boxes(60), random_boxes(7, seed=1)
    ours = torch.stack([boxes.iou_of_pairs(many, box) for box in few])
    assert torch.equal(ours, box_iou(few, many))
    assert ours.max() > 0.3 and ours.min() == 0  # the case has both kinds


def test_iou_by_hand():
    # 2 x 2 shared of 16 + 16; itself; a neighbour that shares an edge only; far away in both directions
    given = torch.tensor([[2.0, 2, 6, 6], [0, 0, 4, 4], [4, 0, 8, 4], [90, 90, 94, 94]])
    assert boxes.iou_of_pairs(given, torch.tensor([0.0, 0, 4, 4])).tolist() == [
        torch.tensor(4 / 28).item(),
        1,
        0,
        0,
    ]


def test_no_boxes():
    none = torch.zeros(0, 4)
    assert boxes.area(none).shape == (0,)
    assert boxes.clip(none, (4, 4)).shape == (0, 4)
    assert boxes.rescale(none, (4, 4), (8, 8)).shape == (0, 4)
    assert boxes.iou_of_pairs(none, torch.tensor([0.0, 0, 4, 4])).shape == (0,)


def test_iou_of_all_pairs_is_torchvisions():
    some, others = random_boxes(5), random_boxes(70, seed=1)
    assert torch.equal(boxes.iou(some, others), box_iou(some, others))
