"""What differs between compared runs besides their losses."""

import json
import statistics

from detector.configure import flat_values
from scripts.comparison.rows import Row, numbers
from scripts.comparison.tuning import budget, described, highest

LOSS = ("class_loss", "box_loss", "model.head.prior")
VARIED = ("run", "output", "seed", *LOSS)  # may differ between compared runs
MUST_AGREE = ("step", "epoch", "images")  # metrics that say what was scored, and when
RISE = 2.0  # AP between the last two evaluations: with more, a training may be too short to compare


def remarks(rows: list[Row]) -> list[str]:
    """A line for each failed run, on tuning and length, and for each tuned setting in which the runs differ."""
    lines = [f"- failed: {row.name}, {failure}" for row in rows for failure in row.failures]
    for row in rows:
        if row.tunings:
            lines.append(f"- {row.name} was tuned{_for_each_seed(row)}: {described(row.tunings)}")
    if sum(bool(row.runs) for row in rows) > 1 and not any(row.tunings for row in rows):
        lines.append("- no row was tuned, so the weights may favour some losses (scripts/ablate.py --tune)")
    if too_short := [row.name for row in rows if _short_trials(row)]:
        remark = "no trial reached two thirds of the runs' AP; longer trials (--tune-set) or cleaner labels may lead"
        lines.append(f"- {', '.join(too_short)}: {remark} to other values")
    rises = {row.name: rise for row in rows if (rise := _last_rise(row)) is not None and rise > RISE}
    if rises:
        by_row = ", ".join(f"{name} {rise:.1f}" for name, rise in rises.items())
        remark = f"AP still rose between the last two evaluations ({by_row})"
        lines.append(f"- {remark}, so longer trainings may change the differences")
    return [*lines, *(f"- {line}" for line in differing(rows)[0])]


def warnings(rows: list[Row]) -> list[str]:
    """The settings that make the comparison unfair."""
    return [f"- warning: {line}" for line in differing(rows)[1]]


def differing(rows: list[Row]) -> tuple[list[str], list[str]]:
    """A line for each tuned setting in which the runs differ; one for all others that split the runs the same way."""
    about_tuned: list[str] = []
    divisions: dict[tuple, dict[str, str]] = {}  # the runs with each value -> key -> these values
    settings = []
    all_runs = [run for row in rows for run in row.runs]
    # Run folders have neither key, and older results no annotations.
    known = {key for key in ("machine", "annotations") if all(key in run for run in all_runs)}
    for row in rows:
        for seed, run in zip(row.seeds, row.runs):
            of_run = {k: v for k, v in flat_values(run["config"]).items() if not k.startswith(VARIED)}
            of_run |= {f"metrics.{key}": run["metrics"][key] for key in MUST_AGREE if key in run["metrics"]}
            of_run["seeds"] = row.seeds
            if "machine" in known:
                of_run["machine"] = run["machine"]["device"]
            of_run["processes"] = run.get("processes", 1)
            if "annotations" in known:
                of_run |= {f"SHA-256 of {key}": value for key, value in run["annotations"].items()}
            of_run["tuning"] = budget(run["tuning"]) + _for_each_seed(row) if "tuning" in run else None
            settings.append((row.name if len(row.runs) == 1 else f"{row.name} seed {seed}", of_run))
    keys = [set(run["tuning"]["keys"]) if "tuning" in run else set() for run in all_runs]
    tuned = set.intersection(*keys) if keys else set()
    for key in dict.fromkeys(key for _, of_run in settings for key in of_run):
        runs_by_value: dict[str, list[str]] = {}
        for name, of_run in settings:
            value = json.dumps(of_run[key], default=str) if key in of_run else "absent"
            runs_by_value.setdefault(value, []).append(name)
        if len(runs_by_value) > 1:
            runs = tuple(", ".join(names) for names in runs_by_value.values())
            if key in tuned:
                values = " / ".join(f"{value} in {names}" for value, names in zip(runs_by_value, runs))
                about_tuned.append(f"{key} was tuned: {values}")
            else:
                divisions.setdefault(runs, {})[key] = " / ".join(runs_by_value)
    unfair = [line for row in rows for line in _mixed_losses(row)]
    for runs, by_key in divisions.items():
        follow = ("metrics.step", "metrics.epoch") if "solver.epochs" in by_key else ()
        differ = ", ".join(f"{key} ({of_key})" for key, of_key in by_key.items() if key not in follow)
        unfair.append(f"not a fair comparison, {' / '.join(runs)} differ in {differ}")
    return about_tuned, unfair


def _for_each_seed(row: Row) -> str:
    return " for each seed" if len(row.tunings) > 1 else ""


def _mixed_losses(row: Row) -> list[str]:
    """A line if the runs of a row, which should differ in their seeds alone, have other losses."""
    tuned = row.tunings[0]["keys"] if len(row.tunings) > 1 else []
    losses = [{k: v for k, v in flat_values(run["config"]).items() if k.startswith(LOSS)} for run in row.runs]
    mixed = [k for k in losses[0] if any(of_run.get(k) != losses[0][k] for of_run in losses)] if losses else []
    mixed = [key for key in mixed if key not in tuned]
    return [f"not a fair comparison, the seeds of {row.name} differ in {', '.join(mixed)}"] if mixed else []


def _last_rise(row: Row) -> float | None:
    """By how much AP rose between the last two evaluations, in percent, mean over the runs that have two."""
    ends = [[point.get("AP") for point in run.get("curve", ())[-2:]] for run in row.runs]
    rises = [100 * (known[1] - known[0]) for known in ends if len(known) == 2 and None not in known]
    return statistics.fmean(rises) if rises else None


def _short_trials(row: Row) -> bool:
    """Whether a row was tuned by trials so short that they may rank values unlike whole runs do."""
    known = [of_run["AP"] for run in row.runs if "AP" in (of_run := numbers(run))]
    if not row.tunings or not known:
        return False
    return statistics.fmean(map(highest, row.tunings)) < 2 / 3 * statistics.fmean(known)
