"""Time and memory on a data set of COCO's size: start, reading, an epoch's order, scoring, a checkpoint.

    python scripts/bench/coco_size.py [--images 118287] [--boxes 860001] [--repeats 3]

Writes annotation files into a temporary folder (473 MB with polygons, and 5,000 images for validation). The images are
hard links to a few pictures. Each row runs in its own process: seconds, CPU seconds (which other work on the machine
hardly changes), peak memory, and how much of that is the process's own. The rest is the code of PyTorch and other
libraries, which is in memory once for all processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from detector.errors import run_main
from scripts.bench import measure

ROOT = Path(__file__).resolve().parents[2]
CLASSES, VAL_IMAGES, FOUND = 80, 5000, 100  # FOUND: detections of an image
PICTURES = 8  # different ones
POINTS = 20  # of a polygon, on average
SIZE = (480, 640)  # height, width
# Each program prints its figures as JSON. STARTED is the time at which its process was started.
HEAD = """
import json, os, time
def clock():
    return time.time(), time.process_time()
def tell(begin):
    figures = [now - then for now, then in zip(clock(), begin)]
    # Not from getrusage, which starts with the memory of the parent process.
    status = dict(line.split(":") for line in open("/proc/self/status", encoding="utf-8"))
    peak, of_files = (int(status[key].split()[0]) * 1024 / 1e9 for key in ("VmHWM", "RssFile"))
    figures += [peak, peak - of_files]  # files: the code of libraries, which all processes on a machine share
    print("FIGURES", json.dumps(figures), flush=True)
    os._exit(0)
"""
PROGRAMS = {
    "start to the first step": """
import train
train_until = train.train_until
def first_step(*args, **last):  # the last argument is the step to train to
    train_until(*args, **dict.fromkeys(last, 1))
    tell((float(os.environ["STARTED"]), 0))
train.train_until = first_step
train.main()
""",
    "check_data.py and eval.py: reading train": """
import scripts.check_data
from data.coco import CocoDataset
from data.transforms import EvalTransform
begin = clock()
CocoDataset(os.environ["TRAIN"], os.environ["IMAGES"], EvalTransform(96, 128))
tell(begin)
""",
    "order of an epoch, batches of 16": """
import numpy as np
from data.samplers import TrainSampler
sampler = TrainSampler(np.ones(int(os.environ["COUNT"])), 16, seed=0)
begin = clock()
assert len(list(sampler)) == len(sampler)
tell(begin)
""",
    "scoring 5,000 images, 100 detections each": """
import numpy as np, torch
from data.coco import CocoDataset
from data.coco_eval import score
from data.transforms import EvalTransform
from detector.structures import Detections
data = CocoDataset(os.environ["VAL"], os.environ["IMAGES"], EvalTransform(96, 128))
rng = np.random.default_rng(0)
def found():
    corner = rng.uniform(0, 300, (100, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 150, (100, 2))], axis=1)
    return Detections(torch.tensor(boxes), torch.tensor(rng.random(100)), torch.tensor(rng.integers(0, 80, 100)))
detections = {image: found() for image in data.image_ids}
begin = clock()
score(data.annotations, detections, data.category_ids)
tell(begin)
""",
    "a checkpoint of resnet50": """
import train
from detector import checkpoint
save = checkpoint.save
def saved(path, *args, **options):
    begin = clock()
    save(path, *args, **options)
    tell(begin)
train.train_until = lambda *args, **options: None
train.checkpoint.save = saved
train.main()
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--boxes", type=int, default=860_001)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder, args.images, args.boxes)
        megabytes = (folder / "train.json").stat().st_size / 1e6
        print(f"{measure.environment()}\n")
        print(f"{args.images:,} images, {args.boxes:,} boxes, annotation file of {megabytes:,.0f} MB\n")
        rows = []
        for what, program in PROGRAMS.items():
            figures = [run(program, folder, args.images) for _ in range(args.repeats)]
            medians = [statistics.median(values) for values in zip(*figures)]
            rows.append([what, *(f"{median:.2f}" for median in medians)])
    print(measure.table(["", "s", "CPU s", "GB", "own GB"], rows))


