"""Gradient density: an example's weight is the inverse of the number of examples with its gradient norm.

Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, arXiv 1811.05181.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.distributed import all_cat, all_sum, world_size
from detector.losses.cells import region_of
from detector.losses.regions import count

try:
    import numpy as np
except ImportError:  # torch runs without it, and so do the losses
    np = None  # type: ignore[assignment]

Density = Literal["unit_region", "near_exact", "exact"]
Scope = Literal["batch", "level"]
Normalizer = Literal["valid_bins", "all_bins"]
FINE = 128  # grid steps in the width of a window, for the gradient norms of "near_exact"
RELEASED: dict[str, Any] = {
    "density": "unit_region",
    "scope": "level",
    "normalizer": "valid_bins",
    "corrected": False,
    "local_counts": True,
    "max_weight": None,
}


class GradientDensity(nn.Module):
    """The weights beta of gradient norms g in [0, 1]: what GHMC and GHMR share.

    density "unit_region": the unit interval is cut into `bins` equal regions; R_j counts the examples in region j.

        S_j = a S_j + (1 - a) R_j               moving average, a = momentum; without momentum S = R
        S_j / (1 - a^t)                         bias correction as in Adam, t = training updates so far
        beta_j = N / (S_j n)                    n = regions that hold an example ("valid_bins") or `bins` ("all_bins")

    density "exact": a window of width e = 1 / `bins` around every example, clipped to 0..1; no moving average.

        beta_i = N l / #{k: g_i - e/2 <= g_k < g_i + e/2},   l = min(g_i + e/2, 1) - max(g_i - e/2, 0)

    density "near_exact": the same in a thirtieth of the time, with norms on a grid of step h = e / 128. Its #{} lies
    between the exact counts of a window with both edges moved in by h and of one with both edges moved out by h. Its l
    is at most h / 2 off.

    More switches:

        max_weight      limit of beta, in neither the paper nor its code. A region has the same total weight with three
                        examples as with a million, so in small batches a few outliers may dominate.
        prior_count     k in beta_j = N / ((S_j + k) n): a region with S_j cells then gets S_j / (S_j + k) of a full
                        region's weight, and beta stays below N / (k n). For GHM-C with "unit_region"; 0 is the paper's
                        form.
        scope           "batch": the caller calls it once on all cells. "level": the caller calls it once for each
                        pyramid level and adds the values; all calls share one moving average.
        local_counts    each process counts its own examples only, and the processes' losses are averaged.
        corrected       False: no bias correction, so the first weights are 1 / (1 - a) times too large, and an
                        empty region keeps its S.

    The paper describes one density for the batch, and "all_bins". `released()` sets all switches
    as the code that its authors released and others ported has them.

    Buffers: `average` (bins,), always float32, and `updates` () int64. They change only in training mode, and only by
    a batch with examples. In evaluation, the average that this batch would give is used and not kept. Unless counts
    are local, each process must call at every step, with or without examples.
    """

    average: Tensor
    updates: Tensor

    def __init__(
        self,
        bins: int = 30,
        momentum: float = 0.75,
        *,
        density: Density = "unit_region",
        scope: Scope = "batch",
        normalizer: Normalizer = "valid_bins",
        corrected: bool = True,
        local_counts: bool = False,
        max_weight: float | None = None,
        prior_count: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if bins < 1:
            raise ValueError(f"{name}: bins is {bins}; it must be at least 1")
        if not 0 <= momentum < 1:
            raise ValueError(f"{name}: momentum is {momentum}; it must be in [0, 1), 0 for no moving average")
        if max_weight is not None and not max_weight > 0:
            raise ValueError(f"{name}: max_weight is {max_weight}; it must be positive, or None for no limit")
        if not 0 <= prior_count < math.inf:
            raise ValueError(f"{name}: prior_count is {prior_count}; it must not be negative, and must be finite")
        if prior_count and density != "unit_region":
            raise ValueError(f"{name}: prior_count is for density 'unit_region', and density is {density!r}")
        for option, value, choices in (
            ("density", density, get_args(Density)),
            ("scope", scope, get_args(Scope)),
            ("normalizer", normalizer, get_args(Normalizer)),
        ):
            if value not in choices:
                raise ValueError(f"{name}: {option} is {value!r}; it must be {' or '.join(choices)}")
        self.bins = bins
        self.momentum = momentum
        self.density = density
        self.regions = bins * FINE if density == "near_exact" else bins
        self.scope = scope
        self.normalizer = normalizer
        self.corrected = corrected
        self.local_counts = local_counts
        self.max_weight = max_weight
        self.prior_count = prior_count
        self.register_buffer("average", torch.zeros(bins))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable, recurse: bool = True) -> "GradientDensity":
        """Called by .to(), .half() and so on. The average stays float32, because float16 ends at 65,504 cells."""
        before = self.average
        super()._apply(fn, recurse)
        if self.average.dtype != torch.float32:
            self.average = before.to(self.average.device)
        return self

    @torch.no_grad()
    def shares(self, norms: Tensor, valid: Tensor | None = None) -> Tensor:
        """beta / N of every example, a constant for the backward pass; 0 in rows that are not valid.

        norms (N, K) in [0, 1], valid (N,) bool or None for all -> (N, K). The sum of share x loss over all processes is
        the mean of beta x loss.
        """
        if self.density == "exact":
            return self._exact_shares(norms, valid)
        region = region_of(norms, self.regions)
        share = self.region_shares(count(region, valid, self.regions))
        return _without(share[region], valid)

    @torch.no_grad()
    def region_shares(self, counts: Tensor) -> Tensor:
        """beta / N of every region (regions,) float32, from this process's counts (regions,) int64.

        `regions` is the number of equal parts of 0..1 for the counts. Updates the moving average, if there is one.
        """
        counts = counts if self.local_counts else all_sum(counts)
        if self.density == "near_exact":
            return self._limited(self._windowed(counts), counts)
        filled = counts > 0
        average = self._averaged(counts, filled)
        divisor = filled.sum() if self.normalizer == "valid_bins" else self.bins
        divided = (average + self.prior_count) * divisor
        share = divided.reciprocal().masked_fill(~filled, 0)  # N of beta and N of the mean cancel
        return self._limited(share, counts)

    def _averaged(self, counts: Tensor, filled: Tensor) -> Tensor:
        """Moving average with this batch in it (bins,), stored in training mode."""
        seen = filled.any()  # an empty batch says nothing about the density; decided without a host copy
        updates = self.updates + seen
        moved = self.momentum * self.average + (1 - self.momentum) * counts
        average = torch.where(seen if self.corrected else filled, moved, self.average)
        if self.training:
            self.average.copy_(average)
            self.updates.copy_(updates)
        if not self.corrected or self.momentum == 0:
            return average
        return average / -torch.expm1(updates * math.log(self.momentum))  # 1 - a^t, without its cancellation

    def _windowed(self, counts: Tensor) -> Tensor:
        """l / #{} at the centre of every region; regions that reach half into the window count by half."""
        up_to = F.pad(counts.cumsum(0), (1, 0))
        at = torch.arange(self.regions, device=counts.device)
        half = FINE // 2
        inner = up_to[(at + half).clamp(max=self.regions)] - up_to[(at - half + 1).clamp(min=0)]
        outer = up_to[(at + half + 1).clamp(max=self.regions)] - up_to[(at - half).clamp(min=0)]
        centre = (at + 0.5) / self.regions
        reach = 0.5 / self.bins
        length = (centre + reach).clamp(max=1) - (centre - reach).clamp(min=0)
        return (2 * length / (inner + outer)).masked_fill(outer == 0, 0)

    def _exact_shares(self, norms: Tensor, valid: Tensor | None) -> Tensor:
        """As `shares`, from a sort and two searches: O(N log N)."""
        here = _without(norms, valid, 2).flatten()  # invalid rows get 2, past every window
        g, order = _sort(here)
        everyone = g if self.local_counts or world_size() == 1 else _sort(all_cat(here))[0]
        half = 0.5 / self.bins
        # Searched in ascending order, so that neighbouring searches touch the same memory.
        count = torch.searchsorted(everyone, g + half) - torch.searchsorted(everyone, g - half)
        length = (g + half).clamp(max=1) - (g - half).clamp(min=0)
        share = torch.empty_like(g)
        share[order] = length / count
        return self._limited(_without(share.view_as(norms), valid), everyone < 2)

    def _limited(self, share: Tensor, counts: Tensor) -> Tensor:
        """`share` with beta limited to `max_weight`; the counts add up to N."""
        if self.max_weight is not None:
            share = share.clamp(max=self.max_weight / counts.sum())
        return share / world_size() if self.local_counts else share


def _without(values: Tensor, valid: Tensor | None, fill: float = 0) -> Tensor:
    """`values` (N, K) with `fill` in rows that are not valid."""
    return values if valid is None else values.masked_fill(~valid[:, None], fill)


def _sort(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N,) of at least 0 in ascending order, and the old index of each."""
    by_torch = values.device.type != "cpu" or values.dtype != torch.float32 or len(values) >= 2**32
    if by_torch or np is None or torch.compiler.is_compiling():  # in torch.compile there are no NumPy integers
        return values.sort()
    # Bits of floats that are not negative sort like the floats. With the index in the lower bits, NumPy sorts both as
    # one integer, three times as fast as torch sorts floats.
    keys = values.numpy().view(np.uint32).astype(np.uint64) << 32
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    ordered = (keys >> 32).astype(np.uint32).view(np.float32)
    return torch.from_numpy(ordered), torch.from_numpy((keys & 0xFFFFFFFF).astype(np.int64))
