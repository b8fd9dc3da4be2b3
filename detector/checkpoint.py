"""Save, resume, and rebuild a model from a checkpoint alone.

A checkpoint is one file of plain types and tensors: config, classes, weights, and for `resume` all the state
of the run. It is written beside and renamed, so that a broken write leaves the old one, and the one before last
is kept: where the disk breaks the last, the run goes on from that. Each tensor has a checksum, which reading compares.
"""

import os
import random
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detector import assemble, config, torchvision_checkpoint
from detector.backbone import load_backbone_weights, read_weights
from detector.config import Config
from detector.criterion import Criterion
from detector.errors import UserError
from detector.model import RetinaNet
from detector.solver import Solver

FORMAT = 3  # of the run's state; 2: weight decay was of norms and biases too, and a run must not change that half-way
LAST, PREVIOUS = "last.pt", "previous.pt"
# Options that a resumed run may have otherwise, by the start of their keys.
MAY_CHANGE = (
    "run",
    "output",
    "device",
    "data.workers",
    "data.train.images",
    "data.val.images",
    "solver.epochs",
    "solver.max_steps",
    "solver.skip_nonfinite",
    "evaluation",
    "checkpoint",
    "tensorboard",
)
KINDS = {"config": dict, "category_ids": list, "class_names": list, "model": dict}
OF_EACH_CLASS = ("category_ids", "class_names", "score_thresholds")  # the last two may be empty: not known


