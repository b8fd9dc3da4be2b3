"""A real training beside its own steps on batches that lie in the device's memory.

    python scripts/bench/real_training.py DATA --output FOLDER [--short-side 800] [--batch 16] [--images 3200]

DATA holds train.json, val.json and images/. Trains ResNet-50, random weights with frozen BatchNorm, on --images of its
images, repeated if needed. Model and data options are those of configs/coco, data.workers and precision auto; the
learning rate is low, because nothing is learnt. Each JPEG file is read and decoded whenever it is used. Prints the
median of images a second and the share of the time that steps waited for images, both over the last of three epochs, in
which nearly each size of images has its graph; then images a second of the steps alone, without loading, logging and
reading the losses.
"""

import argparse
import json
import statistics
from itertools import cycle, islice
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from detector.config import Config
from detector.configure import configure
from detector.device import pick_device
from detector.errors import run_main
from scripts.bench import measure
from scripts.bench.step import backbone_weights
from scripts.comparison.timing import training_steps

EPOCHS = 3
BATCHES = 16
STEPS = 6 * BATCHES
COCO = Path(__file__).resolve().parents[2] / "configs/coco/focal.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--short-side", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", type=int, default=3200)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    repeated = repeat(json.loads((args.data / "train.json").read_text(encoding="utf-8")), args.images)
    (args.output / "train.json").write_text(json.dumps(repeated), encoding="utf-8")
    torch.save(backbone_weights("resnet50"), args.output / "resnet50.pth")
    settings = {
        "output": args.output,
        "data.train.annotations": args.output / "train.json",
        "data.train.images": args.data / "images",
        "data.val.annotations": args.data / "val.json",
        "data.val.images": args.data / "images",
        "data.short_side": args.short_side,
        "data.long_side": args.short_side * 1333 // 800,
        "data.trust": True,
        "model.weights": args.output / "resnet50.pth",
        "solver.lr": 1e-4,
        "solver.batch_size": args.batch,
        "solver.epochs": EPOCHS,
        "tensorboard.every": 5,
        "tensorboard.gradients": 0,
    }
    cfg = configure(str(COCO), [f"{key}={value}" for key, value in settings.items()])
    train.train(cfg, pick_device(cfg.device))
    events = EventAccumulator(str(cfg.folder), size_guidance={"scalars": 0}).Reload()
    speed, wait = (
        [event.value for event in events.Scalars(f"speed/{name}")] for name in ("images_per_second", "data_wait")
    )
    last = slice(-(len(speed) // EPOCHS), None)  # before, kernels are chosen and graphs recorded
    real, alone = statistics.median(speed[last]), speed_of_steps(cfg)
    print(f"\n{measure.environment()}")
    print(f"{real:.1f} images/s (median), {statistics.mean(wait[last]):.1%} of the time waiting for images")
    print(f"{alone:.1f} images/s of the steps alone: the training has {real / alone:.1%} of that")


def speed_of_steps(cfg: Config) -> float:
    """Images a second of steps in a row, on the first batches of the training."""
    turns, warmup = training_steps({"alone": cfg}, BATCHES)
    step = turns["alone"]
    for _ in range(warmup):
        step()
    return 1000 * cfg.solver.batch_size * STEPS / measure.milliseconds(lambda: [step() for _ in range(STEPS)])


def repeat(coco: dict, count: int) -> dict:
    """The photos under new ids, repeated until there are `count`."""
    by_image: dict[int, list[dict]] = {}
    for annotation in coco["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    images: list[dict] = []
    annotations: list[dict] = []
    for number, image in enumerate(islice(cycle(coco["images"]), count)):
        images.append(image | {"id": number})
        for annotation in by_image.get(image["id"], []):
            annotations.append(annotation | {"id": len(annotations) + 1, "image_id": number})
    return coco | {"images": images, "annotations": annotations}


if __name__ == "__main__":
    run_main(main)
