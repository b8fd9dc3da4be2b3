"""Two processes, started as users start them, give what one gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from detector import checkpoint

ROOT = Path(__file__).parents[1]


def run(*command: object) -> None:
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_and_evaluate_as_one(rectangles, folder):
    # All images alike in size, so that none is padded to another's; GroupNorm, since BatchNorm sees a process's share.
    boxes = [[(i % 2, [6 + 4 * i, 10, 20 + 3 * i, 30])] for i in range(5)]
    annotations, images = rectangles(folder, boxes, classes=2)
    files = {"annotations": annotations, "images": images}
    values = {
        "output": str(folder / "runs"),
        "device": "cpu",
        "data": {"train": files, "val": files, "short_side": 64, "long_side": 64, "workers": 0},
        "model": {
            "backbone": "resnet18",
            "weights": "none",
            "norm": "gn",
            "fpn_channels": 64,
            "head": {"width": 64, "depth": 1},
        },
        "class_loss": {"name": "ghm_c"},
        "box_loss": {"name": "ghm_r"},
        "solver": {"batch_size": 4, "lr_batch_size": None, "lr": 0.01, "epochs": 1, "warmup_steps": 0, "ema": 0.9},
        "tensorboard": {"enabled": False},
        "postprocess": {"score_threshold": 0.0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    arguments = ["train.py", "--config", folder / "config.yaml", "--set"]
    run(*arguments, "run=one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments, "run=two")

    one, two = (checkpoint.read(folder / "runs" / name / "last.pt") for name in ("one", "two"))
    for part in ("model", "criterion"):
        for name, value in one["run"][part].items():
            torch.testing.assert_close(two["run"][part][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert one["run"]["criterion"]["class_loss.updates"] == 2
    metrics = [json.loads((folder / "runs" / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["images"] == metrics[1]["images"] == 5
