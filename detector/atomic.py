"""Files that are complete or absent: written under a temporary name, then renamed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, ending: str = ".tmp") -> Iterator[Path]:
    """A path to write to. At the end of the block its file replaces `path`.

    If the block or the disk fails, the new file is removed and an old one stays unchanged. The data reach the disk
    before the rename, so a power failure cannot leave an empty file under the final name.
    """
    beside = path.with_name(path.name + ending)
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def sync(path: Path) -> None:
    """Wait until what was written to the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write(path: Path, text: str) -> None:
    """Write `text` in UTF-8. After an OSError, the old file is unchanged."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
