"""List the files below a folder, and find the file that a path from another machine means."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PurePosixPath

from data.spelling import spelling
from detector.errors import CONTROL
from detector.images import OTHER_PICTURES, suffixes

Notes = dict[str, list[str]]  # kind of remark -> where
EXAMPLES = 3  # of each kind of remark

# Words in the names of files and folders that say which part of a set they hold.
PARTS = {
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}


def list_files(root: Path, notes: Notes) -> dict[str, Path]:
    """Every file below `root` by its path relative to it, with /, sorted; links are followed.

    If a file has several names, only its links stay, because they say how the file is used.
    """
    files: dict[str, Path] = {}
    links = False
    for folder, folders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        for name in sorted(folders):
            inside = os.path.join(folder, name)
            links |= os.path.islink(inside)
            if name.startswith(".") or name == "__MACOSX":
                notes["left out: hidden folders"].append(inside)
            elif os.path.islink(inside) and f"{place}/".startswith(f"{os.path.realpath(inside)}/"):
                notes["left out: links that lead back to a folder above them"].append(inside)
            else:
                continue
            folders.remove(name)
        folders.sort()
        for name in sorted(names):
            path = Path(folder) / name
            key = path.relative_to(root).as_posix()
            links |= path.is_symlink()
            if CONTROL.search(key):
                notes["left out: names with control characters"].append(repr(key))
            elif name.startswith("."):  # also ._photo.jpg, which a Mac puts into its archives
                notes["left out: hidden files"].append(key)
            elif not path.is_file():
                notes["left out: broken links and special files"].append(key)
            else:
                files[key] = path
    if links:
        drop_stores(root, files, notes)
    return files


def drop_stores(root: Path, files: dict[str, Path], notes: Notes) -> None:
    """Remove the files in `files` that other files link to."""
    top = os.path.realpath(root)
    real = {key: os.path.realpath(path) for key, path in files.items()}
    linked = {place for key, place in real.items() if os.path.join(top, key) != place}
    for key, place in real.items():
        if place in linked and os.path.join(top, key) == place:
            notes["left out: files that are used through a link"].append(key)
            del files[key]


def kind_of(name: str) -> str:
    """ "image", "picture" if its format cannot be read here, or "other"."""
    suffix = PurePosixPath(name).suffix.lower()
    return "image" if suffix in suffixes() else "picture" if suffix in OTHER_PICTURES else "other"


def lines_of_notes(notes: Notes) -> list[str]:
    """A line for each kind of remark, with the first examples."""
    return [
        f"{kind}: {len(where)} ({'; '.join(where[:EXAMPLES])}{'; ...' * (len(where) > EXAMPLES)})"
        for kind, where in notes.items()
    ]


def note_unused(names: list[str], notes: Notes) -> None:
    """Note the files that are not used, by kind."""
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        if kind_of(name) == "picture":
            notes[f"left out: {suffix} pictures, which cannot be read here; save them as .jpg or .png"].append(name)
        else:
            notes[f"not used: {suffix} files" if suffix else "not used: files without a suffix"].append(name)


@cache
def part_of(path: str) -> str | None:
    """ "train", "val" or "test": the part that the last such name in a path says; None if no name says one.

    >>> part_of("cells_test/valid2017/images"), part_of("train_and_val/images")
    ('val', None)
    """
    for name in reversed(path.split("/")):
        words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()))
        parts = {part for part, known in PARTS.items() if words & set(known)}
        if len(parts) == 1 or parts == {"val", "test"}:  # COCO's test-dev
            return "test" if "test" in parts else parts.pop()
    return None


class Index:
    """Finds file names by the end of a path from another machine: from Windows, or percent-encoded."""

    def __init__(self, names: Iterable[str]):
        self.by_name, self.by_stem = defaultdict(list), defaultdict(list)
        for name in names:
            last = spelling(name).rsplit("/", 1)[-1]
            self.by_name[last].append(name)
            self.by_stem[PurePosixPath(last).stem].append(name)

    def find(self, text: str, near: str = "") -> list[str]:
        """The names that `text` means: they have the same last part and, counted from the end, agree with it furthest.

        Of equal ones, it takes those with the same spelling, then those in the same part of the set as `near`, then
        those with its folders. It leaves out names in another part of the set than the text's own folders say.
        """
        text = text.strip().strip("\"'")
        parts = pieces(text)
        if not parts:
            return []
        alike = self.by_name.get(parts[-1]) or self._by_stem(parts[-1])
        part = part_of("/".join(parts[-3:-1]))  # the folders further up are where the user keeps data sets
        alike = [name for name in alike if part is None or part_of(folder_of(name)) in (None, part)]
        near_part, near_pieces = part_of(near), pieces(near)
        plain = text.replace("\\", "/").split("/")

        def agreement(name: str) -> tuple:
            part_of_name = part_of(folder_of(name))
            return (
                common(reversed(pieces(name)), reversed(parts)),
                common(reversed(name.split("/")), reversed(plain)),  # before another spelling
                near_part is not None and part_of_name == near_part,
                common(pieces(name), near_pieces),
            )

        scores = {name: agreement(name) for name in alike}
        best = max(scores.values(), default=None)
        return [name for name in alike if scores[name] == best]

    def _by_stem(self, last: str) -> list[str]:
        """Find a name without its suffix, with another image suffix, or with words after it, as in VOC's lists."""
        stem = PurePosixPath(last).stem
        first = (last.split() or [last])[0]
        return (
            self.by_stem.get(last)
            or (self.by_stem.get(stem) if kind_of(last) != "other" else None)
            or self.by_name.get(first)
            or self.by_stem.get(first, [])
        )


@cache
def pieces(path: str) -> tuple[str, ...]:
    """The names in a path, in one spelling, without empty ones, "." and ".."."""
    return tuple(name for name in spelling(path).split("/") if name not in ("", ".", ".."))


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def common(first: Iterable[str], second: Iterable[str]) -> int:
    """The number of equal items at the start of two sequences."""
    count = 0
    for a, b in zip(first, second):
        if a != b:
            break
        count += 1
    return count
