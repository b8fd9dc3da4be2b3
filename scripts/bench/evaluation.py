"""COCO evaluation beside pycocotools: from detections in tensors to the 12 numbers.

    python scripts/bench/evaluation.py [--images 5000] [--detections 100] [--repeats 3] [--seed 0]

The peer makes a list of result dicts and calls COCO.loadRes and COCOeval, as is common. Its ground truth is indexed
beforehand, ours is indexed in each call. They alternate in one process; times are medians. Memory is the peak of one
call beyond the ground truth and the detections, each in its own process. The second table is ours with a tenth of the
detections and with all. The exit code is 1 unless the 12 numbers are equal to the bit.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # everything here runs on the CPU

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.annotations import Annotations, parse_annotations
from data.coco_eval import score
from detector.errors import run_main
from detector.structures import Detections
from scripts.bench import measure

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
CLASSES = 80

Case = tuple[Annotations, dict[int, Detections], list[int]]
Scoring = Callable[[], Mapping[str, object]]  # to NUMBERS, and more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="detections of an image")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, about a minute each at the default size")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = (args.images, args.detections, args.seed)
    print(measure.environment())

    peaks = {name: alone(name, *size) / measure.MIB for name in CALLS}
    calls = {name: prepare(make_case(*size)) for name, prepare in CALLS.items()}
    metrics = {name: call() for name, call in calls.items()}  # the warm-up too
    times = measure.alternate(calls, args.repeats, warmup=0)
    medians = measure.medians(times)
    print(f"\n{args.images:,} images, {args.detections} detections each; ours is {metrics['ours']['engine']}\n")
    rows = [
        [name, f"{medians[name]:,.0f}", f"{measure.ratio(times, 'pycocotools', name):.1f}", f"{peaks[name]:,.0f}"]
        for name in CALLS
    ]
    print(measure.table(["", "ms", "times as fast", "peak MiB"], rows))

    counts = (max(1, args.detections // 10), args.detections)
    growing = {f"{count} an image": ours(make_case(args.images, count, args.seed)) for count in counts}
    growth = measure.medians(measure.alternate(growing, max(5, args.repeats)))
    print()
    print(measure.table(["detections", "ms"], [[name, f"{value:,.0f}"] for name, value in growth.items()]))

    unequal = [name for name in NUMBERS if metrics["ours"][name] != metrics["pycocotools"][name]]
    print()
    print(measure.table(["", *NUMBERS], [[name, *(f"{n[key]:.4f}" for key in NUMBERS)] for name, n in metrics.items()]))
    print(f"\nUnequal: {', '.join(unequal)}" if unequal else "\nAll 12 numbers are equal to the bit.")
    sys.exit(1 if unequal else 0)


def make_case(images: int, detections: int, seed: int) -> Case:
    """Ground truth like COCO's, and detections like a detector's: four fifths are near a box."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(7.4, images)
    owners = np.repeat(np.arange(images), counts)
    truth, labels = random_boxes(rng, len(owners)), rng.integers(CLASSES, size=len(owners))
    columns = {
        "image_id": owners,
        "category_id": labels + 1,
        "bbox": truth,
        "area": truth[:, 2] * truth[:, 3] * rng.uniform(0.4, 1, len(owners)),  # of a mask
        "iscrowd": (rng.random(len(owners)) < 0.02).astype(int),
    }
    rows = zip(*(column.tolist() for column in columns.values()))
    annotations = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(images)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)],
        "annotations": [{"id": number, **dict(zip(columns, row))} for number, row in enumerate(rows, start=1)],
    }

    image = np.repeat(np.arange(images), detections)
    boxes, classes = random_boxes(rng, len(image)), rng.integers(CLASSES, size=len(image))
    near = (rng.random(len(image)) < 0.8) & (counts[image] > 0)
    source = (np.cumsum(counts) - counts)[image[near]] + (rng.random(near.sum()) * counts[image[near]]).astype(int)
    boxes[near] = truth[source] + rng.normal(0, 0.1, (len(source), 4)) * truth[source][:, [2, 3, 2, 3]]
    classes[near] = np.where(rng.random(len(source)) < 0.7, labels[source], classes[near])
    boxes[:, 2:] += boxes[:, :2]
    scores = rng.random(len(image)).round(3)  # some are tied
    parts = (torch.from_numpy(boxes).float(), torch.from_numpy(scores).float(), torch.from_numpy(classes))
    each = zip(*(part.split(detections) for part in parts))
    by_image = {i: Detections(*of_image) for i, of_image in enumerate(each)}
    return parse_annotations(annotations), by_image, list(range(1, CLASSES + 1))


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) xywh in an image of 640 x 480, of all sizes."""
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * ((640, 480) - sides), sides], axis=1)


def ours(case: Case) -> Scoring:
    return lambda: score(*case)


def pycocotools(case: Case) -> Scoring:
    annotations, detections, category_ids = case
    truth = COCO()
    truth.dataset = annotations.document()

    def call() -> dict:
        results = []
        for image_id, (boxes, scores, labels) in detections.items():
            for (x1, y1, x2, y2), value, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
                box = [x1, y1, x2 - x1, y2 - y1]
                results.append({"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": value})
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return dict(zip(NUMBERS, evaluation.stats.tolist()))

    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return call


def alone(name: str, *size: int) -> float:
    """`peak` in a new process, where no freed memory distorts it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, name, *size).result()


def peak(name: str, *size: int) -> float:
    return measure.peak(CALLS[name](make_case(*size)))


CALLS = {"ours": ours, "pycocotools": pycocotools}


if __name__ == "__main__":
    run_main(main)
