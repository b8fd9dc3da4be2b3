"""scripts/bench/evaluation.py at a tiny size: it runs, and both ways give the same numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts/bench/evaluation.py"


@pytest.mark.usefixtures("warm_starts")
def test_table_and_equal_numbers():
    command = [sys.executable, str(SCRIPT), "--images", "20", "--detections", "10", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| pycocotools |" in done.stdout and "| ours |" in done.stdout
    assert "All 12 numbers are equal to the bit." in done.stdout
