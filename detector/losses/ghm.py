"""The gradient harmonizing losses: GHM-C for classes, GHM-R for boxes.

Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, arXiv 1811.05181.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from detector.losses.cells import (
    cross_entropy,
    logits_against_truth,
    lookup,
    region_of,
    sigmoid_softplus,
    sum_cells,
)
from detector.losses.checks import check_boxes, check_cells
from detector.losses.density import RELEASED, Density, GradientDensity, Normalizer, Scope
from detector.losses.fused import cell_sum
from detector.losses.regions import count_regions


class GHMC(GradientDensity):
    """Cross entropy harmonized by the density of its gradient norm g = |p - p*|.

        loss = (1 / N) sum beta(g) [-p* log p - (1-p*) log(1-p)]        beta as in GradientDensity

    Normalised by N, the valid cells of all processes (it is built into beta), so num_pos is not used.

        class_loss = GHMC(bins=30, momentum=0.75)  # keep it, and save its state_dict beside the model's
        labels = torch.where(positive, gt_labels[gt_index], num_classes)  # (N,), num_classes = background
        loss = class_loss(logits, labels, ~ignored, positive.sum().clamp(min=1))

    Raises ValueError where bins is below 1, momentum outside [0, 1), max_weight not positive, prior_count negative or a
    choice unknown.
    """

    @classmethod
    def released(cls, bins: int = 30, momentum: float = 0.75) -> "GHMC":
        """With every switch as in the authors' released code."""
        return cls(bins, momentum, **RELEASED)

    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor, num_pos: Tensor | float) -> Tensor:
        """logits (N, C), labels (N,) int64 with C = background, valid (N,) bool -> scalar."""
        check_cells(logits, labels, valid)
        if self.density == "exact":  # each cell has its own weight, so there is no table
            z = logits_against_truth(logits, labels, valid)
            return sum_cells(self.shares(z.sigmoid(), valid) * cross_entropy(z), valid)
        share = self.region_shares(count_regions(logits, labels, valid, self.regions))
        return cell_sum(_curve, logits, labels, valid, _without_gaps(share), self.regions)


def _curve(z: Tensor, is_positive: Tensor | None, share: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    norm, softplus = sigmoid_softplus(z)
    weight = lookup(share, region_of(norm, bins))
    return weight * softplus, weight * norm


def _without_gaps(share: Tensor) -> Tensor:
    """The shares, in which an empty region takes the larger share of its neighbours.

    A cell at the edge of two regions may be counted in one and rounded into the other. Its weight must not be 0.
    """
    below, above = F.pad(share[:-1], (1, 0)), F.pad(share[1:], (0, 1))
    return torch.where(share > 0, share, torch.maximum(below, above))


class GHMR(GradientDensity):
    """ASL1 harmonized by the density of its gradient norm g = |d| / sqrt(d^2 + mu^2), d = delta - target.

        loss = (1 / N) sum beta(g) [sqrt(d^2 + mu^2) - mu]              beta as in GradientDensity

    Normalised by N, the box coordinates of all processes (it is built into beta), so num_pos is not used. Rows that are
    not `valid` do not count.

        box_loss = GHMR(bins=10, mu=0.02, momentum=0.7)  # keep it, and save its state_dict beside the model's
        targets = encode(gt_boxes[gt_index[positive]], anchors[positive])  # (P, 4)
        loss = 10 * box_loss(deltas[positive], targets, num_pos)  # 10: the released code's weight

    Raises ValueError where mu is not positive and finite, and where GHMC does.
    """

    takes_valid = True

    def __init__(
        self,
        bins: int = 10,
        mu: float = 0.02,
        momentum: float = 0.7,
        *,
        density: Density = "unit_region",
        scope: Scope = "batch",
        normalizer: Normalizer = "valid_bins",
        corrected: bool = True,
        local_counts: bool = False,
        max_weight: float | None = None,
    ) -> None:
        super().__init__(
            bins,
            momentum,
            density=density,
            scope=scope,
            normalizer=normalizer,
            corrected=corrected,
            local_counts=local_counts,
            max_weight=max_weight,
        )
        if not 0 < mu < float("inf"):
            raise ValueError(f"GHMR: mu is {mu}; it must be positive and finite")
        self.mu = mu

    @classmethod
    def released(cls, bins: int = 10, mu: float = 0.02, momentum: float = 0.7) -> "GHMR":
        """With every switch as in the authors' released code."""
        return cls(bins, mu, momentum, **RELEASED)

    def forward(self, deltas: Tensor, targets: Tensor, num_pos: Tensor | float, valid: Tensor | None = None) -> Tensor:
        """deltas, targets (P, 4), in encoded box coordinates; valid (P,) bool or None for all; P may be 0 -> scalar."""
        check_boxes(deltas, targets)
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        d = deltas.to(dtype) - targets.to(dtype)
        if valid is not None:  # before any other step: rows that do not count may be inf or NaN
            d = torch.where(valid[:, None], d, 0)
        # hypot, because the square of a large d would overflow. At 0 its gradient is 0.
        length = torch.hypot(d, torch.full_like(d, self.mu))
        share = self.shares((d / length).detach().abs(), valid)
        return (share * (length - self.mu)).sum()
