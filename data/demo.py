"""The built-in demo set: real handwritten digits composed over photo crops, in COCO format, with no download.

Digits: the 1,797 of `sklearn.datasets.load_digits` (UCI Optical Recognition of Handwritten Digits, 8x8).
Photos: china.jpg (danielbuechele) and flower.jpg (vultilion), CC BY 2.0, as shipped in scikit-learn.
What makes it a realistic test: a long tail of classes, sizes from 14 to 56 px, crowded scenes, empty scenes
and, on request, the outliers that GHM is about: training annotations with a wrong label or a shifted box.
"""

import argparse
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from sklearn.datasets import load_digits, load_sample_image

from detector import atomic
from detector.errors import UserError, run_main

RECIPE = 4  # raise it if the same settings give other files
SPLITS = ("train", "val")
FIRST_VAL_DIGIT = 1437  # of 1,797, see split_digits
PHOTO_COLUMNS = {"train": (0, 416), "val": (416, 640)}  # so that no val background is seen in training
PHOTO_HEIGHT = 427
CLASS_WEIGHTS = 1 / np.arange(1, 11) ** 0.7  # digit 0 is five times as frequent as digit 9
MAX_COVERED = 0.1  # of the smaller of two boxes; more would make digits illegible


class Style(NamedTuple):
    """The settings that all scenes of a set share."""

    sizes: tuple[tuple[int, int], ...]  # width, height: small multiples of 32, because CPUs train on them
    classes: int  # digits 0 to classes - 1
    usual: tuple[int, int]  # digits in a scene: from, up to but not including
    crowded: tuple[int, int]
    largest: int  # px, of a digit in a usual scene
    smallest: int = 14  # px, of a digit
    kinds: tuple[float, float, float] = (0.05, 0.1, 0.85)  # shares of empty, crowded and usual scenes


FULL = Style(((160, 128), (128, 160)), classes=10, usual=(6, 15), crowded=(20, 28), largest=56)
QUICK = Style(((96, 96),), classes=5, usual=(5, 10), crowded=(10, 14), largest=40)


class Digit(NamedTuple):
    """One digit as it will be drawn. Its box is the extent of `alpha`: tight by construction."""

    label: int  # 0..9, the digit itself
    source: int  # its index in load_digits
    alpha: np.ndarray  # (h, w) float32 in 0..1, opacity; ink touches all four sides
    x: int  # left and top, pixels
    y: int
    tint: np.ndarray  # (3,) in 0..1, distance of the ink colour from white

    @property
    def box(self) -> list[int]:
        """x, y, width, height in pixels, as COCO wants it."""
        return [self.x, self.y, self.alpha.shape[1], self.alpha.shape[0]]


class Scene(NamedTuple):
    width: int
    height: int
    photo: str
    crop: tuple[int, int, int, int]  # x, y, width, height in the photo
    mirrored: bool
    brightness: float
    digits: list[Digit]


def split_digits() -> dict[str, np.ndarray]:
    """Indices into load_digits by split: the last fifth is for validation.

    By position, not at random: the set is sorted by writer, so validation has mostly new writers.
    """
    indices = np.arange(len(load_digits().target))
    return {"train": indices[:FIRST_VAL_DIGIT], "val": indices[FIRST_VAL_DIGIT:]}


def plan_scenes(split: str, count: int, seed: int, style: Style = FULL) -> list[Scene]:
    """What each scene will show. A scene depends on split, seed and its own number, not on `count`."""
    digits = load_digits()
    sources = split_digits()[split]
    by_class = [sources[digits.target[sources] == label] for label in range(style.classes)]
    randoms = (np.random.default_rng([seed, SPLITS.index(split), number]) for number in range(count))
    return [plan_scene(digits.images, by_class, PHOTO_COLUMNS[split], rng, style) for rng in randoms]


