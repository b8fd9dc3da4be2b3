"""The images and boxes of COCO files, one or several."""

import os
import posixpath
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote

from data.coco import load_annotations, unique_names
from detector.errors import UserError
from scripts.conversion.label_formats import Box, Labels, Notes, bytes_of
from scripts.conversion.source import Source
from scripts.found_files import Index, folder_of, kind_of, list_files, part_of, tell_unused

# Folders of which the images are often beside, and not in.
OF_ANNOTATIONS = ("annotations", "annotation", "labels", "json", "jsons")


def coco_labels(file: Path) -> tuple[list[str], list[tuple[str, Labels]]]:
    """The classes' names of a COCO file, and of each image its file_name and labels."""
    document = load_annotations(file)
    names = unique_names(document["categories"])
    boxes = defaultdict(list)
    for one in document["annotations"]:
        box = Box(names[one["category_id"]], tuple(map(float, one["bbox"])), bool(one["iscrowd"]), one["area"])
        boxes[one["image_id"]].append(box)
    images = [(one["file_name"], Labels(boxes[one["id"]], (one["width"], one["height"]))) for one in document["images"]]
    return [names[number] for number in sorted(names)], images


def read_coco(sources: list[Path], notes: Notes) -> Source:
    """The images that COCO files name. Of the same image in several, and of the same box, there will be one."""
    every: dict[str, Path] = {}  # what may be an image, by its absolute path
    documents: dict[str, tuple[list[str], list[tuple[str, Labels]]]] = {}
    for source in map(Path, map(os.path.abspath, sources)):
        if source.is_file():
            documents[str(source)] = coco_labels(source)
            inside = {posixpath.dirname(name.replace("\\", "/")) for name, _ in documents[str(source)][1]}
            folders = inside | {unquote(one) for one in inside}
            beside = [path for place in places_of(source) for one in folders for path in files_in(place / one)]
            every |= {str(path): path for path in beside if kind_of(path.name) == "image"}
            continue
        files = {str(path): path for path in list_files(source, notes).values()}
        found = {name: coco_labels(path) for name, path in files.items() if is_coco(path)}
        if not found:
            raise UserError(f"{source}: no COCO file in it, one with images, annotations and categories")
        documents |= found
        every |= files
    root = os.path.commonpath([*map(os.path.dirname, every), *map(os.path.dirname, documents)])
    key = {name: os.path.relpath(name, root).replace(os.sep, "/") for name in (*every, *documents)}
    pool = {key[name]: path for name, path in every.items() if kind_of(name) == "image"}
    index = Index(pool)

    labels: dict[str, Labels] = {}
    parts: dict[str, set[str]] = defaultdict(set)
    for document, (_, records) in documents.items():
        part = part_of(key[document]) if len(documents) > 1 else None
        for file_name, own in records:
            place = place_of(file_name, key[document], pool, index, notes)
            if place is not None:
                labels[place] = merged(labels.get(place), own, place, notes)
                parts[part].add(place)
    if not labels:
        tried = ", ".join(sorted({folder_of(name) or "." for name in pool})[:6]) or "no images there"
        first = next((name for _, records in documents.values() for name, _ in records), "")
        raise UserError(
            f"{', '.join(map(str, sources))}: none of the images is found, such as {first!r}; looked below {root} in: "
            f"{tried}; put them beside the file or into images/ beside it"
        )
    names = list(dict.fromkeys(name for own, _ in documents.values() for name in own))
    alike = defaultdict(list)
    for name in names:
        alike[name.strip().casefold()].append(name)
    notes["classes whose names differ in case or blanks alone, kept apart"] += [
        " and ".join(map(repr, own)) for own in alike.values() if len(own) > 1
    ]
    unnamed = {key[name] for source in sources if source.is_dir() for name in every} - labels.keys()
    tell_unused([name for name in sorted(unnamed - pool.keys()) if name not in map(key.get, documents)], notes)
    notes["not used: images that no annotation file names"] += sorted(unnamed & pool.keys())
    for kind in [kind for kind, where in notes.items() if not where]:
        del notes[kind]
    # Paths in the new folder begin where those of the images part.
    top = os.path.commonpath([folder_of(f"/{name}") for name in labels]).strip("/")
    short = {name: name[len(top) + 1 :] if top else name for name in labels}
    return Source(
        {short[name]: pool[name] for name in labels},
        {short[name]: own for name, own in labels.items()},
        names,
        f"{len(labels)} images of {len(documents)} files",
        parts={part: {short[name] for name in own} for part, own in parts.items() if part},
    )


def is_coco(path: Path) -> bool:
    if path.suffix.lower() != ".json":
        return False
    data = bytes_of(path)
    return all(f'"{key}"'.encode() in data for key in ("images", "annotations", "categories"))


def places_of(file: Path) -> list[Path]:
    """Where the images of a COCO file may be, according to the tools that write such files."""
    beside, above = file.parent, file.parent.parent
    places = [beside, beside / "images", above, above / "images"]
    for place in (beside, beside / "images", above / "images"):
        places += folders_in(place)
    if beside.name.lower() in OF_ANNOTATIONS:
        places += folders_in(above)
    return list(dict.fromkeys(places))


def folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def files_in(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []


def place_of(file_name: str, document: str, pool: dict[str, Path], index: Index, notes: Notes) -> str | None:
    """The image in the `pool` that a file_name in a document means."""
    beside = folder_of(document)
    for start in (beside, f"{beside}/images", folder_of(beside), f"{folder_of(beside)}/images"):
        place = posixpath.normpath(posixpath.join(start.lstrip("/"), file_name))
        if place in pool:
            return place
    hits = index.find(file_name, document)
    if len(hits) == 1:
        return hits[0]
    kind = "left out: images of which several have the name" if hits else "left out: images that are not there"
    notes[kind].append(f"{document}: {file_name}")
    return None


def merged(one: Labels | None, other: Labels, name: str, notes: Notes) -> Labels:
    if one is None:
        return other
    notes["images that are listed more than once, and their boxes joined"].append(name)
    known = {box[:3] for box in one.boxes}
    return one._replace(boxes=one.boxes + [box for box in other.boxes if box[:3] not in known])