def save(
    path: Path,
    cfg: Config,
    solver: Solver,
    criterion: Criterion,
    *,
    category_ids: list[int],
    class_names: list[str],
    score_thresholds: list[float],
    epoch: int,
    evaluated: int,
    best: float,
    seconds_per_step: float | None,
    peak_memory: int,
) -> None:
    """Write the run's state. A last.pt that is replaced becomes previous.pt.

    Args:
        score_thresholds: of each class, where its F1 was best in the last evaluation; -1 where none is known
        epoch: those begun
        evaluated: the step of the last evaluation
        best: the best AP so far

    Raises UserError where the file cannot be written; then what was there stays.
    """
    content = {
        "format": FORMAT,
        "config": cfg.model_dump(mode="json"),
        "category_ids": list(category_ids),
        "class_names": list(class_names),
        "score_thresholds": list(score_thresholds),
        "model": solver.evaluated_model.state_dict(),
        "run": {
            "model": solver.model.state_dict(),
            "solver": solver.state_dict(),
            "criterion": criterion.state_dict(),
            "rng": _random_states(),
            "epoch": epoch,
            "evaluated": evaluated,
            "best": float(best),
            "seconds_per_step": seconds_per_step,
            "peak_memory": peak_memory,
        },
    }
    beside = path.with_suffix(".tmp")
    try:
        torch.save(content, beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        if path.name == LAST and path.exists():
            os.replace(path, path.with_name(PREVIOUS))
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch's writer knows only the second
        beside.unlink(missing_ok=True)
        size = sum(tensor.nbytes for tensor in _tensors(content)) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        raise UserError(
            f"{path}: cannot be written ({str(error).splitlines()[0][:100]}): it takes {size:.0f} MB, "
            f"{free:.0f} MB are free; the run's earlier checkpoints are untouched: make room and go on with --resume"
        ) from None


def newest(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest checkpoint of a run that is whole, its content, and what is wrong with one newer; None without any.

    UserError where there are some, and none is whole.
    """
    broken: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            try:
                return path, read(path), broken
            except UserError as error:
                broken.append(str(error))
    if broken:
        raise UserError(f"{broken[0]}; no earlier checkpoint of the run is whole: start another by --set run=NAME")
    return None


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours, or one of torchvision's RetinaNet as one of ours; UserError for anything else."""
    path = Path(path)
    _check_sums(path)
    content = read_weights(path)
    if torchvision_checkpoint.is_torchvision(content):
        return torchvision_checkpoint.convert(content, path)
    if not all(isinstance(content.get(key), kind) for key, kind in KINDS.items()):
        raise UserError(f"{path}: no detector checkpoint; give last.pt or best.pt of a run, or torchvision's RetinaNet")
    of_each = {key: len(content[key]) for key in OF_EACH_CLASS if content.get(key)}
    if len(set(of_each.values())) > 1:
        told = ", ".join(f"{key} of {count}" for key, count in of_each.items())
        raise UserError(f"{path}: its classes do not agree ({told}); give a checkpoint as train.py wrote it")
    return content


def build_model(
    content: dict[str, Any], path: str | Path, settings: list[str] | None = None
) -> tuple[RetinaNet, Config]:
    """The model of a checkpoint, with its weights, in evaluation mode, and its config with `settings` on top."""
    cfg = assemble.resolve(content["config"], str(path), settings or [])
    model = assemble.build_model(cfg, len(content["category_ids"]))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        detail = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise UserError(f"{path}: its weights do not fit its config ({detail.strip()})") from None
    return model.eval(), cfg


def resume(
    content: dict[str, Any],
    path: Path,
    cfg: Config,
    solver: Solver,
    criterion: Criterion,
    category_ids: list[int],
    *,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Put the state of a run back; returns what the caller keeps of it.

    That is evaluated, best, seconds_per_step, peak_memory, score_thresholds, and the changes of the config.

    UserError where `cfg` or the classes differ from the run's in what would change its result, unless such `changes`
    are accepted. A run may be made longer or shorter.
    """
    if "run" not in content:
        raise UserError(f"{path}: holds weights alone, no state to resume a run from; give it as model.weights")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path}: its run began with another version of this code (weight decay was once of norms and biases too); "
            f"finish it with that version, or start another from its weights by --set run=NAME model.weights={path}"
        )
    run = content["run"]
    before, now = (config.flat(values) for values in (content["config"], cfg.model_dump(mode="json")))
    before["the classes"], now["the classes"] = content["category_ids"], category_ids
    changes = [
        f"{key} {before.get(key)}, now {now.get(key)}"
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changes and not accept_changes:
        raise UserError(
            f"{path}: was trained with {'; '.join(changes)}: go on with the same, start another run by "
            "--set run=NAME, or --accept-changes"
        )
    try:
        solver.model.load_state_dict(run["model"])
        solver.load_state_dict(run["solver"])
        criterion.load_state_dict(run["criterion"])
    except (RuntimeError, ValueError, KeyError) as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: is of another model, loss or optimizer than the config says ({detail})") from None
    _set_random_states(run["rng"])
    kept = {key: run[key] for key in ("evaluated", "best", "seconds_per_step", "peak_memory")}
    return kept | {"score_thresholds": content.get("score_thresholds"), "changes": changes}


def _check_sums(path: Path) -> None:
    """UserError where the file is an archive, as torch.save's are, with a part that is not as it was written."""
    if not zipfile.is_zipfile(path):
        return  # one cut short is no archive; that and other kinds are for the reader to judge
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # whatever a broken table of contents leads to
        damaged = str(error) or type(error).__name__
    if damaged is not None:
        raise UserError(f"{path}: damaged, a checksum does not fit ({damaged[:60]}); take another checkpoint")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def load_initial_weights(model: RetinaNet, cfg: Config) -> str:
    """Fill a new model as `model.weights` says, and say in a line what was done; UserError where it cannot be.

    A detector's checkpoint fills every tensor that it has in the same shape: all but the class outputs, where
    the classes are others.
    """
    weights = cfg.model.weights
    if weights == "none":
        return "random weights"
    try:
        content = {} if weights == "imagenet" else read_weights(weights)
    except UserError as error:
        raise UserError(f"model.weights: {error}") from None
    if "category_ids" not in content and not torchvision_checkpoint.is_torchvision(content):
        load_backbone_weights(model.backbone, cfg.model.backbone, weights)
        return f"backbone weights: {weights}"
    given = read(weights)["model"]
    own = model.state_dict()
    fitting = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    lacking = [key for key in own if key.startswith("backbone.") and key not in fitting and "num_batches" not in key]
    if lacking or (cfg.model.norm == "gn" and any(key.endswith("running_mean") for key in given)):
        where = f" at {lacking[0]}" if lacking else ""
        raise UserError(
            f"model.weights: {weights} is of another backbone or norm{where}; set model.backbone and model.norm"
        )
    model.load_state_dict(fitting, strict=False)
    fresh = [key for key in own if key not in fitting and "num_batches" not in key]
    return f"weights: {len(fitting)} tensors from {weights}" + (f", random: {', '.join(fresh)}" if fresh else "")


def describe_size(model: nn.Module) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained"
