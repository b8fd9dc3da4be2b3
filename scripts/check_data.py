"""Check a data set as the detector will see it: its faults, and which boxes no anchor fits.

    python scripts/check_data.py --config configs/bccd/focal.yaml [--set KEY=VALUE ...]
    python scripts/check_data.py --train mine/train.json --val mine/val.json [--images mine/images]

Reads annotation files and images with the same code as training, and refuses what training would refuse. The page
--output (data.html) then shows the classes; the sizes and shapes of boxes at the network's input size; the share of
boxes that no anchor overlaps with an IoU of 0.5, and better anchors if it finds some; how many negative anchors there
are for each positive one; images that are in both train and val (equal, or nearly so by their perceptual hash); boxes
that look like mistakes; and samples.
"""

import argparse
import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import imagehash
import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from tqdm import tqdm

from data.coco import CocoDataset
from data.draw import GROUND_TRUTH, draw_boxes, enlarge
from data.transforms import EvalTransform
from detector import boxes as box_ops
from detector import config_files
from detector.anchors import Anchors
from detector.config import Config
from detector.configure import build_part, resolve
from detector.errors import UserError, counted, run_main
from detector.images import remark_lines
from detector.resize import STRIDE
from scripts.comparison import page

FITS = 0.5  # an anchor with this IoU learns the box
BITS = 4  # of 64: near duplicates differ in at most so many bits of their perceptual hash
MANY = 0.05  # above this share of boxes without an anchor, other anchors are tried
TRIED = 20_000  # boxes to try them on
ASSIGNED = 500  # images to count positive and negative anchors in
SHOWN = 12  # pictures, and examples of each kind
SIZES = {"below 16": (0, 16), "16 to 32": (16, 32), "32 to 96": (32, 96), "96 to 256": (96, 256), "above": (256, 1e9)}


class Seen(NamedTuple):
    """A data set as the network sees it: N boxes of I images."""

    dataset: CocoDataset
    boxes: np.ndarray  # (N, 4) float32 x1, y1, x2, y2 in pixels of the resized image
    labels: np.ndarray  # (N,)
    image: np.ndarray  # (N,) the index of each box's image
    sizes: list[tuple[int, int]]  # (height, width) of each resized image
    hashes: np.ndarray  # (I, 8) uint8, perceptual


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="take data, image size and anchors from this config")
    parser.add_argument("--train", metavar="FILE", help="training annotations, instead of the config's")
    parser.add_argument("--val", metavar="FILE", help="validation annotations, instead of the config's")
    parser.add_argument("--images", metavar="FOLDER", help="images of both files (default: searched beside each)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other options")
    parser.add_argument("--output", type=Path, default=Path("data.html"), metavar="FILE", help="the page (%(default)s)")
    args = parser.parse_args(argv)
    page.refuse_folder(args.output)
    cfg = options(args)

    train = read_dataset(cfg, "train")
    val = read_dataset(cfg, "val", like=train.dataset) if cfg.data.val.annotations else None
    both = [seen for seen in (train, val) if seen is not None]
    anchors: Anchors = build_part(cfg, "anchors")
    best = best_iou(anchors, train.boxes, [train.sizes[i] for i in train.image])
    imbalance = balance(cfg, anchors, train)
    advice = suggest(cfg, train, best) if len(best) and (best < FITS).mean() > MANY else None
    pairs = near_duplicates(train, val) if val else []
    suspicious = suspicious_boxes(both)

    lines = summary(both, best, imbalance, advice, pairs, suspicious)
    sections = [
        ("", [page.items(lines)]),
        ("Classes", [classes(both)]),
        ("Boxes and anchors", fit(train, anchors, best)),
        ("In both train and val", duplicate_pictures(pairs, train, val) if val else []),
        ("Boxes to check", suspicious_tables(suspicious)),
        ("Samples", [page.row(samples(train))]),
    ]
    page.write(args.output, f"Data of {train.dataset.path}", [(title, parts) for title, parts in sections if parts])
    print("\n".join(lines))
    print(f"written: {args.output}")


def options(args: argparse.Namespace) -> Config:
    """The config or the defaults, with the given files on top."""
    if not args.config and not args.train:
        raise UserError("give --config FILE, or --train FILE")
    if args.images and not (args.train or args.val):
        raise UserError(f"--images {args.images}: goes with --train or --val; of a config, --set data.train.images=...")
    given = {"train": args.train, "val": args.val}
    files = {split: {"annotations": file, "images": args.images or ""} for split, file in given.items() if file}
    if args.train and not args.val:
        files["val"] = {"annotations": "", "images": ""}
    source = args.config or "the defaults"
    values = config_files.read(args.config) if args.config else {}
    cfg = resolve(config_files.merge(values, {"data": files}), source, args.set)
    if not cfg.data.train.annotations:
        raise UserError(f"{source}: names no training set; give --train FILE")
    return cfg


