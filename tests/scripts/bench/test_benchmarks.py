"""Every benchmark at a tiny size: that it runs, and that its table has its rows. What it says is not judged here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import measure

ROOT = Path(__file__).parents[3]
TINY = {
    "step.py": (["--work", "resnet18:96:1", "--boxes", "2", "--repeats", "1"], ["torchvision", "ours, float32"]),
    "assigner.py": (["--sides", "128", "--boxes", "1", "5", "--repeats", "1"], ["128 px, 3,069 x 5"]),
    "inference.py": (["--work", "resnet18:96:1", "--repeats", "1"], ["torchvision", "ours"]),
    "losses.py": (["--rows", "500", "--classes", "3", "--repeats", "1", "--slow"], ["GHM-C", "OHEM", "GHM-R"]),
}


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(text: str) -> dict[str, list[str]]:
    """The tables' rows by their first cell."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.parametrize("script", TINY)
def test_it_runs_and_prints_its_table(script):
    arguments, expected = TINY[script]
    text = run(f"scripts/bench/{script}", *arguments)
    assert measure.environment().split(";")[1] in text
    found = rows(text)
    for name in expected:
        assert float(found[name][0].replace(",", "")) >= 0, name


@pytest.mark.usefixtures("warm_starts")
def test_the_assigner_of_both_is_the_same():
    found = rows(run("scripts/bench/assigner.py", "--sides", "128", "256", "--boxes", "30", "--repeats", "1"))
    assert [row[-1] for name, row in found.items() if "px" in name] == ["0", "0"]


@pytest.mark.usefixtures("warm_starts")
def test_growth_draws_its_plot(tmp_path):
    small = ["--batches", "1", "--sides", "64", "96", "--images", "10", "--repeats", "1"]
    found = rows(run("scripts/bench/growth.py", *small, "--plot", tmp_path / "growth.png"))
    assert {"1 x 512 px", "2 x 96 px", "100"} <= found.keys()
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("warm_starts")
def test_start_is_timed_and_leaves_nothing(tiny, folder):
    found = rows(run("scripts/bench/start.py", "--config", tiny(folder), "--repeats", "1"))
    assert 0.5 < float(found["tiny"][0]) < 600
    assert not (folder / "runs").exists()


@pytest.mark.usefixtures("warm_starts")
def test_start_says_what_is_wrong(folder):
    command = [sys.executable, "scripts/bench/start.py", "--config", str(folder / "none.yaml"), "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no such config file" in done.stderr and "Traceback" not in done.stderr


def test_the_page_keeps_its_other_sections_and_their_order(folder):
    spec = importlib.util.spec_from_file_location("every", ROOT / "scripts/bench/all.py")  # `all` is Python's own
    every = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(every)
    page = folder / "page.md"
    page.write_text("# Benchmarks\n\n## On a GPU\n\nby another script\n")
    for section in ("## Loading\n\nold\n", "## Training step\n\nthe step\n", "## Loading\n\nnew\n\n| a |\n"):
        every.write(page, section)
    text = page.read_text()
    assert text.startswith("# Benchmarks") and "old" not in text and text.count("## ") == 3
    assert text.index("by another") < text.index("## Training step") < text.index("the step")
    assert text.index("the step") < text.index("## Loading") < text.index("| a |")
    assert {command.split()[0] for _, command in every.SECTIONS.values()} <= {
        str(path.relative_to(ROOT)) for path in (ROOT / "scripts/bench").glob("*.py")
    }


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its trainings")
def test_a_struck_run_loses_nothing(folder):
    text = run("scripts/bench/faults.py", "--faults", "1", "--steps", "2", "--seed", "3", "--folder", folder)
    assert text.splitlines()[-1].endswith("1 runs; wrong: 0 lost, 0 exit, 0 left")
    assert {"KILL a process", "TERM a process", "TERM the group"} <= rows(text).keys()
