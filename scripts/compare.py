"""Compare runs: a row for each loss, over its seeds, and whether it beats the first row or may do so by chance.

    python scripts/compare.py runs/ce runs/focal runs/ghm_c --markdown table.md
    python scripts/compare.py results/bccd/*.json --csv runs.csv

A run is the folder that train.py wrote, or the small JSON file that scripts/ablate.py keeps of one. Runs of one variant
are one row: mean and standard deviation over its seeds. AP is in percent, the best of each column is marked; ECE is the
expected calibration error of the scores, GB the peak of the memory.

Below stand the differences in AP from the first row, or --baseline, with an interval that holds 95% of 500 draws of
validation images and of seeds, each with replacement and the same for both rows. "better" and "worse" are said only
where the interval leaves out 0. A few seeds tell little of how others would do: the interval is then too short, and
from one seed it is of the images alone.

A run on COCO is shown the number that others report of its config, from results/published.yaml. A warning is given
for whatever the runs differ in besides the losses, the seed and the head's prior.
"""

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

# Started as a file, Python puts scripts/ on the path and not the repository that holds `detector`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import yaml

from detector.config import flat
from detector.errors import UserError, run_main
from scripts import result

AP = ("AP", "AP50", "AP75", "AP80", "AP90", "APs", "APm", "APl")
HEADER = ("run", "class loss", "box loss", *AP, "ECE", "s/step", "GB")
LEFT = 3  # the first columns are text, aligned left
COMPARED = ("run", "output", "seed", "class_loss", "box_loss", "model.head.prior")  # what runs are meant to differ in
EVALUATED = ("step", "epoch", "images")  # of the metrics: what was scored, and when
PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published.yaml"
ON_COCO = "instances_val2017.json"  # the validation file of the published numbers
COVERED = (2.5, 97.5)  # percent of the draws, the ends of an interval

Result = dict[str, Any]


class Row(NamedTuple):
    """What is compared: the runs of a loss."""

    name: str
    runs: list[Result]  # evaluated, by seed
    failures: list[str]

    @property
    def seeds(self) -> list[int]:
        return [run["config"].get("seed", 0) for run in self.runs]


class Difference(NamedTuple):
    """In AP, of a row from the baseline."""

    name: str
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a result file of scripts/ablate.py")
    parser.add_argument("--baseline", metavar="NAME", help="the row that others are compared with (the first)")
    parser.add_argument("--markdown", metavar="FILE", help="also write the tables as Markdown")
    parser.add_argument("--html", metavar="FILE", help="also write a page with curves and, of run folders, pictures")
    parser.add_argument("--csv", metavar="FILE", help="also write the numbers, a line for each run")
    args = parser.parse_args(argv)

    rows = read_rows(args.runs)
    table = [cells(row) for row in rows]
    best = best_cells(table)
    found = differences(rows, args.baseline)
    warnings = published(rows) + warn(rows)
    if args.html:
        from scripts import report  # matplotlib, for those who ask for it

        report.write(Path(args.html), rows, HEADER, table, found, warnings)
    if args.markdown:
        write("--markdown", args.markdown, "\n".join(sections(markdown(table, best), in_words(found), warnings)) + "\n")
    if args.csv:
        write_csv(args.csv, rows)
    print("\n".join(sections(aligned(table, best), in_words(found), warnings)))


def read_rows(paths: list[str]) -> list[Row]:
    """The runs by variant or name, in the order given; short runs that tuned something are left out."""
    by_name: dict[str, list[tuple[str, Result]]] = {}
    for path in paths:
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or folder; give run folders or result files")
        one = result.collect(Path(path)) if Path(path).is_dir() else result.read(path)
        if "tried" not in one:
            by_name.setdefault(str(one.get("variant") or one["config"].get("run", path)), []).append((path, one))
    if not by_name:
        raise UserError("these are runs that tuned something, and no others; give the results of whole runs")
    rows = []
    for name, runs in by_name.items():
        if len(runs) > 1 and not all("variant" in one for _, one in runs):  # a name in common says nothing
            rows += [_row(f"{name} ({path})", [one]) for path, one in runs]
        else:
            rows.append(_row(name, [one for _, one in runs]))
    return rows


def _row(name: str, runs: list[Result]) -> Row:
    runs = sorted(runs, key=lambda one: one["config"].get("seed", 0))
    failures = [f"seed {one['config'].get('seed', 0)}: {one['failure']}" for one in runs if "failure" in one]
    return Row(name, [one for one in runs if "metrics" in one], failures)


def numbers(run: Result) -> dict[str, float]:
    """By column of the table; absent where it is null, or -1: nothing to measure it on."""
    metrics = run["metrics"]
    known = {k: 100 * metrics[k] for k in AP if isinstance(metrics.get(k), int | float) and metrics[k] >= 0}
    if run.get("calibration_error", -1) >= 0:
        known["ECE"] = run["calibration_error"]
    if metrics.get("seconds_per_step"):
        known["s/step"] = metrics["seconds_per_step"]
    if metrics.get("peak_memory"):
        known["GB"] = metrics["peak_memory"] / 1e9
    return known


def cells(row: Row) -> list[str]:
    """A line of the table; "-" where a number is absent."""
    if not row.runs:
        return [row.name, *["-"] * (len(HEADER) - 2), "failed"]
    config = row.runs[0]["config"]
    known = [numbers(run) for run in row.runs]
    line = [row.name, str(config["class_loss"]["name"]), str(config["box_loss"]["name"])]
    for column in HEADER[LEFT:]:
        values = [one[column] for one in known if column in one]
        digits = 1 if column in AP else 3 if column == "ECE" or column == "s/step" else 2
        spread = f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 and column in (*AP, "ECE") else ""
        line.append(f"{statistics.fmean(values):.{digits}f}{spread}" if values else "-")
    return line


