"""Boxes in the format of VOC, YOLO or labelme -> COCO format, split into train and val. Nothing is left out unsaid.

    python scripts/convert.py yolo hands_yolo/ datasets/hands
    python scripts/convert.py voc VOCdevkit/VOC2007 datasets/voc --val 0.1 --seed 1

Writes the new folder DST, whole or not at all:

    train.json, val.json  COCO annotation files with the same classes
    images/               SRC's images; hard links where the disk allows it, copies elsewhere
    report.txt            all that was left out or read with a remark; the screen shows three examples of each kind

An image and its labels have the same path, but for a folder images or JPEGImages in the place of labels or Annotations.
SRC is not changed, and links in it are not followed.

    yolo     class cx cy w h, in parts of the image. A polygon becomes its bounding box. Names are data.yaml's, else
             those of classes.txt or *.names, else "class 0" ... An image without labels is one without boxes.
    voc      pixels counted from 1, both ends included. A difficult object is neither taught nor scored (iscrowd).
    labelme  rectangles, and polygons and circles as their bounding box.

With voc and labelme an image without labels is left out: nobody says that it is empty. Boxes are cut off at the image's
border. The split is SRC's own where it has one: data.yaml's, ImageSets/Main's, or folders called train and val (or
valid); else --val of the images are drawn by --seed. Its test part is left out.
"""

import argparse
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath

# Started as a file, Python puts scripts/ on the path and not the repository that holds `detector`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml
from tqdm import tqdm

from data.coco import CLIP_TOLERANCE, MIN_SIDE, CocoDataset
from data.images import read_image
from data.transforms import EvalTransform
from detector.errors import CONTROL, UserError, run_main
from scripts.label_formats import READERS, Box, Labels, Notes, sizes_of, text_of

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LABELS = {"yolo": ".txt", "voc": ".xml", "labelme": ".json"}
APART = ("images", "jpegimages", "labels", "annotations")  # folders that keep images and labels apart
VAL = ("val", "valid", "validation")
EXAMPLES = 3
MOST_CLASSES = 100_000


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=LABELS)
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    parser.add_argument("--val", type=float, default=0.2, metavar="SHARE", help="of the images, to score on (0.2)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same split (0)")
    args = parser.parse_args(argv)
    if not 0 < args.val < 1:
        raise UserError(f"--val {args.val}: give a share between 0 and 1")
    if not args.source.is_dir():
        raise UserError(f"{args.source}: no such folder")
    if args.target.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
        raise UserError(f"{args.target}: is there already; give a folder that is new, or empty")

    notes: Notes = defaultdict(list)
    images, labels = list_files(args.source, LABELS[args.format], notes)
    if not images:
        raise UserError(f"{args.source}: no images in it ({', '.join(IMAGES)})")
    names, own_split = describe(args.format, args.source)
    found = read_all(args.format, images, labels, names, notes)
    if not any(boxes for boxes, _ in found.values()):
        raise UserError(
            f"{args.source}: no boxes in the format of {args.format} ({len(images)} images, {len(labels)} label files)"
            + "".join(f"; {kind}: {where[0]}" for kind, where in notes.items())
        )
    check_names([*names, *(box.name for boxes, _ in found.values() for box in boxes)], args.source)
    own = own_split(found, "val", notes) or by_folder(found, VAL)
    test, _ = own_split(found, "test", notes) or by_folder(found, ("test",)) or (set(), "")
    for name in sorted(test - (own[0] if own else set())):
        notes["left out: images to test on, which are neither to train nor to choose by"].append(name)
        del found[name]
    own = own and checked(own[0], found, own[1])  # something to train on is left
    split, how = own or at_random(found, args.val, args.seed)
    write(args, found, split, names, notes)
    report(args, found, split, how, notes)


