"""Train every variant of a loss with the same recipe and several seeds.

    python scripts/ablate.py --config configs/bccd/base.yaml --variants ce focal ghm_c focal+ghm_r --seeds 3

A variant is the name of a YAML file beside the config. The file may set class_loss, box_loss and model.head.prior, and
nothing else. `focal+ghm_r` is focal.yaml with the box_loss of ghm_r.yaml. `--grid class_loss.bins=5,10,20` trains each
variant with each of these values; two --grid options train it with each pair of values.

`--tune box_loss.weight=x0.5,x1,x2 --tune-set solver.epochs=4` first gives each variant the same number of short runs,
one for each value (`x2`: twice the variant's own value). They train on three quarters of the training images and are
scored on the rest, never on the validation set. The variant is then trained with its best value. A remark says if that
is the first or last value, because then the range may be too narrow.

Stop it at any time; the same command continues. Finished runs are kept, interrupted runs are resumed. A run that
diverges is a result too, with its reason; delete the result to try again. `--processes 2` trains each run with two
processes, on two GPUs if there are any. `--time` times a step of each variant at the end, taking turns in one process:
compare.py shows these seconds. --output then holds

    VARIANT-sSEED/     the run folder of train.py, with best.pt
    results/*.json     a small file for each run, all that scripts/compare.py needs
    configs/           the config and log of each run
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from data.annotations import load_annotations
from detector import assemble, config, config_files
from detector.errors import UserError, run_main
from scripts.comparison import result
from scripts.comparison.supervise import Run, train_all
from scripts.comparison.timing import time_steps

VARIANT_KEYS = ("class_loss", "box_loss", "model.head.prior")  # what a variant may set: keys that start so
HELD_OUT = 0.25  # of the training images, to tune on

Values = dict[str, Any]  # the nested values of a config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe that all variants share")
    parser.add_argument(
        "--variants", nargs="+", required=True, metavar="NAME", help="YAML files beside the config, or NAME+NAME"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each variant, with seeds 0 to N - 1 (default: 3)"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="options for all runs"
    )
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=A,B", help="train each variant with each of these values"
    )
    parser.add_argument("--tune", metavar="KEY=A,B", help="choose each variant's value by short runs")
    parser.add_argument(
        "--tune-set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="options for the short runs"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: runs/ and the name of the config's folder"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="where to put the small files (default: in --output)"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at once (default: one for each --processes GPUs, or 1)"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes of each run, with torchrun (default: 1)"
    )
    parser.add_argument("--time", action="store_true", help="at the end, time a step of each variant, taking turns")
    parser.add_argument("--dry-run", action="store_true", help="check everything and list the runs, without training")
    args = parser.parse_args()
    if min(args.seeds, args.processes, 1 if args.jobs is None else args.jobs) < 1:
        raise UserError("--seeds, --jobs and --processes: give at least 1")
    jobs = args.jobs or max(1, torch.cuda.device_count() // args.processes)
    study = Study(args.config, args.set, args.output, args.results, args.processes)

    variants = {name: read_variant(study.base, name) for name in args.variants}
    for grid in args.grid:
        key, values = parse_choice("--grid", grid)
        short = key.rpartition(".")[2]
        variants = {f"{n}[{short}={v}]": choose(c, key, v) for n, c in variants.items() for v in values}
    trials: dict[str, dict[str, Run]] = {}  # variant -> value -> its short run
    if args.tune:
        key, values = parse_choice("--tune", args.tune)
        for name, changes in variants.items():
            trials[name] = {v: study.trial(name, choose(changes, key, v), v, args.tune_set) for v in values}
    tried = [run for runs in trials.values() for run in runs.values()]
    runs = study.runs(variants, args.seeds)
    print(f"{len(runs)} runs of {len(variants)} variants, {len(tried)} short runs; they differ in {differences(runs)}")
    if tried:
        differences(tried)
    if args.dry_run:
        print("\n".join(str(run.cfg.folder) for run in [*tried, *runs]))
        return

    if tried:
        study.hold_out()
        if not train_all(tried, jobs, keep=lambda full: {**full, "curve": [], "resampled": []}):
            sys.exit(1)
        for name, of_value in trials.items():
            aps = {value: score(run.kept) for value, run in of_value.items() if run.kept.exists()}
            best = max(aps, key=lambda value: aps[value] or -1)
            variants[name] = choose(variants[name], key, best)
            tuning = {"key": key, "AP": aps, "chosen": best}
            study.notes[name] = {"tuning": tuning}
            remark = ", at an end of the range: a wider range may hold a better one"
            print(f"{name}: {key} {best}{remark if result.at_an_end(tuning) else ''}")
        runs = study.runs(variants, args.seeds)
    all_finished = train_all(runs, jobs)
    if args.time:
        add_timing(runs)
    print(f"python scripts/compare.py {study.results}/*.json")
    sys.exit(0 if all_finished else 1)


class Study:
    """The folders of a comparison, and the config that its runs share."""

    def __init__(self, base: str, settings: list[str], output: Path | None, results: Path | None, processes: int = 1):
        self.base = Path(base)
        self.common = assemble.configure(base, settings)
        self.settings = settings
        self.output = output or Path("runs") / self.base.resolve().parent.name
        self.results = results or self.output / "results"
        self.processes = processes
        self.notes: dict[str, Values] = {}  # by variant, added to its results

    def runs(self, variants: dict[str, Values], seeds: int) -> list[Run]:
        """Every variant with one seed, then with the next, so that runs that stop early still compare."""
        return [
            self.run(f"{name}-s{seed}", config_files.merge(changes, {"seed": seed}), {"variant": name, "seed": seed})
            for seed in range(seeds)
            for name, changes in variants.items()
        ]

    def trial(self, variant: str, changes: Values, value: str, settings: list[str]) -> Run:
        """A short run that trains on a part of the training set and is scored on the rest."""
        images = self.common.data.train.images
        files = {split: {"annotations": str(self.part(split)), "images": images} for split in ("train", "val")}
        changes = config_files.with_settings(config_files.merge(changes, {"data": files}), settings)
        return self.run(f"tune-{variant}-{value}", changes, {"variant": variant, "tried": value})

    def run(self, name: str, changes: Values, notes: Values) -> Run:
        values = config_files.merge(config_files.with_settings({}, self.settings), changes)
        values |= {"base": str(self.base.resolve()), "run": name, "output": str(self.output)}
        file = self.output / "configs" / f"{name}.yaml"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output: {file} cannot be written ({error.strerror})") from None
        return Run(
            file,
            assemble.configure(str(file)),
            self.results / f"{name}.json",
            notes | self.notes.get(notes["variant"], {}) | {"processes": self.processes},
            self.processes,
        )

    def part(self, split: str) -> Path:
        return self.output / f"tune_{split}.json"

    def hold_out(self) -> None:
        """Split the training set's annotation file by images, the same way each time."""
        annotations = load_annotations(self.common.data.train.annotations)
        indices = list(range(len(annotations.image_ids)))
        random.Random(0).shuffle(indices)
        count = max(1, round(HELD_OUT * len(indices)))
        for split, part in (("val", indices[:count]), ("train", indices[count:])):
            self.part(split).write_text(json.dumps(annotations.document(part)), encoding="utf-8")


