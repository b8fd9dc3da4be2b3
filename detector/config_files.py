"""Configs from YAML files and the command line: bases, one-off settings, and the checks that PyYAML lacks.

`read(path)` reads a file and the file it is based on (key `base`); `with_settings(values, ["solver.lr=0.02"])` puts
one-off settings on top. An option that is text stays as written: `run: 2024-05-01` is no date.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from detector.config import Config
from detector.errors import CONTROL, UserError, one_line
from detector.option_errors import shown

MAX_LEVELS = 20  # of a text
MAX_VALUES = 10_000  # of a text; an alias counts as everything it stands for
# Types that YAML may read into a text. Not null, which means no value.
AS_WRITTEN = {f"tag:yaml.org,2002:{tag}" for tag in ("bool", "float", "int", "merge", "timestamp", "value")}


def read(path: str | Path) -> dict[str, Any]:
    """The unchecked values of a YAML file on top of those of its bases. Raises UserError if it cannot be read."""
    return _read(Path(path), ())


def with_settings(values: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Plain values with `settings` ("a.b=value") on top. Text is taken as typed, all else is YAML.

    Names come first, since a new name drops the options of the old one; otherwise a later setting wins.
    """
    for setting in sorted(settings, key=lambda setting: not setting.partition("=")[0].endswith(".name")):
        key, equals, text = setting.partition("=")
        source = one_line(f"--set {setting}")
        if not equals or not all(key.split(".")) or key.count(".") > MAX_LEVELS:
            raise UserError(f"{source}: write it as key=value, such as --set solver.lr=0.02")
        kind = _kind(key)
        nested: Any = text if kind is str else _parse(text, source, kind)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = merge(values, nested)
    return values


def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` on top, key by key; a part that changes its name loses its old options."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(change, dict):
            name = old.get("name", _default_name(key))
            renamed = change.get("name", name) != name
            merged[key] = change if renamed else merge(old, change)
        else:
            merged[key] = change
    return merged


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    values, base = read_file(path)
    if base is None:
        return values
    if path.resolve() in seen:
        raise UserError(f"{path}: its bases lead back to itself")
    return merge(_read(base, (*seen, path.resolve())), values)


def read_file(path: Path) -> tuple[dict[str, Any], Path | None]:
    """The values that a file itself holds, and its base; `base` in it is a path relative to the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8
        raise UserError(f"{path}: cannot be read ({error})") from None
    values = _parse(text, str(path), Config)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}; write `key: value` lines")
    base = values.pop("base", None)
    if base is None:
        return values, None
    if not isinstance(base, str) or CONTROL.search(base):
        raise UserError(f"{path}: base is {one_line(shown(base))}; give the path of another config file")
    return values, path.parent / os.path.expanduser(base)


class _Loader(yaml.SafeLoader):
    """Loads YAML's plain types. Refuses a key that is given twice, and aliases that expand to too many values.

    `kind`: the type of the document, Config or a type in it. Values of type text stay text.
    """

    def __init__(self, stream: str, kind: Any = None):
        super().__init__(stream)
        self._kind = kind

    def construct_document(self, node: yaml.Node) -> Any:
        self._weigh(node, {})
        self._keep_text(node, self._kind)
        return super().construct_document(node)

    def _keep_text(self, node: yaml.Node, kind: Any) -> None:
        if kind is str and node.tag in AS_WRITTEN:
            node.tag = "tag:yaml.org,2002:str"
        elif isinstance(node, yaml.MappingNode):
            declared = _declared(kind)
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in declared:
                    self._keep_text(value, declared[key.value].annotation)

    def decimal(self, node: yaml.ScalarNode) -> int | str:
        """Decimal, as people mean it: YAML 1.1 reads 010 as 8 and 1:30 as 90."""
        digits = node.value.replace("_", "")
        if ":" in digits:
            return node.value
        return int(digits) if digits.lstrip("+-").isdecimal() else self.construct_yaml_int(node)

    def _weigh(self, node: yaml.Node, known: dict[yaml.Node, tuple[float, int]]) -> tuple[float, int]:
        """The numbers of values and levels of a node with expanded aliases. Raises YAMLError if they are too large."""
        if node not in known:
            known[node] = (float("inf"), 0)  # until known: an alias to a node that contains it never ends
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                self._check_keys([key for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
                children = [child for pair in node.value for child in pair]
            weights = [self._weigh(child, known) for child in children]
            known[node] = (
                1 + sum(values for values, _ in weights),
                1 + max((levels for _, levels in weights), default=0),
            )
            if known[node][0] > MAX_VALUES or known[node][1] > MAX_LEVELS:
                problem = f"more than {MAX_VALUES} values or {MAX_LEVELS} levels, aliases spelled out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return known[node]

    def _check_keys(self, keys: list[yaml.ScalarNode]) -> None:
        seen = set()
        for key in keys:
            if key.value in seen:  # PyYAML would take the last
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.decimal)


def _parse(text: str, source: str, kind: Any) -> Any:
    """The value of a YAML text for a `kind`. Raises UserError, which names `source`, for other text."""
    try:
        loader = _Loader(text, kind)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except Exception as error:  # PyYAML raises all kinds: ValueError for 2024-13-45, KeyError for !!bool x
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split()) or type(error).__name__
        raise UserError(f"{source}: {place}{one_line(f'not YAML ({problem})')}") from None


def _default_name(key: str) -> str | None:
    """The name of a part, such as the anchors, that a config need not name."""
    field = Config.model_fields.get(key)
    return getattr(field.default, "name", None) if field else None


def _declared(kind: Any) -> dict[str, Any]:
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}


def _kind(key: str) -> Any:
    """The declared type of a dotted key; None where it is not declared here."""
    kind = Config
    for part in key.split("."):
        field = _declared(kind).get(part)
        if field is None:
            return None
        kind = field.annotation
    return kind
