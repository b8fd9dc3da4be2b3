"""Measure the gradient of a loss by region of the gradient norm, for cells and for box coordinates."""

from typing import NamedTuple

import torch
from torch import Tensor

from detector import distributed
from detector.criterion import Criterion, Matches
from detector.losses.cells import logits_against_truth
from detector.losses.regions import count, sums_by_index
from detector.structures import Predictions, Target

MU = 0.02  # of the box norm |d| / sqrt(d^2 + mu^2), one for all losses: the GHM paper's
BANDS = {"easy": (0.0, 0.1), "medium": (0.1, 0.9), "outlier": (0.9, 1.0)}  # of the gradient norm


class Regions(NamedTuple):
    """Equal regions of a gradient norm in 0..1; both (bins,), summed over processes."""

    counts: Tensor  # int64, examples in each
    gradient: Tensor  # float64, sum of |d loss / d output| over them

    @property
    def density(self) -> Tensor:
        """GD(g) / N, 1 everywhere for a uniform distribution."""
        return self.counts.double() * len(self.counts) / self.counts.sum().clamp(min=1)

    @property
    def beta(self) -> Tensor:
        """The weight GHM's formula gives, N / GD(g); 0 where there is no example."""
        return torch.where(self.counts > 0, 1 / self.density, 0)

    def shares(self) -> dict[str, float]:
        """Share of the whole gradient that comes from each of BANDS; 0 where there is no gradient."""
        bins, total = len(self.gradient), self.gradient.sum().clamp(min=1e-300)
        edges = {name: (round(low * bins), round(high * bins)) for name, (low, high) in BANDS.items()}
        return {name: float(self.gradient[low:high].sum() / total) for name, (low, high) in edges.items()}


class Observation(NamedTuple):
    """Classification: g = |p - p*| of every valid cell. Boxes: g = |d| / sqrt(d^2 + MU^2) of every coordinate."""

    cells: Regions
    boxes: Regions


def observe(
    criterion: Criterion,
    predictions: Predictions,
    targets: list[Target],
    cell_bins: int = 30,
    box_bins: int = 10,
    matches: Matches | None = None,
) -> Observation:
    """Gradient norms of a batch, and the gradient that the criterion's losses give in each region.

    Does not change the criterion's state or the predictions' graph. In training, call it before the criterion: GHM's
    moving average must count the batch once. Each process must call it.
    """
    matches = matches or criterion.match(predictions, targets)
    labels = matches.anchor_labels(predictions.logits.shape[-1])
    logits = predictions.logits.detach().float().requires_grad_()
    deltas = predictions.deltas.detach().float().requires_grad_()
    state = {name: value.clone() for name, value in criterion.state_dict().items()}
    with torch.enable_grad():
        losses = criterion(predictions._replace(logits=logits, deltas=deltas), targets, matches)
        to_logits, to_deltas = torch.autograd.grad(losses.total, (logits, deltas))
    criterion.load_state_dict(state)

    with torch.no_grad():
        cells = by_region(torch.zeros(0, 1), torch.zeros(0, 1), torch.zeros(0, dtype=torch.bool), cell_bins)
        cells = Regions(*(value.to(logits.device) for value in cells))
        for image in range(len(logits)):  # one by one: a full-size image has 16 million cells
            z = logits_against_truth(logits[image], labels[image], matches.valid[image])
            more = by_region(z.sigmoid(), to_logits[image], matches.valid[image], cell_bins)
            cells = Regions(cells.counts + more.counts, cells.gradient + more.gradient)
        d = deltas.flatten(0, 1)[matches.rows] - criterion.coder.encode(matches.boxes, matches.anchors)
        norms = d.abs() / torch.hypot(d, torch.full_like(d, MU))
        every = torch.ones_like(d[:, 0], dtype=torch.bool)
        boxes = by_region(norms, to_deltas.flatten(0, 1)[matches.rows], every, box_bins)
    return Observation(*(Regions(*map(distributed.all_sum, part)) for part in (cells, boxes)))


def by_region(norms: Tensor, gradient: Tensor, valid: Tensor, bins: int) -> Regions:
    """Counts and sums of |gradient| (N, K) in `bins` equal regions of norms (N, K) in 0..1, over valid (N,) rows."""
    region = (norms * bins).long().clamp_(0, bins - 1).masked_fill_(~valid[:, None], bins)
    return Regions(count(region, None, bins), sums_by_index(region, gradient.abs().double(), bins))
