import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.usefixtures("warm_starts")
def test_the_benchmark_runs_and_prints_its_tables():
    command = [sys.executable, "scripts/bench/loader.py", "--images", "4", "--repeats", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines() if "|" in line]
    for size in ("512x384", "1067x800"):
        assert [f"to {size}", "images/s", "ours", "cached", "MiB a batch"] in rows
        assert f"ours to {size} through the DataLoader" in result.stdout
    for name in ("v2, PIL", "v2, tensors", "v2, in the model", "ours", "ours, cached"):
        (small_row, large_row) = [row for row in rows if row[0] == name]
        assert all(float(value.rstrip("x")) > 0 for value in small_row[1:] + large_row[1:])
        assert float(small_row[4]) == {"o": 4.5, "v": 18.0}[name[0]]  # a float is four bytes
    assert len([row for row in rows if row[0] == "read, decode"]) == 2
