"""scripts/bench/evaluation.py at a tiny size: it runs, and both ways give the same numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts/bench/evaluation.py"


@pytest.mark.usefixtures("warm_starts")
def test_the_benchmark_prints_its_table_and_both_ways_give_equal_numbers():
    command = [sys.executable, str(SCRIPT), "--images", "20", "--detections", "10", "--repeats", "1"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "| pycocotools |" in process.stdout and "| ours |" in process.stdout
    assert "All 12 numbers are equal to the bit." in process.stdout
