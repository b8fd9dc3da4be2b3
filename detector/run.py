"""The state of a run, which its checkpoints save and --resume restores as a whole."""

from dataclasses import dataclass, field
from typing import TextIO

import torch

from detector import checkpoint, config, distributed
from detector.checkpoint import BEST, LAST, PREVIOUS, Saved
from detector.config import Config
from detector.configure import flat_values
from detector.criterion import Criterion
from detector.errors import UserError
from detector.metrics import Metrics, RunFigures
from detector.randomness import random_states, set_random_states
from detector.solver import Solver
from detector.structures import Batch

# Options that may differ when a run is resumed, by the start of their keys.
MAY_CHANGE = (
    "run",
    "output",
    "device",
    "data.workers",
    "data.cache",
    "data.train.images",
    "data.val.images",
    "solver.epochs",
    "solver.max_steps",
    "solver.skip_nonfinite",
    "evaluation",
    "checkpoint",
    "tensorboard",
)


@dataclass
class Run:
    """The state of a training run, from which it can continue as if it had not stopped."""

    cfg: Config
    solver: Solver  # with the model, and the number of steps done
    criterion: Criterion
    category_ids: list[int]
    class_names: list[str]
    steps_per_epoch: int
    data: dict[str, str]  # a digest of the annotations of data.train and of data.val
    evaluated_step: int = 0  # of the last evaluation
    best_ap: float = float("-inf")  # the highest so far
    score_thresholds: list[float] = field(default_factory=list)  # of each class, where its F1 was best; -1: unknown
    seconds_per_step: float | None = None  # median
    peak_memory: int = 0  # bytes
    lock: TextIO | None = None  # the run's config.yaml, open as long as this process trains it

    def __post_init__(self) -> None:
        self.score_thresholds = self.score_thresholds or [-1.0] * len(self.category_ids)

    @property
    def device(self) -> torch.device:
        return self.solver.parameters[0].device

    @property
    def step(self) -> int:
        return self.solver.step_count

    @property
    def epoch(self) -> int:
        """How many epochs have begun."""
        return -(-self.step // self.steps_per_epoch)

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and batch of the next step."""
        return divmod(self.step, self.steps_per_epoch)

    @property
    def figures(self) -> RunFigures:
        """The run's entries in metrics.json."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "seconds_per_step": self.seconds_per_step,
            "peak_memory": self.peak_memory,
        }

    @property
    def evaluation_due(self) -> bool:
        """True at the end of the training, and after every `evaluation.every` epochs unless that is done."""
        epoch, batch = self.position
        after_epoch = batch == 0 and epoch > 0 and epoch % self.cfg.evaluation.every == 0
        return self.solver.done or (after_epoch and self.evaluated_step != self.step)

    @property
    def next_pause(self) -> int:
        """The step at which to pause and save: at the end of the epoch, or at a multiple of checkpoint.every."""
        every = self.cfg.checkpoint.every
        return min((self.position[0] + 1) * self.steps_per_epoch, (self.step // every + 1) * every)

    def record_and_save(self, metrics: Metrics) -> None:
        """Record an evaluation of the current weights and save them; as best.pt too, if AP is the highest so far."""
        self.evaluated_step = self.step
        by_class = metrics["per_class"]
        self.score_thresholds = [by_class[name]["threshold"] if name in by_class else -1.0 for name in self.class_names]
        if metrics["AP"] > self.best_ap:
            self.best_ap = metrics["AP"]
            # Before last.pt: after an interruption between the two, last.pt would know this AP and never save best.pt.
            self.save(BEST)
        self.save(LAST)

    def save(self, name: str) -> None:
        """Write a checkpoint into the run's folder. If that fails, all processes raise UserError."""
        with distributed.together():
            if distributed.is_main():
                checkpoint.save(self.cfg.folder / name, self.content())

    def content(self) -> checkpoint.Content:
        return {
            "format": checkpoint.FORMAT,
            "config": self.cfg.model_dump(mode="json"),
            "category_ids": list(self.category_ids),
            "class_names": list(self.class_names),
            "score_thresholds": list(self.score_thresholds),
            "model": self.solver.evaluated_model.state_dict(),
            "run": {
                "model": self.solver.model.state_dict(),
                "solver": self.solver.state_dict(),
                "criterion": self.criterion.state_dict(),
                "rng": random_states(self.device),
                "epoch": self.epoch,
                "evaluated": self.evaluated_step,
                "best": float(self.best_ap),
                "seconds_per_step": self.seconds_per_step,
                "peak_memory": self.peak_memory,
                "data": dict(self.data),
            },
        }

    def resume(self, saved: Saved, *, accept_changes: bool = False) -> list[str]:
        """Continue from a checkpoint; returns remarks on damaged files, on changes, and if it is finished.

        Raises UserError if a change in the config or the data would change the result, unless `accept_changes`. A run
        may become longer or shorter.
        """
        path, content = saved.path, saved.content
        if "run" not in content:
            raise UserError(f"{path}: holds weights alone, no state to resume a run from; give it as model.weights")
        if content.get("format") != checkpoint.FORMAT:
            raise UserError(
                f"{path}: this run began with an older version of the code, which decayed norms and biases too; finish "
                f"it with that version, or start another from its weights by --set run=NAME model.weights={path}"
            )
        changes = self._changes_since(content)
        if changes and not accept_changes:
            raise UserError(
                f"{path}: was trained with {'; '.join(changes)}: continue with the same, start another run by "
                "--set run=NAME, or --accept-changes"
            )
        state = content["run"]
        try:
            self.solver.model.load_state_dict(state["model"])
            self.solver.load_state_dict(state["solver"])
            self.criterion.load_state_dict(state["criterion"])
        except (RuntimeError, ValueError, KeyError) as error:
            detail = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{path}: is of another model, loss or optimizer than the config says ({detail})") from None
        set_random_states(state["rng"], self.device)
        if not any(change.startswith("data.val") for change in changes):  # AP of other images does not compare
            self.evaluated_step, self.best_ap = state["evaluated"], state["best"]
        self.seconds_per_step, self.peak_memory = state["seconds_per_step"], state["peak_memory"]
        self.score_thresholds = checkpoint.score_thresholds(content)
        remarks = [*saved.damaged, *(f"changed: {change}" for change in changes)]
        if self.solver.done and self.evaluated_step == self.step:
            longer = "solver.max_steps" if self.cfg.solver.max_steps else "solver.epochs"
            remarks.append(f"finished at step {self.step}, so only evaluated again; a larger {longer} trains longer")
        return remarks

    def _changes_since(self, content: checkpoint.Content) -> list[str]:
        before, now = flat_values(content["config"]), config.flat(self.cfg.model_dump(mode="json"))
        before["the classes"], now["the classes"] = content["category_ids"], self.category_ids
        before |= {f"{name}:": digest for name, digest in content["run"].get("data", self.data).items()}
        now |= {f"{name}:": digest for name, digest in self.data.items()}
        return [
            f"{key} {before.get(key)}, now {now.get(key)}"
            for key in dict.fromkeys([*now, *before])
            if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
        ]

    def refuse_unequal_processes(self, saved: Saved | None) -> None:
        """Raise UserError if config, data or checkpoint differ between processes. Paths of results and data may differ.

        Call it before `resume`, which could raise in one process alone.
        """
        options = config.flat(self.cfg.model_dump(mode="json"))
        places = ("output", "data.train", "data.val")
        shared = {key: value for key, value in options.items() if not key.startswith(places)}
        step = saved.content.get("run", {}).get("solver", {}).get("step") if saved else 0
        distributed.same_everywhere(shared | self.data | {"the checkpoint's step": step})

    def open_folder(self) -> None:
        """Make the run's folder and write its config. Raises UserError if another process trains in it."""
        folder = self.cfg.folder
        with distributed.together():
            if distributed.is_main():
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    self.lock = (folder / "config.yaml").open("a", encoding="utf-8")
                    if not locked(self.lock):
                        raise UserError(f"{folder}: another process trains this run; wait for its end, or stop it")
                    self.lock.truncate(0)
                    print(config.dump(self.cfg), end="", file=self.lock, flush=True)
                except OSError as error:
                    raise UserError(f"output: the run folder {folder} cannot be written ({error.strerror})") from None

    def describe_files(self) -> str:
        """Where the results are, in one line."""
        folder, pictures = self.cfg.folder, ["detections.png"] * (self.cfg.tensorboard.images > 0)
        names = [LAST, BEST, "metrics.json", "detections.json", *pictures]
        text = f"in {folder}: {', '.join(name for name in names if (folder / name).exists())}"
        return text + (f"; tensorboard --logdir {self.cfg.output}" if any(folder.glob("events.out.*")) else "")

    def save_batch(self, batch: Batch) -> str:
        """Save this process's images of a step whose loss is not finite; returns a text: where, and what to do."""
        path, batch = self.cfg.folder / f"nonfinite_{distributed.rank()}.pt", batch.to(torch.device("cpu"))
        try:
            targets = [{"boxes": target.boxes.clone(), "labels": target.labels.clone()} for target in batch.targets]
            shared = {"images": batch.images.clone(), "targets": targets, "sizes": batch.sizes.tolist()}
            torch.save(shared | {"image_ids": batch.image_ids, "original_sizes": batch.original_sizes}, path)
        except (OSError, RuntimeError):
            return f"they could not be saved in {path}"
        return (
            f"they are in {path} for a look; lower solver.lr or set solver.clip_norm, and continue with --resume "
            "--accept-changes"
        )


def locked(file: TextIO) -> bool:
    """Lock a file until it is closed; False if another process has locked it."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        pass
    return True


def checkpoint_to_resume(cfg: Config, *, resume: bool) -> Saved | None:
    """The checkpoint to continue from, if any. UserError if the folder holds a run and `resume` is false."""
    if not resume and any((cfg.folder / name).exists() for name in (LAST, PREVIOUS, BEST)):
        raise UserError(f"{cfg.folder} already holds a run: continue with --resume, or name another by --set run=NAME")
    return checkpoint.newest(cfg.folder)
