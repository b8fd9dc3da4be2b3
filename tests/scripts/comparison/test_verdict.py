"""scripts/comparison/verdict.py: intervals cover as often as they claim, against scipy and simulated studies."""

import itertools

import numpy as np
import pytest
from scipy import stats

from scripts.bench import verdicts
from scripts.comparison import verdict
from scripts.comparison.verdict import Runs, Variances

NO_IMAGES = np.zeros((3, 50))  # nothing depends on which images are drawn
SEEDS_VARY = Variances(seed=4.1, image=0.12, interaction=0.14, images=150)  # as in results/switches


def runs(aps, draws=NO_IMAGES[:1], images=100):
    aps = np.array(aps, dtype=float)
    return Runs(aps, aps[:, None] + draws, images)


def test_without_spread_over_images_the_test_is_welch_s():
    row, baseline = runs([41.0, 43.5, 42.2, 47.0], np.zeros((4, 50))), runs([39.0, 40.1, 42.0], NO_IMAGES)
    difference = verdict.difference(row, baseline)
    welch = stats.ttest_ind(row.aps, baseline.aps, equal_var=False)
    interval = welch.confidence_interval()
    assert difference.p == pytest.approx(welch.pvalue) and difference.mean == row.aps.mean() - baseline.aps.mean()
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))


def test_without_spread_over_seeds_the_test_is_student_s_over_images():
    luck = np.random.default_rng(0).normal(0, 0.7, 400)
    row, baseline = runs([42.0] * 3, luck, 30), runs([40.5] * 3, NO_IMAGES[:, :1] + 0 * luck, 30)
    difference = verdict.difference(row, baseline)
    error = luck.std(ddof=1)
    assert difference.high - difference.mean == pytest.approx(stats.t.ppf(0.975, 29) * error)
    assert difference.p == pytest.approx(2 * stats.t.sf(1.5 / error, 29))


def test_the_interval_excludes_zero_exactly_where_p_is_below_the_level():
    rng = np.random.default_rng(1)
    counts = [0, 0]
    for _ in range(300):
        row, baseline = (runs(rng.normal(mean, 1, 3), rng.normal(0, 0.5, (3, 60))) for mean in (2.0, 0.0))
        difference = verdict.difference(row, baseline)
        assert (difference.p < verdict.LEVEL) == (difference.low > 0 or difference.high < 0)
        assert verdict.difference(baseline, row).p == pytest.approx(difference.p)
        counts[difference.p < verdict.LEVEL] += 1
    assert min(counts) > 30


def test_luck_with_images_that_both_rows_share_is_no_difference():
    rng = np.random.default_rng(2)
    shared, aps = rng.normal(0, 5, 300), ([40.0, 41.0, 42.0], [43.0, 44.0, 45.0])
    without_luck = verdict.difference(runs(aps[1], np.zeros(300)), runs(aps[0], np.zeros(300)))
    assert verdict.difference(runs(aps[1], shared), runs(aps[0], shared)) == pytest.approx(without_luck)
    opposite_luck = verdict.difference(runs(aps[1], shared), runs(aps[0], -shared))
    assert opposite_luck.high - opposite_luck.low > 5 * (without_luck.high - without_luck.low)


def test_one_seed_gets_an_interval_over_images_and_no_verdict():
    luck = np.random.default_rng(0).normal(0, 0.7, 400)
    for baseline in (runs([40.0], 0 * luck), runs([40.0, 40.5, 41.0], 0 * luck)):
        gap = verdict.difference(runs([45.0], luck), baseline)
        assert gap.p is None and gap.high - gap.mean == pytest.approx(1.984 * luck.std(ddof=1), rel=0.001)


def test_equal_results_do_not_differ():
    assert verdict.difference(runs([40.0, 40.0]), runs([40.0, 40.0])) == (0, 0, 0, 1)
    assert verdict.difference(runs([41.0, 41.0]), runs([40.0, 40.0])).p == 0


def test_hochberg_s_correction_matches_its_definition():
    """Hochberg: reject the k smallest for the largest k whose p_(k) is at most level / (m - k + 1)."""
    rng = np.random.default_rng(0)
    for m in range(1, 7):
        for _ in range(100):
            ps = (rng.random(m) ** 3).round(3).tolist()
            for level in (0.01, 0.05, 0.2):
                ranked = sorted(ps)
                k = max((k for k in range(1, m + 1) if ranked[k - 1] <= level / (m - k + 1)), default=0)
                rejected = {place for place, p in enumerate(ps) if k and p <= ranked[k - 1]}
                adjusted = verdict.hochberg(ps)
                assert {place for place, p in enumerate(adjusted) if p <= level + 1e-12} == rejected
    assert verdict.hochberg([]) == [] and verdict.hochberg([0.03]) == [0.03]


