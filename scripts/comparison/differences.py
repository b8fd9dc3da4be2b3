"""How rows of runs differ from a baseline, with verdicts, and how large a difference they can detect."""

import statistics
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from detector.errors import UserError
from scripts.comparison import result, verdict
from scripts.comparison.rows import METRICS, Row, known_value, known_values, scored_on

SEEDS = 3  # the least that users are advised to train
Correction = Callable[[Sequence[float]], list[float]]
WANTED = (1.0, 0.2)  # percent: differences for which the needed number of seeds is printed


class Difference(NamedTuple):
    """The difference of a row from the baseline, in percent."""

    name: str
    mean: float | None  # None where it cannot be computed
    interval: tuple[float, float] | None  # that covers 95%; None where it cannot be computed
    p: float | None  # corrected for the number of comparisons; None where there is no verdict
    reason: str = ""  # why there is no verdict

    @property
    def verdict(self) -> str:
        if self.p is None or self.mean is None:
            return "no verdict"
        return "undecided" if self.p > verdict.LEVEL else "better" if self.mean > 0 else "worse"


def differences(rows: Sequence[Row], baseline: str | None = None, metric: str = "AP") -> list[Difference]:
    """The difference of each other row from the baseline (default: the first), without rows whose runs all failed."""
    return differences_by_condition([rows], baseline, metric)[0]


def differences_by_condition(
    conditions: Sequence[Sequence[Row]], baseline: str | None = None, metric: str = "AP"
) -> list[list[Difference]]:
    """`differences` within the rows of each condition, all corrected together."""
    results = []
    for rows in conditions:
        base = named(rows, baseline)
        others = [row for row in rows if row is not base and row.runs and base.runs]
        results.append([_difference([(row, base)], metric) for row in others])
    corrected = iter(_corrected([result for of_condition in results for result in of_condition]))
    return [[next(corrected) for _ in of_condition] for of_condition in results]


def differences_in_change(
    first: Sequence[Row], last: Sequence[Row], baseline: str
) -> tuple[list[Difference], list[str]]:
    """The change in AP of each row from the first condition to the last, minus the change of the baseline.

    If both conditions are scored on the same images, only for rows with the same seeds in both. A run's change is then
    its AP at last minus that at first, seed by seed, and so on each draw of images: what an easy draw adds to both
    conditions cancels. The second value is the paragraph of `detectable_differences`, for changes.

    Conditions with different images are independent, as data sets are, and the second value is empty.
    """
    at_first, at_last = ({row.name: row for row in rows} for rows in (first, last))
    if not same_images([run for row in (*first, *last) for run in row.runs]):
        if baseline not in at_first.keys() & at_last.keys():
            return [], []
        names = [name for name in at_first if name in at_last and name != baseline]
        pairs = [[(rows[name], rows[baseline]) for rows in (at_first, at_last)] for name in names]
        return _corrected([_difference(pair, "AP", (-1, 1)) for pair in pairs]), []
    changes = {}
    for row in first:
        other = at_last.get(row.name)
        if other is None or row.seeds != other.seeds:
            continue
        try:
            before, after = runs_of(row, "AP"), runs_of(other, "AP")
        except ValueError:
            continue
        if before.draws.shape != after.draws.shape:
            continue
        changes[row.name] = verdict.Runs(after.aps - before.aps, after.draws - before.draws, before.images)
    if baseline not in changes:
        return [], []
    results = []
    for name, runs in changes.items():
        if name != baseline:
            estimate = verdict.difference(runs, changes[baseline])
            reason = "" if estimate.p is not None else f"train at least {SEEDS} seeds of each"
            results.append(Difference(name, estimate.mean, (estimate.low, estimate.high), estimate.p, reason))
    results = _corrected(results)
    without_verdict = {result.name for result in results if result.p is None}
    compared = [runs for name, runs in changes.items() if name not in without_verdict]
    return results, _detectable(compared, results, "in the change of AP")


def differing_pairs(rows: Sequence[Row], metric: str = "AP") -> list[str]:
    """A paragraph on which of all pairs of rows differ, corrected together; empty for fewer than three rows."""
    pairs = list(combinations([row for row in rows if row.runs], 2))
    if len(pairs) < 2:
        return []
    tested = zip(pairs, _corrected([_difference([pair], metric) for pair in pairs], verdict.holm))
    lines = []
    for (first, second), of_pair in sorted(tested, key=lambda item: 1.0 if item[1].p is None else item[1].p):
        if of_pair.verdict == "worse":
            first, second = second, first
            of_pair = _difference([(first, second)], metric)._replace(p=of_pair.p)
        if of_pair.verdict == "better":
            lines.append(_line(of_pair._replace(name=f"{first.name} over {second.name}")).rpartition(",")[0])
    heading = f"Of all {len(pairs)} pairs of rows, corrected together, these differ in {metric}:"
    return [heading, "", *(lines or ["- none"])]


