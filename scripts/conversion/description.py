"""A set's own description: data.yaml, or Darknet's obj.data, and lists of its class names."""

import reprlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import yaml

from detector.errors import UserError
from scripts.conversion.found_files import Index
from scripts.conversion.label_formats import Classes, text_of

MOST_CLASSES = 100_000


class Described(NamedTuple):
    """A file that describes a set: data.yaml, or Darknet's obj.data."""

    name: str  # its path in the set
    content: dict

    def part(self, part: str) -> list[str]:
        """The folders and files of "train", "val" or "test", as paths of the machine where the file was written."""
        entry = self.content.get(part) or (self.content.get("valid") if part == "val" else None)
        texts = entry if isinstance(entry, list) else [entry]
        return [text for text in texts if isinstance(text, str) and text.strip()]

    @property
    def root(self) -> str:
        """The folder that its entries start from."""
        root = self.content.get("path")
        return root.replace("\\", "/") if isinstance(root, str) else ""


def describe(source: Path, files: dict[str, Path]) -> Described | None:
    """The file that describes the set, or the uppermost of several. Raises UserError if there are several sets."""
    sets, broken = [], []
    for name, path in files.items():
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in (".yaml", ".yml", ".data"):
            continue
        try:
            content = darknet(text_of(path)) if suffix == ".data" else yaml_of(text_of(path))
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            broken.append(f"{path}: is not YAML ({' '.join(str(error).split())[:100]})")
            continue
        except UserError as error:
            broken.append(str(error))
            continue
        described = Described(name, content if isinstance(content, dict) else {})
        if "names" in described.content or (described.part("train") and described.part("val")):
            sets.append(described)
    if not sets and broken:
        raise UserError(broken[0])
    sets = [described for described in sets if not described.name.endswith(".data")] or sets
    depth = min((described.name.count("/") for described in sets), default=0)
    sets = [described for described in sets if described.name.count("/") == depth]
    if any(described.content != sets[0].content for described in sets):
        listed = ", ".join(described.name for described in sets[:5]) + (", ..." if len(sets) > 5 else "")
        raise UserError(f"{source}: {len(sets)} files in it describe a set: {listed}; give one of them in its place")
    return sets[0] if sets else None


def yaml_of(text: str) -> object:
    """Content whose values are texts, as written: YAML 1.1 takes a class called no for false, and 010 for 8."""
    content = yaml.load(text, yaml.BaseLoader)
    if not isinstance(content, dict):
        return content
    return {key: None if value in ("", "~", "null", "Null", "NULL") else value for key, value in content.items()}


def darknet(text: str) -> dict:
    lines = (line.partition("=") for line in text.splitlines() if not line.lstrip().startswith(("#", ";")))
    return {key.strip(): value.strip() for key, sign, value in lines if sign}


def classes_of(source: Path, files: dict[str, Path], described: Described | None) -> Classes:
    """The class names of a YOLO set: those of data.yaml or obj.data, else those of classes.txt or *.names."""
    place, content = described or Described("", {})
    named, keypoints = content.get("names"), content.get("kpt_shape")
    if isinstance(named, str):  # obj.data names a file
        suffix = PurePosixPath(named).suffix
        lists = Index(name for name in files if name.endswith(suffix)).find(named, place)
        if not lists:
            raise UserError(f"{files[place]}: names {named!r} is not in {source}; put it there")
        named = lines_of(files[lists[0]])
    elif isinstance(named, dict):
        named = in_order(named, files[place])
    elif named is None:
        named = from_lists(source, {name: path for name, path in files.items() if is_names(name)})
    # Only texts: a nested list of aliases may stand for more than memory holds.
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named) or len(set(named)) < len(named):
        raise UserError(f"{source}: the names of its classes are not a list of texts, or a name is there twice")
    return Classes(named, None if keypoints is None else shape_of(keypoints, files[place]))


def shape_of(keypoints: object, file: Path) -> tuple[int, int]:
    """The number of keypoints, and of the numbers for each, from kpt_shape."""
    try:
        if not isinstance(keypoints, list):
            raise TypeError
        count, numbers = map(int, keypoints)
        if min(count, numbers) < 1:
            raise ValueError
    except (TypeError, ValueError):
        shown = reprlib.repr(keypoints).replace("'", "")[:60]  # not str, which expands all aliases
        raise UserError(f"{file}: kpt_shape is {shown}; give [number of keypoints, 2 or 3], such as [17, 3]") from None
    return count, numbers


def is_names(name: str) -> bool:
    return PurePosixPath(name).name.lower() == "classes.txt" or name.lower().endswith(".names")


def from_lists(source: Path, files: dict[str, Path]) -> list[str]:
    """The longest list. Labelling tools leave a list in each folder, and each later one extends the earlier ones."""
    lists = {name: lines_of(path) for name, path in files.items()}
    longest = max(lists.values(), key=len, default=[])
    for name, names in lists.items():
        if names != longest[: len(names)]:
            other = next(path for path in lists if lists[path] is longest)
            raise UserError(
                f"{source}: {name} and {other} number the classes differently; convert these folders separately"
            )
    return longest


def lines_of(file: Path) -> list[str]:
    return [line.strip() for line in text_of(file).split("\n") if line.strip()]


def in_order(named: dict, file: Path) -> list:
    """The names of {number: name} as a list; a number without a name becomes "class NUMBER"."""
    try:
        by_number = {int(number): name for number, name in named.items()}
    except (TypeError, ValueError):
        raise UserError(f"{file}: names: each name needs a number, such as 0: cat") from None
    if by_number and not 0 <= min(by_number) <= max(by_number) < MOST_CLASSES:
        raise UserError(f"{file}: names: numbers go from 0 to {MOST_CLASSES - 1}")
    return [by_number.get(number, f"class {number}") for number in range(max(by_number, default=-1) + 1)]
