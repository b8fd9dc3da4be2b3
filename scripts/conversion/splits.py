"""Split a set as its owner did: images for training, for validation and for a test.

It tries in turn: data.yaml or Darknet's obj.data, lists of images called train.txt, val.txt or similar, COCO files and
folders of such names. If a file names a part that is missing, that is an error: its images would join another part.
"""

import posixpath
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from detector.errors import UserError, counted
from scripts.conversion.description import Described
from scripts.conversion.found_files import PARTS, Index, common, folder_of, kind_of, part_of, pieces
from scripts.conversion.label_formats import Notes, number, text_of
from scripts.conversion.source import Source

# Other words that the name of a list may have.
FILLERS = {"set", "list", "file", "files", "image", "images", "ids", "names", "split", "autosplit", "default", "voc",
           "yolo"}  # fmt: skip


class Split(NamedTuple):
    val: set[str]
    test: set[str]
    left_out: dict[str, str]  # image -> why
    how: str  # how val was chosen; empty if it was not


def own_split(source: Source, notes: Notes) -> Split:
    """The set's own split. Raises UserError if a part is missing."""
    finder = Finder(source, notes)
    listed, _ = finder.named("train")
    train = listed or source.parts.get("train", set())
    val, how = finder.named("val")
    if not val:
        val, how = source.parts.get("val") or finder.by_folder("val"), "that of its files and folders"
    test = finder.test_part(train)
    for name in sorted(val & test):
        notes["images in both validation and test part, used for validation only"].append(name)
    test -= val
    if train and train <= test:
        notes["images of the training part, which lies in the test part, used for training"] += sorted(train)
        test -= train
    left_out: dict[str, str] = {}
    if listed:
        rest = sorted(source.images.keys() - train - val - test)
        left_out = dict.fromkeys(rest, "images that are in no part of the set's own split")
    used = source.images.keys() - left_out.keys() - test
    if not used:
        raise UserError(
            f"all {len(source.images)} images are in the test part; to draw from them, --split random; to only score "
            "them, --val 1"
        )
    if val and not used - val:
        notes["training and validation part are the same, so validation images are drawn at random"].append(how)
        return Split(set(), test, left_out, "")
    for name in sorted(val & train):
        notes["images in both training and validation part, used for validation only"].append(name)
    for name in sorted(test & train):
        notes["images in both training and test part, used for the test only"].append(name)
    return Split(val, test, left_out, how)


def own_test_part(source: Source, notes: Notes) -> Split:
    """The test part of the set's own split; none if all images are in it."""
    try:
        test = own_split(source, defaultdict(list)).test
    except UserError:  # another part is missing
        test = Finder(source, notes).test_part(set())
    return Split(set(), set() if test == source.images.keys() else test, {}, "")


