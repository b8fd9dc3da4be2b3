"""Quality focal and varifocal loss against plain float64 loops."""

import math

import pytest
import torch

from detector.losses import QualityFocal, Varifocal


def by_hand(cell, logits, labels, valid, quality):
    """Sum of cell(p, target, is_positive) over valid rows, one cell at a time."""
    total = 0.0
    for row, label, is_valid, q in zip(logits.tolist(), labels.tolist(), valid.tolist(), quality.tolist()):
        for column, x in enumerate(row):
            if is_valid:
                is_positive = column == label
                total += cell(1 / (1 + math.exp(-x)), q if is_positive else 0.0, is_positive)
    return total


def quality_focal(beta):
    return lambda p, y, _: abs(y - p) ** beta * -(y * math.log(p) + (1 - y) * math.log(1 - p))


def varifocal(alpha, gamma):
    def cell(p, q, _):
        if q > 0:
            return -q * (q * math.log(p) + (1 - q) * math.log(1 - p))
        return -alpha * p**gamma * math.log(1 - p)

    return cell


CASES = [
    (QualityFocal(), quality_focal(2.0)),
    (QualityFocal(beta=1.5), quality_focal(1.5)),
    (Varifocal(), varifocal(0.75, 2.0)),
    (Varifocal(alpha=0.3, gamma=1.0), varifocal(0.3, 1.0)),
]
cases = pytest.mark.parametrize("loss, cell", CASES, ids=["qfl", "qfl 1.5", "varifocal", "varifocal 0.3, 1"])


@pytest.fixture
def quality():
    """The quality of 40 rows, in [0, 1]; some are 0 and some are 1."""
    values = torch.rand(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1.4 - 0.2
    return values.clamp(0, 1)


@cases
def test_equals_the_formula(loss, cell, cells, quality):
    logits, labels, valid, num_pos = cells()
    expected = by_hand(cell, logits, labels, valid, quality) / int(num_pos)
    assert loss(logits, labels, valid, num_pos, quality).item() == pytest.approx(expected, rel=1e-9)


@cases
def test_without_quality_every_positive_is_perfect(loss, cell, cells):
    logits, labels, valid, num_pos = cells()
    perfect_quality = torch.ones(len(labels))
    assert torch.equal(loss(logits, labels, valid, num_pos), loss(logits, labels, valid, num_pos, perfect_quality))


@cases
def test_gradcheck_and_no_gradient_into_quality(loss, cell, cells, quality):
    logits, labels, valid, num_pos = cells()
    quality.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, valid, num_pos, quality), logits.requires_grad_())
    loss(logits, labels, valid, num_pos, quality).backward()
    assert quality.grad is None


@cases
def test_quality_of_background_and_ignored_rows_is_not_read(loss, cell, cells, quality):
    logits, labels, valid, num_pos = cells()
    dirty_quality = torch.where(valid & (labels < 5), quality, 7.0)
    assert torch.equal(
        loss(logits, labels, valid, num_pos, quality), loss(logits, labels, valid, num_pos, dirty_quality)
    )


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("loss", [QualityFocal(), Varifocal()], ids=["qfl", "varifocal"])
def test_the_gradient_of_a_positive_is_zero_at_its_quality(loss, q):
    logits = torch.tensor([[q]], dtype=torch.float64).logit().requires_grad_()
    valid, labels = torch.tensor([True]), torch.tensor([0])
    loss(logits, labels, valid, 1, torch.tensor([q])).backward()
    assert logits.grad.item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    "make, options",
    [
        (QualityFocal, {"beta": 0.5}),
        (QualityFocal, {"beta": float("nan")}),
        (Varifocal, {"alpha": -1.0}),
        (Varifocal, {"gamma": float("inf")}),
    ],
)
def test_refuses_impossible_settings(make, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)
