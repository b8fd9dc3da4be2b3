"""A file is the old one or the whole new one, whatever fails, and nothing stays beside it."""

import pytest

from detector import atomic


def test_the_new_file_takes_the_place_of_the_old_at_the_end(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic.replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old" and beside.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), atomic.replacing(path, ".part") as beside:
        beside.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "a.json"
    path.write_text("old")
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        atomic.write(path, "new" * 100)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_ending_keeps_a_suffix_that_a_writer_needs(tmp_path):
    with atomic.replacing(tmp_path / "film.mp4", ".part.mp4") as beside:
        assert beside.suffix == ".mp4"
        beside.write_bytes(b"frames")
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_text_is_utf8(tmp_path):
    atomic.write(tmp_path / "a.txt", "Größe 細")
    assert (tmp_path / "a.txt").read_bytes() == "Größe 細".encode()
