"""Train every variant of a loss with the same recipe and several seeds.

    python scripts/ablate.py --config configs/bccd/base.yaml --variants ce focal ghm_c focal+ghm_r --seeds 3

A variant is the name of a YAML file beside the config. The file may set class_loss, box_loss and model.head.prior, and
nothing else. `focal+ghm_r` is focal.yaml with the box_loss of ghm_r.yaml. `--grid class_loss.bins=5,10,20` trains each
variant with each of these values; two --grid options train it with each pair of values.

`--tune 8` first gives each variant 8 tuning runs to find its class_loss.weight and box_loss.weight (--tune-keys), from
a tenth to ten times its file's values: the first run has the file's values, and Optuna proposes the others. If the best
value is at an end of the range, the range is extended, still within 8 runs. Tuning runs train on three quarters of the
training images and are scored on the rest, never on the validation set. `--tune-set solver.epochs=4` makes them
shorter. The variant is then trained with its best values. With `--tune-each-seed`, each seed of a variant gets 8 tuning
runs with this seed, so that the intervals of compare.py cover the chance in tuning too. docs/new_loss.md says what
tuning costs and when it is not worth it.

Stop it at any time; the same command continues. Finished runs are kept, interrupted runs are resumed. A run that
diverges is a result too, with its reason; delete the result to try again. `--processes 2` trains each run with two
processes, on two GPUs if there are any. `--time` times a step of each variant at the end, taking turns in one process:
compare.py shows these seconds.

The folder --output holds

    VARIANT-sSEED/     the run folder of train.py, with best.pt
    tune-VARIANT-N/    those of the tuning runs, without best.pt; tune_train.json and tune_val.json: their images.
                       With --tune-each-seed also tune-VARIANT-s1-N/ and so on
    results/*.json     a small file for each run, all that scripts/compare.py needs
    configs/           the config and log of each run
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from data.annotations import load_annotations
from data.image_folder import find_folder
from detector import atomic, config, config_files
from detector.configure import resolve
from detector.device import pick_device
from detector.errors import UserError, counted, run_main
from detector.option_errors import suggestion
from scripts.comparison import result, tuning
from scripts.comparison.fairness import LOSS as VARIANT_KEYS  # what a variant may set: keys that start so
from scripts.comparison.supervise import Run, finished, train_all
from scripts.comparison.timing import time_steps
from scripts.comparison.tuning import Trial

HELD_OUT = 0.25  # of the training images, to tune on

Values = dict[str, Any]  # the nested values of a config


def main() -> None:
    args = parse_arguments()
    # What a variant's file may set goes on top of it, or the file would win.
    on_variants = [setting for setting in args.set if setting.startswith(VARIANT_KEYS)]
    common = [setting for setting in args.set if setting not in on_variants]
    study = Study(args.config, common, args.output, args.results, args.processes)
    gpus = torch.cuda.device_count() if study.common.device in ("auto", "cuda") else 0  # cuda:1 is a single GPU
    jobs = args.jobs or max(1, gpus // args.processes)
    variants = read_variants(study.base, args.variants, on_variants, args.grid)
    runs = study.runs(variants, args.seeds)
    short = f", {args.tune} tuning runs of each{' with each seed' * args.tune_each_seed}" if args.tune else ""
    differing = differences(runs)
    varied = f"; they differ in {', '.join(differing)}" if differing else ""
    print(f"{counted(len(runs), 'run')} of {counted(len(variants), 'variant')}{short}{varied}")
    if not torch.cuda.is_available():  # else asking for a GPU would take its memory beside the runs
        pick_device(study.common.device)
    tuned = [run for run in runs if args.tune and (args.tune_each_seed or run.notes["seed"] == 0)]
    searches = study.searches(variants, tuned, args.tune_keys, args.tune, args.tune_set)
    if args.dry_run:
        first = [next(search) for search in searches]
        for run in first or runs:  # tuned runs will have other weights than now
            finished(run)
        print("\n".join(str(run.cfg.folder) for run in [*first, *runs]))
        return

    if searches:
        for seed in {run.notes["seed"] for run in tuned}:
            study.hold_out(seed)
        tune(study, searches, args.tune, jobs)
        runs = study.runs(variants, args.seeds)
    all_finished = train_all([[run] for run in runs], len(runs), jobs)
    add_tuning(runs)
    if not any(run.kept.exists() and score(run.kept) is not None for run in runs):
        if all_finished:
            print(f"all runs failed; {study.results} says why: delete its files to try again", file=sys.stderr)
        sys.exit(1)
    if args.time:
        add_timing(runs)
    print(f"python scripts/compare.py {study.results}/*.json")
    sys.exit(0 if all_finished else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe that all variants share")
    parser.add_argument(
        "--variants", nargs="+", required=True, metavar="NAME", help="YAML files beside the config, or NAME+NAME"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each variant, with seeds 0 to N - 1 (default: 3)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="options for all runs, also those of a loss: class_loss.weight=2",
    )
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=A,B", help="train each variant with each of these values"
    )
    parser.add_argument("--tune", type=int, metavar="N", help="choose each variant's weights by N tuning runs")
    parser.add_argument(
        "--tune-keys",
        nargs="+",
        choices=tuning.KEYS,
        default=["class_loss.weight", "box_loss.weight"],
        metavar="KEY",
        help=f"what to tune, of {', '.join(tuning.KEYS)} (default: the first two)",
    )
    parser.add_argument(
        "--tune-set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="options for the tuning runs"
    )
    parser.add_argument(
        "--tune-each-seed", action="store_true", help="tune again for each seed (default: once, with seed 0)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: runs/ and the name of the config's folder"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="where to put the small files (default: in --output)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at once (default: as many as the GPUs allow with --processes each; 1 without GPUs or on the CPU)",
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes of each run, with torchrun (default: 1)"
    )
    parser.add_argument("--time", action="store_true", help="at the end, time a step of each variant, taking turns")
    parser.add_argument("--dry-run", action="store_true", help="check everything and list the runs, without training")
    args = parser.parse_args()
    if min(args.seeds, args.processes, 1 if args.jobs is None else args.jobs) < 1:
        raise UserError("--seeds, --jobs and --processes: give at least 1")
    for flag, settings in (("--set", args.set), ("--grid", args.grid), ("--tune-set", args.tune_set)):
        for setting in settings:
            check_setting(flag, setting)
    if args.tune is None and args.tune_each_seed:
        raise UserError("--tune-each-seed: give --tune N too, the number of tuning runs")
    if args.tune is not None:
        check_tuning(args.tune, args.tune_keys, args.grid, args.tune_set)
    return args


class Study:
    """The folders of a comparison, and the config that its runs share."""

    def __init__(self, base: str, settings: list[str], output: Path | None, results: Path | None, processes: int = 1):
        self.base = Path(base)
        self.values = config_files.read(base)
        self.common = resolve(self.values, base, settings)
        self.settings = settings
        self.output = output or Path("runs") / self.base.resolve().parent.name
        self.results = results or self.output / "results"
        self.processes = processes
        self.tried: dict[tuple[str, int], list[Trial]] = {}  # finished tuning runs, by variant and seed
        self.tunings: dict[tuple[str, int], Values] = {}  # what they found
        data = self.common.data
        files = {"data.train": Path(data.train.annotations), "data.val": Path(data.val.annotations)}
        self.annotations = {key: hash_of(file) for key, file in files.items() if file.is_file()}

    def runs(self, variants: dict[str, Values], seeds: int) -> list[Run]:
        """Every variant with one seed, then with the next, so that runs that stop early still compare."""
        return [
            self.whole_run(name, changes, seed, self.tunings.get((name, seed), self.tunings.get((name, 0))))
            for seed in range(seeds)
            for name, changes in variants.items()
        ]

    def whole_run(self, variant: str, changes: Values, seed: int, tuned: Values | None) -> Run:
        notes = {"variant": variant, "seed": seed}
        if tuned:
            changes, notes = with_values(changes, tuned["chosen"]), notes | {"tuning": tuned}
        return self.run(f"{variant}-s{seed}", config_files.merge(changes, {"seed": seed}), notes)

    def searches(
        self, variants: dict[str, Values], runs: list[Run], tuned_keys: list[str], count: int, settings: list[str]
    ) -> list[Iterator[Run]]:
        """A `search` for each of the runs, for its variant and with its seed."""
        keys = [key for key in tuning.KEYS if key in tuned_keys]  # in one order, which the search depends on
        searches = []
        for run in runs:
            name, seed, values = run.notes["variant"], run.notes["seed"], config.flat(run.cfg.model_dump(mode="json"))
            initial = {key: values[key] for key in keys}
            searches.append(self.search(name, variants[name], seed, initial, count, settings))
        return searches

    def search(
        self, variant: str, changes: Values, seed: int, initial: dict[str, float], count: int, settings: list[str]
    ) -> Iterator[Run]:
        """The `count` tuning runs of a variant, beginning with its `initial` values, which are added to `tried`.

        Each must have a result before the next is asked for. One that has a result already keeps its values.
        """
        tried = self.tried.setdefault((variant, seed), [])
        for number in range(1, count + 1):
            name = f"tune-{variant}{of_seed(seed)}-{number}"
            kept = self.results / f"{name}.json"
            if tried and kept.exists():
                values = kept_values(kept, list(initial))
            else:
                values = tuning.propose(tried, seed) if tried else initial
            best = f"; best so far {tuning.best(tried).AP or 0:.3f}" if tried else ""
            title = f"{variant}{of_seed(seed)}, trial {number}/{count} ({shown(values)}{best})"
            run = self.trial(name, with_values(changes, values), seed, {"variant": variant, "tried": values}, settings)
            yield replace(run, title=title, keep_best=False)
            tried.append(Trial(values, score(run.kept)))

    def trial(self, name: str, changes: Values, seed: int, notes: Values, settings: list[str]) -> Run:
        """A tuning run that trains on a part of the training set and is scored on the rest."""
        files = {s: {"annotations": str(self.part(s, seed)), "images": self.images} for s in ("train", "val")}
        changes = config_files.merge(changes, {"data": files, "seed": seed})
        return self.run(name, config_files.with_settings(changes, settings), notes)

    def run(self, name: str, changes: Values, notes: Values) -> Run:
        changes = config_files.merge(config_files.with_settings({}, self.settings), changes)
        values = config_files.merge(self.values, changes) | {"run": name, "output": str(self.output)}
        notes = notes | {"processes": self.processes, "annotations": self.annotations}
        file, kept = self.output / "configs" / f"{name}.yaml", self.results / f"{name}.json"
        return Run(file, resolve(values, f"variant {notes['variant']}", []), kept, notes, self.processes)

    @cached_property
    def images(self) -> str:
        """The folder of the training images, which is searched beside the whole file, not beside a part of it."""
        train = self.common.data.train
        return train.images or str(find_folder(train.annotations, load_annotations(train.annotations).file_names))

    def part(self, split: str, seed: int) -> Path:
        return self.output / f"tune_{split}{of_seed(seed)}.json"

    def hold_out(self, seed: int) -> None:
        """Split the training set's annotation file by images, the same way each time."""
        annotations = load_annotations(self.common.data.train.annotations)
        indices = list(range(len(annotations.image_ids)))
        random.Random(seed).shuffle(indices)
        count = max(1, round(HELD_OUT * len(indices)))
        for split, part in (("val", indices[:count]), ("train", indices[count:])):
            try:
                self.output.mkdir(parents=True, exist_ok=True)
                atomic.write(self.part(split, seed), json.dumps(annotations.document(part)))
            except OSError as error:
                raise UserError(f"--output: {self.part(split, seed)} cannot be written ({error.strerror})") from None