def best_cells(table: list[list[str]]) -> set[tuple[int, int]]:
    """(row, column) of the highest of each AP column: all that tie as shown, none of a lone row."""
    best = set()
    for column in range(LEFT, LEFT + len(AP)) if len(table) > 1 else ():
        values = {i: float(line[column].partition("±")[0]) for i, line in enumerate(table) if line[column] != "-"}
        best |= {(i, column) for i, value in values.items() if value == max(values.values())}
    return best


def differences(rows: list[Row], baseline: str | None = None) -> list[Difference]:
    """Of each row's AP from the baseline's, in the order of the rows; of those alone that hold draws of images."""
    names = [row.name for row in rows]
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline {baseline}: there is no such row; there are {', '.join(names)}")
    base = rows[names.index(baseline)] if baseline else rows[0]
    found = []
    for row in rows:
        draws = [[run["resampled"] for run in one.runs if run.get("resampled")] for one in (row, base)]
        if row is base or not all(draws) or len({len(draw) for one in draws for draw in one}) > 1:
            continue
        mean, other = (statistics.fmean(run["metrics"]["AP"] for run in one.runs) for one in (row, base))
        low, high = interval(*(100 * np.array(one) for one in draws))
        found.append(Difference(row.name, 100 * (mean - other), low, high))
    return found


def interval(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Where COVERED of the differences of means lie, from APs (seeds, draws of images), each draw with seeds drawn too.

    With as many seeds on both sides the same are drawn: they share initial weights and the order of images.
    """
    random = np.random.default_rng(0)
    draws = np.arange(one.shape[1])[:, None]
    seeds = random.integers(len(one), size=(len(draws), len(one)))
    others = seeds if len(one) == len(other) else random.integers(len(other), size=(len(draws), len(other)))
    gaps = one[seeds, draws].mean(axis=1) - other[others, draws].mean(axis=1)
    low, high = np.percentile(gaps, COVERED)
    return float(low), float(high)


def in_words(found: list[Difference]) -> list[str]:
    return [f"- {d.name}: AP {d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}], {d.verdict}" for d in found]


def warn(rows: list[Row]) -> list[str]:
    """What failed, and a warning for each setting, by its dotted key, in which the runs differ though not meant to."""
    warnings = [f"- failed: {row.name}, {failure}" for row in rows for failure in row.failures]
    settings = []
    for row in rows:
        for run in row.runs:
            own = {k: v for k, v in flat(run["config"]).items() if not k.startswith(COMPARED)}
            own |= {f"metrics.{key}": run["metrics"][key] for key in EVALUATED if key in run["metrics"]}
            own["seeds"] = row.seeds
            own["machine"] = run["machine"]["device"] if "machine" in run else None
            own["processes"] = run.get("processes", 1)
            settings.append((row.name if len(row.runs) == 1 else f"{row.name} seed {run['config']['seed']}", own))
    for key in dict.fromkeys(key for _, own in settings for key in own):
        who: dict[str, list[str]] = {}  # value -> the runs that have it
        for name, own in settings:
            who.setdefault(json.dumps(own[key], default=str) if key in own else "absent", []).append(name)
        if len(who) > 1:
            values = " / ".join(f"{value} in {', '.join(having)}" for value, having in who.items())
            warnings.append(f"- warning: not a fair comparison, {key} differs: {values}")
    return warnings


def published(rows: list[Row]) -> list[str]:
    """What others report of the rows that are trained on COCO."""
    entries = result.parse(PUBLISHED, yaml.safe_load, "it comes with this repository", kind=list)
    lines = []
    for row in rows:
        config = flat(row.runs[0]["config"]) if row.runs else {}
        if Path(str(config.get("data.val.annotations", ""))).name != ON_COCO:
            continue
        fitting = [one for one in entries if all(config.get(key) == value for key, value in one["where"].items())]
        if fitting:
            one = max(fitting, key=lambda one: len(one["where"]))
            shown = ", ".join(f"{column} {one[column]}" for column in AP if column in one)
            lines.append(f"- published, {row.name}: {shown} ({one['source']})")
    return lines


def sections(table: list[str], found: list[str], warnings: list[str]) -> list[str]:
    head = ["", "Difference in AP from the baseline, with its 95% interval:", ""] if found else []
    return [*table, *head, *found, *(["", *warnings] if warnings else [])]


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


def write_csv(path: str, rows: list[Row]) -> None:
    with opened("--csv", path) as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", *HEADER[1:], "failure"])
        for row in rows:
            for run in row.runs:
                config, known = run["config"], numbers(run)
                losses = config["class_loss"]["name"], config["box_loss"]["name"]
                values = [known.get(column, "") for column in HEADER[LEFT:]]
                writer.writerow([row.name, config.get("seed", 0), *losses, *values, ""])
            for failure in row.failures:
                seed, _, reason = failure.removeprefix("seed ").partition(": ")
                writer.writerow([row.name, seed, *[""] * (len(HEADER) - 1), reason])


def write(flag: str, path: str, text: str) -> None:
    with opened(flag, path) as file:
        file.write(text)


def opened(flag: str, path: str):
    try:
        return open(path, "w", encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    run_main(main)
