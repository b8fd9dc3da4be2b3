import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from detector.losses import CrossEntropy, Focal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.75, 1.0), (0.5, 0.0), (0.25, 5.0)])
def test_equals_torchvisions_focal_loss(alpha, gamma, dtype, cells, one_hot):
    logits, labels, valid, num_pos = cells(rows=200)
    ours, theirs = logits.to(dtype, copy=True).requires_grad_(), logits.clone().requires_grad_()

    value = Focal(alpha, gamma)(ours, labels, valid, num_pos)
    parts = sigmoid_focal_loss(theirs, one_hot(labels, 5), alpha=alpha, gamma=gamma, reduction="none")
    expected = parts[valid].sum() / num_pos
    value.backward()
    expected.backward()

    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=5e-6, atol=1e-9)


def test_gamma_zero_is_half_of_cross_entropy(cells):
    torch.testing.assert_close(Focal(alpha=0.5, gamma=0.0)(*cells()), CrossEntropy()(*cells()) / 2)


def test_value_by_hand():
    # p = 0.5 in one positive and one negative cell: (0.25 + 0.75) x 0.5^2 x log 2
    logits, labels = torch.zeros(1, 2), torch.tensor([0])
    value = Focal()(logits, labels, torch.tensor([True]), 1)
    torch.testing.assert_close(value, 0.25 * torch.tensor(2.0).log())


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -0.1}, {"gamma": -1.0}, {"gamma": float("inf")}])
def test_refuses_impossible_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Focal(**options)
