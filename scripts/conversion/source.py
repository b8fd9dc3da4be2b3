"""The result of the readers of all formats."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.conversion.description import Described
from scripts.conversion.label_formats import Labels


class Source(NamedTuple):
    images: dict[str, Path]  # by their paths in the new folder
    labels: dict[str, Labels]  # of those that can be used
    names: list[str]  # of the classes that may have no box
    about: str  # what was found, for the message if nothing can be used
    files: dict[str, Path] = {}  # noqa: RUF012  all files of the set
    lists: Sequence[str] = ()  # those of them that list the images of a part
    described: Described | None = None
    parts: dict[str, set[str]] = {}  # noqa: RUF012  part -> images whose annotation file has it in its name
    as_is: bool = False  # boxes stay as they are, so their oddities show when they are read again
