"""From JPEG files to a batch, ours beside torchvision: images per second, on one thread.

    python scripts/bench/loader.py [--images 64] [--repeats 5] [--fresh]

640x480 crops of two photos are flipped half the time and resized to 512x384 and to 1067x800, in batches of 8. The peers
open files with PIL, keep boxes as tv_tensors and end with a padded float batch. Ours ends with uint8, which the model
normalises on the device.

    v2, PIL            RandomHorizontalFlip, Resize, ToImage, ToDtype, Normalize: resized by PIL
    v2, tensors        ToImage, RandomHorizontalFlip, Resize, ToDtype, Normalize
    v2, in the model   RandomHorizontalFlip, ToImage, ToDtype, then GeneralizedRCNNTransform normalises and resizes

All alternate in one process. It keeps freed memory, as our training on a CPU does; --fresh returns it to the system,
the default elsewhere. The first epoch warms up and is not counted.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision import tv_tensors
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from data.coco import CocoDataset
from data.loader import collate, train_loader
from data.transforms import TrainTransform, flip, resize
from detector.device import keep_freed_memory
from detector.errors import run_main
from detector.images import read_image
from scripts.bench import measure

SIDES = {"512x384": (384, 512), "1067x800": (800, 1333)}  # short and long side
HEIGHT, WIDTH, BOXES, BATCH = 480, 640, 8, 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Samples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int], /) -> tuple:
        """The key is an index and the seed of the augmentation."""


Run = tuple[Samples, Callable[[list], tuple]]  # with what makes a batch of samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fresh", action="store_true", help="do not keep freed memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if not args.fresh:
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kilobytes = write_images(folder, args.images) / args.images / 1000
        print(f"{measure.environment()}\n{args.images} JPEG files of {WIDTH}x{HEIGHT}, {kilobytes:.0f} KB each")
        for size, sides in SIDES.items():
            transform = TrainTransform(*sides, horizontal_flip=0.5)
            ours = CocoDataset(folder / "annotations.json", folder, transform)
            cached = CocoDataset(folder / "annotations.json", folder, transform, cache=folder / "cache")
            print(f"\n{compare(size, ours, cached, sides, args.repeats)}")
            print(f"\n{stages(ours, args.repeats)}")
            speeds = [f"{loader_speed(ours, workers, args.repeats):.0f} with {workers}" for workers in (0, 1, 2)]
            print(f"\nours to {size} through the DataLoader, images/s by workers: {', '.join(speeds)}")


def compare(size: str, ours: CocoDataset, cached: CocoDataset, sides: tuple[int, int], repeats: int) -> str:
    runs: dict[str, Run] = {**peers(ours, sides), "ours": (ours, collate), "ours, cached": (cached, collate)}
    times = measure.alternate({name: partial(epoch, *run) for name, run in runs.items()}, repeats)
    rows = []
    for name, ms in measure.medians(times).items():
        ratios = [f"{measure.ratio(times, name, mine):.2f}x" for mine in ("ours", "ours, cached")]
        rows.append([name, f"{1000 * len(ours) / ms:.0f}", *ratios, f"{batch_bytes(*runs[name]) / measure.MIB:.1f}"])
    return measure.table([f"to {size}", "images/s", "ours", "cached", "MiB a batch"], rows)


def stages(dataset: CocoDataset, repeats: int) -> str:
    """Where our time goes, in milliseconds an image."""
    files = [dataset.folder / name for name in dataset.file_names[:BATCH]]
    images = [read_image(file) for file in files]
    none, asked = np.zeros((0, 4), np.float32), dataset.transform.cache_size(HEIGHT, WIDTH)
    resized = [resize(image, none, *asked)[0] for image in images]
    samples = [dataset[index] for index in range(len(files))]
    calls: dict[str, Callable[[], object]] = {
        "read, decode": lambda: [read_image(file) for file in files],
        "resize": lambda: [resize(image, none, *asked) for image in images],
        "flip": lambda: [flip(image, none, True, False) for image in resized],
        "collate": lambda: collate(samples),
    }
    times = measure.medians(measure.alternate(calls, 4 * repeats))
    return measure.table(["stage", "ms an image"], [[name, f"{ms / len(files):.2f}"] for name, ms in times.items()])


def epoch(dataset: Samples, join: Callable[[list], tuple]) -> None:
    for start in range(0, len(dataset), BATCH):
        join([dataset[index, index] for index in range(start, min(start + BATCH, len(dataset)))])


def batch_bytes(dataset: Samples, join: Callable[[list], tuple]) -> int:
    return BATCH * join([dataset[0, 0]])[0].nbytes


def loader_speed(dataset: CocoDataset, workers: int, repeats: int) -> float:
    """Images per second of whole epochs; the first, which starts the workers, is left out."""
    loader = train_loader(dataset, min(BATCH, len(dataset)), seed=0, workers=workers)
    durations = []
    for number in range(repeats + 1):
        loader.batch_sampler.set_position(number)
        start = time.perf_counter()
        images = sum(len(batch.images) for batch in loader)
        durations.append((time.perf_counter() - start) / images)
    return 1 / statistics.median(durations[1:])


def peers(ours: CocoDataset, sides: tuple[int, int]) -> dict[str, Run]:
    """Data sets of the same images and boxes, each with a function that makes a batch of its samples."""
    short_side, long_side = sides
    flipping, resizing = v2.RandomHorizontalFlip(0.5), v2.Resize(short_side, max_size=long_side)
    floats, normalising = v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)
    in_model = GeneralizedRCNNTransform(short_side, long_side, MEAN, STD)

    def join_in_model(samples: list[tuple[Tensor, dict]]) -> tuple[Tensor, list[dict]]:
        images, targets = in_model(*map(list, zip(*samples)))
        return images.tensors, targets

    return {
        "v2, PIL": (Peer(ours, flipping, resizing, v2.ToImage(), floats, normalising), pad_and_stack),
        "v2, tensors": (Peer(ours, v2.ToImage(), flipping, resizing, floats, normalising), pad_and_stack),
        "v2, in the model": (Peer(ours, flipping, v2.ToImage(), floats), join_in_model),
    }


class Peer:
    """The images and boxes of `dataset`, as torchvision's users read them."""

    def __init__(self, dataset: CocoDataset, *steps: v2.Transform):
        self.dataset, self.transform = dataset, v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict]:
        index, _ = key
        image = Image.open(self.dataset.folder / self.dataset.file_names[index]).convert("RGB")
        of_image = slice(index * BOXES, (index + 1) * BOXES)
        annotations = self.dataset.annotations
        corners = [[x, y, x + width, y + height] for x, y, width, height in annotations.boxes[of_image].tolist()]
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(HEIGHT, WIDTH), dtype=torch.float32)
        labels = torch.tensor(annotations.categories[of_image])
        return self.transform(image, {"boxes": boxes, "labels": labels})


