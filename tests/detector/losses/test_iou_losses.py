"""GIoU, DIoU and CIoU: against torchvision, and the laws of losses that take boxes."""

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from detector.losses import BOX_LOSSES, CIoU, DIoU, GIoU

PEERS = {GIoU: generalized_box_iou_loss, DIoU: distance_box_iou_loss, CIoU: complete_box_iou_loss}
every = pytest.mark.parametrize("make", [make for make in BOX_LOSSES.values() if getattr(make(), "takes_boxes", False)])


def random_boxes(count, seed, dtype=torch.float64):
    """Pairs that overlap more or less, or not at all."""
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, count, 2, generator=rng, dtype=dtype) * 30
    return torch.cat([corner, corner + 5 + torch.rand(2, count, 2, generator=rng, dtype=dtype) * 40], dim=2)


def value_and_grad(loss, boxes, targets, num_pos=1):
    boxes = boxes.clone().requires_grad_()
    value = loss(boxes, targets, num_pos)
    value.backward()
    return value.detach(), boxes.grad


@pytest.mark.parametrize("make", PEERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torchvision(make, dtype):
    boxes, targets = random_boxes(300, seed=0, dtype=dtype)
    value, grad = value_and_grad(make(), boxes, targets, 7)
    theirs = boxes.double().requires_grad_()
    expected = PEERS[make](theirs, targets.double(), reduction="sum") / 7
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)


@every
def test_perfect_boxes_cost_nothing(make):
    boxes, _ = random_boxes(5, seed=1)
    assert value_and_grad(make(), boxes, boxes)[0] == pytest.approx(0, abs=1e-9)


@every
def test_boxes_that_do_not_touch_are_pulled_together(make):
    targets = torch.tensor([[0.0, 0, 10, 10]])
    near, far = (value_and_grad(make(), targets + shift, targets) for shift in (20.0, 40.0))
    assert near[0] < far[0]
    assert (near[1] > 0).any()  # plain IoU has no gradient here


@every
def test_scale_and_position_do_not_matter(make):
    boxes, targets = random_boxes(20, seed=2)
    torch.testing.assert_close(make()(boxes, targets, 1), make()(boxes * 7 + 100, targets * 7 + 100, 1))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(make, dtype):
    boxes, targets = random_boxes(20, seed=3, dtype=torch.float32).to(dtype)
    assert torch.equal(make()(boxes, targets, 1), make()(boxes.float(), targets.float(), 1))


@every
def test_degenerate_boxes_give_finite_value_and_gradient(make):
    boxes = torch.tensor([[5.0, 5, 5, 5], [0, 0, 0, 9], [0, 0, 1e6, 1e-6], [5, 5, 5, 5]])
    targets = torch.tensor([[5.0, 5, 5, 5], [0, 0, 9, 0], [0, 0, 10, 10], [0, 0, 10, 10]])
    value, grad = value_and_grad(make(), boxes, targets)
    assert value.isfinite() and grad.isfinite().all()


@every
def test_no_boxes_give_zero_and_a_gradient(make):
    value, grad = value_and_grad(make(), torch.zeros(0, 4), torch.zeros(0, 4))
    assert value == 0 and grad.shape == (0, 4)


@every
def test_gradcheck(make):
    boxes, targets = random_boxes(6, seed=4)
    loss = make()
    if make is CIoU:  # it holds its weight a constant, so this is not the gradient of the value
        with pytest.raises(GradcheckError):
            torch.autograd.gradcheck(lambda x: loss(x, targets, 1), boxes.requires_grad_())
    else:
        assert torch.autograd.gradcheck(lambda x: loss(x, targets, 1), boxes.requires_grad_())


def test_values_by_hand():
    # Two 2 x 2 squares, centres 1 apart: intersection 2, union 6, enclosing box 3 x 2.
    boxes, targets = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]])
    assert GIoU()(boxes, targets, 1).item() == pytest.approx(1 - 1 / 3 + 0 / 6)
    assert DIoU()(boxes, targets, 1).item() == pytest.approx(1 - 1 / 3 + 1 / 13)
    assert CIoU()(boxes, targets, 1).item() == pytest.approx(1 - 1 / 3 + 1 / 13)  # same shape
