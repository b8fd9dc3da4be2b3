"""Seconds from `python train.py --config FILE` to the end of the first training step, and of that step alone.

    python scripts/bench/start.py [--config configs/demo/focal.yaml] [--set KEY=VALUE ...] [--repeats 3]

Each run is a new process with a temporary run folder. In the first of two runs Triton and torch.compile find no
compiled kernels on disk, as on a new machine; the second one finds those of the first.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from detector.errors import run_main
from scripts.bench import measure

ROOT = Path(__file__).resolve().parents[2]
# train.py, but it exits after the first step.
TRAIN = """
import os, time, train
train_until = train.train_until
def first_step(replica, criterion, batches, *args, until_step):
    batch = next(iter(batches))
    start = time.perf_counter()
    train_until(replica, criterion, [batch], *args, until_step=1)
    print("first step:", time.perf_counter() - start, flush=True)
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
    runs: dict[str, list[tuple[float, float]]] = {"first run on a machine": [], "later run": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as caches:
            for measured in runs.values():
                measured.append(first_step(args.config, args.set, caches))
    print(f"{measure.environment()}\n")
    heads = [Path(args.config).stem, "start to first step, s", "the step alone, s"]
    print(measure.table(heads, [[name, *map(spread, zip(*measured))] for name, measured in runs.items()]))


def first_step(config: str, settings: list[str], caches: str) -> tuple[float, float]:
    """Seconds from the start to the end of the first step, and of that step alone."""
    environment = os.environ | {name: f"{caches}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", TRAIN, "--config", config, "--set", f"output={folder}", *settings]
        start, alone = time.perf_counter(), None
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        ) as process:
            assert process.stdout
            for line in process.stdout:  # not to the end of the output, which loading processes keep open for longer
                if line.startswith("first step: "):
                    alone = float(line.partition(": ")[2])
                    break
            taken = time.perf_counter() - start
            _, errors = process.communicate()
    if alone is None:
        sys.exit(f"{config}: {(errors.strip() or 'it printed nothing').splitlines()[-1]}")
    return taken, alone


def spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


if __name__ == "__main__":
    run_main(main)
