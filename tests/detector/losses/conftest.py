import pytest
import torch


@pytest.fixture(scope="session")
def cells():
    """Makes (logits, labels, valid, num_pos) with positives, background and ignored rows, float64."""

    def make(rows=40, classes=5, seed=0, spread=3.0):
        rng = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, classes, generator=rng, dtype=torch.float64) * spread
        labels = torch.randint(0, 2 * classes, (rows,), generator=rng).clamp(max=classes)
        valid = torch.rand(rows, generator=rng) < 0.8
        num_pos = (valid & (labels < classes)).sum().clamp(min=1)
        return logits, labels, valid, num_pos

    return make


@pytest.fixture(scope="session")
def boxes():
    """Makes (deltas, targets, num_pos), float64."""

    def make(rows=30, seed=0, spread=0.2):
        rng = torch.Generator().manual_seed(seed)
        deltas, targets = torch.randn(2, rows, 4, generator=rng, dtype=torch.float64) * spread
        return deltas, targets, torch.tensor(max(rows, 1))

    return make


@pytest.fixture
def one_hot():
    """Makes one-hot targets (N, C), for reference implementations; the class losses never build them."""
    return lambda labels, classes: torch.nn.functional.one_hot(labels, classes + 1)[:, :classes].double()