def read_dataset(cfg: Config, split: str, like: CocoDataset | None = None) -> Seen:
    """Read a whole data set. Raises UserError at the end if images cannot be read."""
    files = getattr(cfg.data, split)
    size = EvalTransform(cfg.data.short_side, cfg.data.long_side)
    ids, names = (like.category_ids, like.class_names) if like else (None, None)
    trust = cfg.data.trust
    dataset = CocoDataset(files.annotations, files.images, size, category_ids=ids, class_names=names, trust=trust)
    if split == "train" and not trust:
        dataset.refuse_without_boxes()
    boxes, labels, image, sizes, hashes, errors = [], [], [], [], [], []
    for index in tqdm(range(len(dataset)), desc=f"reading {split}", unit="image"):
        try:
            pixels, target, _, _ = dataset[index]
        except UserError as error:
            errors.append(str(error))
            continue
        boxes.append(target.boxes.numpy())
        labels.append(target.labels.numpy())
        image.append(np.full(len(target.labels), index))
        sizes.append((pixels.shape[1], pixels.shape[2]))
        hashes.append(np.packbits(imagehash.phash(Image.fromarray(pixels.permute(1, 2, 0).numpy())).hash.flatten()))
    if errors:
        print("\n".join(errors), file=sys.stderr)
        count = f"{len(errors)} of {len(dataset)} images cannot be used"
        raise UserError(f"{files.annotations}: {count}, the first: {errors[0]}")
    columns = np.concatenate(boxes), np.concatenate(labels), np.concatenate(image)
    return Seen(dataset, *columns, sizes, np.stack(hashes))


# ----------------------------------------------------------------------------------------------------------- anchors


