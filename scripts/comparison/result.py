"""A run as one small JSON file with all that a comparison needs, but without the weights.

    result = collect(Path("runs/coco_focal"))     a run folder, whose validation set is read again
    write(Path("results/coco_focal.json"), result); read("results/coco_focal.json")

The keys of a result:

    config             as resolved
    metrics            of the last evaluation
    curve              step, AP, AP50 and AP75 of each evaluation
    gradient           shares of easy, medium and outlier examples in the gradient, each time they were observed
    probability        that the model gives the true class of positive anchors: means of some 50 parts of the training
    calibration_error
    resampled          {metric: its value on each of DRAWS draws of the validation images}; all runs on a set share them
    machine            from scripts/ablate.py: what it was trained on
    failure            one line, instead of metrics, if the run failed
    jobs, timing       from scripts/ablate.py: how many runs shared the machine, and what --time measured
    tuning             from scripts/ablate.py: what --tune tried and chose, see tuning.py
    tried              of a tuning run of --tune: its values
    annotations        from scripts/ablate.py: the start of the SHA-256 of the study's annotation files
"""

import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.annotations import load_annotations
from data.coco_eval import IOUS
from data.matches import average_precision, calibration_error, draw_images, match
from detector import atomic
from detector.errors import UserError

DRAWS = 500
CURVE = ("AP", "AP50", "AP75")
PROBABILITY = "true_class_probability"
PARTS = 50  # of a training, in the curve of PROBABILITY
SHARES = tuple(f"{name}_{band}" for name in ("class", "box") for band in ("easy", "medium", "outlier"))


def collect(folder: Path) -> dict[str, Any]:
    """The result of an evaluated run folder. Raises UserError if one of its files is missing or broken."""
    config = parse(folder / "config.yaml", yaml.safe_load, "this is not a run folder")
    metrics = parse(folder / "metrics.json", json.loads, "this run has not been evaluated; run eval.py on it")
    for loss in ("class_loss", "box_loss"):
        if not (isinstance(config.get(loss), dict) and "name" in config[loss]):
            raise UserError(f"{folder / 'config.yaml'}: no {loss}.name; give a run folder that train.py wrote")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    result = {"config": config, "metrics": metrics}
    result |= {"curve": points(events, "eval", CURVE), "gradient": points(events, "gradient", SHARES)}
    result["probability"] = means(points(events, "diagnostics", (PROBABILITY,)), PARTS)
    if (folder / "detections.json").exists():
        detections = parse(folder / "detections.json", json.loads, "", kind=list)
        annotations = load_annotations(config["data"]["val"]["annotations"])
        matches = match(annotations, detections)
        result["calibration_error"] = calibration_error(matches)
        draws = np.array([average_precision(matches, draw) for draw in draw_images(matches.images, DRAWS)])
        columns = {"AP": draws.mean(axis=1), **{f"AP{iou}": draws[:, place] for iou, place in IOUS.items()}}
        result["resampled"] = {name: column.round(5).tolist() for name, column in columns.items()}
    return result


def draws(result: dict[str, Any], metric: str) -> list[float]:
    """The metric on each draw of images; empty if the result does not have it."""
    return (result.get("resampled") or {}).get(metric, [])


def points(events: EventAccumulator, group: str, names: tuple[str, ...]) -> list[dict[str, float]]:
    """The scalars GROUP/NAME in a run's TensorBoard files, by step; empty without such files."""
    by_step: dict[int, dict[str, float]] = {}
    for name in names:
        if f"{group}/{name}" in events.Tags()["scalars"]:
            for event in events.Scalars(f"{group}/{name}"):
                by_step.setdefault(event.step, {"step": event.step})[name] = round(event.value, 5)
    return [by_step[step] for step in sorted(by_step)]


def means(points: list[dict[str, float]], parts: int) -> list[dict[str, float]]:
    """The mean of each run of points with the same keys, in at most this many parts."""
    size = -(-len(points) // parts) or 1
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [{key: round(statistics.fmean(point[key] for point in run), 5) for key in run[0]} for run in runs]


def machine(device: str) -> dict[str, str]:
    """What the seconds and bytes of a run with this option `device` were measured on: a GPU or the processor."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass
    if device != "cpu" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device if ":" in device else None)
    else:
        name = f"{os.cpu_count()} cores of {processor}"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "os": sys.platform}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write to a temporary file and rename it. Raises UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, json.dumps(result) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def read(path: str | Path) -> dict[str, Any]:
    """Read a result file. Raises UserError for anything else."""
    if Path(path).suffix != ".json":
        raise UserError(f"{path}: not a result file (.json); give a file that scripts/ablate.py wrote, or a run folder")
    result = parse(Path(path), json.loads, "give a run folder or a result file")
    config, about = result.get("config"), result.get("metrics", result.get("failure"))
    losses = isinstance(config, dict) and all(
        isinstance(config.get(key), dict) and "name" in config[key] for key in ("class_loss", "box_loss")
    )
    if not losses or not isinstance(about, dict if "metrics" in result else str):
        raise UserError(f"{path}: not a result of a run; give a file that scripts/ablate.py wrote, or a run folder")
    return {key: value for key, value in result.items() if value is not None}  # null means unknown


def parse(path: Path, load: Any, if_missing: str, kind: type = dict) -> Any:
    """The content of a YAML or JSON file, which must be a `kind`. Raises UserError, with `if_missing` for no file."""
    try:
        content = load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {if_missing}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:  # ValueError: JSON, and bytes that are not UTF-8
        # YAML's messages run over several lines.
        raise UserError(f"{path}: broken: {' '.join(str(error).split())}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: broken: expected a {kind.__name__}, found a {type(content).__name__}")
    return content
