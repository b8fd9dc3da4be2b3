"""Train every variant of a loss under the same everything, with several seeds.

    python scripts/ablate.py --config configs/bccd/base.yaml --variants ce focal ghm_c focal+ghm_r --seeds 3

A variant is the name of a YAML file beside the config that says class_loss, box_loss and, where it is part of the
choice, model.head.prior; anything else in it is refused. `focal+ghm_r` is focal.yaml with the box_loss of ghm_r.yaml.
`--grid class_loss.bins=5,10,20` makes of each variant one for each value; given twice, one for each pair of values.

`--tune box_loss.weight=x0.5,x1,x2 --tune-set solver.epochs=4` first gives each variant the same number of short runs,
one for each value (`x2`: twice the variant's own), scored on a quarter of the training images and trained on the
others, never on the validation set; the variant then goes with its best value. Where that is the first or the last of
them it is said, since the range may be too narrow.

Stop it and start it again with the same command: finished runs are kept, broken ones go on. A run that diverges is a
row with its reason; delete its result to have it tried again. `--processes 2` trains each run with two processes, on
two GPUs where they are. `--time` ends with a step of each variant in turn, in one process: the seconds that compare.py
shows. In --output there are then

    VARIANT-sSEED/     the run folder of train.py, with best.pt
    results/*.json     a small file for each run: all that scripts/compare.py needs
    configs/           each run's config and log
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

# Started as a file, Python puts scripts/ on the path and not the repository that holds `detector`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml

from data.annotations import load_annotations
from detector import assemble, config, config_files
from detector.errors import UserError, run_main
from scripts import result
from scripts.supervise import Run, train_all
from scripts.timing import time_steps

VARIES = ("class_loss", "box_loss", "model.head.prior")  # what a variant may say, by the start of its keys
HELD_OUT = 0.25  # of the training images, to tune on

Values = dict[str, Any]  # of a config, nested


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="what all variants have in common")
    parser.add_argument("--variants", nargs="+", required=True, metavar="NAME", help="files beside it, or NAME+NAME")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of a variant: seeds 0 to N - 1 (3)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="options for all")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=A,B", help="each variant with each of these values"
    )
    parser.add_argument("--tune", metavar="KEY=A,B", help="short runs of each variant, to choose its value")
    parser.add_argument(
        "--tune-set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for these runs"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/, and the config's folder's name")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="for the small files (default: in --output)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: as the GPUs allow, or one)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of each run, by torchrun (1)")
    parser.add_argument("--time", action="store_true", help="at the end, time a step of each variant in turn")
    parser.add_argument("--dry-run", action="store_true", help="check all, and say which runs there would be")
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
    trials: dict[str, dict[str, Run]] = {}  # of each variant, the short run of each value
    if args.tune:
        key, values = parse_choice("--tune", args.tune)
        for name, changes in variants.items():
            trials[name] = {v: study.trial(name, choose(changes, key, v), v, args.tune_set) for v in values}
    tried = [run for runs in trials.values() for run in runs.values()]
    runs = study.runs(variants, args.seeds)
    print(
        f"{len(runs)} runs of {len(variants)} variants, {len(tried)} short ones; all agree but in {differences(runs)}"
    )
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
            found = {value: score(run.kept) for value, run in of_value.items() if run.kept.exists()}
            best = max(found, key=lambda value: found[value] or -1)
            variants[name] = choose(variants[name], key, best)
            tuning = {"key": key, "AP": found, "chosen": best}
            study.notes[name] = {"tuning": tuning}
            remark = ", at an end of what was tried: another range may hold a better one"
            print(f"{name}: {key} {best}{remark if result.at_an_end(tuning) else ''}")
        runs = study.runs(variants, args.seeds)
    whole = train_all(runs, jobs)
    if args.time:
        add_timing(runs)
    print(f"python scripts/compare.py {study.results}/*.json")
    sys.exit(0 if whole else 1)


class Study:
    """Where the runs of a comparison are, and what they have in common."""

    def __init__(self, base: str, settings: list[str], output: Path | None, results: Path | None, processes: int = 1):
        self.base = Path(base)
        self.common = assemble.configure(base, settings)
        self.settings = settings
        self.output = output or Path("runs") / self.base.resolve().parent.name
        self.results = results or self.output / "results"
        self.processes = processes
        self.notes: dict[str, Values] = {}  # of a variant, for its results

    def runs(self, variants: dict[str, Values], seeds: int) -> list[Run]:
        """Every variant with a seed, then with the next: stopped early, there is a comparison."""
        return [
            self.run(f"{name}-s{seed}", config_files.merge(changes, {"seed": seed}), {"variant": name, "seed": seed})
            for seed in range(seeds)
            for name, changes in variants.items()
        ]

    def trial(self, variant: str, changes: Values, value: str, settings: list[str]) -> Run:
        """A short run, on a part of the training set and scored on the rest of it."""
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
        """Divide the training set's annotation file in two, by its images, the same way each time."""
        annotations = load_annotations(self.common.data.train.annotations)
        places = list(range(len(annotations.image_ids)))
        random.Random(0).shuffle(places)
        count = max(1, round(HELD_OUT * len(places)))
        for split, part in (("val", places[:count]), ("train", places[count:])):
            self.part(split).write_text(json.dumps(annotations.document(part)), encoding="utf-8")


