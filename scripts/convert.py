"""YOLO, VOC, labelme or COCO files -> COCO files, split into train, val and test. Everything left out is reported.

    python scripts/convert.py yolo hands_yolo/ datasets/hands
    python scripts/convert.py voc VOCdevkit/VOC2007 datasets/voc --val 0.1 --seed 1
    python scripts/convert.py coco export/instances_default.json datasets/hands
    python scripts/convert.py yolo new_photos/ datasets/new --val 1

Writes the new folder DST, whole or not at all:

    train.json, val.json  COCO annotation files with the same classes; test.json too if SRC has a labelled test part
    images/               SRC's images, in SRC's folders; hard links where the disk allows it, copies elsewhere
    report.txt            all that was left out or read with a remark; the screen shows three examples of each kind

SRC is a folder, or a set's data.yaml or obj.data. It is not changed. Links in it are followed.

    yolo     class cx cy w h, in parts of the image. A polygon or an oriented box becomes its bounding box, keypoints
             (kpt_shape in data.yaml) are left out. Names are data.yaml's, obj.data's, those of classes.txt or *.names,
             else "class 0" ... An image without labels has no boxes.
    voc      pixels counted from 1, both ends included; or, where corners are 0 or fractions, positions counted from 0.
             A difficult object is neither trained on nor scored (iscrowd).
    labelme  rectangles, and the bounds of polygons, masks, rotated boxes and circles. Shapes of one label and
             group_id are one object. An image that is only inside its JSON file is taken from there.
    coco     a file, or several, or folders of them; their classes of the same name become one. Boxes only.

Labels belong to an image if they have the same path, with labels/ or Annotations/ in place of images/ or JPEGImages/,
if the label file names the image, or if the file name is unique. With voc and labelme an image without labels is left
out, because it may show objects that nobody labelled. Boxes are clipped to the image, except in COCO files.

If SRC has its own split, this is used: that of data.yaml, obj.data, lists called train.txt and val.txt, ImageSets/Main,
or files and folders with train, val (valid, validation, dev) and test in their names. Otherwise, and with --split
random, a share --val of the images outside the test part is drawn by --seed. --val 1 puts all images into val.json, to
score a model on them.
"""

import argparse
import json
import math
import os
import shlex
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from data.coco import CLIP_TOLERANCE, MIN_SIDE, CocoDataset
from data.transforms import EvalTransform
from detector.errors import CONTROL, UserError, run_main
from detector.images import Remarks, image_size, read_image
from scripts.conversion.coco import read_coco
from scripts.conversion.folder import LABELS, read_folder
from scripts.conversion.found_files import Notes, lines_of_notes
from scripts.conversion.label_formats import Box
from scripts.conversion.source import Source
from scripts.conversion.splits import Split, at_random, own_split, own_test_part

SMALL = 1000  # images for training


class Picture(NamedTuple):
    path: Path
    size: tuple[int, int]  # (width, height)
    boxes: list[Box]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=(*LABELS, "coco"))
    parser.add_argument("sources", type=Path, metavar="SRC", nargs="+", help="a folder or file; coco takes several")
    parser.add_argument("target", type=Path, metavar="DST")
    parser.add_argument(
        "--split", choices=("own", "random"), default="own", help="SRC's own where it has one (default: own)"
    )
    parser.add_argument(
        "--val", type=float, default=0.2, metavar="SHARE", help="of the images, for validation (default: 0.2); 1: all"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed gives the same split (default: 0)"
    )
    parser.add_argument("--trust", action="store_true", help="use boxes that look like another format unchanged")
    args = parser.parse_args(argv)
    if not 0 < args.val <= 1:
        raise UserError(f"--val {args.val}: give a share above 0, at most 1")
    if args.format != "coco" and len(args.sources) > 1:
        raise UserError(f"{args.sources[1]}: {args.format} is converted one SRC at a time; merge the results with coco")
    for source in args.sources:
        if not source.exists():
            raise UserError(f"{source}: no such folder or file")
    if args.target.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
        raise UserError(f"{args.target}: is there already; give a folder that is new, or empty")
    if not args.target.name:  # ".", whose name is that of the run
        args.target = args.target.resolve()
    with whole_or_not(args.target) as beside:
        made = convert(args, beside)
    report(args, *made)


Parts = dict[str, list[str]]  # train, val, test -> names of their images


