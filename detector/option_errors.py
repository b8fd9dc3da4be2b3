"""Errors in options, in one line each."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from detector.errors import one_line


def describe(error: ValidationError, options: type[BaseModel], where: str = "", also: Iterable[str] = ()) -> str:
    """The first error in one line, with a suggestion for an unknown key and the number of further errors.

    `also`: keys that are allowed in addition to those of `options`.
    """
    first = error.errors(include_url=False)[0]
    location = ".".join(str(part) for part in first["loc"])
    key = ".".join(part for part in (where, location) if part)
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        elsewhere = [path for path in _paths(options) if path.endswith(f".{name}")]
        known = [*_fields(options, first["loc"][:-1]), *also]
        hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else suggestion(name, known)
        text = f"{key}: unknown option; {hint}"
    else:
        message = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], (dict, BaseModel)) else f" (found {shown(first['input'])})"
        text = f"{key}: {message}{given}" if key else message  # a rule about several options names them itself
    more = error.error_count() - 1
    return one_line(text) + (f" (and {more} more)" if more else "")


def suggestion(name: str, known: Collection[str]) -> str:
    """What an unknown name may have meant."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"it may be one of {', '.join(known)}"


def shown(value: Any) -> str:
    """The value as Python writes it."""
    try:
        return repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, a list that contains itself
        return f"a huge {type(value).__name__}"


def _fields(options: type[BaseModel], location: tuple) -> list[str]:
    for part in location:
        options = cast(type[BaseModel], options.model_fields[part].annotation)
    return list(options.model_fields)


def _paths(options: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted keys of all options."""
    paths = []
    for key, field in options.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        paths += _paths(cast(type[BaseModel], kind), f"{prefix}{key}.") if nested else [prefix + key]
    return paths