def add_timing(runs: list[Run]) -> None:
    """Time a step of each variant and add it to the results of its runs."""
    variants: dict[str, config.Config] = {}
    for run in runs:
        variants.setdefault(run.notes["variant"], run.cfg)
    timings = time_steps(variants)
    for run in runs:
        if run.kept.exists():  # otherwise the run ended without one
            result.write(run.kept, result.read(run.kept) | {"timing": timings[run.notes["variant"]]})
    for name, timing in timings.items():
        print(f"{name}: {timing['seconds']:.3f} s/step")


def read_variant(base: Path, name: str) -> Values:
    """What a variant changes in the config `base`. Raises UserError if that is more than the loss."""
    changes: Values = {}
    for number, part in enumerate(name.split("+")):
        file = base.parent / f"{part}.yaml"
        values = result.parse(file, yaml.safe_load, f"--variants {name}: a variant is a file beside {base}")
        values = {key: value for key, value in values.items() if key not in ("base", "run")}
        for key in config.flat(values):
            if not key.startswith(VARIANT_KEYS):
                raise UserError(
                    f"{file}: {key}: a variant may set only {', '.join(VARIANT_KEYS)}; set it in {base} or with --set"
                )
        changes = config_files.merge(changes, values if number == 0 else {"box_loss": values.get("box_loss", {})})
    return changes


def parse_choice(flag: str, text: str) -> tuple[str, list[str]]:
    """Split KEY=A,B,C into the key and its values."""
    key, _, values = text.partition("=")
    if not key or not all(values.split(",")):
        raise UserError(f"{flag} {text}: write it as KEY=A,B,C, such as class_loss.bins=5,10,20")
    return key, values.split(",")


def choose(changes: Values, key: str, value: str) -> Values:
    """`changes` with `key` set to `value`; `x2` is twice the value in `changes`, or twice 1."""
    if re.fullmatch(r"x\d+(\.\d+)?", value):
        value = repr(config.flat(changes).get(key, 1) * float(value[1:]))
    return config_files.with_settings(changes, [f"{key}={value}"])


def differences(runs: list[Run]) -> str:
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
    return ", ".join(differing) or "nothing"


def score(kept: Path) -> float | None:
    """The AP of a result; None if the run failed."""
    return result.read(kept).get("metrics", {}).get("AP")


if __name__ == "__main__":
    run_main(main)
