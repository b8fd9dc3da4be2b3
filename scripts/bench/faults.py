"""Kill a training at random instants, resume it, and compare with one that was left alone.

    python scripts/bench/faults.py [--kills 50] [--steps 60] [--seed 0] [--folder FOLDER]

Each life of the run gets SIGKILL after a random time, while it starts, trains, saves (every step), or evaluates, and
is started again with --resume; runs follow one another until there were enough kills. Then every last.pt must hold, to
the bit, what the run that was left alone ended with: anything else is a loss, and the exit code is 1.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's packages, wherever this is started

import torch
import yaml
from tqdm import tqdm

from data.demo import write_demo
from detector import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        lost = faults(folder, args.kills, args.steps, random.Random(args.seed))
    sys.exit(1 if lost else 0)


def faults(folder: Path, kills: int, steps: int, rng: random.Random) -> int:
    """How many runs did not end as the one left alone."""
    config = write_config(folder, steps)
    start = time.perf_counter()
    finish(config, "alone")
    life = time.perf_counter() - start
    print(f"left alone: {steps} steps in {life:.1f} s", flush=True)
    truth = state(folder / "runs/alone/last.pt")

    killed, lives, runs, lost, saving = 0, 0, 0, 0, 0
    with tqdm(total=kills, unit="kill") as line:
        while killed < kills:
            run = folder / f"runs/run{runs}"
            while True:
                process = launch(config, run.name)
                lives += 1
                try:
                    code = process.wait(timeout=rng.uniform(0, life))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    killed += 1
                    saving += (run / "last.tmp").exists()
                    line.update()
                    continue
                if code:
                    sys.exit(f"{run} ended with {code}:\n{(folder / 'log.txt').read_text(encoding='utf-8')[-2000:]}")
                break
            same = equal(state(run / "last.pt"), truth)
            lost += not same
            runs += 1
    print(f"{killed} kills ({saving} while a checkpoint was written), {lives} lives, {runs} runs, {lost} lost")
    return lost


def write_config(folder: Path, steps: int) -> Path:
    """Tiny images and a tiny model, with everything that has state: GHM, averaged weights, momentum, workers."""
    write_demo(folder / "data", train_images=12, val_images=4)
    values = {
        "output": str(folder / "runs"),
        "device": "cpu",
        "data": {split: {"annotations": str(folder / f"data/{split}.json"), "images": str(folder / f"data/{split}")}
                 for split in ("train", "val")} | {"short_side": 96, "long_side": 128, "workers": 1},
        "model": {"backbone": "resnet18", "weights": "none", "norm": "bn", "fpn_channels": 32,
                  "head": {"width": 32, "depth": 1}},
        "class_loss": {"name": "ghm_c"},
        "box_loss": {"name": "ghm_r"},
        "solver": {"batch_size": 2, "lr_batch_size": None, "epochs": 100, "max_steps": steps, "ema": 0.9},
        "evaluation": {"every": 3},
        "checkpoint": {"every": 1},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def launch(config: Path, run: str) -> subprocess.Popen:
    words = [sys.executable, ROOT / "train.py", "--config", config, "--resume", "--set", f"run={run}"]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    with (config.parent / "log.txt").open("w", encoding="utf-8") as log:
        return subprocess.Popen(list(map(str, words)), env=environment, stdout=log, stderr=log)


def finish(config: Path, run: str) -> None:
    if launch(config, run).wait():
        sys.exit((config.parent / "log.txt").read_text(encoding="utf-8")[-2000:])


def state(path: Path) -> dict:
    """What must not depend on how often a run was interrupted."""
    content = checkpoint.read(path)
    del content["run"]["seconds_per_step"], content["run"]["peak_memory"], content["config"]
    return content


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


if __name__ == "__main__":
    main()