def plan_scene(
    images: np.ndarray, by_class: list[np.ndarray], columns: tuple[int, int], rng: np.random.Generator, style: Style
) -> Scene:
    """images (1797, 8, 8) in 0..16; by_class: the indices to use for each digit; columns: of the photos."""
    width, height = style.sizes[rng.integers(len(style.sizes))]
    least = max(0.8, width / (columns[1] - columns[0]), height / PHOTO_HEIGHT)  # a scene is never larger than its photo
    zoom = rng.uniform(least, 2 * least)
    crop_width, crop_height = int(width / zoom), int(height / zoom)
    crop_x = int(rng.integers(columns[0], columns[1] - crop_width, endpoint=True))
    crop_y = int(rng.integers(0, PHOTO_HEIGHT - crop_height, endpoint=True))
    scene = Scene(
        width=width,
        height=height,
        photo=("china.jpg", "flower.jpg")[rng.integers(2)],
        crop=(crop_x, crop_y, crop_width, crop_height),
        mirrored=bool(rng.integers(2)),
        brightness=rng.uniform(0.25, 0.5),  # the ink is light, and must be legible everywhere
        digits=[],
    )
    kind = rng.choice(["empty", "crowded", "usual"], p=style.kinds)
    wanted = {
        "empty": 0,
        "crowded": int(rng.integers(*style.crowded)),
        "usual": int(rng.integers(*style.usual)),
    }[kind]
    largest = min(max(20, style.smallest), style.largest) if kind == "crowded" else style.largest
    weights = CLASS_WEIGHTS[: style.classes] / CLASS_WEIGHTS[: style.classes].sum()
    for _ in range(wanted):
        label = int(rng.choice(style.classes, p=weights))
        source = int(rng.choice(by_class[label]))
        for _ in range(20):  # after 20 tries there is no room, so leave it out
            size = np.exp(rng.uniform(np.log(style.smallest), np.log(largest)))  # px, longer side before the rotation
            alpha = enlarge(images[source], size, angle=rng.uniform(-15, 15))
            x = int(rng.integers(0, width - alpha.shape[1], endpoint=True))
            y = int(rng.integers(0, height - alpha.shape[0], endpoint=True))
            digit = Digit(label, source, alpha, x, y, tint=rng.uniform(0, 1, 3))
            if all(covered(digit.box, other.box) <= MAX_COVERED for other in scene.digits):
                scene.digits.append(digit)
                break
    return scene


