"""Compare runs: one row each, best AP marked, and a warning for whatever makes the comparison unfair.

    python scripts/compare.py runs/ce runs/focal runs/ghm_c --out results.md

A warning is a line "- ...", so that Markdown shows a list.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml

# Started as a file, Python puts scripts/ on the path and not the repository that holds `detector`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detector.errors import UserError, run_main

AP = ("AP", "AP50", "AP75", "AP80", "AP90", "APs", "APm", "APl")
HEADER = ("run", "class loss", "box loss", *AP, "s/step")
LEFT = 3  # the first columns are text, aligned left
COMPARED = ("run", "class_loss", "box_loss", "output")  # what runs are meant to differ in
EVALUATED = ("step", "epoch", "images")  # of metrics.json: what was scored, and when


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Compare evaluated runs: AP in percent, the best of each column marked, and a warning "
        "for every setting besides the losses in which the runs differ.",
        epilog="example: python scripts/compare.py runs/ce runs/ghm_c --out table.md",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder with config.yaml and metrics.json")
    parser.add_argument("--markdown", action="store_true", help="print Markdown, not an aligned table")
    parser.add_argument("--out", metavar="FILE", help="also write the Markdown table to this file")
    args = parser.parse_args(argv)

    runs = [read_run(folder) for folder in args.runs]
    names = run_names(runs, args.runs)
    rows = [cells(name, *run) for name, run in zip(names, runs)]
    best = best_cells(rows)
    warnings = differences(names, runs)
    below = ["", *warnings] if warnings else []
    page = "\n".join([*markdown(rows, best), *below])
    if args.out:
        try:
            Path(args.out).write_text(page + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from error
    print(page if args.markdown else "\n".join([*aligned(rows, best), *below]))


def read_run(folder: str) -> tuple[dict, dict]:
    """The config and the metrics of a run folder; UserError where either is missing or broken."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run")
    config = read(path / "config.yaml", yaml.safe_load, "this is not a run folder")
    metrics = read(path / "metrics.json", json.loads, "this run is not evaluated yet; run eval.py on it")
    for loss in ("class_loss", "box_loss"):
        if not (isinstance(config.get(loss), dict) and "name" in config[loss]):
            raise UserError(f"{path / 'config.yaml'}: no {loss}.name; give a run that train.py wrote")
    return config, metrics


def read(path: Path, parse, if_missing: str) -> dict:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {if_missing}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:  # ValueError: JSON, and bytes that are not UTF-8
        # YAML's messages run over several lines.
        raise UserError(f"{path}: broken: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: broken: a mapping is expected, found {type(content).__name__}")
    return content


def run_names(runs: list[tuple[dict, dict]], folders: list[str]) -> list[str]:
    """The name each run gave itself, with its folder where that does not tell it from the others."""
    names = [str(config.get("run", folder)) for (config, _), folder in zip(runs, folders)]
    return [f"{n} ({folder})" if names.count(n) > 1 else n for n, folder in zip(names, folders)]


def cells(name: str, config: dict, metrics: dict) -> list[str]:
    """A row of the table; "-" where a metric is absent, null, or -1: nothing to measure it on."""
    known = {k: v for k, v in metrics.items() if isinstance(v, int | float) and v >= 0}
    ap = [f"{100 * known[key]:.1f}" if key in known else "-" for key in AP]
    seconds = f"{known['seconds_per_step']:.3f}" if "seconds_per_step" in known else "-"
    return [name, str(config["class_loss"]["name"]), str(config["box_loss"]["name"]), *ap, seconds]


def best_cells(rows: list[list[str]]) -> set[tuple[int, int]]:
    """(row, column) of the highest of each AP column: all that tie as shown, none of a lone run."""
    best = set()
    for column in range(LEFT, LEFT + len(AP)) if len(rows) > 1 else ():
        values = {i: float(row[column]) for i, row in enumerate(rows) if row[column] != "-"}
        best |= {(i, column) for i, value in values.items() if value == max(values.values())}
    return best


def differences(names: list[str], runs: list[tuple[dict, dict]]) -> list[str]:
    """A warning a setting, by its dotted key, in which the runs differ though they are not meant to."""
    settings = []
    for config, metrics in runs:
        flat = flatten({key: value for key, value in config.items() if key not in COMPARED})
        settings.append(flat | {f"metrics.{key}": metrics[key] for key in EVALUATED if key in metrics})
    warnings = []
    for key in dict.fromkeys(key for flat in settings for key in flat):
        who = {}  # value -> the runs that have it
        for name, flat in zip(names, settings):
            who.setdefault(json.dumps(flat[key], default=str) if key in flat else "absent", []).append(name)
        if len(who) > 1:
            values = " / ".join(f"{value} in {', '.join(having)}" for value, having in who.items())
            warnings.append(f"- warning: not a fair comparison, {key} differs: {values}")
    return warnings


def flatten(config: dict, prefix: str = "") -> dict:
    """{"solver": {"lr": 1}} -> {"solver.lr": 1}"""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def aligned(rows: list[list[str]], best: set[tuple[int, int]]) -> list[str]:
    marked = [[c + ("*" if (i, j) in best else " ") for j, c in enumerate(row)] for i, row in enumerate(rows)]
    table = [[c + " " for c in HEADER], *marked]
    widths = [max(map(len, column)) for column in zip(*table)]
    sides = ["<" if j < LEFT else ">" for j in range(len(HEADER))]
    return [" ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths)).rstrip() for row in table]


def markdown(rows: list[list[str]], best: set[tuple[int, int]]) -> list[str]:
    marked = [[f"**{c}**" if (i, j) in best else c for j, c in enumerate(row)] for i, row in enumerate(rows)]
    rule = ["---" if j < LEFT else "---:" for j in range(len(HEADER))]
    escaped = [[c.replace("|", r"\|") for c in row] for row in [HEADER, rule, *marked]]
    return ["| " + " | ".join(row) + " |" for row in escaped]


if __name__ == "__main__":
    run_main(main)
