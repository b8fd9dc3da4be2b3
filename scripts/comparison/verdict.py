"""The statistics of a comparison: intervals, verdicts, and which differences it can detect.

A row holds the runs of one loss: AP for each seed, and AP for each seed on each of D draws of the validation images. AP
varies with the seed and with the images that are scored. The 95% interval of a difference covers both:

    difference of means  +-  sqrt(t_s^2 (s1^2 / S1 + s0^2 / S0)  +  t_v^2 V)

    s     standard deviation of AP over the S seeds of a row
    t_s   quantile of Student's t for the degrees of freedom that Welch's test gives the seeds
    V     variance, over the draws of images, of the difference of the seed means; minus the part that s^2
          already contains, because seeds react differently to the images
    t_v   quantile of Student's t for images - 1 degrees of freedom

p is the level at which the interval just reaches 0. Each part has its own t (as in Graybill and Wang, "Confidence
intervals on nonnegative linear combinations of variances", JASA 1980). With one Satterthwaite t for their sum, two
seeds that agree by chance would make the variance look well known: some 10% of studies with two seeds and five
comparisons then had a false verdict. The seeds of two losses are not paired, because they hardly correlate.

Over several data sets the difference is the mean of their differences, or the change from one set to another. The sets
are independent, so the variances of weight x difference are added; t_s and t_v are for the degrees of freedom that
Welch and Satterthwaite give to these sums. It says nothing about other data sets.

scripts/bench/verdicts.py measures all this.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from scipy import optimize, special, stats

LEVEL = 0.05  # the most often that equal losses may be called different
POWER = 0.8  # how often a "detectable" difference is detected
MOST_SEEDS = 1000
STUDIES = 2000
TINY = 1e-12

Numbers = TypeVar("Numbers", float, np.ndarray)


class Runs(NamedTuple):
    """One row, in percent."""

    aps: np.ndarray  # (S,), by seed
    draws: np.ndarray  # (S, D), by seed and draw of images
    images: int


class Estimate(NamedTuple):
    """A difference of two rows' means, in percent."""

    mean: float
    low: float  # of the interval that covers 95%
    high: float
    p: float | None  # chance of such a difference between equal losses; None if a row has one seed


class Variances(NamedTuple):
    """The parts of the variance of one run's AP, in percent squared."""

    seed: float
    image: float  # the drawn images favour one loss over another, for all seeds
    interaction: float  # the drawn images favour one seed of a loss over another
    images: int  # the number of images that these variances belong to


def difference(row: Runs, base: Runs) -> Estimate:
    """`row` minus `base`, which share their draws of images.

    With one seed in a row, the spread of seeds is unknown: the interval covers the images only, and p is None.
    """
    return mean_difference([(row, base)])


def mean_difference(sets: Sequence[tuple[Runs, Runs]], weights: Sequence[float] | None = None) -> Estimate:
    """The mean over data sets of `difference` of the two rows of each; the sets share neither images nor runs.

    With `weights`, the sum of weight x difference instead: (-1, 1) gives the change from the first set to the second.
    With one seed in a row of any set, the interval covers the images only, and p is None.
    """
    weights = weights or [1 / len(sets)] * len(sets)
    mean = float(sum(w * (row.aps.mean() - base.aps.mean()) for w, (row, base) in zip(weights, sets)))
    rows = [(w, row) for w, pair in zip(weights, sets) for row in pair]
    of_images = [float((row.draws.mean(axis=0) - base.draws.mean(axis=0)).var(ddof=1)) for row, base in sets]
    images_df = [max(row.images - 1, 1) for row, _ in sets]
    if single := min(len(row.aps) for _, row in rows) == 1:
        of_seeds, df = 0.0, 1.0
    else:
        counted = [sum(_interaction(row.draws) / len(row.aps) for row in pair) for pair in sets]
        of_images = [max(part - also, 0.0) for part, also in zip(of_images, counted)]
        parts = [w**2 * row.aps.var(ddof=1) / len(row.aps) for w, row in rows]
        of_seeds, df = sum(parts), _welch(parts, [len(row.aps) - 1 for _, row in rows])
    of_images = [w**2 * part for w, part in zip(weights, of_images)]  # the sets are independent, so variances add up
    known = of_seeds, df, sum(of_images), max(_welch(of_images, images_df), 1)
    reach = float(_half_width(LEVEL, *known))
    return Estimate(mean, mean - reach, mean + reach, None if single else _p_value(abs(mean), *known))


def _welch(parts: Sequence[Numbers], dfs: Sequence[int]) -> Numbers:
    """Degrees of freedom of the sum of several variances of means."""
    return sum(parts) ** 2 / np.maximum(sum(part**2 / df for part, df in zip(parts, dfs)), 1e-300)


