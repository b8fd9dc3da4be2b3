"""How an entry point begins and ends."""

import io
import sys
from pathlib import Path

import pytest

from detector.errors import UserError, run_main

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