def same_images(runs: Sequence[dict]) -> bool:
    """Whether the runs were scored on as many images, with as many boxes of each class."""
    boxes = [{name: of.get("boxes") for name, of in run["metrics"].get("per_class", {}).items()} for run in runs]
    return len({(run["metrics"].get("images"), *of_run.items()) for run, of_run in zip(runs, boxes)}) == 1


def differences_over_sets(
    sets: Sequence[Sequence[Row]], baseline: str | None = None, metric: str = "AP"
) -> list[Difference]:
    """The mean over data sets of the difference of each row from the baseline, for the rows that each set has."""
    base = named(sets[0], baseline).name
    by_name = [{row.name: row for row in rows if row.runs} for rows in sets]
    names = [row.name for row in sets[0] if all(row.name in rows for rows in by_name)]
    if base not in names:
        return []
    return _corrected(
        [_difference([(rows[name], rows[base]) for rows in by_name], metric) for name in names if name != base]
    )


def _corrected(results: list[Difference], correct: Correction = verdict.hochberg) -> list[Difference]:
    ps = {index: result.p for index, result in enumerate(results) if result.p is not None}
    for index, p in zip(ps, correct(list(ps.values()))):
        results[index] = results[index]._replace(p=p)
    return results


def named(rows: Sequence[Row], name: str | None) -> Row:
    """The row with that name; the first row if it is None."""
    by_name = {row.name: row for row in rows}
    if name is not None and name not in by_name:
        raise UserError(f"--baseline {name}: no such row; the rows are {', '.join(by_name)}")
    return rows[0] if name is None else by_name[name]


def _difference(sets: Sequence[tuple[Row, Row]], metric: str, weights: Sequence[float] | None = None) -> Difference:
    """The difference of a row from a base, or its mean over several sets (or sum with `weights`); p is uncorrected."""
    name = sets[0][0].name
    weights = weights or [1 / len(sets)] * len(sets)
    try:
        estimate = verdict.mean_difference([_comparable(row, base, metric) for row, base in sets], weights)
    except ValueError as error:
        values = [[known_values(side, metric) for side in pair] for pair in sets]
        known = all(side for pair in values for side in pair)
        means = [statistics.fmean(of_row) - statistics.fmean(of_base) for of_row, of_base in values] if known else []
        mean = sum(weight * of_set for weight, of_set in zip(weights, means)) if known else None
        return Difference(name, mean, None, None, str(error))
    reason = ""
    if estimate.p is None:
        single = next(side.name for row, base in sets for side in (base, row) if len(side.runs) == 1)
        reason = f"{single} has one seed; train at least {SEEDS} (--seeds {SEEDS})"
    return Difference(name, estimate.mean, (estimate.low, estimate.high), estimate.p, reason)


def _comparable(row: Row, base: Row, metric: str) -> tuple[verdict.Runs, verdict.Runs]:
    """The numbers of two rows of one set. Raises ValueError, with the reason, if they allow no verdict."""
    of_row, of_base = runs_of(row, metric), runs_of(base, metric)
    if (
        set(map(scored_on, row.runs)) != set(map(scored_on, base.runs))
        or of_row.draws.shape[1] != of_base.draws.shape[1]
    ):
        raise ValueError(f"{row.name} and {base.name} were scored on different images")
    return of_row, of_base


def runs_of(row: Row, metric: str) -> verdict.Runs:
    """A row's numbers. Raises ValueError, with the reason, if they allow no verdict."""
    aps = [known_value(run, metric) for run in row.runs]
    if None in aps:
        raise ValueError(f"{metric} of {row.name} is not known for each run")
    draws = [result.draws(run, metric) for run in row.runs]
    if not all(draws):
        raise ValueError(f"{metric} of {row.name} on resampled images is not known")
    if len(set(map(len, draws))) > 1 or len({run["metrics"].get("images") for run in row.runs}) > 1:
        raise ValueError(f"the runs of {row.name} were scored on different images")
    array = np.array(draws, dtype=float)
    if array.shape[1] < 2 or not (array >= 0).all():  # -1 and NaN: nothing to measure it on
        raise ValueError(f"{metric} of {row.name} is not known on each draw of images")
    images = row.runs[0]["metrics"].get("images") or 0
    if images < 2:
        raise ValueError(f"{row.name} was not scored on several images")
    return verdict.Runs(np.array(aps), 100 * array, images)


