"""Write docs/configuration.md, a list of all config options, from the code that checks them.

    python scripts/write_config_docs.py [--check]

Names, types, defaults and bounds come from detector/config.py, and the descriptions from the comments beside or above
the options. The swappable parts and their options come from detector/configure.py. --check writes nothing and exits
with 2 if the page is out of date.
"""

import argparse
import ast
import inspect
import io
import textwrap
import tokenize
from pathlib import Path
from typing import Any

from detector.config import Config, Options, Part
from detector.configure import PARTS
from detector.errors import UserError, run_main

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Every option

Written by `python scripts/write_config_docs.py` from `detector/config.py` and `detector/configure.py`.

A config is a YAML file with the options that differ from these defaults. It may start from another config with `base:
other.yaml`. `--set solver.lr=0.02` on the command line overrides both. Unknown options are refused with a suggestion.
With another `class_loss.name`, the weight and options of the old loss are dropped; set those of the new one. The same
holds for `box_loss`, `assigner` and `anchors`. What the options of these parts do is in [losses.md](losses.md) and in
the docstrings of `detector/losses/`, `detector/assigner.py` and `detector/anchors.py`.
Text is taken literally, in the file and after `--set`: `--set run=2024-05-01`, `--set "output=/data/set #2"`. In a
path, `~` is the home folder. `python train.py` writes the complete config of a run into its folder's `config.yaml`.
"""
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "multiple_of": "multiple of"}
BOUNDS |= {"min_length": "characters: at least"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check whether the page is up to date")
    args = parser.parse_args(argv)
    text = render()
    if args.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            raise UserError(f"{PAGE}: is out of date; python scripts/write_config_docs.py writes it")
        print(f"{PAGE} is up to date")
        return
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE}")


def render() -> str:
    parts = [HEAD, "## The run\n", table(Config, "")]
    for key, field in Config.model_fields.items():
        if isinstance(field.default, Part):
            parts += [f"## {key}\n", part(key, field.default)]
        elif isinstance(field.default, Options):
            parts += [f"## {key}\n", section(type(field.default), key)]
    return "\n".join(parts)


def section(options: type[Options], prefix: str) -> str:
    """The tables of a section and its subsections."""
    parts = [table(options, f"{prefix}.")]
    inner: dict[type[Options], list[str]] = {}
    for name, field in options.model_fields.items():
        if isinstance(field.default, Options):
            inner.setdefault(type(field.default), []).append(name)
    for kind, (first, *others) in inner.items():
        parts.append(section(kind, f"{prefix}.{first}"))
        parts += [f"`{prefix}.{other}` has the same options.\n" for other in others]
    return "\n".join(parts)


def table(options: type[Options], prefix: str) -> str:
    """A table of the options, without subsections and parts."""
    lines = ["| option | default | values | |", "| --- | --- | --- | --- |"]
    for name, (kind, call, words) in sources(options).items():
        default = options.model_fields[name].default
        if not isinstance(default, (Options, Part)):
            lines.append(f"| `{prefix}{name}` | `{shown(default)}` | {may_be(kind, call)} | {escaped(words)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def sources(options: type[Options]) -> dict[str, tuple[str, ast.expr | None, str]]:
    """The annotation, value and comment of each option in the source code."""
    text = textwrap.dedent(inspect.getsource(options))
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(text).body
    assert isinstance(definition, ast.ClassDef)
    found_options = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            words = [comments[node.end_lineno][0]] if node.end_lineno in comments else []
            above = node.lineno - 1
            while above in comments and comments[above][1]:
                words.insert(0, comments[above][0])
                above -= 1
            found_options[node.target.id] = ast.unparse(node.annotation), node.value, " ".join(words)
    return {name: found_options[name] for name in options.model_fields if name in found_options}


def may_be(kind: str, value: ast.expr | None) -> str:
    """Type and bounds in words."""
    if kind.startswith("Literal["):
        return escaped(", ".join(f"`{value}`" for value in ast.literal_eval(f"({kind[8:-1]},)")))
    if kind.startswith("tuple["):
        kind = f"{kind.count(',') + 1} numbers"
    words = {"list[float]": "a list of numbers", "float": "number", "int": "whole number", "bool": "true, false"}
    words |= {"Workers": "`auto`, or a whole number from 0 to 1024"}
    for name, word in (words | {"FilePath": "path", "str": "text", "| None": "or null"}).items():
        kind = kind.replace(name, word)
    limits = []
    if isinstance(value, ast.Call):
        bounds = ((keyword.arg, ast.unparse(keyword.value)) for keyword in value.keywords)
        limits = [f"{BOUNDS[name]} {eval(bound, {})}" for name, bound in bounds if name in BOUNDS]  # such as 2**14
    return escaped(", ".join([kind, *limits]))


def part(key: str, default: Part) -> str:
    """The choices for a part, with their options."""
    lines = [f"`{key}.name` (default `{default.name}`) and the options of the choice:\n"]
    if "weight" in type(default).model_fields:
        lines.insert(0, f"`{key}.weight` (default 1) multiplies the loss.\n")
    lines += ["| name | | options, with their defaults |", "| --- | --- | --- |"]
    for name, build in PARTS[key].items():
        about = (inspect.getdoc(build) or "").split("\n\n")[0].replace("\n", " ")
        options = [
            f"`{parameter.name}={shown(parameter.default)}`"
            for parameter in inspect.signature(build).parameters.values()
            if parameter.name not in ("self", "strides")
        ]
        lines.append(f"| `{name}` | {escaped(about)} | {escaped(', '.join(options)) or 'none'} |")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(shown, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value) or '""'


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    run_main(main)
