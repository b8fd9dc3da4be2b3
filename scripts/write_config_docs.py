"""Write docs/configuration.md, every option of a config file, from the code that checks them.

    python scripts/write_config_docs.py [--check]

Names, types, defaults and bounds are those of detector/config.py, and so are the words: the comment beside or above an
option. The swappable parts and their options are those of detector/assemble.py. --check writes nothing, and ends with
exit code 2 where the page is not what would be written.
"""

import argparse
import ast
import inspect
import io
import sys
import textwrap
import tokenize
from pathlib import Path
from typing import Any

# Started as a file, Python puts scripts/ on the path and not the repository that holds `detector`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detector.assemble import PARTS
from detector.config import Config, Options, Part
from detector.errors import UserError, run_main

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Every option

Written by `python scripts/write_config_docs.py` from `detector/config.py` and `detector/assemble.py`.

A config is a YAML file that says what differs from these defaults, and may start from another by `base: other.yaml`;
`--set solver.lr=0.02` on the command line comes last. An option that is not here is refused, with the name that it may
have meant. Text is taken as it is written, in both places: `--set run=2024-05-01`, `--set "output=/data/set #2"`. In a
path, `~` is the home folder. `python train.py` writes what a run was trained with into its folder's `config.yaml`.
"""
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "multiple_of": "multiple of"}
BOUNDS |= {"min_length": "characters, at least"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    args = parser.parse_args(argv)
    text = render()
    if args.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            raise UserError(f"{PAGE}: is not current; python scripts/write_config_docs.py writes it")
        print(f"{PAGE} is current")
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
    """The table of a section, and of the sections in it."""
    parts = [table(options, f"{prefix}.")]
    inner: dict[type[Options], list[str]] = {}
    for name, field in options.model_fields.items():
        if isinstance(field.default, Options):
            inner.setdefault(type(field.default), []).append(name)
    for kind, (first, *others) in inner.items():
        parts.append(section(kind, f"{prefix}.{first}"))
        parts += [f"and the same of `{prefix}.{other}`.\n" for other in others]
    return "\n".join(parts)


def table(options: type[Options], prefix: str) -> str:
    """Its own options, a row each, without those that are sections or parts."""
    lines = ["| option | default | may be | |", "| --- | --- | --- | --- |"]
    for name, (kind, call, words) in sources(options).items():
        default = options.model_fields[name].default
        if not isinstance(default, (Options, Part)):
            lines.append(f"| `{prefix}{name}` | `{shown(default)}` | {may_be(kind, call)} | {escaped(words)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def sources(options: type[Options]) -> dict[str, tuple[str, ast.expr | None, str]]:
    """Of each option its annotation, what it is set to and its comment, as they stand in the code."""
    text = textwrap.dedent(inspect.getsource(options))
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(text).body[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            words = [comments[node.end_lineno][0]] if node.end_lineno in comments else []
            above = node.lineno - 1
            while above in comments and comments[above][1]:
                words.insert(0, comments[above][0])
                above -= 1
            found[node.target.id] = ast.unparse(node.annotation), node.value, " ".join(words)
    return {name: found[name] for name in options.model_fields if name in found}


def may_be(kind: str, value: ast.expr | None) -> str:
    """Type and bounds in words."""
    if kind.startswith("Literal["):
        return escaped(", ".join(f"`{one}`" for one in ast.literal_eval(f"({kind[8:-1]},)")))
    if kind.startswith("tuple["):
        kind = f"{kind.count(',') + 1} numbers"
    words = {"list[float]": "a list of numbers", "float": "number", "int": "whole number", "bool": "true, false"}
    for name, word in (words | {"FilePath": "path", "str": "text", "| None": "or null"}).items():
        kind = kind.replace(name, word)
    limits = []
    if isinstance(value, ast.Call):
        bounds = {one.arg: eval(ast.unparse(one.value), {}) for one in value.keywords if one.arg in BOUNDS}  # 2**14
        limits = [f"{BOUNDS[name]} {bound}" for name, bound in bounds.items()]
    return escaped(", ".join([kind, *limits]))


def part(key: str, default: Part) -> str:
    """What may be chosen, with the options of each."""
    lines = [f"`{key}.name`, by default `{default.name}`, and the options of what is chosen:\n"]
    if "weight" in type(default).model_fields:
        lines.insert(0, f"`{key}.weight`, by default 1, multiplies the loss.\n")
    lines += ["| name | | options, with their defaults |", "| --- | --- | --- |"]
    for name, build in PARTS[key].items():
        about = (inspect.getdoc(build) or "").split("\n\n")[0].replace("\n", " ")
        options = [
            f"`{one.name}={shown(one.default)}`"
            for one in inspect.signature(build).parameters.values()
            if one.name not in ("self", "strides")
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
