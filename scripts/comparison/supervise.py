"""Trainings as child processes: some at once, watched in one line, stopped together, each kept as a result.

A run is a config file; its log is beside it. A finished run is known by its result file, whatever became of its folder.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from detector import checkpoint, config
from detector.config import Config
from detector.errors import UserError
from detector.stop import Stop
from scripts.comparison import result

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
ELSEWHERE = (
    "run",
    "output",
    "device",
    "precision",
    "data.workers",
    "data.train",
    "data.val",
    "tensorboard",
    "checkpoint",
)
STEPS = re.compile(r"(\d+)/(\d+) \[")  # of the progress line
EXIT_CODE = re.compile(r"exitcode\s*: (-?\d+)")  # of torchrun's report, which itself ends with 1
TAIL = 2**14  # bytes of a log; that report has some thousand
POLL = 0.5  # seconds


@dataclass
class Run:
    """One training, as the config file says, to be kept in the file `kept`."""

    file: Path
    cfg: Config
    kept: Path
    notes: dict[str, Any]  # what else its result shall hold
    processes: int = 1

    @property
    def name(self) -> str:
        return self.cfg.run

    @property
    def log(self) -> Path:
        return self.file.with_suffix(".log")


@dataclass
class Child:
    run: Run
    process: subprocess.Popen
    log: TextIO
    begun: int  # where in the log it starts: a run that goes on adds to it

    def said(self) -> str:
        """The end of what it wrote."""
        with self.run.log.open("rb") as file:
            file.seek(max(self.begun, self.run.log.stat().st_size - TAIL))
            return file.read().decode("utf-8", errors="replace")


def finished(run: Run) -> bool:
    """Whether the run has a result; UserError where that is of another config."""
    if not run.kept.exists():
        return False
    kept = result.read(run.kept)
    then, now = config.flat(kept["config"]), config.flat(run.cfg.model_dump(mode="json"))
    then["processes"], now["processes"] = kept.get("processes", 1), run.processes
    for key in dict.fromkeys([*now, *then]):
        if now.get(key) != then.get(key) and not key.startswith(ELSEWHERE):
            raise UserError(
                f"{run.kept}: is of a run with {key} {then.get(key)}, now {now.get(key)}: delete it to have it trained "
                "again, or give another --output"
            )
    return True


def train_all(runs: list[Run], jobs: int, keep: Callable[[dict], dict] = lambda full: full) -> bool:
    """Train what has no result yet, `jobs` at once; whether all have one in the end.

    keep: what of a full result is written. A run that diverges has its reason for a result. UserError, after the others
    were stopped and have saved, where a run ends by a slip in what all have in common; SystemExit on a signal.
    """
    waiting = [run for run in runs if not finished(run)]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
    children: dict[int, Child] = {}
    lost: list[str] = []
    shape = "{desc}: {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}"
    quiet = {} if sys.stderr.isatty() else {"mininterval": 60}  # a log file gets a line a minute
    with Stop() as stop, tqdm(total=len(waiting), desc="runs", bar_format=shape, **quiet) as line:
        try:
            done = 0
            while waiting or children:
                for slot in range(jobs):
                    if slot not in children and waiting and stop.number is None:
                        children[slot] = start(waiting.pop(0), slot, jobs)
                time.sleep(POLL)
                for slot, child in list(children.items()):
                    if child.process.poll() is not None:
                        del children[slot]
                        child.log.close()
                        ended(child, jobs, keep, lost)
                        done += 1
                if stop.number is not None:
                    break
                shares = {child.run.name: progress(child.said()) for child in children.values()}
                line.set_postfix_str(", ".join(f"{name} {share:.0%}" for name, share in shares.items()), refresh=False)
                line.update(round(done + sum(shares.values()), 3) - line.n)
        finally:
            stop_all(list(children.values()))
    if stop.number is not None:
        print(f"stopped by {signal.Signals(stop.number).name}; go on with the same command", file=sys.stderr)
        sys.exit(128 + stop.number)
    for line in lost:
        print(line, file=sys.stderr)
    return not lost


def start(run: Run, slot: int, jobs: int) -> Child:
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}  # in which its log is read
    if jobs * run.processes > 1:  # each its share of the cores, and GPUs of its own
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (jobs * run.processes))))
    if jobs > 1 and torch.cuda.device_count() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(cards(slot, run.processes))
    command = [sys.executable, str(TRAIN), "--config", str(run.file), "--resume"]
    if run.processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.processes}"]
    log = run.log.open("a", encoding="utf-8")
    # A session of its own: Ctrl-C would reach it too, and ours be its second signal, which ends it at once.
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    return Child(run, process, log, log.tell())


def cards(slot: int, processes: int) -> list[str]:
    """The GPUs of a slot, of those that we may use ourselves, as CUDA_VISIBLE_DEVICES names them."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    names = ours.split(",")
    first = slot % max(1, len(names) // processes) * processes
    return names[first : first + processes]


def ended(child: Child, jobs: int, keep: Callable[[dict], dict], lost: list[str]) -> None:
    """Keep the result of a process that has ended, or note in `lost` why there is none."""
    run, code, said = child.run, child.process.returncode, child.said()
    if code == 1 and run.processes > 1 and (told := EXIT_CODE.findall(said)):
        code = int(told[-1])  # the last told is the first that ended
    reason = last_line(said)
    if code == 0:
        # Of a run that goes on it is not known what it shared the machine with before.
        alone = {"jobs": jobs} if child.begun == 0 else {}
        result.write(run.kept, keep(result.collect(run.cfg.folder) | run.notes | alone))
        for name in (checkpoint.LAST, checkpoint.PREVIOUS):  # best.pt is kept
            (run.cfg.folder / name).unlink(missing_ok=True)
        tqdm.write(f"{run.name}: AP {result.read(run.kept)['metrics']['AP']:.3f}")
    elif code == 1:
        result.write(run.kept, {"config": run.cfg.model_dump(mode="json"), "failure": reason, **run.notes})
        tqdm.write(f"{run.name}: failed: {reason}")
    elif code == 2:
        raise UserError(f"{run.name}: {reason.removeprefix('error: ')} (its log: {run.log})")
    else:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        lost.append(f"{run.name}: ended by {how}; go on with the same command (its log: {run.log})")
        tqdm.write(lost[-1])


def stop_all(children: list[Child]) -> None:
    """Have the processes save and end."""
    for child in children:
        child.process.send_signal(signal.SIGTERM)
    for child in children:
        child.process.wait()
        child.log.close()


def progress(said: str) -> float:
    """The share of its steps that a run has done, by the end of its log."""
    found = STEPS.findall(said)
    return int(found[-1][0]) / max(1, int(found[-1][1])) if found else 0.0


def last_line(said: str) -> str:
    """What a run said at its end; its error, where it told one."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", said) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]