def best_rows(rows: Sequence[Row]) -> dict[str, str]:
    """{metric: the row that is better than each other row beyond chance}, for the metrics that have such a row.

    With equal losses at most one table in 20 has any such row: the level is divided by the number of metrics.
    """
    best = {}
    for metric in METRICS:
        means = {row.name: statistics.fmean(values) for row in rows if (values := known_values(row, metric))}
        if len(means) > 1:
            top = max(means, key=means.__getitem__)
            others = differences(rows, top, metric)
            if all(o.verdict == "worse" and (o.p or 0) <= verdict.LEVEL / len(METRICS) for o in others):
                best[metric] = top
    return best


def describe(results: Sequence[Difference], baseline: str, metric: str = "AP", sets: int = 1) -> list[str]:
    """A heading and a line for each difference, or mean difference over several sets; empty without differences."""
    if not results:
        return []
    count = sum(result.p is not None for result in results)
    corrected = f"; p and verdict are corrected for {count} comparisons, intervals are not" if count > 1 else ""
    over = f", the mean over {sets} sets," if sets > 1 else ","
    return [f"{metric} minus that of {baseline}{over} with its 95% interval{corrected}:", "", *map(_line, results)]


def _line(result: Difference) -> str:
    if result.mean is None:
        return f"- {result.name}: no verdict: {result.reason}"
    start = f"- {result.name}: {result.mean:+.1f}{in_brackets(result)}"
    if result.p is None:
        return f"{start}; no verdict: {result.reason}"
    return f"{start}, p {in_digits(result.p)}, {result.verdict}"


def in_brackets(result: Difference) -> str:
    """The interval after a blank; empty without one."""
    if result.interval is None:
        return ""
    images_only = " over images only" if result.p is None else ""  # a row has one seed
    low, high = result.interval
    return f" [{low:+.1f}, {high:+.1f}]{images_only}"


def in_digits(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def detectable_differences(rows: Sequence[Row], results: Sequence[Difference], metric: str = "AP") -> list[str]:
    """A paragraph on how large a difference these runs detect and what a smaller one takes; empty if it is unknown."""
    if all(result.p is None for result in results):
        return []
    without_verdict = {result.name for result in results if result.p is None}
    compared = [runs_of(row, metric) for row in rows if row.runs and row.name not in without_verdict]
    return _detectable(compared, results, metric)


def _detectable(compared: list[verdict.Runs], results: Sequence[Difference], metric: str) -> list[str]:
    comparisons = sum(result.p is not None for result in results)
    known = verdict.variances(compared)
    if not comparisons or known is None:
        return []
    seeds = min(len(runs.aps) for runs in compared)
    corrected = verdict.detectable(known, seeds, comparisons)
    only = f" ({corrected:.1f} if only one of these {comparisons} rows differs, because of the correction)"
    lines = [
        f"With {seeds} seeds a row and these {known.images:,} images, 4 of 5 studies detect a difference of "
        f"{verdict.detectable(known, seeds):.1f} {metric} between two rows"
        f"{only if comparisons > 1 else ''}, at these rows' mean spread."
    ]
    for wanted in WANTED:
        number, unit = alone = _takes(known, wanted)
        corrected_number, corrected_unit = _takes(known, wanted, comparisons) if comparisons > 1 else alone
        needed = corrected_number if corrected_unit == unit else f"{corrected_number} {corrected_unit}"
        only = f" ({needed} if only one row differs)" if needed != number else ""
        lines.append(f"Detecting {wanted} takes {number} {unit}{only}.")
    return [" ".join(lines)]


def _takes(known: verdict.Variances, wanted: float, comparisons: int = 1) -> tuple[str, str]:
    """The number of seeds or images that a study needs to detect the difference `wanted`, and its unit."""
    if (seeds := verdict.seeds_needed(known, wanted, comparisons)) is not None:
        return f"{seeds:,}", "seeds a row"
    if (images := verdict.images_needed(known, wanted, comparisons)) > known.images:
        return f"at least {images:,}", "images with any number of seeds"
    return f"more than {verdict.MOST_SEEDS:,}", "seeds a row"
