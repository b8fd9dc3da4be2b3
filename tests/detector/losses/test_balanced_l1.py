import math

import pytest
import torch

from detector.losses import BalancedL1

OPTIONS = [{}, {"alpha": 0.8, "gamma": 1.2, "beta": 0.11}, {"gamma": 3.0}]
every = pytest.mark.parametrize("options", OPTIONS, ids=str)


def slope(d, alpha=0.5, gamma=1.5, beta=1.0):
    """The paper's gradient of one coordinate, equation 7, in units of beta."""
    b = math.exp(gamma / alpha) - 1
    return alpha * math.log(b * d / beta + 1) if d < beta else gamma


def one(loss, d):
    """Value and gradient at one error."""
    deltas = torch.tensor([[d, 0.0, 0.0, 0.0]], dtype=torch.float64).requires_grad_()
    value = loss(deltas, torch.zeros(1, 4), 1)
    value.backward()
    return value.item(), deltas.grad[0, 0].item()


def test_equals_the_papers_closed_form(boxes):
    deltas, targets, num_pos = boxes(spread=1.0)
    d = (deltas - targets).abs()
    assert (d < 1).any() and (d > 1).any()
    b = math.exp(3) - 1
    inlier = 0.5 / b * (b * d + 1) * torch.log(b * d + 1) - 0.5 * d
    constant = 1.5 / b - 0.5  # so that both parts agree at 1
    expected = torch.where(d < 1, inlier, 1.5 * d + constant).sum() / num_pos
    torch.testing.assert_close(BalancedL1()(deltas, targets, num_pos), expected)


@every
@pytest.mark.parametrize("d", [1e-9, 0.01, 0.1, 0.11, 0.5, 1.0, 1.7, 30.0])
def test_value_is_the_integral_of_the_papers_gradient(options, d):
    value, gradient = one(BalancedL1(**options), d)
    count = 20_000
    middles = [(i + 0.5) * d / count for i in range(count)]
    integral = sum(slope(x, **options) for x in middles) * d / count
    assert value == pytest.approx(integral, rel=2e-4, abs=1e-16)
    assert gradient == pytest.approx(slope(d, **options), rel=1e-6, abs=1e-12)


@every
def test_gradient_is_continuous_where_the_two_parts_meet(options):
    loss, beta = BalancedL1(**options), options.get("beta", 1.0)
    gradients = [one(loss, beta * x)[1] for x in (1 - 1e-9, 1.0, 1 + 1e-9, 2.0)]
    assert gradients == pytest.approx([loss.gamma] * 4, rel=1e-7)


def test_small_errors_get_more_gradient_than_with_smooth_l1_and_a_smaller_alpha_gives_more():
    for d in (0.01, 0.1, 0.5):
        gradients = [one(BalancedL1(alpha=alpha, gamma=1.0), d)[1] for alpha in (0.8, 0.5, 0.2)]
        assert d < gradients[0] < gradients[1] < gradients[2] < 1  # d: smooth L1's gradient with beta 1


@pytest.mark.parametrize(
    "options, named",
    [
        ({"alpha": 0.0}, "alpha is 0.0; it must be positive and finite"),
        ({"gamma": -1.0}, "gamma"),
        ({"beta": float("nan")}, "beta"),
        ({"beta": float("inf")}, "beta is inf; it must be positive and finite"),
        ({"alpha": 0.01}, "at most 50"),
    ],
)
def test_refuses_impossible_settings(options, named):
    with pytest.raises(ValueError, match=named):
        BalancedL1(**options)
