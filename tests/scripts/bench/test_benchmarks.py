"""Each benchmark runs at a tiny size and its table has all rows. These tests do not judge the numbers."""

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
    process = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def rows(text: str) -> dict[str, list[str]]:
    """The tables' rows by their first cell."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.parametrize("script", TINY)
def test_each_benchmark_prints_its_table(script):
    arguments, expected = TINY[script]
    output = run(f"scripts/bench/{script}", *arguments)
    assert measure.environment().split(";")[1] in output
    table = rows(output)
    for name in expected:
        assert float(table[name][0].replace(",", "")) >= 0, name


@pytest.mark.usefixtures("warm_starts")
def test_both_assigners_give_the_same_matches():
    table = rows(run("scripts/bench/assigner.py", "--sides", "128", "256", "--boxes", "30", "--repeats", "1"))
    assert [row[-1] for name, row in table.items() if "px" in name] == ["0", "0"]


@pytest.mark.usefixtures("warm_starts")
def test_growth_draws_its_plot(tmp_path):
    arguments = ["--batches", "1", "--sides", "64", "96", "--images", "10", "--repeats", "1"]
    table = rows(run("scripts/bench/growth.py", *arguments, "--plot", tmp_path / "growth.png"))
    assert {"1 x 512 px", "2 x 96 px", "100"} <= table.keys()
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("warm_starts")
def test_start_is_timed_and_leaves_no_run_folder(tiny, folder):
    table = rows(run("scripts/bench/start.py", "--config", tiny(folder), "--repeats", "1"))
    for name in ("first run on a machine", "later run"):
        whole, step = (float(cell.partition(" ")[0]) for cell in table[name])
        assert 0 <= step < whole < 600 and whole > 0.5, table
    assert not (folder / "runs").exists()


@pytest.mark.usefixtures("warm_starts")
def test_start_reports_a_missing_config(folder):
    command = [sys.executable, "scripts/bench/start.py", "--config", str(folder / "none.yaml"), "--repeats", "1"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and "no such config file" in process.stderr and "Traceback" not in process.stderr


def test_the_page_keeps_its_other_sections_and_their_order(folder):
    spec = importlib.util.spec_from_file_location("every", ROOT / "scripts/bench/all.py")  # `all` is a builtin
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
def test_a_killed_run_loses_nothing(folder):
    output = run("scripts/bench/faults.py", "--faults", "1", "--steps", "2", "--seed", "3", "--folder", folder)
    assert output.splitlines()[-1].endswith("1 runs; wrong: 0 lost, 0 exit, 0 left")
    assert {"KILL a process", "TERM a process", "TERM the group"} <= rows(output).keys()