def size_of_map(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(height, width) of the level's map of an image of this size."""
    height, width = size
    return -(-height // stride), -(-width // stride)


def padded(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    rows, columns = size_of_map(size, multiple)
    return rows * multiple, columns * multiple


def best_iou(anchors: Anchors, boxes: np.ndarray, sizes: list[tuple[int, int]]) -> np.ndarray:
    """The best IoU that any anchor of its image has with each box (N, 4); sizes: (height, width) of its image.

    Among the anchors of one shape and level, the one with the nearest centre has the best IoU, so only that is tried.
    """
    best = np.zeros(len(boxes), np.float32)
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        by_size.setdefault(padded(size, STRIDE), []).append(index)
    for size, indices in by_size.items():
        of_size = torch.from_numpy(boxes[indices])
        centres = (of_size[:, :2] + of_size[:, 2:]) / 2
        of_level = []
        for level, shapes in enumerate(anchors.shapes):
            map_size = size_of_map(size, anchors.strides[level])
            steps = torch.tensor(anchors.steps(map_size, level, size)[::-1])  # x first
            positions = (centres / steps).round().clamp(min=torch.zeros(2), max=torch.tensor(map_size[::-1]) - 1)
            placed = (positions * steps).repeat(1, 2)[:, None] + shapes  # (n, shapes, 4)
            repeated = of_size[:, None].expand_as(placed)
            iou = box_ops.iou_of_pairs(placed.flatten(0, 1), repeated.flatten(0, 1)).view(len(of_size), -1)
            of_level.append(iou.amax(dim=1))
        best[indices] = torch.stack(of_level).amax(dim=0).numpy()
    return best


def balance(cfg: Config, anchors: Anchors, train: Seen) -> str:
    """A line on how many negatives there are for each positive: anchors, and cells (an anchor has one a class)."""
    assigner = build_part(cfg, "assigner")
    chosen = sorted(random.Random(0).sample(range(len(train.sizes)), min(ASSIGNED, len(train.sizes))))
    positives = negatives = 0
    for index in chosen:
        size = padded(train.sizes[index], cfg.data.pad_to)
        map_sizes = [size_of_map(size, stride) for stride in anchors.strides]
        levels = [height * width * anchors.per_position for height, width in map_sizes]
        boxes = torch.from_numpy(train.boxes[train.image == index])
        assignment = assigner(anchors(map_sizes, size, torch.device("cpu")), boxes, levels, anchors.per_position)
        positives += int(assignment.positive.sum())
        negatives += int((~assignment.positive & ~assignment.ignored).sum())
    if not positives:
        return f"no positive anchors in {len(chosen):,} training images"
    classes = len(train.dataset.class_names)
    cells = (classes * (positives + negatives) - positives) / positives
    ratio = f"1 positive to {negatives / positives:,.0f} negatives among the anchors"
    of_cells = f"1 to {cells:,.0f} with {counted(classes, 'class')} for each anchor"
    return f"{ratio} of {len(chosen):,} training images, {of_cells} ({cfg.assigner.name})"


class Advice(NamedTuple):
    sizes: list[float]
    ratios: list[float]
    before: float  # share of boxes without an anchor
    after: float
    boxes: int  # number of boxes of the trial

    @property
    def settings(self) -> str:
        return f"--set anchors.sizes={self.sizes} anchors.ratios={self.ratios}".replace(", ", ",")


def suggest(cfg: Config, train: Seen, best: np.ndarray) -> Advice | None:
    """Anchor sizes and ratios that leave at most 2/3 as many boxes without an anchor; None if none are found."""
    now = cfg.anchors.options
    if cfg.anchors.name != "grid":
        return None
    tried = np.array(random.Random(0).sample(range(len(train.boxes)), min(TRIED, len(train.boxes))))
    boxes, sizes = train.boxes[tried], [train.sizes[i] for i in train.image[tried]]
    before = float((best[tried] < FITS).mean())
    sides = boxes[:, 2:] - boxes[:, :2]
    shapes = np.quantile(sides[:, 1] / np.maximum(sides[:, 0], 1e-6), [0.1, 0.5, 0.9])
    of_data = [round(float(ratio), 2) for ratio in np.clip(shapes, 0.1, 10)]
    candidates = []
    for factor in (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2):
        scaled = [round(size * factor, 1) for size in now["sizes"]]
        for ratios in (list(now["ratios"]), of_data, sorted({*now["ratios"], of_data[0], of_data[2]})):
            other = Anchors(tuple(scaled), now["octaves"], tuple(ratios))
            missed = float((best_iou(other, boxes, sizes) < FITS).mean())
            candidates.append((missed + 0.002 * len(ratios), missed, scaled, ratios))  # each ratio costs time
    _, missed, scaled, ratios = min(candidates)
    return Advice(scaled, ratios, before, missed, len(tried)) if missed <= before * 2 / 3 else None


# ------------------------------------------------------------------------------------------- duplicates, odd boxes


def near_duplicates(train: Seen, val: Seen) -> list[tuple[int, int]]:
    """Pairs (train image, val image) whose perceptual hashes differ in at most BITS bits."""
    pairs = []
    for index, val_hash in enumerate(val.hashes):
        gaps = np.unpackbits(train.hashes ^ val_hash, axis=1).sum(axis=1)
        pairs += [(int(train_index), index) for train_index in np.flatnonzero(gaps <= BITS)]
    return pairs


def suspicious_boxes(both: list[Seen]) -> dict[str, list[str]]:
    """Kind of likely mistake -> the boxes."""
    suspicious: dict[str, list[str]] = {
        "less than 4 pixels wide or high, as the network sees it": [],
        "more than 95% of the image": [],
        "more than ten times as long as wide": [],
        "the same class twice in one place (IoU above 0.95)": [],
    }
    tiny, huge, thin, twice = suspicious.values()
    for seen in both:
        names = seen.dataset.class_names
        for index in range(len(seen.sizes)):
            of_image = slice(*np.searchsorted(seen.image, [index, index + 1]))
            boxes, labels = seen.boxes[of_image], seen.labels[of_image]
            file = seen.dataset.file_names[index]
            where = [f"{file}: {names[label]} {box.round(1).tolist()}" for box, label in zip(boxes, labels)]
            sides = boxes[:, 2:] - boxes[:, :2]
            area = seen.sizes[index][0] * seen.sizes[index][1]
            short, long = sides.min(axis=1, initial=1e9), sides.max(axis=1, initial=0)
            tiny += [where[i] for i in np.flatnonzero(short < 4)]
            huge += [where[i] for i in np.flatnonzero(sides.prod(axis=1) > 0.95 * area)]
            thin += [where[i] for i in np.flatnonzero(long > 10 * short)]
            iou = box_ops.iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).numpy()
            same = np.triu((iou > 0.95) & (labels[:, None] == labels), 1)
            twice += [where[i] for i in np.flatnonzero(same.any(axis=0))]
    return suspicious


# ------------------------------------------------------------------------------------------------------------ the page


def summary(
    both: list[Seen],
    best: np.ndarray,
    imbalance: str,
    advice: Advice | None,
    pairs: list,
    suspicious: dict[str, list[str]],
) -> list[str]:
    lines = [seen.dataset.summary() for seen in both]
    for seen in both:
        lines += remark_lines(seen.dataset.image_remarks)
    if len(both) == 2:
        names = both[0].dataset.class_names
        for split, seen in zip(("train", "val"), both):
            absent = [name for label, name in enumerate(names) if not (seen.labels == label).any()]
            if absent:
                what = "learnt" if split == "train" else "scored"
                lines.append(f"classes without a box in {split}, which cannot be {what}: {', '.join(absent[:20])}")
        repeated = counted(len({i for i, _ in pairs}), "training image")
        warning = (
            f"warning: {repeated} also in val, equal or nearly so: remove them from one of the two, or AP is too high"
        )
        lines.append(warning if pairs else "no training image is also in val")
    if len(best):
        lines.append(f"{(best < FITS).mean():.1%} of the training boxes have no anchor with an IoU of {FITS}")
    lines.append(imbalance)
    if advice:
        tried = f"of {advice.boxes:,} boxes that were tried, instead of {advice.before:.1%}"
        lines.append(f"with {advice.settings} it is {advice.after:.1%} {tried}")
    lines += [f"{counted(len(where), 'box')}: {kind}" for kind, where in suspicious.items() if where]
    return lines


def classes(both: list[Seen]) -> str:
    names = both[0].dataset.class_names
    counts = [Counter(seen.labels.tolist()) for seen in both]
    images = [Counter(label for label, _ in set(zip(seen.labels.tolist(), seen.image.tolist()))) for seen in both]
    order = sorted(range(len(names)), key=lambda label: -counts[0][label])
    heads = [f"{what} in {split}" for split in ("train", "val")[: len(both)] for what in ("boxes", "images")]
    rows = [[names[k], *(n for c, i in zip(counts, images) for n in (c[k], i[k]))] for k in order]
    return page.table(("class", *heads), rows)


def fit(train: Seen, anchors: Anchors, best: np.ndarray) -> list[str]:
    if not len(train.boxes):
        return [page.text("There are no boxes to learn from.")]
    sides = train.boxes[:, 2:] - train.boxes[:, :2]
    size, ratio = np.sqrt(sides.prod(axis=1)), sides[:, 1] / sides[:, 0]
    rows = []
    for name, (low, high) in SIZES.items():
        inside = (size >= low) & (size < high)
        if inside.any():
            ious = best[inside]
            rows.append((name, len(ious), f"{(ious < FITS).mean():.1%}", f"{np.median(ious):.2f}"))
    rows.append(("all", len(best), f"{(best < FITS).mean():.1%}", f"{np.median(best):.2f}"))
    table = page.table(("side, pixels", "boxes", f"no anchor with IoU {FITS}", "median best IoU"), rows)
    shapes = torch.cat(anchors.shapes)
    widths, heights = (shapes[:, 2] - shapes[:, 0]).numpy(), (shapes[:, 3] - shapes[:, 1]).numpy()
    plots = []
    for values, marks, label in (
        (size, np.sqrt(widths * heights), "side of boxes, pixels (square root of the area)"),
        (ratio, heights / widths, "height / width of boxes"),
    ):
        plot, axis = plt.subplots(figsize=page.FIGURE, layout="constrained")
        edges = np.geomspace(max(values.min(), 1e-2) * 0.99, values.max() * 1.01 + 1e-6, 50).tolist()
        axis.hist([values[best >= FITS], values[best < FITS]], edges, stacked=True, color=["#1f77b4", "#d62728"],
                  label=["an anchor fits", "no anchor fits"])  # fmt: skip
        for mark in np.unique(marks.round(3)):
            axis.axvline(mark, color="black", linewidth=0.6, alpha=0.4)
        axis.set(xlabel=label, ylabel="boxes", xscale="log")
        ticks = [2.0**k for k in range(-4, 12) if edges[0] <= 2.0**k <= edges[-1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.legend(fontsize=8)
        plots.append(page.figure(plot, f"{label}; the lines are anchors"))
    return [table, page.row(plots)]


def duplicate_pictures(pairs: list[tuple[int, int]], train: Seen, val: Seen) -> list[str]:
    shown = []
    for train_index, val_index in pairs[:SHOWN]:
        for seen, index, split in ((train, train_index, "train"), (val, val_index, "val")):
            shown.append(page.photo(drawn(seen, index), f"{split}: {seen.dataset.file_names[index]}", "plot"))
    return [page.row(shown)] if shown else []


def suspicious_tables(suspicious: dict[str, list[str]]) -> list[str]:
    parts = []
    for kind, where in suspicious.items():
        if where:
            more = f"; the first {SHOWN}" if len(where) > SHOWN else ""
            parts += [page.text(f"{counted(len(where), 'box')}, {kind}{more}:"), page.items(where[:SHOWN])]
    return parts


def samples(train: Seen) -> list[str]:
    chosen = sorted(random.Random(0).sample(range(len(train.sizes)), min(SHOWN, len(train.sizes))))
    return [page.photo(drawn(train, index), train.dataset.file_names[index], "plot") for index in chosen]


def drawn(seen: Seen, index: int) -> np.ndarray:
    pixels, target, _, _ = seen.dataset[index]
    pixels, zoom = enlarge(pixels)
    names = [seen.dataset.class_names[label] for label in target.labels.tolist()]
    return draw_boxes(pixels, target.boxes * zoom, names, GROUND_TRUTH).permute(1, 2, 0).numpy()


if __name__ == "__main__":
    run_main(main)
