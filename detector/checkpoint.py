"""The checkpoint file: write it, read it, and rebuild a model from it alone.

A checkpoint holds plain types and tensors only: config, classes, weights, and the state that run.py resumes from. The
last but one is kept as previous.pt, in case the disk damages the last. Reading compares the checksum of each tensor.
"""

import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from detector import assemble, atomic, torchvision_checkpoint
from detector.config import Config
from detector.configure import resolve
from detector.errors import UserError
from detector.model import RetinaNet

FORMAT = 3  # of RunState. In 2, weight decay included norms and biases, which must not change within a run
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
REQUIRED = {"config": dict, "category_ids": list, "class_names": list, "model": dict}
PER_CLASS_KEYS = ("category_ids", "class_names", "score_thresholds")  # the last two may be empty: not known


class RunState(TypedDict):
    """What resuming needs besides the evaluated weights: see run.py."""

    model: dict[str, Tensor]  # as trained; not averaged
    solver: dict[str, Any]
    criterion: dict[str, Tensor]
    rng: dict[str, Any]
    epoch: int  # epochs begun
    evaluated: int  # step of the last evaluation
    best: float
    seconds_per_step: float | None
    peak_memory: int
    data: NotRequired[dict[str, str]]  # digests of the annotations; not in older checkpoints


class Content(TypedDict):
    """The content of a checkpoint file: a dict, since torch.load(weights_only=True) reads no dataclass."""

    config: dict[str, Any]
    category_ids: list[int]
    class_names: list[str]
    model: dict[str, Tensor]  # the weights that are evaluated
    format: NotRequired[int]
    score_thresholds: NotRequired[list[float]]  # of each class, where its F1 was best; -1 where not known
    run: NotRequired[RunState]  # not in a file of weights alone


class Saved(NamedTuple):
    """The newest whole checkpoint of a run."""

    path: Path
    content: Content
    damaged: list[str]  # messages about a newer one that cannot be read


def save(path: Path, content: Content) -> None:
    """Write a checkpoint. A replaced last.pt becomes previous.pt.

    Raises UserError if the file cannot be written; then the existing files stay.
    """
    try:
        with atomic.replacing(path) as beside:
            torch.save(content, beside)
            if path.name == LAST and path.exists():
                atomic.sync(beside)
                os.replace(path, path.with_name(PREVIOUS))
    except (OSError, RuntimeError) as error:  # torch's writer raises the second
        size = sum(tensor.nbytes for tensor in _tensors(content)) / 1e6
        free = shutil.disk_usage(path.parent).free / 1e6
        raise UserError(
            f"{path}: cannot be written ({str(error).splitlines()[0][:100]}): it takes {size:.0f} MB, "
            f"{free:.0f} MB are free; the run's earlier checkpoints are untouched: free some space and continue with "
            "--resume"
        ) from None


def newest(folder: Path) -> Saved | None:
    """The newest undamaged checkpoint of a run; None without any. Raises UserError if all are damaged."""
    damaged: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            try:
                return Saved(path, read(path), damaged)
            except UserError as error:
                damaged.append(str(error))
    if damaged:
        raise UserError(f"{damaged[0]}; no earlier checkpoint of the run is whole: start another by --set run=NAME")
    return None


def read(path: str | Path) -> Content:
    """Read a checkpoint of train.py, or convert one of torchvision's RetinaNet. Raises UserError for anything else."""
    path = Path(path)
    _check_sums(path)
    content = read_weights(path)
    if torchvision_checkpoint.is_torchvision(content):
        content = torchvision_checkpoint.convert(content, path)
        return cast(Content, content)
    if not all(isinstance(content.get(key), kind) for key, kind in REQUIRED.items()):
        raise UserError(f"{path}: no detector checkpoint; give last.pt or best.pt of a run, or torchvision's RetinaNet")
    lengths = {key: len(content[key]) for key in PER_CLASS_KEYS if content.get(key)}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} of {count}" for key, count in lengths.items())
        raise UserError(f"{path}: its classes do not agree ({counts}); give a checkpoint as train.py wrote it")
    return cast(Content, content)


def read_weights(path: str | Path) -> dict[str, Any]:
    """A file of tensors and plain types by name; UserError for anything else."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; give a file, such as {Path(path) / BEST}")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message suggests to load it anyway, which may run code in the file
        reason = "it is none of PyTorch's, or holds more than tensors"
        raise UserError(f"{path}: not a readable weights file ({reason})") from None
    except Exception as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: not a readable weights file ({detail})") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors by name")
    return content


def build_model(content: Content, path: str | Path, settings: list[str] | None = None) -> tuple[RetinaNet, Config]:
    """The model of a checkpoint, with its weights, in evaluation mode, and its config with `settings` on top."""
    cfg = resolve(content["config"], str(path), settings or [])
    model = assemble.build_model(cfg, len(content["category_ids"]))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        detail = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise UserError(f"{path}: its weights do not fit its config ({detail.strip()})") from None
    return model.eval(), cfg


def score_thresholds(content: Content, unknown: float = -1.0) -> list[float]:
    """The score of each class at its best F1 in the last evaluation; `unknown` if there is none."""
    thresholds = content.get("score_thresholds") or [-1.0] * len(content["category_ids"])
    return [unknown if threshold < 0 else threshold for threshold in thresholds]


def class_names(content: Content) -> list[str]:
    """The names of the classes; "category 7" where the file does not say."""
    return content["class_names"] or [f"category {category_id}" for category_id in content["category_ids"]]


def _check_sums(path: Path) -> None:
    """Raise UserError if the file is an archive, as written by torch.save, and a part fails its checksum."""
    if not zipfile.is_zipfile(path):
        return  # a truncated file is no archive; the reader reports it, and other kinds of files
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a broken table of contents raises all kinds
        damaged = str(error) or type(error).__name__
    if damaged is not None:
        raise UserError(f"{path}: damaged, a checksum does not fit ({damaged[:60]}); take another checkpoint")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
