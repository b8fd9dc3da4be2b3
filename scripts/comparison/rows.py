"""Runs as the rows of a comparison: one for each loss, over its seeds."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detector.errors import UserError
from detector.gradients import BANDS
from scripts.comparison import result

METRICS = ("AP", "AP50", "AP75", "AP80", "AP90")  # known on each draw of images, so they can get a verdict
AP = (*METRICS, "APs", "APm", "APl")

Result = dict[str, Any]


class Row(NamedTuple):
    """The runs of one loss."""

    name: str
    runs: list[Result]  # evaluated, by seed
    failures: list[str]

    @property
    def seeds(self) -> list[int]:
        return [run["config"].get("seed", 0) for run in self.runs]

    @property
    def tunings(self) -> list[Result]:
        """What tuning found: once for the row, or for each of its runs (ablate.py --tune-each-seed); [] without tuning.

        If only some runs share a tuning, it is the first run's. Then their losses differ, which `fairness` reports.
        """
        found = [run["tuning"] for run in self.runs if "tuning" in run]
        different = {json.dumps(tuning["trials"]) for tuning in found}
        same_keys = all(tuning["keys"] == found[0]["keys"] for tuning in found)
        return found if same_keys and len(different) == len(self.runs) else found[:1]


class Costs(NamedTuple):
    """What a training step of each row takes, if it can be compared."""

    seconds: dict[str, float]  # by name of the row
    memory: dict[str, float]  # bytes, at most
    remark: str  # how it was measured, or why it is not shown


def read_rows(paths: list[str]) -> list[Row]:
    """The runs grouped by variant or name, in the order given, without the tuning runs."""
    return _rows(_read(paths))


def read_sets(paths: list[str]) -> list[tuple[str, list[Row]]]:
    """The name and the rows of each validation set.

    Runs are of several sets if a variant has one seed on more than one. Otherwise all are one set, even if they were
    scored on different images, which is a mistake that their comparison reports.
    """
    runs = _read(paths)
    digests: dict[tuple, set[str | None]] = {}  # of annotation files that look alike
    for _, run in runs:
        if "metrics" in run:
            digests.setdefault(_set(run), set()).add(run.get("annotations", {}).get("data.val"))

    def key_of(run: Result) -> tuple:
        """Files that look alike are different sets if their content and the size of the images differ."""
        data = run["config"].get("data", {})
        sizes = data.get("short_side"), data.get("long_side")
        return (*_set(run), *sizes) if len(digests[_set(run)]) > 1 else _set(run)

    known = {_file(run): key_of(run) for _, run in runs if "metrics" in run}
    by_set: dict[tuple, list[tuple[str, Result]]] = {}
    for path, run in runs:  # one that failed does not say how many images there are
        by_set.setdefault(key_of(run) if "metrics" in run else known.get(_file(run), ()), []).append((path, run))
    places = {
        (run["variant"], run["config"].get("seed", 0), key)
        for key in by_set
        for _, run in by_set[key]
        if "variant" in run
    }
    several = len({place[:2] for place in places}) < len(places)
    of_sets = list(by_set.values()) if several else [runs]
    return [(_title([run for _, run in of_set]), _rows(of_set)) for of_set in of_sets]


def scored_on(run: Result) -> tuple:
    """The file of the validation set, without its folder, which may differ between machines; the number of images."""
    return Path(_file(run)).name, run["metrics"].get("images")


def _set(run: Result) -> tuple:
    per_class = run["metrics"].get("per_class", {})
    return *scored_on(run), *((name, of_class.get("boxes")) for name, of_class in per_class.items())


def _file(run: Result) -> str:
    return run["config"].get("data", {}).get("val", {}).get("annotations", "")


def _title(runs: list[Result]) -> str:
    images = {run["metrics"].get("images") for run in runs if "metrics" in run}
    return f"{_file(runs[0]) or 'a set without a name'}, {' / '.join(map(str, images)) or 'unknown'} images"


def _read(paths: list[str]) -> list[tuple[str, Result]]:
    runs = []
    for path in paths:
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or folder; give run folders or result files")
        for file in _result_files(Path(path)) or [path]:
            run = _of_folder(Path(file)) if Path(file).is_dir() else result.read(file)
            if "tried" not in run:
                runs.append((file, run))
    if not runs:
        raise UserError("all of these are tuning runs; give the results of whole runs")
    return runs


def _of_folder(folder: Path) -> Result:
    """The result of a run folder, or of one that eval.py wrote. ablate.py names runs VARIANT-sSEED."""
    run = result.collect(folder) | {"folder": str(folder)}
    name, ending = str(run["config"].get("run")), f"-s{run['config'].get('seed', 0)}"
    return run | ({"variant": name.removesuffix(ending)} if name.endswith(ending) else {})


def _result_files(folder: Path) -> list[str]:
    """The result files in a folder, or in the --output of ablate.py; none in a run folder."""
    if any((folder / name).exists() for name in ("config.yaml", "metrics.json")):
        return []
    return sorted(map(str, folder.glob("results/*.json"))) or sorted(map(str, folder.glob("*.json")))


def _rows(given: list[tuple[str, Result]]) -> list[Row]:
    by_name: dict[str, list[tuple[str, Result]]] = {}
    for path, run in given:
        by_name.setdefault(str(run.get("variant") or run["config"].get("run", path)), []).append((path, run))
    rows = []
    for name, runs in by_name.items():
        one_row = all("variant" in run for _, run in runs)  # otherwise, equal names do not mean equal configs
        if any("folder" in run for _, run in runs):  # the variant is from the run's name, which two folders may share
            one_row = one_row and len({run["config"].get("seed", 0) for _, run in runs}) == len(runs)
        elif one_row:
            _refuse_twice(name, runs)
        if len(runs) > 1 and not one_row:
            rows += [_row(f"{name} ({path})", [run]) for path, run in runs]
        else:
            rows.append(_row(name, [run for _, run in runs]))
    return rows


def _refuse_twice(name: str, runs: list[tuple[str, Result]]) -> None:
    """UserError if a seed is given twice: two copies of one run would look like two seeds that agree."""
    files: dict[int, str] = {}
    for path, run in runs:
        seed = run["config"].get("seed", 0)
        if seed in files:
            raise UserError(
                f"{path}: is seed {seed} of {name}, like {files[seed]}; give each run once, and runs of one recipe"
            )
        files[seed] = path


def _row(name: str, runs: list[Result]) -> Row:
    runs = sorted(runs, key=lambda run: run["config"].get("seed", 0))
    failures = [f"seed {run['config'].get('seed', 0)}: {run['failure']}" for run in runs if "failure" in run]
    return Row(name, [run for run in runs if "metrics" in run], failures)


def numbers(run: Result) -> dict[str, float]:
    """AP in percent and ECE, without those that are null or -1 (nothing to measure them on)."""
    known = {metric: value for metric in AP if (value := known_value(run, metric)) is not None}
    if run.get("calibration_error", -1) >= 0:
        known["ECE"] = run["calibration_error"]
    return known


def known_value(run: Result, metric: str) -> float | None:
    """The metric in percent; None if it is absent, null, NaN or -1."""
    value = run["metrics"].get(metric)
    return 100 * value if isinstance(value, int | float) and value >= 0 else None


def known_values(row: Row, metric: str = "AP") -> list[float]:
    """The metric of each seed in percent, without seeds for which it is unknown."""
    return [known for run in row.runs if (known := known_value(run, metric)) is not None]


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """`41.2±0.3`, the mean and standard deviation; "-" without values."""
    spread = f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}" if values else "-"


def gradient_shares(row: Row, kind: str) -> dict[str, float] | None:
    """The mean share of the gradient by kind of example; None if no run observed it. kind: "class" or "box"."""
    points = [point for run in row.runs for point in run.get("gradient", ()) if f"{kind}_easy" in point]
    return {band: statistics.fmean(point[f"{kind}_{band}"] for point in points) for band in BANDS} if points else None


def costs(rows: list[Row]) -> Costs:
    """Seconds of a step if `ablate.py --time` measured them, and memory if each run had the same machine to itself.

    The seconds that a run took itself do not compare: other programs slow it down, and machines differ.
    """
    runs = [run for row in rows for run in row.runs]
    if not runs:
        return Costs({}, {}, "")
    timings = [run["timing"] for run in runs if run.get("timing")]
    timed = len(timings) == len(runs) and len({timing["started"] for timing in timings}) == 1
    jobs = {run["jobs"] for run in runs if "jobs" in run}
    machines = {str(run.get("machine", {}).get("device")) for run in runs}
    if not all("jobs" in run for run in runs):
        reason = "the results do not say whether each run had the machine to itself"
    elif jobs != {1}:
        reason = f"runs shared the machine (--jobs {max(jobs)})"
    elif len(machines) > 1:
        reason = "the runs are from different machines"
    else:
        reason = ""
    advice = "scripts/ablate.py --time measures the losses in turn"
    if timed:
        seconds = {row.name: row.runs[0]["timing"]["seconds"] for row in rows if row.runs}
        remark = f"s/step: the losses took turns in one process, median of {timings[0]['steps']} steps"
        remark += f". GB is not shown: {reason}" if reason else ""
    else:
        seconds = {}
        remark = f"s/step and GB are not shown: {reason}; {advice}" if reason else f"s/step is not shown; {advice}"
    return Costs(seconds, {} if reason else _mean_memory(rows), remark)


def _mean_memory(rows: list[Row]) -> dict[str, float]:
    """The mean peak by row, without the rows that lack it."""
    values = {row.name: [peak for run in row.runs if (peak := run["metrics"].get("peak_memory"))] for row in rows}
    return {name: statistics.fmean(known) for name, known in values.items() if known}