def add_timing(runs: list[Run]) -> None:
    """Time a step of each variant, and note it in the results of its runs."""
    variants: dict[str, config.Config] = {}
    for run in runs:
        variants.setdefault(run.notes["variant"], run.cfg)
    timings = time_steps(variants)
    for run in runs:
        if run.kept.exists():  # else it was lost
            result.write(run.kept, result.read(run.kept) | {"timing": timings[run.notes["variant"]]})
    for name, timing in timings.items():
        print(f"{name}: {timing['seconds']:.3f} s/step")


def read_variant(base: Path, name: str) -> Values:
    """What a variant changes in the config `base`; UserError where that is more than the loss."""
    changes: Values = {}
    for number, part in enumerate(name.split("+")):
        file = base.parent / f"{part}.yaml"
        values = result.parse(file, yaml.safe_load, f"--variants {name}: a variant is a file beside {base}")
        values = {key: value for key, value in values.items() if key not in ("base", "run")}
        for key in config.flat(values):
            if not key.startswith(VARIES):
                raise UserError(
                    f"{file}: {key}: a variant may say {', '.join(VARIES)} alone; set it in {base} or by --set"
                )
        changes = config_files.merge(changes, values if number == 0 else {"box_loss": values.get("box_loss", {})})
    return changes


def parse_choice(flag: str, text: str) -> tuple[str, list[str]]:
    """KEY=A,B,C -> the key and its values."""
    key, _, values = text.partition("=")
    if not key or not all(values.split(",")):
        raise UserError(f"{flag} {text}: write it as KEY=A,B,C, such as class_loss.bins=5,10,20")
    return key, values.split(",")


def choose(changes: Values, key: str, value: str) -> Values:
    """`changes` with `key` at `value`; `x2` is twice what they have, or twice 1."""
    if re.fullmatch(r"x\d+(\.\d+)?", value):
        value = repr(config.flat(changes).get(key, 1) * float(value[1:]))
    return config_files.with_settings(changes, [f"{key}={value}"])


def differences(runs: list[Run]) -> str:
    """The keys in which runs differ; UserError where one of them is not the loss."""
    values = [config.flat(run.cfg.model_dump(mode="json")) for run in runs]
    differing = [
        k for k in dict.fromkeys(k for one in values for k in one) if len({repr(one.get(k)) for one in values}) > 1
    ]
    for key in differing:
        if key not in ("run", "seed") and not key.startswith(VARIES):
            raise UserError(f"{key} differs between the runs: a fair comparison is of {', '.join(VARIES)} alone")
    return ", ".join(differing) or "nothing"


def score(kept: Path) -> float | None:
    """AP of a result; None where the run failed."""
    return result.read(kept).get("metrics", {}).get("AP")


if __name__ == "__main__":
    run_main(main)
