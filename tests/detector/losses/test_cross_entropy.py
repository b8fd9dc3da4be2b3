import pytest
import torch
import torch.nn.functional as F

from detector.losses import CrossEntropy


@pytest.mark.parametrize("alpha", [None, 0.0, 0.25, 0.9, 1.0])
def test_equals_torchs_binary_cross_entropy(alpha, cells, one_hot):
    logits, labels, valid, num_pos = cells(spread=10.0)
    targets = one_hot(labels, 5)
    weight = torch.ones_like(targets) if alpha is None else alpha * targets + (1 - alpha) * (1 - targets)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    value = CrossEntropy(alpha)(ours, labels, valid, num_pos)
    expected = F.binary_cross_entropy_with_logits(theirs, targets, weight * valid[:, None], reduction="sum") / num_pos
    value.backward()
    expected.backward()

    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("x", [-50.0, -30.0, 0.0, 30.0, 50.0])
def test_float32_gradient_is_p_minus_target(x):
    logits = torch.full((2, 1), x, requires_grad=True)
    CrossEntropy()(logits, torch.tensor([0, 1]), torch.tensor([True, True]), 1).backward()
    p = torch.tensor(x, dtype=torch.float64).sigmoid()
    expected = torch.stack([-torch.tensor(-x, dtype=torch.float64).sigmoid(), p])  # positive, negative
    torch.testing.assert_close(logits.grad[:, 0].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("x", [10.0, 19.0, 21.0, 30.0, 39.0, 41.0, 50.0])
def test_large_logits_lose_no_precision(x):
    logits = torch.tensor([[x]], dtype=torch.float64, requires_grad=True)
    value = CrossEntropy()(logits, torch.tensor([1]), torch.tensor([True]), 1)
    value.backward()
    torch.testing.assert_close(value, logits[0, 0] + torch.log1p(torch.exp(-logits[0, 0])), rtol=1e-15, atol=0)
    torch.testing.assert_close(logits.grad, logits.sigmoid(), rtol=1e-15, atol=0)


def test_alpha_one_half_halves_the_loss(cells):
    torch.testing.assert_close(CrossEntropy(0.5)(*cells()), CrossEntropy()(*cells()) / 2)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_refuses_impossible_alpha(alpha):
    with pytest.raises(ValueError, match="alpha"):
        CrossEntropy(alpha)