def convert(args: argparse.Namespace, beside: Path) -> tuple[dict[str, Picture], Parts, str, Notes]:
    """Write the new folder at `beside`; returns its images, those of each part, how they were split, and remarks."""
    notes: Notes = defaultdict(list)
    if args.format == "coco":
        source = read_coco(args.sources, notes)
    else:
        source = read_folder(args.format, args.sources[0], beside / "decoded", notes)
    named = ", ".join(map(str, args.sources))
    for name in [*source.names, *(box.name for labels in source.labels.values() for box in labels.boxes)]:
        if not name.strip() or CONTROL.search(name):
            raise UserError(f"{named}: a class is called {name!r}; give it a name without line breaks")
    split = own_split(source, notes) if args.split == "own" and args.val < 1 else own_test_part(source, notes)
    for name, why in split.left_out.items():
        if name in source.labels:
            notes[f"left out: {why}"].append(name)
    pictures = look_at(source, split, notes)
    if not any(picture.boxes for picture in pictures.values()):
        raise UserError(
            f"{named}: no boxes in the format of {args.format} ({source.about})"
            + "".join(f"; {kind}: {where[0]}" for kind, where in notes.items())
        )
    test = split.test & pictures.keys()
    if test and not any(pictures[name].boxes for name in test):
        notes["left out: images of the test part, which has no boxes"] += sorted(test)
        pictures = {name: picture for name, picture in pictures.items() if name not in test}
    rest = pictures.keys() - (test if args.val < 1 else set())
    val, how = split.val & rest, split.how
    if args.val == 1:
        val, how = set(rest), "--val 1"
    elif not split.val:
        val, how = at_random(list(rest), args.val, args.seed), f"drawn by --seed {args.seed}"
    if not val or (len(val) == len(rest) and args.val < 1):
        part = "score" if not val else "train"
        raise UserError(
            f"{named}: no image that can be used is left to {part} on, the split is {how}; --split random draws one"
            + "".join(f"; {kind}: {where[0]}" for kind, where in notes.items())
        )
    parts = {"train": sorted(rest - val), "val": sorted(val), "test": sorted(pictures.keys() - rest)}
    parts = {part: chosen for part, chosen in parts.items() if chosen}
    write(beside, pictures, parts, source.names, notes, args.trust)
    return pictures, parts, how, notes


def look_at(source: Source, split: Split, notes: Notes) -> dict[str, Picture]:
    """The usable images, without those that the split leaves out, with boxes in pixels."""
    pictures, remarks = {}, Remarks()
    chosen = [name for name in source.labels if name not in split.left_out]
    for name in tqdm(chosen, desc="reading", unit="image"):
        path, labels = source.images[name], source.labels[name]
        try:
            size = labels.size or image_size(path)[::-1]  # the labels may be of the image not turned by EXIF
            read_image(path, size[::-1], remarks)
        except UserError as error:
            notes["left out: images or labels that cannot be used"].append(str(error))
            continue
        boxes = [box for labelled in labels.boxes_in(size) if (box := cut(labelled, size, name, notes, source.as_is))]
        if labels.boxes and not boxes:
            notes["left out: images none of whose boxes lies in them"].append(name)
        else:
            pictures[name] = Picture(path, size, boxes)
    for kind, files in remarks.items():
        notes[f"images with {kind}"] += sorted(files)
    return pictures


def cut(box: Box, size: tuple[int, int], name: str, notes: Notes, as_is: bool) -> Box | None:
    """The part of a box inside its image, or with `as_is` the box itself; None if no part is inside."""
    x, y, width, height = box.sides
    if not all(map(math.isfinite, box.sides)):
        notes["left out: boxes that are not finite"].append(f"{name}: {box.name}")
        return None
    x1, y1 = max(x, 0.0), max(y, 0.0)
    x2, y2 = min(x + width, float(size[0])), min(y + height, float(size[1]))
    if x2 - x1 < MIN_SIDE or y2 - y1 < MIN_SIDE:
        notes["left out: boxes without area in their image"].append(
            f"{name}: {box.name} {[round(v, 1) for v in box.sides]}"
        )
        return None
    if as_is:
        return box
    if max(abs(x1 - x), abs(y1 - y), abs(x2 - x - width), abs(y2 - y - height)) > CLIP_TOLERANCE:
        notes["boxes cut off at the border of their image"].append(f"{name}: {box.name}")
    return box._replace(sides=(round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)))


# ------------------------------------------------------------------------------------------------------- the new folder


