"""Rank & sort loss against the paper's definitions, one pair of cells at a time; and its other laws."""

from itertools import product

import pytest
import torch

from detector.configure import resolve
from detector.losses import RankSort, dispatch, rank_sort

CLASSES = 5


def higher(score, other):
    """The smoothed step H: how much `score` counts as above `other`."""
    return min(max((score - other) / (2 * 0.5) + 0.5, 0.0), 1.0)


def by_hand(logits, labels, valid, quality):
    """Value and gradient (N, C) by equations 1 to 7 of the paper: primary terms L_ij, each for a pair of cells."""
    cells = [(row, c) for row, c in product(range(len(logits)), range(logits.shape[1])) if valid[row]]
    positives = [(row, c) for row, c in cells if labels[row] == c]
    negatives = [(row, c) for row, c in cells if labels[row] != c]
    x, y = logits.double().tolist(), quality.double().tolist()
    gradient = torch.zeros(logits.shape, dtype=torch.float64)
    total = 0.0

    def share_out(error, i, by):
        """L_ij = error x the share of j in `by`; it is added to the gradient of j and taken from that of i."""
        for j, h in by.items():
            primary = error * h / sum(by.values())
            gradient[j] += primary / len(positives)
            gradient[i] -= primary / len(positives)

    for i in positives:
        above = {j: higher(x[j[0]][j[1]], x[i[0]][i[1]]) for j in cells}
        negatives_above = {j: above[j] for j in negatives if above[j] > 0}
        positives_above = {j: above[j] for j in positives}
        rightly_above = {j: h for j, h in positives_above.items() if y[j[0]] >= y[i[0]]}
        wrongly_above = {j: h for j, h in positives_above.items() if y[j[0]] < y[i[0]] and h > 0}
        ranking_error = sum(negatives_above.values()) / sum(above.values())
        current_error, target_error = (
            sum(h * (1 - y[j[0]]) for j, h in group.items()) / sum(group.values())
            for group in (positives_above, rightly_above)
        )
        total += (ranking_error + current_error - target_error) / len(positives)
        share_out(ranking_error, i, negatives_above)
        share_out(current_error - target_error, i, wrongly_above)
    return total, gradient


def value_and_grad(logits, *rest):
    x = logits.clone().requires_grad_()
    value = RankSort()(x, *rest)
    value.backward()
    return value.detach(), x.grad