def run(program: str, folder: Path, images: int) -> list[float]:
    """The seconds, CPU seconds and GB that a program of PROGRAMS prints."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        settings = ["run=t", f"output={output}", "device=cpu", "tensorboard.enabled=false", "data.workers=0"]
        settings += [
            "model.weights=none",
            "model.norm=bn",
            f"model.backbone={'resnet50' if 'checkpoint.save' in program else 'resnet18'}",
        ]
        settings += ["model.fpn_channels=64", "model.head.width=64"]
        settings += ["data.short_side=96", "data.long_side=128", "solver.batch_size=2"]
        for split in ("train", "val"):
            settings += [f"data.{split}.annotations={folder / split}.json", f"data.{split}.images={folder / 'images'}"]
        command = [sys.executable, "-c", HEAD + program]
        command += ["--config", str(ROOT / "configs/coco/focal.yaml"), "--set", *settings]
        files = {"TRAIN": str(folder / "train.json"), "VAL": str(folder / "val.json"), "COUNT": str(images)}
        shell = 'STARTED=$(date +%s.%N) exec "$@"'  # the clock starts before Python does
        environment = os.environ | files | {"IMAGES": str(folder / "images"), "PYTHONPATH": str(ROOT)}
        words = ["bash", "-c", shell, "bash", *command]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        sys.exit((done.stderr.strip() or "it printed no figures").splitlines()[-1])
    return json.loads(lines[-1].removeprefix("FIGURES "))


def write_set(folder: Path, images: int, boxes: int) -> None:
    """Write train.json, val.json and the folder images/ of both."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    originals = [folder / f"{number}.jpg" for number in range(PICTURES)]
    for original in originals:
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        cv2.imwrite(str(original), cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC))
    for split, count, box_count in (("train", images, boxes), ("val", VAL_IMAGES, VAL_IMAGES * 36_781 // 5000)):
        names = [f"{split}{number:012}.jpg" for number in range(count)]
        for number, name in enumerate(names):
            os.link(originals[number % PICTURES], folder / "images" / name)
        with (folder / f"{split}.json").open("w", encoding="utf-8") as file:
            file.write('{"info": {"year": 2017}, "images": [')
            file.write(", ".join(json.dumps(about_image(number, name)) for number, name in enumerate(names)))
            file.write('], "annotations": [')
            for number, record in enumerate(annotations(rng, box_count, count)):
                file.write((", " if number else "") + json.dumps(record))
            categories = [{"supercategory": "thing", "id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)]
            file.write(f'], "categories": {json.dumps(categories)}}}')


def about_image(number: int, name: str) -> dict:
    """A record as long as COCO's own."""
    return {
        "license": 3,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/train2017/{name}",
        "height": SIZE[0],
        "width": SIZE[1],
        "date_captured": "2013-11-14 11:18:45",
        "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
        "id": number,
    }


def annotations(rng: np.random.Generator, count: int, images: int) -> Iterator[dict]:
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array(SIZE[::-1]) - sides)
    boxes = np.concatenate([corners, sides], axis=1).round(2).tolist()
    areas = (sides.prod(axis=1) * rng.uniform(0.4, 1, count)).round(4).tolist()  # of a mask
    columns = (rng.integers(images, size=count), rng.integers(1, CLASSES + 1, count), rng.random(count) < 0.01)
    points = rng.poisson(POINTS, count) + 3
    for number, (box, area, image, category, crowd) in enumerate(zip(boxes, areas, *(c.tolist() for c in columns))):
        spread = rng.random((points[number], 2)) * box[2:] + box[:2]
        yield {
            "segmentation": [spread.round(2).flatten().tolist()],
            "area": area,
            "iscrowd": int(crowd),
            "image_id": image,
            "bbox": box,
            "category_id": category,
            "id": 900_000_000_000 + number,
        }


if __name__ == "__main__":
    run_main(main)
