"""Compare runs: a row for each loss over its seeds, and whether its difference from the first row is more than chance.

    python scripts/compare.py runs/ce runs/focal runs/ghm_c --markdown table.md
    python scripts/compare.py results/laptop/*.json --csv runs.csv

A run is a folder that train.py wrote, or the small JSON file that scripts/ablate.py keeps of one. The --output of
ablate.py, or another folder of such files, stands for all of them. Runs of one variant are one row: mean and standard
deviation over its seeds. AP is in percent. ECE is the expected calibration error of the scores, GB the peak memory. In
AP, AP50, AP75, AP80 and AP90 the highest value is marked if it is better than each other row beyond chance.

Below are the differences in AP (--metric) from the first row (or --baseline), each with its 95% interval over other
seeds and other validation images. They hold for these loss weights, unless each seed was tuned (ablate.py
--tune-each-seed): then they cover the chance in tuning too. "better" and "worse" are corrected for the number of rows:
at most one list in 20 has any false one. A row with one seed gets no verdict. The line below says how large a
difference these runs can detect, and how many seeds or images a smaller one takes; in brackets, after the correction,
if only one row differs. --pairs prints which of all pairs of rows differ, without any baseline. The formulas are in
scripts/comparison/verdict.py.

Runs of several validation sets, such as results/laptop/*.json results/cards/*.json, get a table for each set and then
the mean over the sets of each difference, with its interval and verdict, for the rows that have runs in each set.

Published numbers of the same config, from results/published.yaml, are shown beside runs on COCO. A warning lists
every other setting in which the runs differ, besides the losses, the seed and the head's prior.
"""

import argparse
import csv
import io
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import yaml

from detector.config import flat
from detector.errors import UserError, run_main
from scripts.comparison import result
from scripts.comparison.differences import (
    Difference,
    best_rows,
    describe,
    detectable_differences,
    differences,
    differences_over_sets,
    differing_pairs,
    named,
)
from scripts.comparison.fairness import LOSS, remarks, warnings
from scripts.comparison.rows import AP, METRICS, Costs, Result, Row, costs, mean_and_spread, numbers, read_sets

HEADER = ("run", "class loss", "box loss", *AP, "ECE", "s/step", "GB")
LEFT = 3  # the first columns are text, aligned to the left
PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published.yaml"
ON_COCO = "instances_val2017.json"  # the validation file of the published numbers


class Compared(NamedTuple):
    """The comparison of one set's rows. The lists of str are lines of text."""

    title: str
    rows: list[Row]
    cost: Costs
    table: list[list[str]]
    warnings: list[str]
    results: list[Difference]
    verdicts: list[str]
    pairs: list[str]
    detectable: list[str]
    notes: list[str]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run folder, a result file of scripts/ablate.py, or a folder of these files",
    )
    parser.add_argument("--baseline", metavar="NAME", help="the row to compare the others with (default: the first)")
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default="AP",
        help="the metric to compare (default: AP); choose it before you see results",
    )
    parser.add_argument("--pairs", action="store_true", help="also print which of all pairs of rows differ")
    parser.add_argument("--markdown", metavar="FILE", help="also write the tables as Markdown")
    parser.add_argument(
        "--html", metavar="FILE", help="also write a page with curves and, where run folders exist, pictures"
    )
    parser.add_argument("--csv", metavar="FILE", help="also write the numbers, one line for each run")
    args = parser.parse_args(argv)

    sets = read_sets(args.runs)
    several = len(sets) > 1
    baseline = args.baseline or named(sets[0][1], None).name
    for title, rows in sets if several else ():
        if baseline not in (names := [row.name for row in rows]):
            raise UserError(f"--baseline {baseline}: not in {title}; there the rows are {', '.join(names)}")
    compared = [compare(title, rows, baseline, args.metric, args.pairs) for title, rows in sets]
    together = over_sets(compared, baseline, args.metric) if several else []
    if args.html:
        from scripts.comparison import report  # imports matplotlib, which only the page needs

        report.write(Path(args.html), compared, HEADER, together)
    if args.markdown:
        text = "\n".join(whole(compared, together, markdown, heading="## ")) + "\n"
        save("--markdown", args.markdown, text)
    if args.csv:
        save("--csv", args.csv, as_csv(compared, args.metric))
    print("\n".join(whole(compared, together, aligned)))