def _half_width(level: float, of_seeds: Numbers, df: Numbers, of_images: float, images_df: float) -> Numbers:
    """Half the width of the interval at `level`; `df` are the degrees of freedom of the seeds."""
    seeds, images = special.stdtrit(np.maximum(df, 1), level / 2), special.stdtrit(images_df, level / 2)
    return np.sqrt(seeds**2 * of_seeds + images**2 * of_images)


def _p_value(mean: float, *known: float) -> float:
    """The level at which half the interval's width is `mean`; 0 below TINY."""
    if mean == 0 or _half_width(TINY, *known) <= mean:
        return float(mean == 0)
    return math.exp(optimize.brentq(lambda x: _half_width(math.exp(x), *known) - mean, math.log(TINY), 0))


def hochberg(ps: Sequence[float]) -> list[float]:
    """The p of several comparisons, adjusted so that at most LEVEL of all studies have any false verdict.

    Like Holm's correction, but starting from the largest p: the same limits, and fewer true differences missed. It
    requires tests without negative dependence; comparisons with one baseline depend positively. Hochberg, "A sharper
    Bonferroni procedure for multiple tests of significance", Biometrika 75, 1988.
    """
    adjusted, least = [1.0] * len(ps), 1.0
    for factor, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__, reverse=True), start=1):
        least = min(least, factor * ps[place])
        adjusted[place] = least
    return adjusted


def holm(ps: Sequence[float]) -> list[float]:
    """As `hochberg`, for comparisons of any dependence, such as all pairs of rows. Holm, 1979."""
    adjusted, most = [1.0] * len(ps), 0.0
    for done, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        most = min(1.0, max(most, (len(ps) - done) * ps[place]))
        adjusted[place] = most
    return adjusted


def variances(rows: Sequence[Runs]) -> Variances | None:
    """The mean parts over rows that share their draws of images; None unless two rows have two or more seeds."""
    rows = [row for row in rows if len(row.aps) > 1]
    if len(rows) < 2:
        return None
    interaction = np.array([_interaction(row.draws) for row in rows])
    total = np.array([row.aps.var(ddof=1) for row in rows])  # the spread over seeds includes `interaction`
    means = np.array([row.draws.mean(axis=0) for row in rows])
    means -= means.mean(axis=1, keepdims=True)
    means -= means.mean(axis=0)  # removes the luck that all rows share
    image = (means**2).sum() / ((means.shape[0] - 1) * (means.shape[1] - 1))
    image -= np.mean(
        [part / len(row.aps) for part, row in zip(interaction, rows)]
    )  # the part that remains in a mean over seeds
    shared = min(float(interaction.mean()), float(total.mean()))
    return Variances(float(total.mean()) - shared, max(float(image), 0.0), shared, rows[0].images)


def _interaction(draws: np.ndarray) -> float:
    """Variance of AP (S, D) after the mean of each seed and of each draw is subtracted."""
    rest = draws - draws.mean(axis=1, keepdims=True)
    rest -= rest.mean(axis=0)
    return float((rest**2).sum() / ((draws.shape[0] - 1) * (draws.shape[1] - 1)))


def detectable(known: Variances, seeds: int, comparisons: int = 1) -> float:
    """The least difference, in percent, that POWER of all studies with `seeds` seeds a row would detect.

    With several comparisons it is the only true difference, the case in which the correction is strictest.
    """
    of_seeds, of_images = (known.seed + known.interaction) / seeds, 2 * known.image
    # A study's estimates of its two seed variances vary, so average over many studies, the same ones in each call.
    of_row, of_base = of_seeds * np.random.default_rng(0).chisquare(seeds - 1, size=(2, STUDIES)) / (seeds - 1)
    df = _welch((of_row, of_base), (seeds - 1, seeds - 1))
    reach = _half_width(LEVEL / comparisons, of_row + of_base, df, of_images, known.images - 1)
    error = math.sqrt(2 * of_seeds + of_images)
    if error == 0:
        return 0.0

    def seen(gap: float) -> float:
        return float(stats.norm.sf((reach - gap) / error).mean())

    return optimize.brentq(lambda gap: seen(gap) - POWER, 0, float(reach.max()) + 10 * error)


def seeds_needed(known: Variances, gap: float, comparisons: int = 1) -> int | None:
    """The number of seeds a row needs to detect a difference of `gap`; None if MOST_SEEDS are too few."""
    seeds = range(2, MOST_SEEDS + 1)
    place = bisect_left(seeds, True, key=lambda count: detectable(known, count, comparisons) <= gap)
    return seeds[place] if place < len(seeds) else None


def images_needed(known: Variances, gap: float, comparisons: int = 1) -> int:
    """The number of validation images needed to detect a difference of `gap` with any number of seeds."""
    reach = stats.norm.isf(LEVEL / comparisons / 2) + stats.norm.ppf(POWER)
    return math.ceil(known.images * 2 * known.image * (reach / gap) ** 2)
