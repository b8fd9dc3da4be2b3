"""Run every benchmark, write docs/benchmarks.md: python scripts/bench/all.py [--only step loader ...] [--output FILE]

Takes about half an hour on two otherwise idle cores. --only runs some sections and keeps the others.
"""

import argparse
import re
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from detector.errors import run_main

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/benchmarks.md"
SECTIONS = {  # title and command
    "step": ("Training step", "scripts/bench/step.py"),
    "assigner": ("Assignment", "scripts/bench/assigner.py"),
    "losses": ("Losses", "scripts/bench/losses.py --slow --step"),
    "loader": ("Loading", "scripts/bench/loader.py"),
    "inference": ("Inference", "scripts/bench/inference.py"),
    "evaluation": ("Evaluation", "scripts/bench/evaluation.py"),
    "start": ("Start", "scripts/bench/start.py"),
    "coco_size": ("COCO's size", "scripts/bench/coco_size.py"),
    "growth": ("Growth", "scripts/bench/growth.py --plot docs/growth.png"),
    "verdicts": ("Verdicts", "scripts/bench/verdicts.py --simulations 4000"),
}
HEAD = """# Benchmarks

This project beside its peers. In each section both took turns in one run, so compare numbers only within a section. The
first lines of each script say what it measures and how. Written by `python scripts/bench/all.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE")
    args = parser.parse_args()
    for name in args.only:
        start = time.perf_counter()
        print(f"{name} ...", end=" ", flush=True)
        section = run(*SECTIONS[name])
        write(args.output, section)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)


def run(title: str, command: str) -> str:
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{command}: {(done.stderr.strip() or 'it failed').splitlines()[-1]}")
    picture = "\n![growth](growth.png)\n" if "--plot" in command else ""
    return f"## {title}\n\n    python {command}\n\n{datetime.now(UTC):%Y-%m-%d}, {done.stdout.strip()}\n{picture}"


def write(path: Path, section: str) -> None:
    """Replace the section with the same title in the page, or insert it; the text above and other sections stay."""
    head, *parts = re.split(
        r"^(?=## )", path.read_text(encoding="utf-8") if path.is_file() else HEAD, flags=re.MULTILINE
    )
    by_title = {part.splitlines()[0]: part for part in parts}
    by_title[section.splitlines()[0]] = section
    titles = [f"## {title}" for title, _ in SECTIONS.values()]
    others = [part for title, part in by_title.items() if title not in titles]  # as gpu.sh's
    parts = [head, *others, *(by_title[title] for title in titles if title in by_title)]
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
