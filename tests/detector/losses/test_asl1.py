import pytest
import torch

from detector.losses import ASL1, L1


def test_asl1_follows_its_formula(boxes):
    deltas, targets, num_pos = boxes()
    expected = (((deltas - targets) ** 2 + 0.02**2).sqrt() - 0.02).sum() / num_pos
    torch.testing.assert_close(ASL1()(deltas, targets, num_pos), expected)


def test_asl1_becomes_l1_as_mu_vanishes(boxes):
    l1 = L1()(*boxes())
    gaps = [float(l1 - ASL1(mu)(*boxes())) for mu in (0.1, 0.01, 1e-3, 1e-9)]
    assert gaps == sorted(gaps, reverse=True) and 0 <= gaps[-1] < 1e-8


@pytest.mark.parametrize("mu", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_impossible_mu(mu):
    with pytest.raises(ValueError, match=r"mu is .*must be positive and finite"):
        ASL1(mu)
