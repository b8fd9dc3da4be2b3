"""Compare losses under several conditions, such as shares of wrong labels: AP by condition, one line for each loss.

    python scripts/compare_conditions.py results/wrong_labels --condition "wrong training labels, percent"
    python scripts/compare_conditions.py results/imbalance --condition "negative anchors for each positive" --log

FOLDER holds a folder of result files (scripts/ablate.py) for each condition, whose name is the condition's number:
results/wrong_labels/0, 20, 40. Prints the mean and standard deviation of AP over seeds, and each row's difference from
the first row (or --baseline) in each condition, with its 95% interval (scripts/comparison/verdict.py); p and verdict
are corrected for all of these together.

It also prints how AP changes from the first condition to the last, compared with that of the baseline. If all
conditions are scored on the same images, the intervals are tighter, and the table has what each row loses.

The plot shows AP with its standard deviation over seeds, and the differences from the baseline with their intervals.
"""

import argparse
import statistics
import sys
from pathlib import Path

from matplotlib import pyplot as plt

from detector.errors import UserError, run_main
from scripts.comparison import page
from scripts.comparison.differences import (
    Difference,
    describe,
    differences,
    differences_by_condition,
    differences_in_change,
    same_images,
)
from scripts.comparison.fairness import differing
from scripts.comparison.rows import Row, known_values, mean_and_spread, read_rows

