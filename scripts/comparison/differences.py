"""Rows of runs -> how they differ from a baseline, with verdicts; and what such runs can tell at all."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detector.errors import UserError
from scripts.comparison import result, verdict
from scripts.comparison.rows import METRICS, Row

SEEDS = 3  # what a user is advised to train at least
WANTED = (1.0, 0.2)  # differences in percent of which it is said how many seeds they take


class Difference(NamedTuple):
    """Of a row from the baseline, in percent."""

    name: str
    mean: float | None  # None where it cannot be computed
    low: float | None  # of the 95% interval; None where it cannot be computed
    high: float | None
    p: float | None  # corrected for the number of comparisons; None where there is no verdict
    reason: str = ""  # why there is none

    @property
    def verdict(self) -> str:
        if self.p is None:
            return "no verdict"
        return "undecided" if self.p > verdict.LEVEL else "better" if self.mean > 0 else "worse"


def differences(rows: Sequence[Row], baseline: str | None = None, metric: str = "AP") -> list[Difference]:
    """Of each other row from the baseline (the first), in the order of the rows; rows that all failed are left out."""
    base = named(rows, baseline)
    found = [_difference(row, base, metric) for row in rows if row is not base and row.runs and base.runs]
    judged = [place for place, one in enumerate(found) if one.p is not None]
    for place, p in zip(judged, verdict.hochberg([found[place].p for place in judged])):
        found[place] = found[place]._replace(p=p)
    return found


def named(rows: Sequence[Row], name: str | None) -> Row:
    """The row of that name, the first for None."""
    by_name = {row.name: row for row in rows}
    if name is not None and name not in by_name:
        raise UserError(f"--baseline {name}: there is no such row; there are {', '.join(by_name)}")
    return rows[0] if name is None else by_name[name]


def _difference(row: Row, base: Row, metric: str) -> Difference:
    """Its p is not corrected yet."""
    try:
        one, other = runs_of(row, metric), runs_of(base, metric)
        if _scored_on(row) != _scored_on(base) or one.draws.shape[1] != other.draws.shape[1]:
            raise ValueError(f"{row.name} and {base.name} were scored on other images")
    except ValueError as error:
        values = [
            [known for run in side.runs if (known := known_value(run, metric)) is not None] for side in (row, base)
        ]
        mean = statistics.fmean(values[0]) - statistics.fmean(values[1]) if all(values) else None
        return Difference(row.name, mean, None, None, None, str(error))
    found = verdict.difference(one, other)
    reason = ""
    if found.p is None:
        single = base.name if len(base.runs) == 1 else row.name
        reason = f"one seed of {single} says nothing of other seeds; train at least {SEEDS} (--seeds {SEEDS})"
    return Difference(row.name, found.mean, found.low, found.high, found.p, reason)


def runs_of(row: Row, metric: str) -> verdict.Runs:
    """A row's numbers; ValueError, with the reason, where they cannot be judged."""
    aps = [known_value(run, metric) for run in row.runs]
    if None in aps:
        raise ValueError(f"{metric} of {row.name} is not known of each run")
    draws = [result.draws(run, metric) for run in row.runs]
    if not all(draws):
        kept = "; its results keep draws of AP alone" if metric != "AP" and result.draws(row.runs[0], "AP") else ""
        raise ValueError(f"{metric} of {row.name} on other draws of the images is not known{kept}")
    if len(set(map(len, draws))) > 1 or len({run["metrics"].get("images") for run in row.runs}) > 1:
        raise ValueError(f"the runs of {row.name} were scored on other images")
    array = np.array(draws, dtype=float)
    if array.shape[1] < 2 or not (array >= 0).all():  # -1 and NaN: nothing to measure it on
        raise ValueError(f"{metric} of {row.name} on other draws of the images is not known of each draw")
    images = row.runs[0]["metrics"].get("images") or 0
    if images < 2:
        raise ValueError(f"{row.name} was not scored on several images")
    return verdict.Runs(np.array(aps), 100 * array, images)


def known_value(run: dict, metric: str) -> float | None:
    """In percent; None where it is absent, null, NaN or -1."""
    value = run["metrics"].get(metric)
    return 100 * value if isinstance(value, int | float) and value >= 0 else None


def _known_values(row: Row, metric: str) -> list[float]:
    return [known for run in row.runs if (known := known_value(run, metric)) is not None]


def _scored_on(row: Row) -> set[tuple]:
    """The number of images and the name of their file: its folder may differ from machine to machine."""
    files = (run["config"].get("data", {}).get("val", {}).get("annotations", "") for run in row.runs)
    return {(run["metrics"].get("images"), Path(file).name) for run, file in zip(row.runs, files)}


def best_rows(rows: Sequence[Row]) -> dict[str, str]:
    """{metric: the row that is better than each other row beyond chance}, of those metrics where there is one."""
    best = {}
    for metric in METRICS:
        means = {row.name: statistics.fmean(values) for row in rows if (values := _known_values(row, metric))}
        if len(means) > 1:
            top = max(means, key=means.__getitem__)
            others = differences(rows, top, metric)
            if all(one.verdict == "worse" for one in others):
                best[metric] = top
    return best


def in_words(found: Sequence[Difference], baseline: str, metric: str = "AP") -> list[str]:
    """A heading, and a line for each difference; nothing without differences."""
    if not found:
        return []
    judged = sum(one.p is not None for one in found)
    verdicts = f"; p and verdict are corrected for {judged} comparisons" if judged > 1 else ""
    return [f"{metric} minus that of {baseline}, with its 95% interval{verdicts}:", "", *map(_line, found)]


def _line(one: Difference) -> str:
    interval = "" if one.low is None else f" [{one.low:+.1f}, {one.high:+.1f}]"
    if one.mean is None:
        return f"- {one.name}: no verdict: {one.reason}"
    if one.p is None:
        images = " from the images alone" if interval else ""
        return f"- {one.name}: {one.mean:+.1f}{interval}{images}; no verdict: {one.reason}"
    return f"- {one.name}: {one.mean:+.1f}{interval}, p {in_digits(one.p)}, {one.verdict}"


def in_digits(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def what_they_tell(rows: Sequence[Row], found: Sequence[Difference], metric: str = "AP") -> list[str]:
    """How large a difference these runs can tell, and what a smaller one takes; nothing where it cannot be said."""
    comparisons = sum(one.p is not None for one in found)
    if not comparisons:
        return []
    names = {one.name for one in found if one.p is None}
    judged = [runs_of(row, metric) for row in rows if row.runs and row.name not in names]
    known = verdict.variances(judged)
    if known is None:
        return []
    seeds = min(len(runs.aps) for runs in judged)
    alone = verdict.detectable(known, seeds, comparisons)
    only = f" ({alone:.1f} if only one of these {comparisons} rows differs, because of the correction)"
    lines = [
        f"With {seeds} seeds a row and these {known.images:,} images, a difference of "
        f"{verdict.detectable(known, seeds):.1f} {metric} between two rows is seen in 4 of 5 studies"
        f"{only if comparisons > 1 else ''}, at these rows' mean spread."
    ]
    for wanted in WANTED:
        needed = verdict.seeds_needed(known, wanted)
        images = verdict.images_needed(known, wanted)
        if needed is not None:
            takes = f"{needed:,} seeds a row"
        elif images > known.images:
            takes = f"at least {images:,} images, however many seeds"
        else:
            takes = f"more than {verdict.MOST_SEEDS:,} seeds a row"
        lines.append(f"A difference of {wanted} takes {takes}.")
    return [" ".join(lines)]
