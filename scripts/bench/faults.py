"""Interrupt trainings at random, resume them, and compare their results with uninterrupted trainings.

    python scripts/bench/faults.py [--faults 200] [--steps 12] [--seed 0] [--folder FOLDER]

A run has one process or two. It is started several times; a life is the time from a start to its end. Each life has 0
or 2 loading processes for each process. It gets one signal (SIGKILL or SIGTERM to one process, or SIGTERM to the whole
group with its loading processes) while it starts, trains, evaluates or writes a checkpoint. The next life continues
with --resume. Counted as wrong:

- lost: last.pt of a finished run differs from that of the uninterrupted run, or SIGTERM did not save the last step;
- exit: SIGTERM must end all processes with 143 and one line, SIGKILL the others with 1 and one line; no traceback;
- left: a process or a loading process runs for 10 s after the life has ended.

The processes are forked from this one to keep each life short, so the start of Python itself is never interrupted.
"""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import argparse
import atexit
import contextlib
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import cv2
import torch
import yaml

import train
from data.demo import write_demo
from detector import checkpoint
from detector.errors import run_main
from detector.solver import Solver

STRIKES = ("KILL a process", "TERM a process", "TERM the group")
PHASES = {"b": "start-up", "t": "training", "e": "evaluation", "s": "checkpoint"}
PATIENCE = 60  # seconds; a process that takes longer is hanging