def test_holm_s_correction_matches_its_definition():
    """Holm: reject from the smallest p on, until the first p_(k) above level / (m - k + 1)."""
    rng = np.random.default_rng(0)
    for m in range(1, 7):
        for _ in range(100):
            ps = (rng.random(m) ** 3).round(3).tolist()
            for level in (0.01, 0.05, 0.2):
                rejected = set()
                for k, place in enumerate(np.argsort(ps, kind="stable"), start=1):
                    if ps[place] > level / (m - k + 1):
                        break
                    rejected.add(place)
                adjusted = verdict.holm(ps)
                assert {place for place, p in enumerate(adjusted) if p <= level + 1e-12} == rejected
    assert verdict.holm([]) == [] and verdict.holm([0.03]) == [0.03]


def test_variances_of_simulated_studies_are_recovered():
    true_variances = Variances(seed=2.0, image=0.5, interaction=0.8, images=500)
    rng = np.random.default_rng(0)
    setting = verdicts.Setting("", true_variances, [true_variances.seed])
    estimates = [verdict.variances(verdicts.draw(setting, 4, 6, rng)) for _ in range(200)]
    assert np.mean(estimates, axis=0) == pytest.approx([2.0, 0.5, 0.8, 500], rel=0.1)


def test_variances_need_two_rows_with_two_seeds():
    assert verdict.variances([runs([1.0, 2.0]), runs([1.0])]) is None
    assert verdict.variances([runs([1.0, 2.0]), runs([1.0, 3.0])]) is not None


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_verdicts_err_no_more_often_than_they_claim(seeds):
    """The losses are equal, so 5% of verdicts may be wrong. 600 studies measure that share to 0.9%."""
    setting = verdicts.Setting("", SEEDS_VARY, [SEEDS_VARY.seed])
    rng, false_positives, family_errors, studies = np.random.default_rng(seeds), 0, 0, 600
    bootstrap_errors = 0
    for _ in range(studies):
        base, *rows = verdicts.draw(setting, seeds, 4, rng)
        differences = [verdict.difference(row, base) for row in rows]
        false_positives += differences[0].p <= verdict.LEVEL
        family_errors += min(verdict.hochberg([difference.p for difference in differences])) <= verdict.LEVEL
        drawn = rng.integers(seeds, size=(seeds, verdicts.DRAWS))  # a bootstrap over seeds and images, which errs
        gaps = [np.take_along_axis(row.draws, drawn, axis=0).mean(axis=0) for row in (rows[0], base)]
        low, high = np.percentile(gaps[0] - gaps[1], (2.5, 97.5))
        bootstrap_errors += not low <= 0 <= high
    assert false_positives / studies < 0.06 and family_errors / studies < 0.06
    assert bootstrap_errors / studies > 0.1  # so the simulation exposes a bad method


@pytest.mark.parametrize("seeds, comparisons", [(2, 1), (3, 1), (3, 5), (8, 1)])
def test_a_detectable_difference_is_detected_with_the_claimed_power(seeds, comparisons):
    gap = verdict.detectable(SEEDS_VARY, seeds, comparisons)
    setting, rng, hits, studies = verdicts.Setting("", SEEDS_VARY, [SEEDS_VARY.seed]), np.random.default_rng(0), 0, 400
    for _ in range(studies):
        row, base = verdicts.draw(setting, seeds, 2, rng)
        hits += verdict.difference(runs(row.aps + gap, row.draws - row.aps[:, None]), base).p <= 0.05 / comparisons
    assert hits / studies == pytest.approx(verdict.POWER, abs=0.06)


