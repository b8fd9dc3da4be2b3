"""The images of a folder with their YOLO, VOC or labelme labels."""

import base64
import io
from collections import defaultdict
from pathlib import Path, PurePosixPath

from PIL import Image

from detector.errors import UserError
from detector.images import suffixes
from scripts.conversion.description import classes_of, describe, is_names
from scripts.conversion.found_files import folder_of, kind_of, list_files, note_unused, part_of
from scripts.conversion.label_formats import (
    READERS,
    Classes,
    Labels,
    Notes,
    as_pixels,
    from_zero,
    labelme_content,
    name_inside,
)
from scripts.conversion.pairing import pair
from scripts.conversion.source import Source
from scripts.conversion.splits import lists_among

LABELS = {"yolo": ".txt", "voc": ".xml", "labelme": ".json"}


def read_folder(form: str, source: Path, decoded: Path, notes: Notes) -> Source:
    """The images below a folder and their labels. Images that are only inside label files are put into `decoded`."""
    chosen = None
    if source.is_file():
        if form != "yolo" or source.suffix.lower() not in (".yaml", ".yml", ".data"):
            raise UserError(f"{source}: is a file; give the folder of images and labels")
        source, chosen = source.parent, source.name
    files = list_files(source, notes)
    described, classes = None, Classes([])
    if form == "yolo":
        described = describe(source, {chosen: files[chosen]} if chosen in files else files)
        classes = classes_of(source, files, described)
    images = {name: path for name, path in files.items() if kind_of(name) == "image"}
    lists = lists_among(files, images)
    helpers = {*lists, *filter(is_names, files), *([described.name] if described else [])}
    labels = {
        name: path
        for name, path in files.items()
        if PurePosixPath(name).suffix.lower() == LABELS[form] and name not in helpers
    }
    pairs, doubtful = pair(images, labels, lambda file: name_inside(form, file), notes)
    paired = {*pairs.values(), *(label for rivals in doubtful.values() for label in rivals)}
    if form == "labelme":
        for label in sorted(labels.keys() - paired):
            if name := decode(label, labels[label], decoded, notes):
                images[name], pairs[name] = decoded / name, label
                paired.add(label)
    note_unused([name for name in files if name not in images.keys() | labels.keys() | helpers], notes)
    for name in sorted(labels.keys() - paired):
        kind = "text" if form == "yolo" else "labels"
        notes[f"not used: {kind} without an image"].append(str(labels[name]))
    about = f"{say_where(images, 'images')}, {say_where(labels, LABELS[form] + ' files')}, {len(pairs)} belong together"
    if not images:
        unread = {PurePosixPath(name).suffix.lower() for name in files if kind_of(name) == "picture"}
        raise UserError(
            f"{source}: no images in it that can be read ({' '.join(sorted(suffixes()))})"
            + (f", but {' '.join(sorted(unread))}; save those as .jpg" if unread else "")
        )
    read = read_labels(form, images, labels, pairs, doubtful, classes, notes)
    parts: dict[str, set[str]] = defaultdict(set)
    for name, label in pairs.items():
        if part := part_of(folder_of(label)):
            parts[part].add(name)
    return Source(images, read, classes.names, about, files, lists, described, parts)


def say_where(names: dict[str, Path], what: str) -> str:
    folders = sorted({folder_of(name) or "SRC" for name in names})
    return f"{len(names)} {what}" + (f" in {', '.join(folders[:4])}{', ...' * (len(folders) > 4)}" if folders else "")


def read_labels(
    form: str,
    images: dict[str, Path],
    labels: dict[str, Path],
    pairs: dict[str, str],
    doubtful: dict[str, list[str]],
    classes: Classes,
    notes: Notes,
) -> dict[str, Labels]:
    read: dict[str, Labels] = {}
    used: dict[str, Labels] = {}
    for name in sorted(images):
        if name in doubtful:
            rivals = ", ".join(doubtful[name][:3])
            notes["left out: images that may or may not belong to a label file of their name"].append(
                f"{name}: {rivals}"
            )
        elif name not in pairs and form == "yolo":
            notes["images without a label file, taken as without boxes"].append(name)
            read[name] = Labels([])
        elif name not in pairs:
            notes["left out: images without a label file"].append(name)
        elif pairs[name] in used:
            notes["images that share a label file with another"].append(name)
            read[name] = used[pairs[name]]
        else:
            try:
                read[name] = used[pairs[name]] = READERS[form](labels[pairs[name]], classes, notes)
            except UserError as error:
                notes["left out: images or labels that cannot be used"].append(str(error))
    if form == "voc" and not from_zero(list(used.values()), notes):
        read = {name: as_pixels(labels) for name, labels in read.items()}
    return read


def decode(label: str, file: Path, folder: Path, notes: Notes) -> str | None:
    """Write the image inside a labelme file into `folder`; returns its path there, or None."""
    try:
        data = labelme_content(file).get("imageData")
        if not data:
            return None
        data = base64.b64decode(data.rpartition(",")[2])  # a data URL has its kind before the comma
        with Image.open(io.BytesIO(data)) as image:
            suffix = ".jpg" if image.format == "JPEG" else f".{image.format}".lower()
    except UserError:
        return None  # not labelme's
    except Exception as error:  # decoders raise all kinds
        notes["left out: images or labels that cannot be used"].append(
            f"{file}: the image in it cannot be read ({type(error).__name__})"
        )
        return None
    name = PurePosixPath(label).with_suffix(suffix).as_posix()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    notes["images that were only inside their label file"].append(name)
    return name