@pytest.fixture
def case(cells):
    """Makes (logits, labels, valid, num_pos, quality)."""

    def make(**options):
        logits, *rest = cells(**options)
        quality = torch.rand(len(logits), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return logits, *rest, quality

    return make


@pytest.mark.parametrize("spread", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("qualities", [None, 3, 1000])  # how many different ones; None: all are 1
@pytest.mark.parametrize("grid", [0.0, 0.25])  # rounds the logits: many ties, and values on the edges of H
def test_equals_the_papers_value_and_gradient(case, spread, qualities, grid):
    logits, labels, valid, num_pos, quality = case(spread=spread)
    if grid:
        logits = (logits / grid).round() * grid
    quality = None if qualities is None else (quality * qualities).round() / qualities
    result = value_and_grad(logits, labels, valid, num_pos, *([] if quality is None else [quality]))
    expected, expected_grad = by_hand(logits, labels, valid, torch.ones(len(labels)) if quality is None else quality)
    assert result[0].item() == pytest.approx(expected, rel=1e-8)
    torch.testing.assert_close(result[1], expected_grad, rtol=1e-7, atol=1e-9)


def test_a_perfect_ranking_costs_nothing():
    # A positive's step ends half a logit below it, so one logit apart nothing overlaps.
    logits = torch.tensor([[4.0, -3.0], [-2.0, 3.0], [2.0, 1.0], [0.9, -8.0]])
    labels, valid = torch.tensor([0, 1, 0, 2]), torch.ones(4, dtype=torch.bool)
    value, grad = value_and_grad(logits, labels, valid, 3, torch.tensor([0.9, 0.8, 0.7, 0.0]))
    assert value == 0 and not grad.any()
    value, grad = value_and_grad(logits, labels, valid, 3, torch.tensor([0.9, 0.7, 0.8, 0.0]))
    assert value > 0 and grad[1, 1] > 0 > grad[2, 0]  # the better box is pulled up, the worse one pushed down
    assert grad.count_nonzero() == 2


def test_it_pulls_up_as_much_as_it_pushes_down(case):
    logits, labels, valid, num_pos, quality = case()
    _, grad = value_and_grad(logits, labels, valid, num_pos, quality)
    positive = torch.zeros_like(grad, dtype=torch.bool)
    rows = (valid & (labels < CLASSES)).nonzero()[:, 0]
    positive[rows, labels[rows]] = True
    assert grad.abs().sum() > 0.1
    assert grad.sum().item() == pytest.approx(0, abs=1e-9)
    value, grad = value_and_grad(logits, labels, valid, num_pos)  # nothing to sort: all of it is ranking error
    assert grad[~positive].sum().item() == pytest.approx(value.item(), rel=1e-8)
    assert grad[positive].sum().item() == pytest.approx(-value.item(), rel=1e-8)


def test_negatives_below_every_positive_change_nothing(case):
    logits, labels, valid, num_pos, quality = case()
    value, grad = value_and_grad(logits, labels, valid, num_pos, quality)
    easy_logits = torch.full((5000, CLASSES), float(logits.min()) - 1)
    background_labels, ones = torch.full((5000,), CLASSES), torch.ones(5000)
    joined_inputs = [
        torch.cat(pair) for pair in ((logits, easy_logits), (labels, background_labels), (valid, ones.bool()))
    ]
    joined_value, joined_grad = value_and_grad(*joined_inputs, num_pos, torch.cat([quality, ones]))
    assert torch.equal(value, joined_value) and torch.equal(grad, joined_grad[: len(grad)])
    assert not joined_grad[len(grad) :].any()


def test_without_positives_it_is_zero_with_a_gradient(cells):
    logits, labels, valid, _ = cells()
    value, grad = value_and_grad(logits, torch.full_like(labels, CLASSES), valid, 1)
    assert value == 0 and not grad.any()


def test_following_the_gradient_ranks_and_sorts(case):
    logits, labels, valid, num_pos, quality = case(rows=12, spread=1.0)
    logits.requires_grad_()
    for _ in range(300):
        (step,) = torch.autograd.grad(RankSort()(logits, labels, valid, num_pos, quality), logits)
        logits.data -= step
    assert RankSort()(logits, labels, valid, num_pos, quality) < 0.05  # it starts at about 1
    rows = (valid & (labels < CLASSES)).nonzero()[:, 0]
    best_first = rows[quality[rows].argsort(descending=True)]
    scores = logits[best_first, labels[best_first]]
    negative = torch.arange(CLASSES) != labels[:, None]
    assert len(rows) > 3 and (scores.diff() < 0).all() and scores.min() > logits[valid[:, None] & negative].max()


def test_pieces_change_nothing(case, monkeypatch):
    results = [value_and_grad(*case(rows=60))]
    monkeypatch.setitem(dispatch.PIECE, "cpu", 3 * CLASSES)
    results.append(value_and_grad(*case(rows=60)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    monkeypatch.setattr(rank_sort, "PAIRS", 50)
    torch.testing.assert_close(value_and_grad(*case(rows=60)), results[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [30.0, 1e4, float("inf")])
def test_negatives_far_above_count_fully_and_no_more(case, size):
    logits, labels, valid, num_pos, quality = case(spread=1.0)
    row = int((valid & (labels == CLASSES)).nonzero()[0])
    results = []
    for logit in (20.0, size):
        logits[row, 0] = logit
        results.append(value_and_grad(logits, labels, valid, num_pos, quality))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-15)
    assert results[1][1][row, 0] > 0


def test_gradient_scales_and_adds_up(case):
    logits, *rest = case()
    _, grad = value_and_grad(logits, *rest)
    x = logits.clone().requires_grad_()
    loss = RankSort()(x, *rest)
    (2 * loss + loss).backward(retain_graph=True)
    torch.testing.assert_close(x.grad, 3 * grad)
    loss.backward()  # a second time through the same graph
    torch.testing.assert_close(x.grad, 4 * grad)


def test_a_loss_scale_saves_gradients_too_small_for_float16(case):
    logits, labels, valid, num_pos, quality = case()
    half_logits = logits.half()
    _, expected = value_and_grad(half_logits.double(), labels, valid, num_pos, quality)
    x = half_logits.requires_grad_()
    (RankSort()(x, labels, valid, num_pos, quality) * 1e-6 * 2.0**20).backward()
    torch.testing.assert_close(x.grad.double(), expected * 1e-6 * 2.0**20, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("what", ["positive", "negative"])
def test_nan_is_not_hidden(case, what):
    logits, labels, valid, num_pos, quality = case()
    row = int((valid & (labels < CLASSES)).nonzero()[0])
    logits[row, labels[row] if what == "positive" else (labels[row] + 1) % CLASSES] = torch.nan
    assert RankSort()(logits, labels, valid, num_pos, quality).isnan()


@pytest.mark.parametrize(("settings", "prior"), [([], 0.5), (["model.head.prior=0.2"], 0.2)])
def test_scores_start_at_one_half_unless_the_config_says_otherwise(settings, prior):
    """If scores start at RetinaNet's 0.01, most objects stay below the score threshold."""
    raw_config = {"data": {split: {"annotations": "a.json", "images": "a"} for split in ("train", "val")}}
    cfg = resolve(raw_config | {"class_loss": {"name": "rank_sort"}}, "test", settings)
    assert cfg.model.head.prior == prior
    assert resolve(raw_config | {"class_loss": {"name": "focal"}}, "test", []).model.head.prior == 0.01