def enlarge(image: np.ndarray, size: float, angle: float) -> np.ndarray:
    """An 8x8 digit (0..16) as opacity (h, w) in 0..1: `size` px long, turned by `angle` degrees, trimmed."""
    ink = image >= 6
    scale = size / max(np.ptp(np.flatnonzero(ink.any(axis=axis))) + 1 for axis in (0, 1))
    side = int(np.ceil(12 * scale))  # the 8x8 digit, its corners when turned, and some air
    matrix = cv2.getRotationMatrix2D((3.5, 3.5), angle, scale)
    matrix[:, 2] = matrix[:, 2] + ((side - 1) / 2 - 3.5)
    smooth = cv2.warpAffine((image / 16).astype(np.float32), matrix, (side, side), flags=cv2.INTER_CUBIC)
    # A contour with an edge of about two pixels: readable at any size, while a plain enlargement is a blur.
    # The contour is at 0.45: above that thin strokes break, below it ones become bars.
    alpha = np.clip((smooth - 0.45) * max(scale / 1.5, 1.5) + 0.5, 0, 1)
    rows, columns = (np.flatnonzero((alpha >= 0.25).any(axis=axis)) for axis in (1, 0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def covered(box: list[int], other: list[int]) -> float:
    """Intersection over the smaller area of two x, y, width, height boxes."""
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    return max(width, 0) * max(height, 0) / min(box[2] * box[3], other[2] * other[3])


@cache
def photo(name: str) -> np.ndarray:
    """(427, 640, 3) uint8 RGB."""
    return load_sample_image(name)


def render(scene: Scene) -> np.ndarray:
    """The picture, (height, width, 3) uint8 RGB."""
    x, y, width, height = scene.crop
    crop = photo(scene.photo)[y : y + height, x : x + width]
    picture = cv2.resize(crop, (scene.width, scene.height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    picture = np.clip(picture[:, :: -1 if scene.mirrored else 1] * scene.brightness, 0, 255)
    for digit in scene.digits:
        x, y, width, height = digit.box
        under = picture[y : y + height, x : x + width]
        alpha = digit.alpha[:, :, None]
        under += alpha * (255 - 70 * digit.tint - under)
    return np.rint(picture).astype(np.uint8)


def file_name(split: str, number: int) -> str:
    return f"{split}_{number:05d}.jpg"


def describe(split: str, scenes: list[Scene], settings: dict, style: Style = FULL) -> dict:
    """The clean COCO annotation file of a split. Category ids are 1..10 for the digits 0..9."""
    images = [
        {"id": i, "file_name": file_name(split, i), "width": scene.width, "height": scene.height}
        for i, scene in enumerate(scenes, start=1)
    ]
    boxes = [(i, digit.label, digit.box) for i, scene in enumerate(scenes, start=1) for digit in scene.digits]
    annotations = [
        dict(id=i, image_id=image, category_id=label + 1, bbox=box, area=box[2] * box[3], iscrowd=0)
        for i, (image, label, box) in enumerate(boxes, start=1)
    ]
    description = f"Demo, {split}: scenes composed of real handwritten digits (UCI) over crops of two photos"
    return {
        "info": {"description": description, "settings": settings},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": str(label)} for label in range(style.classes)],
    }


def add_outliers(dataset: dict, *, wrong_labels: float, shifted_boxes: float, seed: int) -> None:
    """Spoil these shares of the annotations in place, none twice, and mark each with "outlier".

    "label": another class, all equally likely. "box": moved by 0.4 to 0.8 of its sides within the image (less
    where there is no room), so that its IoU with the digit is below 0.35.
    """
    classes = len(dataset["categories"])
    rng = np.random.default_rng([seed, len(SPLITS)])  # not the scenes': outliers must not change a picture
    images = {image["id"]: image for image in dataset["images"]}
    annotations = [dataset["annotations"][i] for i in rng.permutation(len(dataset["annotations"]))]
    labels_end = round(wrong_labels * len(annotations))
    boxes_end = labels_end + round(shifted_boxes * len(annotations))
    for annotation in annotations[:labels_end]:
        annotation["category_id"] = 1 + (annotation["category_id"] - 1 + int(rng.integers(1, classes))) % classes
        annotation["outlier"] = "label"
    for annotation in annotations[labels_end:boxes_end]:
        image, box = images[annotation["image_id"]], annotation["bbox"]
        for axis, side in enumerate((image["width"], image["height"])):
            room = side - box[2 + axis]
            shift = round(rng.uniform(0.4, 0.8) * box[2 + axis]) * int(rng.choice([-1, 1]))
            if not 0 <= box[axis] + shift <= room:
                shift = abs(shift) if 2 * box[axis] < room else -abs(shift)  # to the side with more room
            box[axis] = min(max(box[axis] + shift, 0), room)
        annotation["outlier"] = "box"


def write_demo(
    folder: Path,
    *,
    train_images: int = 750,
    val_images: int = 150,
    seed: int = 0,
    wrong_labels: float = 0.0,
    shifted_boxes: float = 0.0,
    quick: bool = False,
    size: tuple[int, int] | None = None,
    objects: tuple[int, int] | None = None,
    digit_size: tuple[int, int] | None = None,
    force: bool = False,
) -> None:
    """Write folder/train.json, val.json and the pictures in folder/train, folder/val; say what was written.

    size: (width, height) of all scenes, px. objects: the fewest and most digits of a scene, all numbers between equally
    likely; no scene is then empty or crowded by chance. digit_size: the smallest and largest digit, px.

    The same settings give the same bytes. A folder that already holds them is left alone; one that holds
    another data set is refused unless `force`. The outliers go into train only; val is always clean.
    Raises UserError for counts below 1, a negative seed, shares outside 0..1, sizes that do not fit, a refused folder.
    """
    folder = Path(folder)
    counts = {"train": train_images, "val": val_images}
    settings: dict[str, Any] = dict(recipe=RECIPE, train_images=train_images, val_images=val_images, seed=seed)
    settings |= dict(wrong_labels=wrong_labels, shifted_boxes=shifted_boxes)
    settings |= dict(quick=True) if quick else {}
    given = dict(size=size, objects=objects, digit_size=digit_size)
    settings |= {name: list(pair) for name, pair in given.items() if pair is not None}
    check(settings)
    style = styled(QUICK if quick else FULL, **given)
    paths = {split: folder / f"{split}.json" for split in SPLITS}
    existing = [settings_of(path) for path in paths.values() if path.exists()]
    if existing == [settings, settings] and not force:
        print(f"{folder}: already there with these settings, nothing to do")
        return
    if any(other != settings for other in existing) and not force:
        raise UserError(f"{folder}: holds another data set; choose another folder or replace it with --force")

    for path in paths.values():
        path.unlink(missing_ok=True)
    datasets = {}
    for split, count in counts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for stale in (folder / split).glob(f"{split}_*.jpg"):
            stale.unlink()
        scenes = plan_scenes(split, count, seed, style)
        for i, scene in enumerate(scenes, start=1):
            jpeg = cv2.imencode(".jpg", render(scene)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
            (folder / split / file_name(split, i)).write_bytes(jpeg.tobytes())
        datasets[split] = describe(split, scenes, settings, style)
    add_outliers(datasets["train"], wrong_labels=wrong_labels, shifted_boxes=shifted_boxes, seed=seed)
    for split, dataset in datasets.items():  # last, and whole: an interrupted run must not look finished
        atomic.write(paths[split], json.dumps(dataset))
        print(summary(folder / split, dataset))


def check(settings: dict) -> None:
    for name in ("train_images", "val_images"):
        if settings[name] < 1:
            raise UserError(f"{name}: {settings[name]}, must be at least 1")
    if settings["seed"] < 0:
        raise UserError(f"seed: {settings['seed']}, must not be negative")
    for name in ("wrong_labels", "shifted_boxes"):
        if not 0 <= settings[name] <= 1:
            raise UserError(f"{name}: {settings[name]}, a share must lie in 0..1")
    if settings["wrong_labels"] + settings["shifted_boxes"] > 1:
        raise UserError("wrong_labels + shifted_boxes: above 1, but no annotation is spoilt twice")
    for name, (low, high) in dict(size=(32, 2048), objects=(0, 500), digit_size=(8, 512)).items():
        first, second = settings.get(name, (low, high))
        if not all(low <= number <= high for number in (first, second)):
            raise UserError(f"{name}: {first} {second}, both must lie in {low}..{high}")
        if name != "size" and first > second:
            raise UserError(f"{name}: {first} {second}, the first must not exceed the second")


def styled(
    style: Style,
    size: tuple[int, int] | None,
    objects: tuple[int, int] | None,
    digit_size: tuple[int, int] | None,
) -> Style:
    """`style` with the given values instead of its own. Raises UserError where the largest digit does not fit."""
    if size is not None:
        style = style._replace(sizes=((size[0], size[1]),))
    if objects is not None:
        style = style._replace(usual=(objects[0], objects[1] + 1), kinds=(0, 0, 1))
    if digit_size is not None:
        style = style._replace(smallest=digit_size[0], largest=digit_size[1])
    if 2 * style.largest > min(map(min, style.sizes)):  # a turned digit is larger, and must have room to lie anywhere
        sides = min(map(min, style.sizes))
        raise UserError(
            f"digit_size: {style.largest} px is more than half of a scene's {sides} px; make digits smaller"
        )
    return style


def settings_of(path: Path) -> dict | None:
    """The settings an annotation file was written with, None if it is not ours."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["info"]["settings"]
    except (ValueError, KeyError, TypeError):
        return None


def summary(folder: Path, dataset: dict) -> str:
    images, annotations = dataset["images"], dataset["annotations"]
    outliers = sum("outlier" in annotation for annotation in annotations)
    boxes = Counter(annotation["category_id"] for annotation in annotations)
    by_class = " ".join(f"{category['name']}:{boxes[category['id']]}" for category in dataset["categories"])
    counts = f"{len(images)} images, {len(annotations)} boxes, {outliers} of them outliers"
    return f"{folder}: {counts}; boxes by class {by_class}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.demo",
        description="Write a small COCO-format data set: handwritten digits over photo crops, no download.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    given: dict[str, Any] = dict(default=argparse.SUPPRESS)
    add("--output", type=Path, **given, help="folder to write (default: datasets/demo; --quick: datasets/demo_quick)")
    add("--train-images", type=int, **given, metavar="N", help="scenes to train on (default: 750; --quick: 640)")
    add("--val-images", type=int, **given, metavar="N", help="scenes to score, clean (default: 150; --quick: 100)")
    add("--seed", type=int, default=0, help="the same seed gives the same bytes")
    add("--wrong-labels", type=float, default=0.0, metavar="SHARE", help="of the train boxes, 0..1")
    add("--shifted-boxes", type=float, default=0.0, metavar="SHARE", help="of the train boxes, 0..1")
    add("--quick", action="store_true", help="small scenes of the digits 0 to 4, learnt in a minute or two")
    pair: dict[str, Any] = dict(nargs=2, type=int, **given)
    add(
        "--size",
        **pair,
        metavar=("WIDTH", "HEIGHT"),
        help="px of each scene (default: 160 x 128 or 128 x 160; --quick: 96 x 96)",
    )
    add("--objects", **pair, metavar=("FEWEST", "MOST"), help="digits in a scene, fewer where there is no room")
    add("--digit-size", **pair, metavar=("SMALLEST", "LARGEST"), help="px of the digits' longer side")
    add("--force", action="store_true", help="replace the data set in the folder")
    options = vars(parser.parse_args())
    defaults: dict[str, Any] = dict(output=Path("datasets/demo"), train_images=750, val_images=150)
    if options["quick"]:
        defaults = dict(output=Path("datasets/demo_quick"), train_images=640, val_images=100)
    options = defaults | options
    folder = options.pop("output")
    try:
        write_demo(folder, **options)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written ({error.strerror}); choose another folder") from None


if __name__ == "__main__":
    run_main(main)
