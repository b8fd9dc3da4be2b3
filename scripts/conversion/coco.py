"""The images and boxes of COCO files."""

import os
import posixpath
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from data.annotations import load_annotations
from detector.errors import UserError
from scripts.conversion.found_files import Index, common, folder_of, kind_of, list_files, note_unused, part_of, pieces
from scripts.conversion.label_formats import Box, Labels, Notes, bytes_of
from scripts.conversion.source import Source

# Folders of annotation files. Their images are often beside the folder, not in it.
OF_ANNOTATIONS = ("annotations", "annotation", "labels", "json", "jsons")


def coco_labels(file: Path, notes: Notes) -> tuple[list[str], list[tuple[str, Labels]]]:
    """The class names of a COCO file, and the file_name and labels of each image."""
    read = load_annotations(file)
    boxes: list[list[Box]] = [[] for _ in read.file_names]
    columns = (read.images, read.categories, read.boxes, read.crowds, read.areas)
    for image, category, sides, crowd, area in zip(*(column.tolist() for column in columns)):
        boxes[image].append(Box(read.names[category], tuple(sides), crowd, area))
    for remark in read.remarks:
        notes["remarks on COCO files"].append(f"{file}: {remark}")
    sizes = [(width, height) if width and height else None for height, width in read.sizes.tolist()]
    images = [(name, Labels(listed, size)) for name, listed, size in zip(read.file_names, boxes, sizes)]
    return [read.names[number] for number in sorted(read.names)], images


Records = list[tuple[str, Labels]]  # file_name and labels of each image


def read_coco(sources: list[Path], notes: Notes) -> Source:
    """The images that COCO files name. Images and boxes that several files list are joined to one."""
    documents: dict[str, tuple[list[str], Records]] = {}
    every: dict[str, Path] = {}  # candidates for their images
    walked: set[str] = set()  # those of them in the given folders
    given: set[str] = set()  # documents that are named one by one
    for source in map(Path, map(os.path.abspath, sources)):
        if source.is_file():
            documents[str(source)] = coco_labels(source, notes)
            every |= images_beside(source, documents[str(source)][1])
            given.add(str(source))
        else:
            files = {str(path): path for path in list_files(source, notes).values()}
            coco_files = {name: coco_labels(path, notes) for name, path in files.items() if is_coco(path)}
            if not coco_files:
                raise UserError(f"{source}: no COCO file in it, which has images, annotations and categories")
            documents |= coco_files
            every |= files
            walked |= files.keys() - coco_files.keys()
    root = os.path.commonpath([*map(os.path.dirname, every), *map(os.path.dirname, documents)])
    key = {name: os.path.relpath(name, root).replace(os.sep, "/") for name in (*every, *documents)}
    pool = {key[name]: path for name, path in every.items() if kind_of(name) == "image"}
    index = Index(pool)

    claims: dict[str, list[Claim]] = defaultdict(list)
    for document, (_, records) in documents.items():
        part = part_of(key[document]) if len(documents) > 1 else None
        for file_name, listed in records:
            if found := place_of(file_name, key[document], pool, index, notes):
                place, exact = found
                shared = common(reversed(pieces(place)), reversed(pieces(file_name)))
                if shared == 1 and part and part_of(folder_of(place)) not in (None, part):
                    shared = 0  # the name alone, in another part of the set
                claims[place].append(
                    Claim(key[document], part, file_name, len(pieces(place)) + 1 if exact else shared, listed)
                )
    labels: dict[str, Labels] = {}
    parts: dict[str, set[str]] = defaultdict(set)
    used: set[str] = set()  # documents
    for place in claims:
        if kept := of_one_image(place, claims[place], notes):
            labels[place] = merged(place, kept, notes)
            used |= {claim.document for claim in kept}
            for part in {claim.part for claim in kept if claim.part}:
                parts[part].add(place)
    if not labels:
        tried = ", ".join(sorted({folder_of(name) or "." for name in pool})[:6]) or "no images there"
        first = next(name for _, records in documents.values() for name, _ in records)
        raise UserError(
            f"{', '.join(map(str, sources))}: none of the images is found, such as {first!r}; looked below {root} in: "
            f"{tried}; put them beside the file or into images/ beside it"
        )
    for document, (_, records) in documents.items():
        meant = document in given or part_of(key[document]) in ("train", "val")
        if records and meant and len(documents) > 1 and key[document] not in used:
            raise UserError(
                f"{document}: none of its {len(records)} images is found, such as {records[0][0]!r}; put them "
                "beside it or into images/ beside it, or leave the file out"
            )
    unnamed = sorted({key[name] for name in walked} - labels.keys())
    note_unused([name for name in unnamed if name not in pool], notes)
    for name in filter(pool.get, unnamed):
        notes["not used: images that no annotation file names"].append(name)
    # Paths in the new folder start where the images' paths first differ.
    top = os.path.commonpath([folder_of(f"/{name}") for name in labels]).strip("/")
    short = {name: name[len(top) + 1 :] if top else name for name in labels}
    return Source(
        {short[name]: pool[name] for name in labels},
        {short[name]: listed for name, listed in labels.items()},
        joined([names for names, _ in documents.values()], notes),
        f"{len(labels)} images of {len(documents)} files",
        parts={part: {short[name] for name in images} for part, images in parts.items()},
        as_is=True,
    )


