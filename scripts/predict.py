"""What a trained model finds in images, folders of them and videos: pictures of it, and a file.

    python scripts/predict.py --checkpoint runs/mine/best.pt photo.jpg more_photos/ film.mp4

Writes into the folder --output (predictions/)

    photo.jpg, more_photos/..., film.mp4   each with its boxes drawn
    detections.json                        all boxes in COCO's results format, and the file, and of a video the frame,
                                           that each is of; image_id counts images and frames

Shown is what scores at least --score, or, without it, what its class's best threshold in the run's last evaluation asks
(the one of the best F1 at an IoU of 0.5; 0.3 where none is known). An image that cannot be read, or is of a kind that
cannot, such as .heic, does not keep the others from being done; the exit code is then 2. Other files in a folder are
counted. A video that ends early is done as far as it goes, and that is said. No file that is given is written over.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Started as a file, Python puts scripts/ on the path and not the repository that holds `detector`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.draw import annotate
from data.images import Remarks, read_image, remark_lines, suffixes
from detector import load
from detector.errors import UserError, run_main
from detector.inference import Detector, Found
from scripts.found_files import Notes, kind_of, tell_unused
from scripts.found_files import list_files as files_below

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")
COLOURS = ("#ff7f0e", "#17becf", "#e377c2", "#bcbd22", "#2ca02c", "#9467bd", "#d62728", "#1f77b4")
RESULTS = "detections.json"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="IMAGE|FOLDER|VIDEO")
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="FOLDER")
    parser.add_argument("--score", type=float, metavar="0..1", help="the least that is shown, for all classes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    args = parser.parse_args(argv)
    if args.score is not None and not 0 <= args.score <= 1:
        raise UserError(f"--score {args.score}: give a number from 0 to 1")
    if (args.output / "config.yaml").exists():
        raise UserError(f"--output {args.output}: is a run's folder, whose files would be replaced; give another")
    passed: Notes = defaultdict(list)
    files, unread = list_files(args.sources, args.output, passed)
    detector = load(args.checkpoint, args.device)
    if args.score is not None:
        detector.thresholds.fill_(args.score)
    shown = [f"{name} {score:.2f}" for name, score in zip(detector.class_names, detector.thresholds.tolist())]
    print("shown from a score of: " + ", ".join(shown[:20] + ["..."] * (len(shown) > 20)))

    results: list[dict[str, Any]] = []
    flaws: list[UserError] = []
    remarks: Remarks = {}
    counted, start = 0, time.perf_counter()
    try:
        for source, target in tqdm(files, unit="file"):
            try:
                done = film if source.suffix.lower() in VIDEOS else picture
                counted += done(detector, source, target, counted, results, remarks)
            except CannotWriteError:
                raise  # nor what comes after
            except UserError as error:
                flaws.append(error)
            except FloatingPointError as error:
                raise FloatingPointError(f"{source}: {error}") from None
    finally:  # also of what was done before Ctrl-C
        write(args.output / RESULTS, json.dumps(results).encode())
    seconds = time.perf_counter() - start
    found = Counter(one["category"] for one in results)
    counts = ", ".join(f"{name} {count}" for name, count in found.most_common(20))
    print(f"{counted} images, {len(results)} boxes ({counts}) in {seconds:.1f} s, {counted / seconds:.1f} images/s")
    print(f"written: {args.output / RESULTS} and the pictures beside it")
    for line in remark_lines(remarks):
        print(line)
    for kind, where in passed.items():
        print(f"{kind}: {len(where)} ({'; '.join(where[:3])}{'; ...' * (len(where) > 3)})")
    flaws += [UserError(f"{path}: a picture of this kind cannot be read; save it as .jpg") for path in unread]
    for flaw in flaws:
        print(f"left out: {flaw}", file=sys.stderr)
    if flaws:
        raise UserError(f"{len(flaws)} of {len(files) + len(unread)} files could not be used, the first: {flaws[0]}")


def list_files(sources: list[Path], output: Path, passed: Notes) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Each image and video with where its picture goes, no two to one place; and the pictures that cannot be read.

    What else is in the folders is added to `passed`.
    """
    pairs: list[tuple[Path, Path]] = []
    unread: list[Path] = []
    known = {*suffixes(), *VIDEOS}
    for source in sources:
        if source.is_dir():
            every = [*files_below(source, passed).values()]
            every = [path for path in every if output.resolve() not in path.resolve().parents]  # our own pictures
            inside = [path for path in every if path.suffix.lower() in known]
            unread += [path for path in every if kind_of(path.name) == "picture"]
            tell_unused([str(path) for path in sorted({*every} - {*inside, *unread})], passed)
            if not inside:
                there = "".join(f"; {kind}: {where[0]}" for kind, where in passed.items())
                there += f"; {unread[0]} cannot be read, save it as .jpg" if unread else ""
                raise UserError(f"{source}: no image or video in it ({' '.join(sorted(known))}){there}")
            pairs += [(path, Path(source.resolve().name) / path.relative_to(source)) for path in inside]
        elif not source.exists():
            raise UserError(f"{source}: no such file or folder")
        elif source.suffix.lower() not in known:
            raise UserError(f"{source}: neither an image nor a video ({' '.join(sorted(known))})")
        else:
            pairs.append((source, Path(source.name)))
    taken: set[Path] = set()
    originals = {source.resolve() for source, _ in pairs}
    placed = []
    for source, name in pairs:
        name = name.with_suffix(".mp4" if name.suffix.lower() in VIDEOS else ".jpg")
        number, target = 2, output / name
        while target in taken or target.resolve() in originals:
            number, target = number + 1, output / name.with_stem(f"{name.stem}_{number}")
        taken.add(target)
        placed.append((source, target))
    return placed, unread