def compare(title: str, rows: list[Row], baseline: str, metric: str, pairs: bool = False) -> Compared:
    """The comparison of the rows of one set."""
    cost = costs(rows)
    results = differences(rows, baseline, metric)
    against = named(rows, baseline)
    verdicts = describe(results, against.name, metric)
    if not against.runs and any(row.runs for row in rows):
        verdicts = [f"No verdict: all runs of {against.name} failed; name another row by --baseline."]
    failures = {row.name: f"; {len(row.failures)} of its runs failed" for row in rows if row.failures}
    for place, diff in enumerate(results, start=len(verdicts) - len(results)):
        verdicts[place] += failures.get(diff.name, "")
    return Compared(
        title,
        rows,
        cost,
        table=[cells(row, cost) for row in rows],
        warnings=warnings(rows),
        results=results,
        verdicts=verdicts,
        pairs=differing_pairs(rows, metric) if pairs else [],
        detectable=detectable_differences(rows, results, metric),
        notes=[f"- {cost.remark}"] * bool(cost.remark) + published(rows) + remarks(rows),
    )


def over_sets(compared: list[Compared], baseline: str, metric: str) -> list[str]:
    """The heading, verdicts and notes of all sets together."""
    results = differences_over_sets([comparison.rows for comparison in compared], baseline, metric)
    if not results:
        return [f"No verdict: this takes {baseline} and another row with runs in each set."]
    lines = describe(results, baseline, metric, len(compared))
    means = [{diff.name: diff.mean for diff in comparison.results} for comparison in compared]
    for place, diff in enumerate(results, start=len(lines) - len(results)):
        by_set = ("unknown" if of_set[diff.name] is None else f"{of_set[diff.name]:+.1f}" for of_set in means)
        lines[place] += f"; by set {', '.join(by_set)}"
    lines += ["", "Each set counts the same. The verdicts are about the mean over these sets, not about other sets."]
    by_name = [{row.name: row for row in comparison.rows} for comparison in compared]
    names = [baseline, *(diff.name for diff in results)]
    if absent := [name for name in dict.fromkeys(chain(*by_name)) if name not in names]:
        lines += ["", f"Left out, because they do not have runs in each set: {', '.join(absent)}."]
    remarks = [remark for name in names for remark in changed([rows[name].runs[0] for rows in by_name], name)]
    return [*lines, *[""] * bool(remarks), *remarks]


def changed(runs: list[Result], name: str) -> list[str]:
    """A warning for each option of a row's losses that differs between sets, without those that were tuned."""
    tuned = {key for run in runs for key in run["tuning"]["keys"]} if all("tuning" in run for run in runs) else set()
    configs = [flat(run["config"]) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key.startswith(LOSS) and key not in tuned)
    values = {key: list(dict.fromkeys(str(config.get(key)) for config in configs)) for key in keys}
    return [
        f"- warning: {name} is not the same loss in each set, {key} differs: {' / '.join(of_key)}"
        for key, of_key in values.items()
        if len(of_key) > 1
    ]


def cells(row: Row, cost: Costs) -> list[str]:
    """A line of the table, with "-" for absent numbers."""
    if not row.runs:
        return [row.name, *["-"] * (len(HEADER) - 2), "failed"]
    config = row.runs[0]["config"]
    known = [numbers(run) for run in row.runs]
    line = [row.name, str(config["class_loss"]["name"]), str(config["box_loss"]["name"])]
    for column in (*AP, "ECE"):
        values = [run[column] for run in known if column in run]
        digits = 1 if column in AP else 3
        line.append(mean_and_spread(values, digits))
    seconds, memory = cost.seconds.get(row.name), cost.memory.get(row.name)
    return [*line, "-" if seconds is None else f"{seconds:.3f}", "-" if memory is None else f"{memory / 1e9:.2f}"]