Conditions = dict[float, dict[str, Row]]  # the rows of each condition by name, in ascending order of the condition


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--condition", default="condition", metavar="WORDS", help="what the folders' numbers are")
    parser.add_argument("--log", action="store_true", help="draw the condition on a logarithmic axis")
    parser.add_argument("--baseline", metavar="NAME", help="the row to compare the others with (default: the first)")
    parser.add_argument(
        "--output", type=Path, default=Path("conditions.png"), metavar="FILE", help="the plot (%(default)s)"
    )
    args = parser.parse_args(argv)
    conditions = read(args.folder)
    if len(conditions) < 2:
        raise UserError(f"{args.folder}: needs results of at least two conditions, and has {len(conditions)}")
    if args.log and min(conditions) <= 0:
        raise UserError(f"--log: a logarithmic axis has no place for the condition {min(conditions):g}")
    names = list(dict.fromkeys(name for rows in conditions.values() for name in rows))
    baseline = args.baseline or names[0]
    if baseline not in names:
        raise UserError(f"--baseline {baseline}: no such row; the rows are {', '.join(names)}")
    with_baseline = {value: list(rows.values()) for value, rows in conditions.items() if baseline in rows}
    by_condition = dict(
        zip(with_baseline, differences_by_condition(list(with_baseline.values()), baseline), strict=True)
    )
    figure = draw(conditions, by_condition, baseline, args.condition, args.log)
    try:
        page.save(figure, args.output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {args.output}: cannot be written ({error})") from None
    print("\n".join([*table(conditions, names), "", *verdicts(conditions, by_condition, baseline)]))
    print(f"written: {args.output}")


def read(folder: Path) -> Conditions:
    """The rows of each condition, without rows that have no AP."""
    folders = []
    for path in sorted(path for path in folder.glob("*") if path.is_dir()):
        if (number := number_of(path)) is not None:
            folders.append((number, path))
        elif any(path.glob("*.json")):
            print(f"left out: {path}: its name is no number", file=sys.stderr)
    if not folders:
        raise UserError(f"{folder}: has no folders named by the number of a condition, such as 0, 10 and 20")
    conditions: Conditions = {}
    for (value, path), (before, _) in zip(sorted(folders), [(None, None), *sorted(folders)]):
        if value == before:
            raise UserError(f"{path}: another folder has the number {value:g} too; give each condition one folder")
        files = sorted(map(str, path.glob("*.json")))
        if not files:
            raise UserError(f"{path}: has no result files")
        if all(Path(file).name.startswith("tune-") for file in files):
            print(f"left out: {path}: only tuning runs so far", file=sys.stderr)
            continue
        rows = read_rows(files)
        for row in rows:
            for failure in row.failures:
                print(f"failed: {row.name} at {value:g}, {failure}", file=sys.stderr)
        for line in differing(rows)[1]:
            print(f"warning: at {value:g} {line}", file=sys.stderr)
        if known := {row.name: row for row in rows if known_values(row)}:  # else all have failed
            conditions[value] = known
    return conditions


def number_of(path: Path) -> float | None:
    try:
        value = float(path.name)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def comparable(conditions: Conditions) -> bool:
    """Whether all conditions are scored on the same images."""
    return same_images([run for rows in conditions.values() for row in rows.values() for run in row.runs])


def table(conditions: Conditions, names: list[str]) -> list[str]:
    first, last, loses = min(conditions), max(conditions), comparable(conditions)
    heads = ["run", *(f"{value:g}" for value in conditions), *[f"lost at {last:g}"] * loses]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name in names:
        cells = [mean_and_spread(known_values(rows[name])) if name in rows else "-" for rows in conditions.values()]
        if loses:
            both = name in conditions[first] and name in conditions[last]
            cells.append(loss_of_ap(conditions[first][name], conditions[last][name]) if both else "-")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def loss_of_ap(first: Row, last: Row) -> str:
    (result,) = differences([first._replace(name="first"), last._replace(name="last")])
    assert result.mean is not None  # both rows have an AP
    lost = -result.mean or 0.0  # not -0.0
    if result.interval is None:
        return f"{lost:.1f}, no interval"
    images_only = " over images only" if result.p is None else ""  # one seed
    low, high = result.interval
    interval = f"[{-high:.1f}, {-low:.1f}]{images_only}"
    of_first = statistics.fmean(known_values(first))
    return f"{lost:.1f} {interval}" + (f", {lost / of_first:.0%}" if of_first else "")


def verdicts(conditions: Conditions, by_condition: dict[float, list[Difference]], baseline: str) -> list[str]:
    """The differences from the baseline in each condition, and in the loss of AP from the first to the last."""
    named = [
        result._replace(name=f"{result.name} at {value:g}")
        for value, results in by_condition.items()
        for result in results
    ]
    lines = describe(named, baseline)
    lines += [f"- {baseline} has no result at {value:g}" for value in conditions if value not in by_condition]
    first, last = (list(conditions[value].values()) for value in (min(conditions), max(conditions)))
    changes, detectable = differences_in_change(first, last, baseline)
    what = f"Change of AP from {min(conditions):g} to {max(conditions):g}"
    lines += ["", *describe(changes, baseline, what)]
    names = dict.fromkeys(row.name for row in (*first, *last))
    left_out = [name for name in names if name not in [baseline, *(result.name for result in changes)]]
    if left_out:
        takes = "the same seeds, each with an AP," if comparable(conditions) else "runs"
        lines.append(
            f"- no verdict on the change of {', '.join(left_out)}: it takes {takes} at {min(conditions):g} and at "
            f"{max(conditions):g}, for the row and for {baseline}"
        )
    return [*lines, "", *detectable, *[""] * bool(detectable)]


def draw(
    conditions: Conditions, by_condition: dict[float, list[Difference]], baseline: str, label: str, log: bool
) -> plt.Figure:
    figure, (absolute, relative) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(name for rows in conditions.values() for name in rows))
    colours = {name: f"C{place}" for place, name in enumerate(names)}
    for place, name in enumerate(names):
        values = [value for value, rows in conditions.items() if name in rows]
        of_seeds = [known_values(conditions[value][name]) for value in values]
        means = [statistics.fmean(known) for known in of_seeds]
        spread = [statistics.stdev(known) if len(known) > 1 else 0 for known in of_seeds]
        style = dict(marker="o", capsize=3, color=colours[name], label=page.label(name))
        absolute.errorbar(values, means, spread, **style)
        points = [
            (value, result.mean, result.interval[1] - result.mean)
            for value, results in by_condition.items()
            for result in results
            if result.name == name and result.mean is not None and result.interval
        ]
        if points:
            span = max(conditions) - min(conditions)
            shift = (place - (len(names) - 1) / 2) * 0.012  # so that the intervals do not hide one another
            at = [value * (1 + 5 * shift) if log else value + shift * span for value, _, _ in points]
            relative.errorbar(at, [mean for _, mean, _ in points], [reach for _, _, reach in points], **style)
    relative.axhline(0, color=colours[baseline], linewidth=1)
    absolute.set(ylabel="AP, percent: mean and deviation over seeds")
    relative.set(ylabel=f"AP minus that of {baseline},\n95% interval")
    for axis in (absolute, relative):
        axis.set(xlabel=label, xscale="log" if log else "linear")
        axis.set_xticks(list(conditions), [f"{value:,g}" for value in conditions])
        axis.minorticks_off()
    handles, names = absolute.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3)  # outside, where it covers no point
    return figure


if __name__ == "__main__":
    run_main(main)