def joined(names: list[list[str]], notes: Notes) -> list[str]:
    """The class names of all files, each once."""
    every = list(dict.fromkeys(name for listed in names for name in listed))
    alike = defaultdict(list)
    for name in every:
        alike[name.strip().casefold()].append(repr(name))
    for spelt in alike.values():
        if len(spelt) > 1:
            notes["classes whose names differ in case or blanks alone, kept apart"].append(" and ".join(spelt))
    return every


def is_coco(path: Path) -> bool:
    if path.suffix.lower() != ".json":
        return False
    data = bytes_of(path)
    return all(f'"{key}"'.encode() in data for key in ("images", "annotations", "categories"))


def images_beside(file: Path, records: Records) -> dict[str, Path]:
    """Candidates for the images of a COCO file, from the places where tools that write such files put them."""
    beside, above = file.parent, file.parent.parent
    places = [beside, beside / "images", above, above / "images"]
    for place in (beside, beside / "images", above / "images", *[above] * (beside.name.lower() in OF_ANNOTATIONS)):
        places += [path for path in inside(place) if path.is_dir()]
    folders = {posixpath.dirname(name.replace("\\", "/")) for name, _ in records}
    folders |= set(map(unquote, folders))
    files = [path for place in dict.fromkeys(places) for folder in folders for path in inside(place / folder)]
    return {os.path.normpath(path): path for path in files if kind_of(path.name) == "image" and path.is_file()}


def inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


class Claim(NamedTuple):
    """A record of a document, for the image that its file_name seems to mean."""

    document: str
    part: str | None  # the document's
    file_name: str
    agreement: int  # names at the end of the image's path that file_name has too; more if it is where the document says
    labels: Labels


def of_one_image(place: str, claims: list[Claim], notes: Notes) -> list[Claim]:
    """The claims that mean this image. Others mean one of the same name in a folder that is not there."""
    best = max(claims, key=lambda claim: claim.agreement)
    kept = []
    for claim in claims:
        # Another file may have the name with fewer folders. The same name is somewhere else there.
        shorter = claim.document != best.document and claim.file_name != best.file_name
        shorter = shorter and claim.agreement == len(pieces(claim.file_name))
        if claim.agreement == best.agreement or shorter:
            kept.append(claim)
        else:
            notes["left out: images that are not there"].append(f"{claim.document}: {claim.file_name}")
    exact = best.agreement > len(pieces(place))
    named = {(claim.document, claim.file_name) for claim in kept}
    if not exact and len(named) > len({document for document, _ in named}):
        kind = f"left out: names that all fit one image, {place}"
        notes[kind] += [f"{document}: {file_name}" for document, file_name in sorted(named)]
        return []
    return kept


def place_of(
    file_name: str, document: str, pool: dict[str, Path], index: Index, notes: Notes
) -> tuple[str, bool] | None:
    """The image in the `pool` that a document's file_name means, and whether it is where the document says.

    None if none or several fit.
    """
    beside = folder_of(document)
    for start in (beside, f"{beside}/images", folder_of(beside), f"{folder_of(beside)}/images"):
        place = posixpath.normpath(posixpath.join(start.lstrip("/"), file_name))
        if place in pool:
            return place, True
    hits = index.find(file_name, document)
    if len(hits) == 1:
        return hits[0], False
    kind = "left out: names that fit several images" if hits else "left out: images that are not there"
    notes[kind].append(f"{document}: {file_name}")
    return None


def merged(place: str, claims: list[Claim], notes: Notes) -> Labels:
    """The labels of an image from all records of it. Raises UserError if they disagree about its size."""
    boxes = list(claims[0].labels.boxes)
    sizes: dict[tuple[int, int], str] = {}
    for claim in claims:
        if claim.labels.size:
            sizes.setdefault(claim.labels.size, f"{claim.labels.size[0]} x {claim.labels.size[1]} in {claim.document}")
    if len(sizes) > 1:
        raise UserError(f"{place}: its size is {' and '.join(sizes.values())}; correct the wrong one, and its boxes")
    for claim in claims[1:]:
        notes["images that are listed more than once, and their boxes joined"].append(place)
        known = {box[:3] for box in boxes}
        boxes += [box for box in claim.labels.boxes if box[:3] not in known]
    return Labels(boxes, next(iter(sizes), None))