@dataclass
class Life:
    """The processes of a run from one start to their end, and the (time, mark) pairs of process 0."""

    processes: list[int]
    log: Path
    pipe: int
    marks: list[tuple[float, str]] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)
    hung: bool = False

    def poll(self) -> None:
        """Read new marks, and the exit codes of processes that have ended."""
        with contextlib.suppress(BlockingIOError):
            self.marks += [(time.monotonic(), mark) for mark in os.read(self.pipe, 4096).decode()]
        for process in set(self.processes) - self.codes.keys():
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self.codes[process] = os.waitstatus_to_exitcode(status)

    def count(self, mark: str) -> int:
        return sum(made == mark for _, made in self.marks)

    @property
    def phase(self) -> str:
        return next((mark for _, mark in reversed(self.marks) if mark in PHASES), "b")

    @property
    def over(self) -> bool:
        return len(self.codes) == len(self.processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--steps", type=int, default=12, help="steps of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder for the runs (default: a temporary one)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads would not survive a fork
    cv2.setNumThreads(0)
    folder = args.folder or Path(tempfile.mkdtemp())
    try:
        wrong = faults(folder, args.faults, args.steps, random.Random(args.seed))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    sys.exit(1 if wrong else 0)


def faults(folder: Path, wanted: int, steps: int, rng: random.Random) -> int:
    """Interrupt `wanted` times, print how each life ended, and return how often that was wrong."""
    config = write_config(folder, steps)
    truth: dict[int, dict] = {}
    lasts: dict[int, dict[str, float]] = {}  # number of processes -> seconds of each phase
    struck: Counter[tuple[str, str]] = Counter()  # by strike and phase
    wrong, runs, lives = [], 0, 0
    while struck.total() < wanted:
        processes, name = rng.choice((1, 2)), f"run{runs}"
        if processes not in truth:
            life = start(config, f"alone{processes}", processes, workers=0, every=1)
            finish(life)
            if any(life.codes.values()):
                sys.exit(life.log.read_text(encoding="utf-8"))
            truth[processes], lasts[processes] = state(folder / f"runs/alone{processes}/last.pt"), durations(life)
            print(f"uninterrupted, {processes} process(es): {lasts[processes]}", flush=True)
        done = False
        while not done:
            workers, every = rng.choice((0, 2)), rng.choice((1, 1000))
            how, phase = rng.choice(STRIKES), rng.choice("btes")
            before = saved(folder / "runs" / name)
            life = start(config, name, processes, workers, every)
            lives += 1
            hit = strike(life, how, phase, lasts[processes], rng)
            finish(life, struck=bool(hit))
            done = not any(life.codes.values())
            label = f"{name}: {how} in {PHASES.get(hit, 'none')}, {processes} process(es), {workers} workers"
            complaints = [*left_behind(life), *["exit: had to be killed"] * life.hung]
            if hit:
                struck[how, PHASES[hit]] += 1
                complaints += complaints_about(life, how, hit, done, before, saved(folder / "runs" / name))
            elif not done:
                complaints.append("exit: ended by itself")
            for complaint in complaints:
                wrong.append(complaint)
                log = life.log.read_text(encoding="utf-8")
                print(f"WRONG {label}: {complaint}, codes {list(life.codes.values())}\n{log}")
            print(f"{struck.total()} {label}: {list(life.codes.values())}", flush=True)
        if not equal(state(folder / "runs" / name / "last.pt"), truth[processes]):
            wrong.append("lost: other weights")
            print(f"WRONG {name}: its end differs from that of the uninterrupted run", flush=True)
        shutil.rmtree(folder / "runs" / name)
        runs += 1
    print(f"\n| | {' | '.join(PHASES.values())} |\n| --- |{' ---: |' * len(PHASES)}")
    for how in STRIKES:
        print(f"| {how} | {' | '.join(str(struck[how, phase]) for phase in PHASES.values())} |")
    kinds = Counter(complaint.partition(":")[0] for complaint in wrong)
    summary = ", ".join(f"{kinds[kind]} {kind}" for kind in ("lost", "exit", "left"))
    print(f"\n{struck.total()} faults, {lives} lives, {runs} runs; wrong: {summary}")
    return len(wrong)


def strike(life: Life, how: str, phase: str, lasts: dict[str, float], rng: random.Random) -> str:
    """Send the signal at a random moment of a phase; returns the phase it hit, "" if the life was over."""
    wanted = {"b": 0, "t": rng.randint(1, 4), "e": 1, "s": rng.randint(1, 3)}[phase]
    until(life, lambda: life.count(phase) >= wanted)
    at = time.monotonic() + rng.uniform(0, lasts[phase])
    until(life, lambda: time.monotonic() >= at)
    if life.codes:
        return ""
    number = signal.SIGKILL if how.startswith("KILL") else signal.SIGTERM
    if how.endswith("group"):
        os.killpg(life.processes[0], number)
    else:
        os.kill(rng.choice(life.processes), number)
    life.poll()
    return life.phase


def complaints_about(life: Life, how: str, hit: str, done: bool, before: int, after: int) -> list[str]:
    """The mistakes at the end of an interrupted life."""
    log, codes = life.log.read_text(encoding="utf-8"), set(life.codes.values())
    complaints = []
    if "Traceback" in log or (how.startswith("TERM") and "memory" in log):
        complaints.append("exit: unexpected output")
    early = hit == "b"  # before handlers are installed and all processes are connected
    if how == "KILL a process":
        fine = {-signal.SIGKILL, 1, 128 + signal.SIGTERM, -signal.SIGTERM} if early else {-signal.SIGKILL, 1}
    else:
        fine = {128 + signal.SIGTERM, *({1, -signal.SIGTERM} if early else ())}
    fine |= {0} if "tensorboard --logdir" in log else set()  # process 0 had finished
    if not done and not codes <= fine:
        complaints.append(f"exit: none of {sorted(fine)}")
    if how.startswith("TERM") and 128 + signal.SIGTERM in codes:
        if "stopped by SIGTERM" not in log:
            complaints.append("exit: no line")
        if not early and after != before + life.count("."):
            complaints.append(f"lost: step {after} is saved, but {before} + {life.count('.')} were done")
    return complaints


def finish(life: Life, struck: bool = False) -> None:
    """Wait for the end. Like torchrun, end the other processes if one has failed; kill them if that takes too long."""
    failed_at, struck_at = None, time.monotonic() if struck else None
    while not life.over:
        life.poll()
        now = time.monotonic()
        if failed_at is None and any(life.codes.values()):
            failed_at = now
        for process in set(life.processes) - life.codes.keys():
            since = failed_at or struck_at
            if since and now - since > PATIENCE:
                life.hung = True
                os.kill(process, signal.SIGKILL)
            elif failed_at and now - failed_at > 5:
                os.kill(process, signal.SIGTERM)
        time.sleep(0.01)
    life.poll()
    os.close(life.pipe)


def left_behind(life: Life) -> list[str]:
    """A complaint if processes of the group still run; they are killed."""
    end = time.monotonic() + 10
    while members(life.processes[0]):
        if time.monotonic() > end:
            os.killpg(life.processes[0], signal.SIGKILL)
            return ["left: processes still run"]
        time.sleep(0.02)
    return []


def members(group: int) -> list[str]:
    """The running processes of a group (Linux)."""
    running = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group_of = path.read_text(encoding="utf-8").rpartition(") ")[2].split()[:3]
            if int(group_of) == group and state != "Z":
                running.append(path.parent.name)
    return running


def until(life: Life, reached: Callable[[], bool]) -> None:
    while not life.codes and not reached():
        time.sleep(0.002)
        life.poll()


def durations(life: Life) -> dict[str, float]:
    """Mean seconds of each phase of an uninterrupted life."""
    spent: dict[str, list[float]] = {mark: [] for mark in PHASES}
    turns = [(moment, mark) for moment, mark in life.marks if mark in PHASES]
    for (begin, mark), (end, _) in pairwise(turns):
        spent[mark].append(end - begin)
    return {mark: round(statistics.fmean(seconds), 3) for mark, seconds in spent.items()}


def write_config(folder: Path, steps: int) -> Path:
    """A config with tiny images and a tiny model, and all kinds of state: GHM, averaged weights, momentum."""
    write_demo(folder / "data", train_images=12, val_images=4)
    values = {
        "output": str(folder / "runs"),
        "device": "cpu",
        "data": {split: {"annotations": str(folder / f"data/{split}.json"), "images": str(folder / f"data/{split}")}
                 for split in ("train", "val")} | {"short_side": 96, "long_side": 128},
        "model": {"backbone": "resnet18", "weights": "none", "norm": "bn", "fpn_channels": 32,
                  "head": {"width": 32, "depth": 1}},
        "class_loss": {"name": "ghm_c"},
        "box_loss": {"name": "ghm_r"},
        "solver": {"batch_size": 2, "lr_batch_size": None, "epochs": 100, "max_steps": steps, "ema": 0.9},
        "evaluation": {"batch_size": 1},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(config: Path, run: str, processes: int, workers: int, every: int) -> Life:
    words = ["train.py", "--config", str(config), "--resume"]
    words += ["--set", f"run={run}", f"data.workers={workers}", f"checkpoint.every={every}"]
    environment = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    log = config.parent / "log.txt"
    log.write_text("", encoding="utf-8")
    born: list[int] = []
    for rank in range(processes):
        process = os.fork()
        if not process:
            live(words, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, born, log, writing)
        with contextlib.suppress(OSError):  # the child may have done it already
            os.setpgid(process, (born or [process])[0])
        born.append(process)
    os.close(writing)
    return Life(born, log, reading)


def live(words: list[str], environment: dict[str, str], born: list[int], log: Path, pipe: int) -> None:
    """In the new process: run train.py and mark its phases; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a new Python, without the handler of our run_main
        os.setpgid(0, born[0] if born else 0)
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ.update(environment)
        sys.argv = words
        if not born:
            mark_calls(pipe)
        run_main(train.main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)  # None is success
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()
        os._exit(code)


def mark_calls(pipe: int) -> None:
    """Write a letter at the start of each phase, and a dot after each step."""

    def marking(call, before: bytes, after: bytes):
        def marked(*arguments, **named):
            os.write(pipe, before)
            result = call(*arguments, **named)
            os.write(pipe, after)
            return result

        return marked

    os.write(pipe, b"b")
    marks = (
        (train, "train_until", b"t", b""),
        (train, "predict", b"e", b""),
        (checkpoint, "save", b"s", b""),
        (Solver, "step", b"", b"."),
    )
    for owner, name, before, after in marks:
        setattr(owner, name, marking(getattr(owner, name), before, after))


def saved(run: Path) -> int:
    """The step of the newest undamaged checkpoint; 0 without one."""
    newest = checkpoint.newest(run)
    return newest.content["run"]["solver"]["step"] if newest else 0


def state(path: Path) -> dict:
    """The parts of a checkpoint that must not depend on interruptions."""
    content = checkpoint.read(path)
    run = {key: value for key, value in content["run"].items() if key not in ("seconds_per_step", "peak_memory")}
    return {key: value for key, value in content.items() if key != "config"} | {"run": run}


def equal(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


if __name__ == "__main__":
    run_main(main)
