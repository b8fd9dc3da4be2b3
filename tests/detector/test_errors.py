"""How an entry point begins and ends."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from detector.errors import UserError, run_main

ROOT = Path(__file__).parents[2]
NAME = "Zelle é / 细胞 Жук \udcff"  # the last from a file name of bytes that are no UTF-8


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-8"])
def test_printing_never_fails(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main():
        print(NAME)
        raise UserError(NAME)

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2
    for stream, start in ((out, ""), (err, "error: ")):
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)
        assert text.startswith(start + "Zelle ") and text.endswith("\\udcff\n")
        # What the encoding has is as it was, the rest as Python writes it.
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
        place = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, place = os.pipe()
        os.close(reader)
    words = [sys.executable, *flags, "-c", PRINTS, tmp_path / "results"]
    code = [
        subprocess.run(words, cwd=ROOT, stdout=place, stderr=place).returncode,
        (done := subprocess.run(words, cwd=ROOT, stdout=place, stderr=subprocess.PIPE, encoding="utf-8")).returncode,
    ]
    os.close(place)
    assert (tmp_path / "results").read_text() == "results"
    last = done.stderr.splitlines()[-1]
    if output == "a full disk":
        assert code == [2, 2] and last.startswith("error: all is done") and "No space left" in last
    else:
        assert code == [0, 0] and last == "x" * 100
