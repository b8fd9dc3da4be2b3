import pytest
import torch

from detector.losses import SmoothL1


@pytest.mark.parametrize("beta", [1 / 9, 1.0])
def test_smooth_l1_follows_its_two_branches(beta, boxes):
    deltas, targets, num_pos = boxes()
    errors = (deltas - targets).abs().flatten().tolist()
    expected = sum(d * d / (2 * beta) if d <= beta else d - beta / 2 for d in errors) / int(num_pos)
    assert SmoothL1(beta)(deltas, targets, num_pos).item() == pytest.approx(expected, rel=1e-12)


def test_smooth_l1_gradient_is_continuous_where_the_branches_meet():
    deltas = torch.tensor([[1 / 9 - 1e-9, 1 / 9 + 1e-9, 0.0, 0.0]], dtype=torch.float64).requires_grad_()
    SmoothL1()(deltas, torch.zeros(1, 4), 1).backward()
    torch.testing.assert_close(deltas.grad[0, :2], torch.ones(2, dtype=torch.float64), rtol=0, atol=2e-8)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_impossible_beta(beta):
    with pytest.raises(ValueError, match=r"beta is .*must be positive and finite"):
        SmoothL1(beta)