@contextmanager
def whole_or_not(target: Path) -> Iterator[Path]:
    """A folder beside the target. It takes the target's place if nothing fails; otherwise it is deleted."""
    beside = target.with_name(f".{target.name}.part")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        yield beside
        os.replace(beside, target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); nothing was written. Free space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write(
    beside: Path, pictures: dict[str, Picture], parts: Parts, names: list[str], notes: Notes, trust: bool
) -> None:
    """Write the new folder, and check it as training will."""
    used = {box.name for picture in pictures.values() for box in picture.boxes}
    classes = list(dict.fromkeys([*names, *sorted(used)]))
    category = {name: place for place, name in enumerate(classes, start=1)}
    for name, picture in tqdm(pictures.items(), desc="writing", unit="image"):
        image = beside / "images" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        file = os.path.realpath(picture.path)  # a link to a link would break when its target moves
        try:
            os.link(file, image)
        except OSError:
            shutil.copyfile(file, image)
    shutil.rmtree(beside / "decoded", ignore_errors=True)
    for split, chosen in parts.items():
        (beside / f"{split}.json").write_text(json.dumps(document(chosen, pictures, category)), encoding="utf-8")
        try:
            CocoDataset(beside / f"{split}.json", beside / "images", EvalTransform(800, 1333), trust=trust)
        except UserError as error:
            raise UserError(f"the converted data set would be wrong: {str(error).replace(f'{beside}/', '')}") from None
    remarks = "".join(
        f"{kind}: {len(where)}\n" + "".join(f"    {place}\n" for place in where) for kind, where in notes.items()
    )
    (beside / "report.txt").write_text(remarks or "Everything was used as it is.\n", encoding="utf-8")


def document(chosen: list[str], pictures: dict, category: dict[str, int]) -> dict:
    """A COCO annotation file of the images `chosen`."""
    images: list[dict] = []
    annotations: list[dict] = []
    for number, name in enumerate(chosen, start=1):
        _, (width, height), boxes = pictures[name]
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for box in boxes:
            area = box.area or box.sides[2] * box.sides[3]
            about = {"id": len(annotations) + 1, "image_id": number, "category_id": category[box.name]}
            annotations.append(about | {"bbox": list(box.sides), "area": area, "iscrowd": int(box.crowd)})
    categories = [{"id": place, "name": name} for name, place in category.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def report(args: argparse.Namespace, pictures: dict[str, Picture], parts: Parts, how: str, notes: Notes) -> None:
    purpose = {"train": "training", "val": "validation", "test": "a test"}
    sizes = [f"{len(chosen)} images for {purpose[part]}" for part, chosen in parts.items()]
    print(f"{args.target}: {', '.join(sizes)}; the split is {how}")
    counts = {
        part: Counter(box.name for name in chosen for box in pictures[name].boxes) for part, chosen in parts.items()
    }
    for name in sorted(set().union(*counts.values())):
        lack = [part for part in ("train", "val") if part in parts and not counts[part][name]]
        remark = f", none in {lack[0]}: it cannot be {'learnt' if lack[0] == 'train' else 'scored'}" if lack else ""
        print(f"    {name}: {' and '.join(str(count[name]) for count in counts.values())} boxes{remark}")
    for line in lines_of_notes(notes):
        print(line)
    if notes:
        print(f"all of them: {args.target / 'report.txt'}")
    folder = shlex.quote(str(args.target))
    if "train" in parts:
        config = f"configs/{'coco' if torch.cuda.is_available() else 'laptop'}/focal.yaml"
        files = f"--train {folder}/train.json --val {folder}/val.json --images {folder}/images"
        print(f"look at it: python scripts/check_data.py --config {config} {files}")
        settings = [f"run={shlex.quote(args.target.name)}"]
        for split in ("train", "val"):
            settings += [f"data.{split}.annotations={folder}/{split}.json", f"data.{split}.images={folder}/images"]
        if torch.cuda.is_available() and len(parts["train"]) < SMALL:
            # COCO's recipe would train such a set for a few dozen steps.
            settings += ["solver.batch_size=4", "solver.epochs=40", "solver.warmup_steps=50"]
        print(f"train:      python train.py --config {config} --set {' '.join(settings)}")
    if "train" not in parts or "test" in parts:
        run, scored = ("RUN", "val") if "train" not in parts else (shlex.quote(args.target.name), "test")
        command = f"python eval.py --checkpoint runs/{run}/best.pt --data {folder}/{scored}.json {folder}/images"
        print(f"{'test:' if 'test' in parts else 'score:':<11} {command}")


if __name__ == "__main__":
    run_main(main)
