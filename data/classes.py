"""Which category of an annotation file is which class of the model."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np

from data.annotations import Annotations, shortened
from detector.errors import UserError


def match_classes(
    path: Path, annotations: Annotations, category_ids: Sequence[int] | None, class_names: Sequence[str] | None
) -> tuple[list[int], list[str], list[str]]:
    """The category id of each class in this file, by label; the classes' names; remarks.

    `category_ids` and `class_names` are training's, by label. Without them, the file's categories are the classes.
    Ids decide which category is which class. If the names contradict that, names decide: some exporters number the
    categories of each file by themselves. A class that the file lacks then gets an id that the file does not use.

    Raises UserError if a category with a box is none of training's classes, or if the names of ids differ and names
    cannot decide.
    """
    names = annotations.names
    ids = sorted(names) if category_ids is None else list(category_ids)
    expected, remarks = dict(zip(ids, class_names or ())), []
    used = np.unique(annotations.categories).tolist()
    if problem := _contradiction(path, names, used, ids, expected):
        id_here, id_there = ({name: number for number, name in both.items()} for both in (names, expected))
        shared = id_here.keys() & id_there.keys()
        unknown = {category: names[category] for category in used if names[category] not in shared}
        if unknown or not shared:  # the others could be matched by name, so the message is about these
            raise UserError(_contradiction(path, unknown, used, ids, expected) or problem)
        unused = count(max(names) + 1)
        ids = [id_here[name] if name in shared else next(unused) for name in id_there]
        if moved := sorted(name for name in shared if id_here[name] != id_there[name]):
            example = f"{shortened(moved[0])} has the id {id_here[moved[0]]} here and {id_there[moved[0]]} in training"
            remarks.append(f"categories matched by name, because {example}")
        expected = dict(zip(ids, id_there))
    if extra := sorted(names[category] for category in names.keys() - set(ids)):
        number = "1 category" if len(extra) == 1 else f"{len(extra):,} categories"
        remarks.append(f"{number} unknown to training, none with a box (the first is {extra[0]!r})")
    known = {**names, **expected}
    return ids, [known.get(category, f"category {category}") for category in ids], remarks


def _contradiction(
    path: Path, names: dict[int, str], used: list[int], ids: list[int], expected: dict[int, str]
) -> str | None:
    """Why categories cannot be matched by id, in one line; None if they can."""
    for category, name in names.items():
        if category not in ids and (category in used or name in expected.values()):
            return (
                f"{path}: category {category} ({shortened(name)}) is unknown to the model, whose category "
                f"ids are {shortened(ids)}; take an annotation file of the same data set"
            )
        if expected.get(category, name) != name:
            return (
                f"{path}: category {category} is {shortened(name)} here and {shortened(expected[category])} in "
                "training; give both annotation files the same categories"
            )
    return None
