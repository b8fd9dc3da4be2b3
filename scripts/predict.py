"""Detect objects in images, folders and videos: draws the boxes and writes them to a file.

    python scripts/predict.py --checkpoint runs/mine/best.pt photo.jpg more_photos/ film.mp4

Writes into the folder --output (predictions/)

    photo.jpg, more_photos/..., film.mp4   each with its boxes drawn
    detections.json                        all boxes in COCO's results format, each with its file and, for a video, its
                                           frame; image_id counts images and frames

Boxes are shown from --score up, or else from the best threshold of their class in the run's last evaluation (the best
F1 at an IoU of 0.5; 0.3 if none is known). If an image cannot be read, or its format is not supported (such as .heic),
the others are processed and the exit code is 2. Other files in a folder are counted. A video that ends early is
processed as far as it goes, with a message. Source files are never overwritten.
"""

import argparse
import contextlib
import io
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from torchvision.ops import box_convert
from tqdm import tqdm

from data.draw import annotate
from detector import atomic, load
from detector.errors import UserError, run_main
from detector.images import Remarks, read_image, remark_lines, suffixes
from detector.inference import Detector, NamedDetections
from scripts.conversion.found_files import Notes, kind_of, lines_of_notes, note_unused
from scripts.conversion.found_files import list_files as files_below

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")
COLOURS = ("#ff7f0e", "#17becf", "#e377c2", "#bcbd22", "#2ca02c", "#9467bd", "#d62728", "#1f77b4")
RESULTS = "detections.json"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="IMAGE|FOLDER|VIDEO")
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="FOLDER")
    parser.add_argument("--score", type=float, metavar="0..1", help="show boxes from this score up, for all classes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    args = parser.parse_args(argv)
    if args.score is not None and not 0 <= args.score <= 1:
        raise UserError(f"--score {args.score}: give a number from 0 to 1")
    if (args.output / "config.yaml").exists():
        raise UserError(f"--output {args.output}: has files of train.py or eval.py, which would be lost; give another")
    skipped: Notes = defaultdict(list)
    files, unreadable = list_files(args.sources, args.output, skipped)
    detector = load(args.checkpoint, args.device)
    if args.score is not None:
        detector.thresholds.fill_(args.score)
    shown = [f"{name} {score:.2f}" for name, score in zip(detector.class_names, detector.thresholds.tolist())]
    print("shown from a score of: " + ", ".join(shown[:20] + ["..."] * (len(shown) > 20)))

    results: list[dict[str, Any]] = []
    errors: list[UserError] = []
    remarks: Remarks = {}
    counted, start = 0, time.perf_counter()
    try:
        for source, target in tqdm(files, unit="file"):
            try:
                process = process_video if source.suffix.lower() in VIDEOS else process_image
                counted += process(detector, source, target, counted, results, remarks)
            except CannotWriteError:
                raise  # the next files cannot be written either
            except UserError as error:
                errors.append(error)
            except FloatingPointError as error:
                raise FloatingPointError(f"{source}: {error}") from None
    finally:  # also after Ctrl-C
        write(args.output / RESULTS, json.dumps(results).encode())
    seconds = time.perf_counter() - start
    by_class = Counter(entry["category"] for entry in results)
    counts = ", ".join(f"{name} {count}" for name, count in by_class.most_common(20))
    boxes = f"{len(results)} boxes ({counts})" if results else "no boxes"
    print(f"{counted} images, {boxes} in {seconds:.1f} s, {counted / seconds:.1f} images/s")
    if counted and not results and args.score != 0:
        print("no box reached the score that its class needs (see above); a lower --score shows more")
    print(f"written: {args.output / RESULTS} and the pictures beside it")
    for line in remark_lines(remarks) + lines_of_notes(skipped):
        print(line)
    errors += [UserError(f"{path}: this image format cannot be read; save it as .jpg") for path in unreadable]
    for refusal in errors:
        print(f"skipped: {refusal}", file=sys.stderr)
    if errors:
        total = len(files) + len(unreadable)
        raise UserError(f"{len(errors)} of {total} files could not be used, the first: {errors[0]}")


def list_files(sources: list[Path], output: Path, skipped: Notes) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """(source, target) of each image and video, with distinct targets, and the images in unsupported formats.

    Other files in the folders are added to `skipped`.
    """
    pairs: list[tuple[Path, Path]] = []
    unreadable: list[Path] = []
    known = {*suffixes(), *VIDEOS}
    written = {output.resolve(), *(output.resolve() / source.resolve().name for source in sources if source.is_dir())}
    for source in sources:
        if source.is_dir():
            paths = []
            ours = {folder for folder in written if source.resolve() in folder.parents}
            for path in files_below(source, skipped).values():
                if ours & {*path.resolve().parents}:
                    skipped["left out: files in the folder of the results"].append(str(path))
                else:
                    paths.append(path)
            usable = [path for path in paths if path.suffix.lower() in known]
            unreadable += [path for path in paths if kind_of(path.name) == "picture"]
            note_unused([str(path) for path in sorted({*paths} - {*usable, *unreadable})], skipped)
            if not usable:
                others = "".join(f"; {kind}: {where[0]}" for kind, where in skipped.items())
                others += f"; {unreadable[0]} cannot be read, save it as .jpg" if unreadable else ""
                raise UserError(f"{source}: no image or video in it ({' '.join(sorted(known))}){others}")
            pairs += [(path, Path(source.resolve().name) / path.relative_to(source)) for path in usable]
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
    return placed, unreadable


def process_image(
    detector: Detector, source: Path, target: Path, number: int, results: list[dict[str, Any]], remarks: Remarks
) -> int:
    """Process one image; returns 1, the number of images."""
    image = read_image(source, remarks=remarks)
    detections = detector(image)
    drawn = io.BytesIO()
    try:
        Image.fromarray(draw(image, detections, detector)).save(drawn, "JPEG", quality=92)
    except OSError as error:
        raise UserError(f"{source}: cannot be drawn on ({error})") from None
    write(target, drawn.getvalue())
    results += entries(detections, detector, {"image_id": number, "file_name": str(source)})
    return 1


def process_video(
    detector: Detector, source: Path, target: Path, number: int, results: list[dict[str, Any]], remarks: Remarks
) -> int:
    """Process a video; returns its number of frames. The file gets its final name when it is complete."""
    reader, writer, count = cv2.VideoCapture(str(source)), cv2.VideoWriter(), 0
    rate, expected = reader.get(cv2.CAP_PROP_FPS) or 25.0, int(reader.get(cv2.CAP_PROP_FRAME_COUNT))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(target, ".part.mp4") as beside, contextlib.ExitStack() as stack:
            stack.callback(writer.release)  # closes the file before it is renamed or removed
            images = tqdm(frames(reader), total=max(expected, 0) or None, desc=source.name, unit="frame", leave=False)
            for image in images:
                if not count:
                    size = image.shape[1], image.shape[0]
                    writer.open(str(beside), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
                detections = detector(image)
                writer.write(cv2.cvtColor(draw(image, detections, detector), cv2.COLOR_RGB2BGR))
                about = {"image_id": number + count, "file_name": str(source), "frame": count}
                results += entries(detections, detector, about)
                count += 1
            if not count:
                raise UserError(f"{source}: no frame of it can be decoded; give another video")
            writer.release()
            written = sum(1 for _ in frames(cv2.VideoCapture(str(beside))))
            if written < count:  # OpenCV's writer reports no errors
                raise OSError(f"{written} of {count} frames are in it; is the disk full?")
    except OSError as error:
        raise CannotWriteError(target, error) from None
    finally:
        reader.release()
    if count + 1 < expected:  # the file's own count may be off by one
        tqdm.write(f"{source}: {count} of {expected} frames could be decoded", file=sys.stderr)
    return count


def frames(reader: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """Images (h, w, 3) uint8 RGB."""
    while True:
        success, image = reader.read()
        if not success:
            return
        yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def entries(detections: NamedDetections, detector: Detector, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The detections in COCO's results format, each with `about` added."""
    category = dict(zip(detector.class_names, detector.category_ids))
    sides = box_convert(detections.boxes, "xyxy", "xywh").double().numpy().round(3)
    return [
        {**about, "category_id": category[name], "category": name, "bbox": box, "score": round(score, 5)}
        for name, box, score in zip(detections.names, sides.tolist(), detections.scores.tolist())
    ]


def draw(image: np.ndarray, detections: NamedDetections, detector: Detector) -> np.ndarray:
    """A copy of the image with boxes and captions."""
    canvas = Image.fromarray(image)
    captions = [f"{name} {score:.2f}" for name, score in zip(detections.names, detections.scores.tolist())]
    colours = [COLOURS[detector.class_names.index(name) % len(COLOURS)] for name in detections.names]
    annotate(canvas, detections.boxes, captions, colours)
    return np.asarray(canvas)


def write(path: Path, content: bytes) -> None:
    """Write to a temporary file and rename it, so that the file is complete or absent."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as beside:
            beside.write_bytes(content)
    except OSError as error:
        raise CannotWriteError(path, error) from None


class CannotWriteError(UserError):
    def __init__(self, path: Path, error: OSError):
        super().__init__(f"{path}: cannot be written ({error.strerror or error}); give another folder with --output")


if __name__ == "__main__":
    run_main(main)