def test_more_seeds_detect_smaller_differences_and_seeds_needed_is_the_smallest_count():
    sizes = [verdict.detectable(SEEDS_VARY, seeds) for seeds in (2, 3, 5, 10, 100)]
    assert all(more < fewer for fewer, more in itertools.pairwise(sizes))
    needed = verdict.seeds_needed(SEEDS_VARY, 4.0)
    assert verdict.detectable(SEEDS_VARY, needed) <= 4.0 < verdict.detectable(SEEDS_VARY, needed - 1)
    # Two normal means with a known spread of 0.15: 2 (1.96 + 0.84)^2 (0.15 / 0.2)^2 = 8.8 a side, one more for t.
    assert verdict.seeds_needed(Variances(0.15**2, 0.0, 0.0, 5000), 0.2) in (9, 10, 11)
    # With any number of seeds, a variance of 2 x 0.12 is 1.37 points. One point takes (1.37 / 1)^2 x 150 images.
    assert verdict.seeds_needed(SEEDS_VARY, 1.0) is None
    for comparisons in (2, 7):
        needed = verdict.seeds_needed(SEEDS_VARY, 4.0, comparisons)
        sizes = [verdict.detectable(SEEDS_VARY, seeds, comparisons) for seeds in (needed - 1, needed)]
        assert sizes[1] <= 4.0 < sizes[0]
    assert verdict.images_needed(SEEDS_VARY, 1.0) == pytest.approx(150 * 1.3725**2, rel=0.01)


def test_the_mean_over_sets_without_spread_over_images_has_welch_s_test():
    """Equal variances of rows with S seeds: Student's t with the degrees of freedom of all rows, in closed form."""
    aps = np.array([40.0, 41.0, 42.5])
    rows = [(runs(aps + shift, NO_IMAGES), runs(aps, NO_IMAGES)) for shift in (4.0, -1.0)]
    difference = verdict.mean_difference(rows)
    error = np.sqrt(4 * aps.var(ddof=1) / 3) / 2  # four rows; a mean of two sets
    assert difference.mean == pytest.approx(1.5)
    assert difference.high - difference.mean == pytest.approx(stats.t.ppf(0.975, 4 * 2) * error)
    assert difference.p == pytest.approx(2 * stats.t.sf(1.5 / error, 4 * 2))


def test_the_mean_over_sets_without_spread_over_seeds_adds_the_variances_over_images():
    rng, flat = np.random.default_rng(0), NO_IMAGES[:, :1]
    rows = []
    for images, spread in ((30, 0.7), (80, 0.2)):
        luck = rng.normal(0, spread, 400)
        rows.append((runs([42.0] * 3, luck, images), runs([40.5] * 3, flat + 0 * luck, images)))
    variances = [row.draws[0].var(ddof=1) for row, _ in rows]
    df = sum(variances) ** 2 / (variances[0] ** 2 / 29 + variances[1] ** 2 / 79)
    difference = verdict.mean_difference(rows)
    assert difference.high - difference.mean == pytest.approx(stats.t.ppf(0.975, df) * np.sqrt(sum(variances)) / 2)


def test_one_seed_in_one_set_allows_no_verdict():
    several_seeds, one_seed = (runs([40.0, 41.0]), runs([42.0, 43.5])), (runs([40.0]), runs([42.0, 43.0]))
    difference = verdict.mean_difference([several_seeds, one_seed])
    assert difference.p is None and difference.mean == pytest.approx(-2.375)


@pytest.mark.parametrize("seeds", [(2, 2), (3, 5)])
def test_verdicts_over_sets_err_no_more_often_than_they_claim(seeds):
    """One pair of losses has equal means, 3 better on one set and 3 worse on the other. Another pair differs.

    A third is 3 better on both, so this does not change from one set to the other.
    """
    settings = [verdicts.Setting("", spread, [spread.seed]) for spread in (SEEDS_VARY, Variances(0.5, 0.6, 0.3, 70))]
    rng, hits, studies = np.random.default_rng(seeds), np.zeros(3), 1000
    for _ in range(studies):
        pairs = [verdicts.draw(setting, count, 2, rng) for setting, count in zip(settings, seeds)]
        gaps = [
            [(Runs(row.aps + gap, row.draws + gap, row.images), base) for (row, base), gap in zip(pairs, by_set)]
            for by_set in ((3.0, -3.0), (8.0, 6.0), (3.0, 3.0))
        ]
        weights = (None, None, (-1, 1))
        hits += [verdict.mean_difference(*of_gap).p <= verdict.LEVEL for of_gap in zip(gaps, weights)]
    of_equal, of_different, of_change = hits / studies
    assert 0.005 < of_equal < 0.065 and of_different > 0.6 and 0.005 < of_change < 0.065