def list_files(source: Path, suffix: str, notes: Notes) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images by their path in `source`, and label files by `key_of` theirs."""
    images, labels = {}, {}
    for folder, folders, files in os.walk(source):
        folders.sort()
        for file in sorted(files):
            path = Path(folder) / file
            name = path.relative_to(source).as_posix()
            if path.suffix.lower() not in (*IMAGES, suffix):
                continue
            if path.is_symlink() or CONTROL.search(name):
                notes["left out: a link, or a name with control characters"].append(repr(name))
            elif path.suffix.lower() == suffix:
                if key_of(name) in labels:
                    notes["left out: a second label file of the same image"].append(name)
                labels.setdefault(key_of(name), path)
            else:
                images[name] = path
    return images, labels


def key_of(name: str) -> str:
    """What an image and its label file have in common: the path without suffix and the folders that keep them apart."""
    path = PurePosixPath(name)
    return "/".join([*(part for part in path.parent.parts if part.lower() not in APART), path.stem])


def read_all(
    form: str, images: dict[str, Path], labels: dict[str, Path], names: list[str], notes: Notes
) -> dict[str, tuple[list[Box], tuple[int, int]]]:
    """Boxes and the (width, height) that they are in, of every image that can be used, by its path in SRC."""
    found = {}
    unused = dict(labels)
    for name, path in tqdm(images.items(), desc="reading", unit="image"):
        file = labels.get(key_of(name))
        if file is not None and unused.pop(key_of(name), None) is None:
            notes["images that share a label file with another"].append(name)
        if file is None and form != "yolo":
            notes["left out: images without a label file"].append(name)
            continue
        try:
            stored, upright = sizes_of(path)
            label = Labels([]) if file is None else READERS[form](file, upright, names, notes)
            size = upright
            if label.size is not None and label.size != upright:
                size = stored  # labelled by who does not turn images
                if label.size != stored:
                    raise UserError(
                        f"{name} is {upright[0]}x{upright[1]}, its labels say {label.size[0]}x{label.size[1]}"
                    )
            read_image(path, size[::-1])
        except UserError as error:
            notes["left out: images or labels that cannot be used"].append(str(error))
            continue
        if file is None:
            notes["images without a label file, taken as without boxes"].append(name)
        found[name] = [box for box in (cut(box, size, name, notes) for box in label.boxes) if box], size
    described = {".json": "labels without an image", ".xml": "labels without an image", ".txt": "text without an image"}
    for file in unused.values():
        if file.name not in ("classes.txt", "README.txt", "report.txt") and file.parent.name != "Main":
            notes["not used: " + described[file.suffix.lower()]].append(str(file))
    return found


def cut(box: Box, size: tuple[int, int], name: str, notes: Notes) -> Box | None:
    """The part of a box that lies in its image; None where there is none."""
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
    if max(abs(x1 - x), abs(y1 - y), abs(x2 - x - width), abs(y2 - y - height)) > CLIP_TOLERANCE:
        notes["boxes cut off at the border of their image"].append(f"{name}: {box.name}")
    return box._replace(sides=(round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)))


# --------------------------------------------------------------------------------------------------------- the split

Split = tuple[set[str], str]  # the images to score on, and how they were chosen


def describe(form: str, source: Path) -> tuple[list[str], Callable[[dict, str, Notes], Split | None]]:
    """Names of the classes where the format has them apart, and what finds a part, "val" or "test", that SRC names."""
    if form == "voc":
        lists = source / "ImageSets" / "Main"
        return [], lambda found, part, notes: by_list(found, lists / f"{part}.txt", source, notes)
    if form == "labelme":
        return [], lambda found, part, notes: None
    content = {}
    for file in sorted(source.glob("*.yaml")) + sorted(source.glob("*.yml")):
        try:
            content = yaml.safe_load(text_of(file))
        except yaml.YAMLError as error:
            raise UserError(f"{file}: is not YAML ({' '.join(str(error).split())[:100]})") from None
        if isinstance(content, dict) and "names" in content:
            break
        content = {}
    named = content.get("names")
    if isinstance(named, dict):
        named = in_order(named, file)
    if named is None:
        lists = [*sorted(source.rglob("classes.txt")), *sorted(source.rglob("*.names"))]
        named = text_of(lists[0]).split("\n") if lists else []
        named = [line.strip() for line in named if line.strip()]
    if not isinstance(named, list) or len(set(map(str, named))) != len(named):
        raise UserError(f"{source}: the names of its classes are not a list, or one is there twice")
    return list(map(str, named)), lambda found, part, notes: by_entry(found, content.get(part), source, notes)


def in_order(named: dict, file: Path) -> list:
    """The names of {number: name}; those that are not there are called by their number."""
    try:
        by_number = {int(number): name for number, name in named.items()}
    except (TypeError, ValueError):
        raise UserError(f"{file}: names: each is to have its number, as in 0: cat") from None
    if by_number and not 0 <= min(by_number) <= max(by_number) < MOST_CLASSES:
        raise UserError(f"{file}: names: numbers go from 0 to {MOST_CLASSES}")
    return [by_number.get(number, f"class {number}") for number in range(max(by_number, default=-1) + 1)]


def check_names(names: list[str], source: Path) -> None:
    for name in names:
        if not name.strip() or CONTROL.search(name):
            raise UserError(f"{source}: a class is called {name!r}; give it a name of one line")


def by_entry(found: dict, entry: object, source: Path, notes: Notes) -> Split | None:
    """The images of a part of data.yaml: a folder, a list, or several of them; their paths start from anywhere."""
    chosen: set[str] = set()
    for one in entry if isinstance(entry, list) else [entry]:
        if isinstance(one, str):
            place = re.sub(r"^(\.\.?/)+", "", one).strip("/")
            if place.endswith(".txt"):
                chosen |= (by_list(found, source / place, source, notes) or (set(), ""))[0]
            else:
                chosen |= {name for name in found if name.startswith(f"{place}/")}
    return checked(chosen, found, "data.yaml's")


def by_list(found: dict, file: Path, source: Path, notes: Notes) -> Split | None:
    """The images that a text file lists: by their path or the end of it, or by the name without suffix."""
    if not file.exists():
        return None
    by_name = defaultdict(list)
    for name in found:
        by_name[PurePosixPath(name).name].append(name)
        by_name[PurePosixPath(name).stem].append(name)
    chosen: set[str] = set()
    for line in filter(None, map(str.strip, text_of(file).splitlines())):
        alike = by_name.get(PurePosixPath(line).name, [])
        hits = [name for name in alike if f"/{name}".endswith(f"/{line.lstrip('./')}") or line.endswith(f"/{name}")]
        if not hits and len(alike) == 1:
            hits = alike
        if not hits:  # behind the name there may be a number: VOC's lists of a class
            hits = by_name.get(line.split()[0], [])
        if not hits:
            notes[f"lines of {file.relative_to(source)} that name no image in use"].append(line)
        chosen.update(hits)
    return checked(chosen, found, str(file.relative_to(source)))


def by_folder(found: dict, names: tuple[str, ...]) -> Split | None:
    val = {name for name in found if any(part.lower() in names for part in PurePosixPath(name).parent.parts)}
    return checked(val, found, "its folders'")


def checked(val: set[str], found: dict, how: str) -> Split | None:
    """A split that has both parts."""
    return (val, how) if val and len(val) < len(found) else None


def at_random(found: dict, share: float, seed: int) -> Split:
    if len(found) < 2:
        raise UserError(f"{len(found)} image can be used: one is needed to train on and another to score")
    names = sorted(found)
    random.Random(seed).shuffle(names)
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return set(names[:count]), f"drawn by --seed {seed}"


# ------------------------------------------------------------------------------------------------------- what is made


def write(args: argparse.Namespace, found: dict, val: set[str], names: list[str], notes: Notes) -> None:
    """The new folder, by way of one beside it, checked as training will check it."""
    used = {box.name for boxes, _ in found.values() for box in boxes}
    classes = list(dict.fromkeys([*names, *sorted(used)]))
    category = {name: place for place, name in enumerate(classes, start=1)}
    place = Path(os.path.abspath(args.target))  # "." has no name
    beside = place.with_name(f".{place.name}.part")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        for name in tqdm(found, desc="writing", unit="image"):
            image = beside / "images" / name
            image.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(args.source / name, image)
            except OSError:
                shutil.copyfile(args.source / name, image)
        for split in ("train", "val"):
            chosen = [name for name in sorted(found) if (name in val) == (split == "val")]
            (beside / f"{split}.json").write_text(json.dumps(document(chosen, found, category)), encoding="utf-8")
            CocoDataset(beside / f"{split}.json", beside / "images", EvalTransform(800, 1333))
        told = "".join(
            f"{kind}: {len(where)}\n" + "".join(f"    {one}\n" for one in where) for kind, where in notes.items()
        )
        (beside / "report.txt").write_text(told or "Everything was used as it is.\n", encoding="utf-8")
        os.replace(beside, place)
    except OSError as error:
        raise UserError(f"{args.target}: cannot be written ({error.strerror}); nothing was, make room for it") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def document(chosen: list[str], found: dict, category: dict[str, int]) -> dict:
    """A COCO annotation file of the images `chosen`."""
    images, annotations = [], []
    for number, name in enumerate(chosen, start=1):
        boxes, (width, height) = found[name]
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for box in boxes:
            area = box.sides[2] * box.sides[3]
            about = {"id": len(annotations) + 1, "image_id": number, "category_id": category[box.name]}
            annotations.append(about | {"bbox": list(box.sides), "area": area, "iscrowd": int(box.crowd)})
    categories = [{"id": place, "name": name} for name, place in category.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def report(args: argparse.Namespace, found: dict, val: set[str], how: str, notes: Notes) -> None:
    counts = {
        split: Counter(
            box.name for name, (boxes, _) in found.items() if (name in val) == (split == "val") for box in boxes
        )
        for split in ("train", "val")
    }
    print(f"{args.target}: {len(found) - len(val)} images to train on, {len(val)} to score on; the split is {how}")
    for name in sorted(set(counts["train"]) | set(counts["val"])):
        lack = [split for split in counts if not counts[split][name]]
        remark = f", none in {lack[0]}: it cannot be {'learnt' if lack[0] == 'train' else 'scored'}" if lack else ""
        print(f"    {name}: {counts['train'][name]} and {counts['val'][name]} boxes{remark}")
    for kind, where in notes.items():
        examples = "; ".join(where[:EXAMPLES]) + ("; ..." if len(where) > EXAMPLES else "")
        print(f"{kind}: {len(where)} ({examples})")
    if notes:
        print(f"all of them: {args.target / 'report.txt'}")
    folder = shlex.quote(str(args.target))
    files = f"--train {folder}/train.json --val {folder}/val.json --images {folder}/images"
    print(f"look at it: python scripts/check_data.py {files}")
    print(
        f"train:      python train.py --config configs/coco/focal.yaml --set run={shlex.quote(args.target.name)} "
        + " ".join(
            f"data.{split}.annotations={folder}/{split}.json data.{split}.images={folder}/images"
            for split in ("train", "val")
        )
    )


if __name__ == "__main__":
    run_main(main)
