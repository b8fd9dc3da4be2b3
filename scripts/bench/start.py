"""Seconds from `python train.py --config FILE` to the end of the first training step.

    python scripts/bench/start.py [--config configs/demo/focal.yaml] [--set KEY=VALUE ...] [--repeats 3]

Each round is a new process with a temporary run folder.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.bench import measure

ROOT = Path(__file__).resolve().parents[2]
# train.py, but it exits after the first step.
TRAIN = """
import os, sys, train
train_until = train.train_until
def first_step(*args, until_step):
    train_until(*args, until_step=1)
    print("first step done", flush=True)
    os._exit(0)
train.train_until = first_step
train.main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/demo/focal.yaml"), metavar="FILE")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    seconds = [first_step(args.config, args.set) for _ in range(args.repeats)]
    print(f"{measure.environment()}\n")
    row = [Path(args.config).stem, f"{statistics.median(seconds):.1f}", f"{min(seconds):.1f}", f"{max(seconds):.1f}"]
    print(measure.table(["start to first step", "s, median", "least", "most"], [row]))


def first_step(config: str, settings: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", TRAIN, "--config", config, "--set", f"output={folder}", *settings]
        start = time.perf_counter()
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        ) as process:
            # Does not wait for the end of the output, which loading processes keep open for longer.
            done = any("first step done" in line for line in process.stdout)
            taken = time.perf_counter() - start
            _, errors = process.communicate()
    if not done:
        sys.exit(f"{config}: {errors.strip().splitlines()[-1]}")
    return taken


if __name__ == "__main__":
    main()
