"""Real COCO images: ids with gaps, crowds, images without boxes, grayscale, all aspects. Skipped without them."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import train
from detector import checkpoint
from detector.configure import configure

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "coco_free"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")

PAIRS = [("ce", "smooth_l1"), ("ohem", "l1"), ("focal", "asl1"), ("ghm_c", "ghm_r")]


@pytest.mark.parametrize("class_loss, box_loss", PAIRS)
def test_every_loss_trains_and_is_scored(folder, class_loss, box_loss):
    images = str(DATA / "images")
    files = {split: {"annotations": str(DATA / f"{split}.json"), "images": images} for split in ("train", "val")}
    values = {
        "output": str(folder),
        "data": {**files, "short_side": 96, "long_side": 160, "workers": 0, "strong": True},
        "model": {
            "backbone": "resnet18",
            "weights": "none",
            "norm": "bn",
            "fpn_channels": 32,
            "head": {"width": 32, "depth": 1},
        },
        "class_loss": {"name": class_loss},
        "box_loss": {"name": box_loss},
        "solver": {"batch_size": 4, "lr": 1e-3, "max_steps": 3, "warmup_steps": 1},
        "postprocess": {"score_threshold": 0.0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    cfg = configure(str(folder / "config.yaml"))
    metrics = train.train(cfg, torch.device("cpu"))

    truth = json.loads((DATA / "val.json").read_text())
    assert metrics["images"] == len(truth["images"])
    boxes = {c["id"]: sum(a["category_id"] == c["id"] and not a["iscrowd"] for a in truth["annotations"])
             for c in truth["categories"]}  # fmt: skip
    assert {c["name"]: boxes[c["id"]] for c in truth["categories"]} == {
        name: values["boxes"] for name, values in metrics["per_class"].items()
    }
    assert 0 <= metrics["AP"] <= 1

    ids = checkpoint.read(cfg.folder / "last.pt")["category_ids"]
    assert ids == sorted(boxes) and ids[-1] == 90 and len(ids) == 80  # COCO's gaps