def picture(
    detector: Detector, source: Path, target: Path, number: int, results: list[dict[str, Any]], remarks: Remarks
) -> int:
    """Do one image; how many there were."""
    image = read_image(source, remarks=remarks)
    found = detector(image)
    drawn = io.BytesIO()
    try:
        Image.fromarray(draw(image, found, detector)).save(drawn, "JPEG", quality=92)
    except OSError as error:
        raise UserError(f"{source}: no picture of it can be made ({error})") from None
    write(target, drawn.getvalue())
    results += entries(found, detector, {"image_id": number, "file_name": str(source)})
    return 1


def film(
    detector: Detector, source: Path, target: Path, number: int, results: list[dict[str, Any]], remarks: Remarks
) -> int:
    """Do a video; how many frames it had. It has its own name only when it is whole."""
    reader = cv2.VideoCapture(str(source))
    rate, expected = reader.get(cv2.CAP_PROP_FPS) or 25.0, int(reader.get(cv2.CAP_PROP_FRAME_COUNT))
    beside, writer, count = target.with_suffix(".part.mp4"), cv2.VideoWriter(), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for image in tqdm(frames(reader), total=max(expected, 0) or None, desc=source.name, unit="frame", leave=False):
            if not count:
                size = image.shape[1], image.shape[0]
                writer.open(str(beside), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
            found = detector(image)
            writer.write(cv2.cvtColor(draw(image, found, detector), cv2.COLOR_RGB2BGR))
            results += entries(found, detector, {"image_id": number + count, "file_name": str(source), "frame": count})
            count += 1
        if not count:
            raise UserError(f"{source}: no frame of it can be decoded; give another video")
        writer.release()
        written = sum(1 for _ in frames(cv2.VideoCapture(str(beside))))
        if written < count:  # OpenCV's writer never says so
            raise OSError(f"{written} of {count} frames are in it; is the disk full?")
        os.replace(beside, target)
    except OSError as error:
        raise CannotWriteError(target, error) from None
    finally:
        reader.release()
        writer.release()
        with contextlib.suppress(OSError):  # it may never have been
            beside.unlink()
    if count + 1 < expected:  # what a file says of itself may be one off
        tqdm.write(f"{source}: {count} frames could be decoded of the {expected} that it says it has", file=sys.stderr)
    return count


def frames(reader: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """Images (h, w, 3) uint8 RGB."""
    while True:
        there, image = reader.read()
        if not there:
            return
        yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def entries(found: Found, detector: Detector, about: dict[str, Any]) -> list[dict[str, Any]]:
    """In COCO's results format, with `about` in each."""
    category = dict(zip(detector.class_names, detector.category_ids))
    sides = torch.cat([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], dim=1).double().numpy().round(3)
    return [
        {**about, "category_id": category[name], "category": name, "bbox": box, "score": round(score, 5)}
        for name, box, score in zip(found.names, sides.tolist(), found.scores.tolist())
    ]


def draw(image: np.ndarray, found: Found, detector: Detector) -> np.ndarray:
    """A copy of the image with boxes and captions."""
    canvas = Image.fromarray(image)
    captions = [f"{name} {score:.2f}" for name, score in zip(found.names, found.scores.tolist())]
    colours = [COLOURS[detector.class_names.index(name) % len(COLOURS)] for name in found.names]
    annotate(canvas, found.boxes, captions, colours)
    return np.asarray(canvas)


def write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise CannotWriteError(path, error) from None


class CannotWriteError(UserError):
    def __init__(self, path: Path, error: OSError):
        super().__init__(f"{path}: cannot be written ({error.strerror or error}); give another folder by --output")


if __name__ == "__main__":
    run_main(main)
