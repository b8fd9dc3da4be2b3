"""Find the images of an annotation file: their folder, and each file in it, however its name is spelled."""

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

from data.annotations import leads_out
from data.spelling import spelling
from detector.errors import UserError

SAMPLE = 50  # names that a folder must have to be the right one


class ImageFolder:
    """A folder of images. It lists each folder inside at most once."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._entries: dict[str, tuple[set[str], set[str]]] = {}  # folder -> its files, its folders
        self._spelled: dict[str, tuple[dict[str, list[str]], dict[str, list[str]]]] = {}  # the same by spelling

    def locate(self, names: Sequence[str], source: str | Path) -> tuple[list[str], list[str]]:
        """The paths in the folder for the image names in `source`, and remarks on names with another spelling.

        It tries the name as it stands, then other forms: with backslashes as separators, an absolute path into the
        folder, the part after the folder's own name; and last, other spellings of these. Raises UserError for an image
        that is missing or may be either of two, and for a name that leads out of the folder.
        """
        self._list("")  # a UserError where there is no such folder
        paths_of = {name: name for name in names if self._has(name)}
        other = list(dict.fromkeys(name for name in names if name not in paths_of))
        owners = {path: path for path in paths_of}
        missing = []
        for name in other:
            forms = self._forms(name)
            paths = next((paths for form in forms if (paths := self._spellings(form))), [])
            if len(paths) > 1:
                raise UserError(
                    f"{self.root}: {name!r} of {source} may be {paths[0]!r} or {paths[1]!r}; write the right one there"
                )
            if not paths:
                if not forms:
                    raise UserError(
                        f"{source}: file_name is {name!r}, which leads out of the image folder {self.root}; give a "
                        "path inside it, relative to it"
                    )
                missing.append(name)
            elif owners.setdefault(paths[0], name) != name:
                raise UserError(
                    f"{self.root}: {name!r} and {owners[paths[0]]!r} of {source} would both be {paths[0]!r}; complete "
                    "the folder or correct the names"
                )
            else:
                paths_of[name] = paths[0]
        if missing:
            gone = set(missing)
            raise UserError(
                f"{self.root}: {sum(name in gone for name in names)} of {len(names)} images of {source} are not there, "
                f"the first is {missing[0]!r}; correct the image folder or complete it"
            )
        remarks = [f"{len(other):,} images found under another spelling (the first is {other[0]!r})"] if other else []
        return [paths_of[name] for name in names], remarks

    def files(self, names: Sequence[str]) -> tuple[str, ...] | None:
        """The real paths of the images with these names, links followed; None unless all are found."""
        try:
            return tuple(os.path.realpath(self.root / path) for path in self.locate(names, "")[0])
        except UserError:
            return None

    def _forms(self, name: str) -> list[str]:
        """Paths in the folder that a name may stand for."""
        plain = posixpath.normpath(name.replace("\\", "/"))
        if leads_out(name):
            return []
        if os.path.isabs(name):
            roots = {os.path.abspath(self.root), os.path.realpath(self.root)}
            if forms := [plain[len(root) :].strip("/") for root in roots if Path(plain).is_relative_to(root)]:
                return forms
            if os.path.exists(name):  # a file of this machine, which is elsewhere
                return []
        # Also "images/a.jpg" if the folder is images/ itself, and a full path from another machine.
        forms = [] if PureWindowsPath(name).anchor else [posixpath.normpath(name), plain]
        folder = spelling(os.path.basename(os.path.abspath(self.root)))
        for parts in (plain.split("/"), posixpath.normpath(spelling(name)).split("/")):
            forms += ["/".join(parts[n + 1 :]) for n, part in enumerate(parts[:-1]) if spelling(part) == folder]
        return list(dict.fromkeys(forms))

    def _spellings(self, form: str) -> list[str]:
        return [form] if self._has(form) else self._search("", posixpath.normpath(spelling(form)).split("/"))

    def _search(self, below: str, parts: list[str]) -> list[str]:
        """Files whose path below a folder has these parts, compared by `spelling`."""
        if below not in self._spelled:
            names = self._list(below)
            self._spelled[below] = _by_spelling(names[0]), _by_spelling(names[1])
        files, folders = self._spelled[below]
        paths = [posixpath.join(below, name) for name in files.get("/".join(parts), [])]
        for count in range(1, len(parts)):
            for folder in folders.get("/".join(parts[:count]), []):
                paths += self._search(posixpath.join(below, folder), parts[count:])
        return paths

    def _has(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        # Dots behind a link would lead out of the folder.
        return not name.startswith("/") and ".." not in folder.split("/") and file in self._list(folder)[0]

    def _list(self, below: str) -> tuple[set[str], set[str]]:
        """Names of the files and of the folders in a folder, without pipes, because reading a pipe may never end."""
        if below not in self._entries:
            files, folders = set(), set()
            try:
                with os.scandir(self.root / below) as entries:
                    for entry in entries:
                        # A link counts as its target; a circular link is left out.
                        path = entry.path if entry.is_symlink() else None
                        if os.path.isfile(path) if path else entry.is_file():
                            files.add(entry.name)
                        elif os.path.isdir(path) if path else entry.is_dir():
                            folders.add(entry.name)
            except OSError as error:
                if not below:
                    raise UserError(
                        f"{self.root}: cannot read the image folder ({error.strerror}); correct its path"
                    ) from None
            except ValueError:  # a name that the system does not allow
                pass
            self._entries[below] = files, folders
        return self._entries[below]


def _by_spelling(names: set[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(spelling(name), []).append(name)
    return groups


def find_folder(annotations: str | Path, names: Sequence[str]) -> Path:
    """Find the folder with the images of an annotation file where common exporters put it.

    It looks beside the file and beside the file's folder: there, in images/ and similar ones, and in a folder named
    after the file. Raises UserError if no folder has the images, or several have.
    """
    path = Path(annotations)
    sample = [names[place] for place in sorted({len(names) * n // SAMPLE for n in range(SAMPLE)})]
    # instances_train2017.json is of train2017
    named_alike = dict.fromkeys([path.stem, path.stem.rpartition("_")[2] or path.stem])
    usual = ["images", "data", "img", "imgs"]
    below = [*named_alike, *(f"{folder}/{split}" for folder in usual for split in named_alike), "", *usual]
    tried = []
    for home in (path.parent, Path(os.path.abspath(path.parent)).parent):
        folders = [home / name for name in below]
        tried += folders
        holding: dict[tuple[str, ...], Path] = {}
        for folder in folders:
            if folder.is_dir() and (files := ImageFolder(folder).files(sample)):
                holding.setdefault(files, folder)
        if len(holding) > 1:
            first, second = list(holding.values())[:2]
            raise UserError(f"{path}: its images may be in {first} or in {second}; name the right one as image folder")
        if holding:
            return next(iter(holding.values()))
    raise UserError(
        f"{path}: its images, such as {names[0]!r}, are neither beside it nor in {tried[-len(usual)]}/ and the like; "
        "name their folder"
    )


def elsewhere(path: Path, names: list[str], folder: Path) -> str:
    """A hint at the folder that has the images, if there is one in the default places."""
    try:
        other = find_folder(path, names)
    except UserError:
        return ""
    return f"; all are in {other}" if other.resolve() != folder.resolve() else ""