def pad_and_stack(samples: list[tuple[Tensor, dict]]) -> tuple[Tensor, list[dict]]:
    """Does the same as GeneralizedRCNNTransform.batch_images."""
    images, targets = zip(*samples)
    height, width = (-(-max(side) // 32) * 32 for side in zip(*(image.shape[1:] for image in images)))
    batch = images[0].new_full((len(images), 3, height, width), 0)
    for padded, image in zip(batch, images):
        padded[:, : image.shape[1], : image.shape[2]].copy_(image)
    return batch, list(targets)


def write_images(folder: Path, count: int) -> int:
    """Write JPEG files and their annotations.json; returns the bytes of all images."""
    random = np.random.default_rng(0)
    photos, written = load_sample_images().images, 0
    images: list[dict] = []
    annotations: list[dict] = []
    for number in range(count):
        photo = photos[number % len(photos)]
        height = int(random.integers(300, photo.shape[0]))
        width = height * WIDTH // HEIGHT
        y, x = (int(random.integers(0, room + 1)) for room in (photo.shape[0] - height, photo.shape[1] - width))
        picture = cv2.resize(photo[y : y + height, x : x + width], (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        grain = random.normal(0, 4, (HEIGHT, WIDTH, 1))  # which enlarging has smoothed away
        picture = np.clip(picture + grain, 0, 255).astype(np.uint8)
        jpeg = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        (folder / f"{number}.jpg").write_bytes(jpeg)
        written += len(jpeg)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT})
        for corner in random.integers(0, 300, (BOXES, 2)).tolist():
            record = {"id": len(annotations), "image_id": number, "category_id": 1, "bbox": [*corner, 80, 60]}
            annotations.append(record)
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations.json").write_text(json.dumps(document), encoding="utf-8")
    return written


if __name__ == "__main__":
    run_main(main)
