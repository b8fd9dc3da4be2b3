"""YAML with the checks that PyYAML lacks; where an option is text it stays as written: `run: 2024-05-01` is no date."""

from typing import Any

import yaml
from pydantic import BaseModel

from detector.errors import UserError, one_line

MAX_LEVELS = 20  # of a text
MAX_VALUES = 10_000  # of a text, an alias counting as everything that it stands for

# Types that YAML may read into a text. Not null, which means no value.
AS_WRITTEN = {f"tag:yaml.org,2002:{tag}" for tag in ("bool", "float", "int", "merge", "timestamp", "value")}


class _Loader(yaml.SafeLoader):
    """YAML's plain types. Refuses a key that is given twice, and aliases that multiply to too many values.

    `kind`: the type of the whole, Config or a type in it. Where it declares text, YAML makes no number or date of it.
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
            declared = declared_options(kind)
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in declared:
                    self._keep_text(value, declared[key.value].annotation)

    def _weigh(self, node: yaml.Node, known: dict[yaml.Node, tuple[float, int]]) -> tuple[float, int]:
        """How many values and levels a node has with its aliases expanded; YAMLError where they are too many."""
        if node not in known:
            known[node] = (float("inf"), 0)  # until it is known: an alias of what it is in has no end
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


def parse(text: str, source: str, kind: Any) -> Any:
    """The value of a YAML text that is to become a `kind`; the UserError for other text names `source`."""
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


def declared_options(kind: Any) -> dict[str, Any]:
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
