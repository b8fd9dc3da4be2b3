import pytest
import torch
import torch.nn.functional as F

from detector.losses import OHEM, CrossEntropy


def cell_losses(logits, labels, valid, one_hot):
    """Losses of the valid positive cells, and of the valid negative cells, hardest first."""
    targets = one_hot(labels, logits.shape[1])[valid]
    losses = F.binary_cross_entropy_with_logits(logits[valid], targets, reduction="none")
    return losses[targets == 1], losses[targets == 0].sort(descending=True).values


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_keeps_positives_and_the_hardest_negatives(ratio, cells, one_hot):
    logits, labels, valid, num_pos = cells(rows=60)
    positive, negative = cell_losses(logits, labels, valid, one_hot)
    expected = (positive.sum() + negative[: round(ratio * len(positive))].sum()) / num_pos
    torch.testing.assert_close(OHEM(ratio)(logits, labels, valid, num_pos), expected)


@pytest.mark.parametrize("top_k", [1, 20])
def test_top_k_keeps_the_hardest_of_all(top_k, cells, one_hot):
    logits, labels, valid, num_pos = cells(rows=60)
    hardest = torch.cat(cell_losses(logits, labels, valid, one_hot)).sort(descending=True).values
    torch.testing.assert_close(OHEM(top_k=top_k)(logits, labels, valid, num_pos), hardest[:top_k].sum() / num_pos)


@pytest.mark.parametrize("loss, kept", [(OHEM(3.0), 4 * 10), (OHEM(1.5), 25), (OHEM(top_k=7), 7)])
def test_ties_share_the_places_exactly(loss, kept):
    logits = torch.zeros(100, 4, requires_grad=True)
    labels = torch.arange(100).clamp(max=14).sub(10).clamp(min=0)  # 0 x 11, 1, 2, 3, then background
    labels = torch.where(torch.arange(100) < 10, labels, 4)
    loss(logits, labels, torch.ones(100, dtype=torch.bool), 1).backward()
    assert (2 * logits.grad).abs().sum().item() == pytest.approx(kept)  # each cell's slope is a half
    assert len(logits.grad[10:].unique()) == 1  # position does not decide which cell is kept
    if loss.top_k is None:
        assert (logits.grad[:10, 0] == -0.5).all()  # the ten positive cells keep their full gradient


@pytest.mark.parametrize("loss", [OHEM(1e6), OHEM(top_k=10**9)], ids=["ratio", "top_k"])
def test_more_places_than_cells_give_cross_entropy(loss, cells):
    torch.testing.assert_close(loss(*cells()), CrossEntropy()(*cells()))


def test_without_positives_it_keeps_as_many_negatives_as_the_ratio(cells):
    logits, labels, valid, _ = cells()
    logits.requires_grad_()
    OHEM(3.0)(logits, torch.full_like(labels, 5), valid, 1).backward()
    hardest = logits.detach().masked_fill(~valid[:, None], -torch.inf).flatten().topk(3).indices
    assert set(logits.grad.flatten().nonzero().flatten().tolist()) == set(hardest.tolist())


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_impossible_ratios(ratio):
    with pytest.raises(ValueError, match=r"ratio is .*must be positive and finite"):
        OHEM(ratio)


def test_refuses_to_keep_no_cell():
    with pytest.raises(ValueError, match="top_k is 0"):
        OHEM(top_k=0)
