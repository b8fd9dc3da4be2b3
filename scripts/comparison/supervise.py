"""Trainings as child processes: several at once, one progress line, stopped together, a result file for each.

A run is a config file with a log beside it. A run is finished when it has a result file, even if its folder is gone.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from detector import checkpoint, config, config_files
from detector.config import Config
from detector.configure import flat_values
from detector.device import usable_cores
from detector.errors import UserError
from detector.stop import Stop
from scripts.comparison import result

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
MACHINE_AND_PATHS = (  # settings that may differ between a kept result and the same run now
    "run",
    "output",
    "device",
    "data.workers",
    "data.cache",
    "data.train",
    "data.val",
    "tensorboard",
    "checkpoint",
)
FORESEEN = re.compile(r"error: (?!process \d+ has lost)")  # a loss that is not finite, say, but no lack of memory
STEPS = re.compile(r"(\d+)/(\d+) \[")  # of the progress line
EXIT_CODE = re.compile(r"exitcode\s*: (-?\d+)")  # in torchrun's report; torchrun itself exits with 1
TAIL = 2**14  # bytes of a log; torchrun's report has a few thousand
POLL = 0.5  # seconds


@dataclass
class Run:
    """One training from a config file, whose result goes into the file `kept`."""

    file: Path
    cfg: Config
    kept: Path
    notes: dict[str, Any]  # added to its result
    processes: int = 1
    title: str = ""  # for the line that reports its result, instead of its name
    keep_best: bool = True  # else best.pt goes too, once there is a result

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
    start: int  # its first byte in the log, to which a resumed run appends
    rest: Iterator[Run]  # what follows once it has a result

    def log_tail(self) -> str:
        """The end of its output."""
        with self.run.log.open("rb") as file:
            file.seek(max(self.start, self.run.log.stat().st_size - TAIL))
            return file.read().decode("utf-8", errors="replace")


def finished(run: Run) -> bool:
    """Whether the run has a result. Raises UserError if that result, or a run that was stopped, has another config."""
    folder, kept = run.cfg.folder, {}
    if run.kept.exists():
        kept = result.read(run.kept)
        before, where, what = kept["config"], run.kept, "it"
    elif any((folder / name).exists() for name in (checkpoint.LAST, checkpoint.PREVIOUS)):
        before, where, what = config_files.read(folder / "config.yaml"), folder, "the folder"
    else:
        return False
    then, now = flat_values(before), config.flat(run.cfg.model_dump(mode="json"))
    then["processes"], now["processes"] = kept.get("processes", 1) if kept else run.processes, run.processes
    if "auto" in (now.get("precision"), then.get("precision")):
        then["precision"] = now.get("precision")
    changes = [
        f"{key} {then.get(key)}, now {now.get(key)}"
        for key in dict.fromkeys([*now, *then])
        if now.get(key) != then.get(key) and not key.startswith(MACHINE_AND_PATHS)
    ]
    for key, digest in run.notes.get("annotations", {}).items():
        if kept.get("annotations", {}).get(key, digest) != digest:  # older results do not have it
            file = f"{key}.annotations"
            changes.append(f"other annotations: {then.get(file)}, now {now[file]}, whose content differs")
    if changes:
        advice = f"delete {what} to train the run again, or give another --output"
        raise UserError(f"{where}: was trained with {changes[0]}: {advice}")
    return bool(kept)


def train_all(
    sequences: Iterable[Iterable[Run]], total: int, jobs: int, keep: Callable[[dict], dict] = lambda full: full
) -> bool:
    """Train the runs without a result, `jobs` at once; return whether all have one in the end.

    sequences: lists or generators, with `total` runs together. A sequence is asked for its next run when the one
    before has a result, so a run may depend on earlier results.
    keep: selects what of a full result is written. The result of a run that diverges is the reason. A run that ends for
    another reason, such as a lack of memory, has no result. A user error in one run stops the others, which save, and
    raises UserError. A signal raises SystemExit.
    """
    waiting: list[tuple[Run, Iterator[Run]]] = []
    done = sum([queue_next(iter(sequence), waiting) for sequence in sequences])
    if done:
        print(f"{done} of {total} runs are already finished")
    children: dict[int, Child] = {}
    lost: list[str] = []
    shape = "{desc}: {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}"
    quiet = {} if sys.stderr.isatty() else {"mininterval": 60}  # a log file gets a line a minute
    with Stop() as stop, tqdm(total=total, initial=done, desc="runs", bar_format=shape, **quiet) as line:
        try:
            while waiting or children:
                for slot in range(jobs):
                    if slot not in children and waiting and stop.number is None:
                        children[slot] = start(*waiting.pop(0), slot, jobs)
                time.sleep(POLL)
                for slot, child in list(children.items()):
                    if child.process.poll() is not None:
                        del children[slot]
                        child.log.close()
                        ended(child, jobs, keep, lost)
                        done += 1
                        if child.run.kept.exists():
                            done += queue_next(child.rest, waiting)
                if stop.number is not None:
                    break
                shares = {child.run.name: progress(child.log_tail()) for child in children.values()}
                line.set_postfix_str(", ".join(f"{name} {share:.0%}" for name, share in shares.items()), refresh=False)
                line.update(round(done + sum(shares.values()), 3) - line.n)
        finally:
            stop_all(list(children.values()))
    if stop.number is not None:
        print(f"stopped by {signal.Signals(stop.number).name}; the same command continues", file=sys.stderr)
        sys.exit(128 + stop.number)
    for reason in lost:
        print(reason, file=sys.stderr)
    return not lost


def queue_next(sequence: Iterator[Run], waiting: list[tuple[Run, Iterator[Run]]]) -> int:
    """Append the first run of `sequence` without a result, and what follows it; return how many before it have one."""
    count = 0
    for run in sequence:
        if not finished(run):
            waiting.append((run, sequence))
            break
        count += 1
    return count


def start(run: Run, rest: Iterator[Run], slot: int, jobs: int) -> Child:
    try:
        run.file.parent.mkdir(parents=True, exist_ok=True)
        run.file.write_text(config.dump(run.cfg), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {run.file} cannot be written ({error.strerror})") from None
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}  # the encoding that the log is read in
    cores = max(1, usable_cores() // jobs)  # divide cores and GPUs among the runs
    environment["PYTHON_CPU_COUNT"] = str(cores)  # for data.workers
    if jobs * run.processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // run.processes)))
    if jobs > 1 and run.cfg.device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(cards(slot, run.processes))
    command = [sys.executable, str(TRAIN), "--config", str(run.file), "--resume"]
    if run.processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.processes}"]
    log = run.log.open("a", encoding="utf-8")
    begin = log.tell()  # before the process writes, which moves it
    # In a session of its own: otherwise Ctrl-C would reach it too, and our SIGTERM would be its second signal, which
    # ends it at once.
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    return Child(run, process, log, begin, rest)


def cards(slot: int, processes: int) -> list[str]:
    """The GPUs of a slot among those visible to us, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    names = visible.split(",")
    first = slot % max(1, len(names) // processes) * processes
    return names[first : first + processes]


def ended(child: Child, jobs: int, keep: Callable[[dict], dict], lost: list[str]) -> None:
    """Write the result of a process that has ended, or append to `lost` why there is none."""
    run, code, log_tail = child.run, child.process.returncode, child.log_tail()
    if code == 1 and run.processes > 1 and (codes := EXIT_CODE.findall(log_tail)):
        code = int(codes[-1])  # torchrun lists the process that ended first last
    reason, title = last_line(log_tail), run.title or run.name
    if code == 0:
        # For a resumed run we do not know what it shared the machine with before.
        about = {"machine": result.machine(run.cfg.device)} | ({"jobs": jobs} if child.start == 0 else {})
        result.write(run.kept, keep(result.collect(run.cfg.folder) | run.notes | about))
        for name in (checkpoint.LAST, checkpoint.PREVIOUS, *[checkpoint.BEST] * (not run.keep_best)):
            (run.cfg.folder / name).unlink(missing_ok=True)
        tqdm.write(f"{title}: AP {result.read(run.kept)['metrics']['AP']:.3f}")
    elif code == 1 and FORESEEN.match(reason):
        result.write(run.kept, {"config": run.cfg.model_dump(mode="json"), "failure": reason, **run.notes})
        tqdm.write(f"{title}: failed: {reason}")
    elif code == 2:
        raise UserError(f"{run.name}: {reason.removeprefix('error: ')} (log: {run.log})")
    else:
        how = signal.Signals(-code).name if code < 0 else reason if code == 1 else f"exit code {code}"
        lost.append(f"{run.name}: ended by {how}; the same command continues it (log: {run.log})")
        tqdm.write(lost[-1])


def stop_all(children: list[Child]) -> None:
    """Make the processes save and end."""
    for child in children:
        child.process.send_signal(signal.SIGTERM)
    for child in children:
        child.process.wait()
        child.log.close()


def progress(log_tail: str) -> float:
    """The share of its steps that a run has done, from the end of its log."""
    steps = STEPS.findall(log_tail)
    return int(steps[-1][0]) / max(1, int(steps[-1][1])) if steps else 0.0


def last_line(log_tail: str) -> str:
    """The last line of a run's output, or its last error if it printed one."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log_tail) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    causes = [error for error in errors if FORESEEN.match(error)]
    return (causes or errors or lines or ["no output"])[-1]
