"""How an entry point begins and ends."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from detector.errors import UserError, run_main

ROOT = Path(__file__).parents[2]
NAME = "Zelle é / 细胞 Жук \udcff"  # the last stands for a byte of a file name that is no UTF-8


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-8"])
def test_printing_never_fails(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main():
        print(NAME)
        raise UserError(NAME)

    with pytest.raises(SystemExit) as exit_info:
        run_main(main)
    assert exit_info.value.code == 2
    for stream, start in ((out, ""), (err, "error: ")):
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)
        assert text.startswith(start + "Zelle ") and text.endswith("\\udcff\n")
        # Characters of the encoding stay as they are; Python's escapes replace the others.
        assert (
            text.encode("ascii", "backslashreplace").decode().removeprefix(start)
            == ascii(NAME)[1:-1].replace("\\\\", "\\") + "\n"
        )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/a b.json", "{home}/a b.json"),
        ("~", "{home}"),
        ("--output=~/x", "--output={home}/x"),
        ("--output", "--output"),
        ("run=~/x", "run=~/x"),  # of --set: the option's type says whether it is a path
        ("a~/b", "a~/b"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("solver.lr=1", "solver.lr=1"),
    ],
)
def test_the_home_folder_may_be_a_tilde(monkeypatch, tmp_path, given, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["~/command", given])
    run_main(lambda: None)
    assert sys.argv == ["~/command", expected.format(home=tmp_path)]
    assert Path.home() == tmp_path


PRINTS = """
import sys
from detector.errors import run_main

def main():
    for stream in (sys.stdout, sys.stderr):
        for _ in range(2000):
            print("x" * 100, file=stream)
        stream.flush()
    open(sys.argv[1], "w").write("results")

run_main(main)
"""


@pytest.mark.parametrize("output", ["a pipe that has ended", "a full disk"])
@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_output_that_cannot_be_written_loses_no_results(tmp_path, output, flags):
    if output == "a full disk":
        fd = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, fd = os.pipe()
        os.close(reader)
    command = [sys.executable, *flags, "-c", PRINTS, tmp_path / "results"]
    exit_codes = [
        subprocess.run(command, cwd=ROOT, stdout=fd, stderr=fd).returncode,
        (result := subprocess.run(command, cwd=ROOT, stdout=fd, stderr=subprocess.PIPE, encoding="utf-8")).returncode,
    ]
    os.close(fd)
    assert (tmp_path / "results").read_text() == "results"
    last_line = result.stderr.splitlines()[-1]
    if output == "a full disk":
        assert exit_codes == [2, 2] and last_line.startswith("error: all is done") and "No space left" in last_line
    else:
        assert exit_codes == [0, 0] and last_line == "x" * 100
