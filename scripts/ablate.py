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
import sys
from pathlib import Path

import torch

from detector import config
from detector.device import pick_device
from detector.errors import UserError, counted, run_main
from scripts.comparison import result, tuning
from scripts.comparison.study import Study, score
from scripts.comparison.supervise import Run, finished, train_all
from scripts.comparison.timing import time_steps
from scripts.comparison.variants import VARIANT_KEYS, differences, read_variants


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
        study.tune(searches, args.tune, jobs)
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


if __name__ == "__main__":
    run_main(main)