def hash_of(file: Path) -> str:
    """The start of the file's SHA-256: a result belongs to the data of its training."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def tune(study: Study, searches: list[Iterator[Run]], trials: int, jobs: int) -> None:
    """Train the tuning runs and add what they found to the study. Exits if a tuning run has no result."""
    small: dict[str, list | dict] = {"curve": [], "probability": [], "resampled": {}}
    if not train_all(searches, trials * len(searches), jobs, keep=lambda full: full | small):
        sys.exit(1)
    for (name, seed), tried in study.tried.items():
        study.tunings[name, seed] = tuning.summary(tried)
        print(f"{name}{of_seed(seed)}: {tuning.described([study.tunings[name, seed]])}")


def of_seed(seed: int) -> str:
    """For names of tuning runs. Without --tune-each-seed all have seed 0, and later seeds can be added."""
    return f"-s{seed}" if seed else ""


def add_tuning(runs: list[Run]) -> None:
    """Add what tuning found to the results of runs that were finished before, maybe after fewer trials."""
    for run in runs:
        if "tuning" in run.notes and run.kept.exists():
            kept = result.read(run.kept)
            if kept.get("tuning") != run.notes["tuning"]:
                result.write(run.kept, kept | {"tuning": run.notes["tuning"]})


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


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in values.items())


def check_setting(flag: str, setting: str) -> None:
    """Raises UserError for a setting that another option makes."""
    key = setting.partition("=")[0]
    if key in ("class_loss", "class_loss.name", "box_loss", "box_loss.name") and flag != "--grid":
        raise UserError(f"{flag} {setting}: --variants names the losses; {flag} changes an option, such as a weight")
    if other := {"seed": "--seeds", "run": "--variants", "output": "--output"}.get(key):
        raise UserError(f"{flag} {setting}: {other} sets it; leave it out")


def check_tuning(trials: int, keys: list[str], grids: list[str], settings: list[str]) -> None:
    """Raises UserError where the options of --tune contradict each other."""
    if trials < 2:
        raise UserError(f"--tune {trials}: give at least 2; the first tuning run has the variant's own values")
    for flag, given in (("--grid", grids), ("--tune-set", settings)):
        for setting in given:
            if (key := setting.partition("=")[0]) in keys:
                raise UserError(f"{flag} {setting}: {key} is what --tune searches; leave it out here or in --tune-keys")


def kept_values(kept: Path, keys: list[str]) -> dict[str, float]:
    """What a finished trial tried. Raises UserError if those are other keys."""
    values = result.read(kept).get("tried")
    if not isinstance(values, dict) or list(values) != keys:
        raise UserError(f"{kept}: has not tried {', '.join(keys)}: delete it, or give another --results")
    return values


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


def score(kept: Path) -> float | None:
    """The AP of a result; None if the run failed."""
    return result.read(kept).get("metrics", {}).get("AP")


if __name__ == "__main__":
    run_main(main)
