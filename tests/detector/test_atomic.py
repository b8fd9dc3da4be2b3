"""Whatever fails, a file is the old one or the complete new one, and no temporary file remains."""

import pytest

from detector import atomic


def test_the_new_file_replaces_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic.replacing(path) as temp_path:
        temp_path.write_text("new")
        assert path.read_text() == "old" and temp_path.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), atomic.replacing(path, ".part") as temp_path:
        temp_path.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "a.json"
    path.write_text("old")
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        atomic.write(path, "new" * 100)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_keeps_a_suffix_that_a_writer_needs(tmp_path):
    with atomic.replacing(tmp_path / "film.mp4", ".part.mp4") as temp_path:
        assert temp_path.suffix == ".mp4"
        temp_path.write_bytes(b"frames")
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_text_is_utf8(tmp_path):
    atomic.write(tmp_path / "a.txt", "Größe 細")
    assert (tmp_path / "a.txt").read_bytes() == "Größe 細".encode()