class Finder:
    """Finds the parts of a set."""

    def __init__(self, source: Source, notes: Notes):
        self.images, self.files, self.parts, self.notes = source.images, source.files, source.parts, notes
        self.described = source.described or Described("", {})
        self.index = Index(self.images)
        parents = (parent.as_posix() for name in self.images for parent in PurePosixPath(name).parents)
        self.folders = {"", *parents} - {"."}
        main = [
            name for name in source.lists if folder_of(name).endswith("ImageSets/Main")
        ]  # VOC has other lists for other tasks
        self.lists = main or source.lists

    def named(self, part: str) -> tuple[set[str], str]:
        """The images of a part that a file names, and "that of FILE". Raises UserError if none of them are found."""
        entry = self.described.part(part)
        if entry:
            hits = set().union(*(self.by_entry(line) for line in entry))
            where, what = self.described.name, ", ".join(entry)
        else:
            lists = [name for name in self.lists if part_of(PurePosixPath(name).stem) == part]
            hits = set().union(*(self.by_list(self.files[name], name) for name in lists))
            where = what = ", ".join(lists)
        if where and not hits:
            if instead := self.by_folder(part):
                self.notes[f"{where}: its part {part} is not there ({what}), folders of that name are taken"].append(
                    what
                )
                return instead, "that of its folders"
            if part != "test":
                raise UserError(
                    f"{where}: no image of its part {part} is found ({what}); complete the set or correct the file, or "
                    "give --split random to draw validation images"
                )
            self.notes[f"{where}: its test part is not there"].append(what)
        return hits, f"that of {where}"

    def test_part(self, train: set[str]) -> set[str]:
        """The test images that a file names; else those in files or folders of that name, without `train`."""
        return self.named("test")[0] or (self.parts.get("test") or self.by_folder("test")) - train

    def by_folder(self, part: str) -> set[str]:
        return {name for name in self.images if part_of(folder_of(name)) == part}

    def by_entry(self, entry: str) -> set[str]:
        """The images of an entry of a description: a folder, a list, a pattern or an image, written on any machine."""
        entry = entry.strip().replace("\\", "/")
        last = PurePosixPath(entry)
        if last.suffix.lower() == ".txt":
            lists = Index(name for name in self.files if name.lower().endswith(".txt")).find(entry, self.described.name)
            return set().union(*(self.by_list(self.files[name], name) for name in lists[:1]))
        if kind_of(entry) == "image" and "*" not in entry:
            return set(self.index.find(entry, self.described.name))
        if "*" in last.name:
            entry = last.parent.as_posix()
        folder = self.folder_meant(entry)
        return (
            set() if folder is None else {name for name in self.images if not folder or name.startswith(f"{folder}/")}
        )

    def folder_meant(self, entry: str) -> str | None:
        """The set's folder that an entry means: the path from the description, else the one whose end agrees best."""
        place, root = folder_of(self.described.name), self.described.root
        for start in (posixpath.join(place, root), place):
            path = posixpath.normpath(posixpath.join(start, entry))
            if path in self.folders or path == ".":
                return "" if path == "." else path
        wanted = pieces(f"{root}/{entry}")
        part = part_of("/".join(wanted[-3:]))
        depth = {folder: common(reversed(pieces(folder)), reversed(wanted)) for folder in self.folders}
        # The name that says the part, such as val in val/images, must be in the end that agrees.
        depth = {name: count for name, count in depth.items() if count and part_of("/".join(wanted[-count:])) == part}
        best = [folder for folder, count in depth.items() if count == max(depth.values())]
        near = {folder: common(pieces(folder), pieces(place)) for folder in best}
        best = [folder for folder in best if near[folder] == max(near.values())]
        return best[0] if len(best) == 1 else None

    def by_list(self, file: Path, name: str) -> set[str]:
        """The images that a text file lists, one in each line."""
        chosen: set[str] = set()
        for line in filter(None, map(str.strip, text_of(file).splitlines())):
            hits = self.index.find(line, name)
            if not hits:
                self.notes[f"lines of {name} that name no image"].append(line)
            elif len(hits) > 1:
                self.notes[f"lines of {name} that name several images, all taken"].append(line)
            chosen.update(hits)
        return chosen


def lists_among(files: dict[str, Path], images: Iterable[str]) -> list[str]:
    """The set's files that list the images of a part: by their name, unless they are the labels of an image."""
    stems = {PurePosixPath(name).stem for name in images}
    called = [name for name in files if is_list(name) and PurePosixPath(name).stem not in stems]
    return [name for name in called if not holds_boxes(text_of(files[name]))]


def is_list(name: str) -> bool:
    """Whether a text file is named only after a part: train.txt, but not cat_train.txt, the list of a class."""
    path = PurePosixPath(name)
    words = re.findall(r"[a-z]+", path.stem.lower())
    known = {word for part in PARTS.values() for word in part}
    return path.suffix.lower() == ".txt" and part_of(path.stem) is not None and {*words} <= known | FILLERS


def holds_boxes(content: str) -> bool:
    """Whether a text has labels in YOLO's format, or is empty like the labels of an image without objects."""
    first = content.strip().partition("\n")[0].split()
    return not first or (len(first) > 4 and all(number(word) is not None for word in first))


def at_random(names: list[str], share: float, seed: int) -> set[str]:
    if len(names) < 2:
        raise UserError(
            f"{counted(len(names), 'image')} can be used, without those of a test part: one is needed for training and "
            "another for validation; to only score images, --val 1"
        )
    names = sorted(names)
    random.Random(seed).shuffle(names)
    return set(names[: min(max(1, round(share * len(names))), len(names) - 1)])
