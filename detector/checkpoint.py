"""Save, resume, and rebuild a model from a checkpoint alone.

A checkpoint is one file of plain types and tensors: config, classes, weights, and for `resume` all the state
of the run. It is written beside and renamed, so that a broken write leaves the old one.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detector import assemble, config, torchvision_checkpoint
from detector.backbone import load_backbone_weights, read_weights
from detector.config import Config
from detector.criterion import Criterion
from detector.errors import UserError
from detector.model import RetinaNet
from detector.solver import Solver

FORMAT = 1
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
    "evaluation",
    "tensorboard",
)
KINDS = {"config": dict, "category_ids": list, "class_names": list, "model": dict}


def save(
    path: Path,
    cfg: Config,
    solver: Solver,
    criterion: Criterion,
    *,
    category_ids: list[int],
    class_names: list[str],
    epoch: int,
    best: float,
    seconds_per_step: float | None,
) -> None:
    """Write the run's state; `epoch` counts those begun, `best` is the best AP so far."""
    content = {
        "format": FORMAT,
        "config": cfg.model_dump(mode="json"),
        "category_ids": list(category_ids),
        "class_names": list(class_names),
        "model": solver.evaluated_model.state_dict(),
        "run": {
            "model": solver.model.state_dict(),
            "solver": solver.state_dict(),
            "criterion": criterion.state_dict(),
            "rng": torch.get_rng_state(),
            "epoch": epoch,
            "best": float(best),
            "seconds_per_step": seconds_per_step,
        },
    }
    beside = path.with_suffix(".tmp")
    torch.save(content, beside)
    os.replace(beside, path)


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours, or one of torchvision's RetinaNet as one of ours; UserError for anything else."""
    path = Path(path)
    content = read_weights(path)
    if torchvision_checkpoint.is_torchvision(content):
        return torchvision_checkpoint.convert(content, path)
    if not all(isinstance(content.get(key), kind) for key, kind in KINDS.items()):
        raise UserError(f"{path}: no detector checkpoint; give last.pt or best.pt of a run, or torchvision's RetinaNet")
    return content


def build_model(content: dict[str, Any], path: str | Path) -> tuple[RetinaNet, Config]:
    """The model of a checkpoint, with its weights, in evaluation mode, and its config."""
    cfg = assemble.complete(config.build(content["config"], str(path)), str(path))
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
) -> dict[str, Any]:
    """Put the state of a run back; returns what the caller keeps of it: best, seconds_per_step.

    UserError where `cfg` or the classes differ from the run's in what would change its result. A run may be made
    longer or shorter.
    """
    if "run" not in content:
        raise UserError(f"{path}: holds weights alone, no state to resume a run from; give it as model.weights")
    run = content["run"]
    before, now = (config.flat(values) for values in (content["config"], cfg.model_dump(mode="json")))
    before["the classes"], now["the classes"] = content["category_ids"], category_ids
    for key in dict.fromkeys([*now, *before]):
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE):
            raise UserError(
                f"{path}: was trained with {key} {before.get(key)}, now it is {now.get(key)}; go on with the same, or "
                "start another run by --set run=NAME"
            )
    try:
        solver.model.load_state_dict(run["model"])
        solver.load_state_dict(run["solver"])
        criterion.load_state_dict(run["criterion"])
    except (RuntimeError, ValueError, KeyError) as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: is of another model, loss or optimizer than the config says ({detail})") from None
    torch.set_rng_state(run["rng"])
    return {"best": run["best"], "seconds_per_step": run["seconds_per_step"]}


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
