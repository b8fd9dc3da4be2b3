"""What the variants of a comparison change in the config that they share: their losses, and nothing else."""

import json
from pathlib import Path
from typing import Any

from detector import config, config_files
from detector.errors import UserError
from detector.option_errors import suggestion
from scripts.comparison.fairness import LOSS as VARIANT_KEYS  # what a variant may set: keys that start so
from scripts.comparison.supervise import Run

Values = dict[str, Any]  # the nested values of a config


def read_variants(base: Path, names: list[str], settings: list[str], grids: list[str]) -> dict[str, Values]:
    """What each variant changes in the config `base`, by name, with settings ("class_loss.weight=2") on top.

    With grids, each variant with each of their values.
    """
    variants = {name: config_files.with_settings(read_variant(base, name), settings) for name in names}
    for grid in grids:
        key, values = parse_grid(grid)
        short = key.rpartition(".")[2]
        variants = {f"{n}[{short}={v}]": with_values(c, {key: v}) for n, c in variants.items() for v in values}
    known: dict[str, str] = {}
    for name, changes in variants.items():
        other = known.setdefault(json.dumps(changes, sort_keys=True, default=str), name)
        if other != name:
            raise UserError(f"--variants {name}: has the losses of {other}; leave one of them out")
    return variants


def read_variant(base: Path, name: str) -> Values:
    """What a variant changes in the config `base`. Raises UserError if that is more than the loss."""
    changes: Values = {}
    parts = name.split("+")
    if len(parts) > 2:
        raise UserError(f"--variants {name}: name one file, or two as CLASS+BOX for the class and the box loss")
    for number, part in enumerate(parts):
        file = base.parent / f"{part}.yaml"
        if not file.exists():
            known = sorted(other.stem for other in base.parent.glob("*.yaml") if other.name != base.name)
            raise UserError(f"--variants {name}: no file {file}; {suggestion(part, known)}")
        below = bases(file)
        if below and base.resolve() not in [other.resolve() for other in below]:
            raise UserError(f"{file} starts from {below[0]}, not from {base}: give --config {below[0]}")
        values = changes_to(base, file)
        for key in config.flat(values):
            if not key.startswith(VARIANT_KEYS):
                raise UserError(
                    f"{file}: {key}: a variant may set only {', '.join(VARIANT_KEYS)}; set it in {base} or with --set"
                )
        changes = config_files.merge(changes, values if number == 0 else {"box_loss": values.get("box_loss", {})})
    return changes


def bases(file: Path) -> list[Path]:
    """The files that a config file is based on, the nearest first."""
    config_files.read(file)  # a UserError if its bases lead back to itself
    _, below = config_files.read_file(file)
    return [] if below is None else [below, *bases(below)]


def changes_to(base: Path, file: Path) -> Values:
    """What a config file and the files it is based on, up to `base`, set."""
    values, below = config_files.read_file(file)
    values.pop("run", None)
    if below is None or below.resolve() == base.resolve():
        return values
    return config_files.merge(changes_to(base, below), values)


def parse_grid(text: str) -> tuple[str, list[str]]:
    """Split KEY=A,B,C into the key and its values."""
    key, _, values = text.partition("=")
    if not key or not all(values.split(",")):
        raise UserError(f"--grid {text}: write it as KEY=A,B,C, such as class_loss.bins=5,10,20")
    return key, values.split(",")


def with_values(changes: Values, values: dict[str, Any]) -> Values:
    """`changes` with values on top, by dotted key."""
    return config_files.with_settings(changes, [f"{key}={value}" for key, value in values.items()])


def differences(runs: list[Run]) -> list[str]:
    """The keys in which the runs differ. Raises UserError if one of them does not belong to the loss."""
    values = [config.flat(run.cfg.model_dump(mode="json")) for run in runs]
    differing = [
        key
        for key in dict.fromkeys(key for of_run in values for key in of_run)
        if len({repr(of_run.get(key)) for of_run in values}) > 1
    ]
    for key in differing:
        if key not in ("run", "seed") and not key.startswith(VARIANT_KEYS):
            raise UserError(f"{key} differs between the runs: a fair comparison varies only {', '.join(VARIANT_KEYS)}")
    return differing