def marks(rows: list[Row]) -> set[tuple[int, int]]:
    """The (row, column) of each cell that is the best of its column beyond chance."""
    names = [row.name for row in rows]
    return {(names.index(name), HEADER.index(metric)) for metric, name in best_rows(rows).items()}


def published(rows: list[Row]) -> list[str]:
    """The published numbers of the rows that were trained on COCO."""
    entries = result.parse(PUBLISHED, yaml.safe_load, "it is part of this repository", kind=list)
    lines = []
    for row in rows:
        config = flat(row.runs[0]["config"]) if row.runs else {}
        if Path(str(config.get("data.val.annotations", ""))).name != ON_COCO:
            continue
        matching = [entry for entry in entries if all(config.get(k) == v for k, v in entry["where"].items())]
        if matching:
            entry = max(matching, key=lambda entry: len(entry["where"]))
            shown = ", ".join(f"{column} {entry[column]}" for column in AP if column in entry)
            lines.append(f"- published, {row.name}: {shown} ({entry['source']})")
    return lines


def whole(compared: list[Compared], together: list[str], write: Callable, heading: str = "") -> list[str]:
    """The lines of each set, then those of all together; with one set, without titles."""
    parts = []
    for comparison in compared:
        parts += [[f"{heading}{comparison.title}"]] * (len(compared) > 1)
        parts += [
            write(comparison.table, marks(comparison.rows)),
            comparison.warnings,
            comparison.verdicts,
            comparison.pairs,
            comparison.detectable,
            comparison.notes,
        ]
    parts += [[f"{heading}All {len(compared)} sets"], together] if together else []
    return [line for part in parts if part for line in ("", *part)][1:]


def aligned(table: list[list[str]], best: set[tuple[int, int]]) -> list[str]:
    marked = [[c + ("*" if (i, j) in best else " ") for j, c in enumerate(line)] for i, line in enumerate(table)]
    marked = [[c + " " for c in HEADER], *marked]
    widths = [max(map(len, column)) for column in zip(*marked)]
    sides = ["<" if j < LEFT else ">" for j in range(len(HEADER))]
    return [" ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths)).rstrip() for line in marked]


def markdown(table: list[list[str]], best: set[tuple[int, int]]) -> list[str]:
    marked = [[f"**{c}**" if (i, j) in best else c for j, c in enumerate(line)] for i, line in enumerate(table)]
    rule = ["---" if j < LEFT else "---:" for j in range(len(HEADER))]
    escaped = [[c.replace("|", r"\|") for c in line] for line in [HEADER, rule, *marked]]
    return ["| " + " | ".join(line) + " |" for line in escaped]


def as_csv(compared: list[Compared], metric: str) -> str:
    """A line for each run, with the numbers of its row. With several sets, the first column is the set."""
    several = len(compared) > 1
    text = io.StringIO()
    writer = csv.writer(text)
    header = ["variant", "seed", *HEADER[1:], "compared", "difference", "low", "high", "p, corrected"]
    header += ["verdict", "reason", "failure"]
    writer.writerow(["set"] * several + header)
    for comparison in compared:
        of_rows = {
            diff.name: [metric, diff.mean, *(diff.interval or (None, None)), diff.p, diff.verdict, diff.reason]
            for diff in comparison.results
        }
        of_set = [comparison.title] * several
        for row in comparison.rows:
            of_row = of_rows.get(row.name, [""] * 7)
            taken = [comparison.cost.seconds.get(row.name, ""), comparison.cost.memory.get(row.name, 0) / 1e9 or ""]
            for run in row.runs:
                config, known = run["config"], numbers(run)
                losses = config["class_loss"]["name"], config["box_loss"]["name"]
                values = [known.get(column, "") for column in (*AP, "ECE")]
                line = [row.name, config.get("seed", 0), *losses, *values, *taken, *of_row, ""]
                writer.writerow([*of_set, *line])
            for failure in row.failures:
                seed, _, reason = failure.removeprefix("seed ").partition(": ")
                writer.writerow([*of_set, row.name, seed, *[""] * (len(header) - 3), reason])
    return text.getvalue()


def save(flag: str, path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    run_main(main)
