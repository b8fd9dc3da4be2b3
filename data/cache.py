"""The images of a data set decoded and resized once, in one file that every process maps.

The file holds raw pixels, uint8 RGB, image after image; the sizes give each image's position. Its name is a digest of
everything its content depends on, so other files, changed files or another size make another cache. An unused cache
stays until you delete it.
"""

import contextlib
import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from data.transforms import resize
from detector.atomic import replacing
from detector.errors import UserError
from detector.images import Remarks, read_image

FORMAT = 1  # raise it if the same images give other bytes

Sizes = Sequence[tuple[int, int]]


class Cache:
    """Images by index, as (h, w, 3) uint8 RGB.

    Args:
        folder: folder of the cache, which is built unless it exists and is complete
        files, sizes: of the images, as read_image takes them
        kept: (height, width) of each image in the cache

    Raises UserError if the folder cannot be written or lacks room, or an image cannot be read.
    """

    def __init__(self, folder: str | Path, files: Sequence[Path], sizes: Sizes, kept: Sizes):
        self.kept = kept
        self._pixels: np.memmap | None = None
        self.remarks: Remarks = {}  # on the images, if this object has read them
        self.ends = np.cumsum([height * width * 3 for height, width in kept])
        try:
            stats = [(os.path.abspath(file), os.stat(file)) for file in files]
            stamps = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
            digest = hashlib.sha256(repr((FORMAT, stamps, sizes, kept)).encode()).hexdigest()
            self.path = Path(folder) / f"{digest[:16]}.rgb"
            self.found = self._is_whole() or not self._build(files, sizes)
        except OSError as error:
            where = error.filename or folder
            raise UserError(f"data.cache: {where}: {error.strerror}; name a folder that can be written") from None

    def summary(self) -> str:
        return f"Images from the cache {self.path}, {self.ends[-1] / 1e6:,.0f} MB, {'found' if self.found else 'new'}."

    def __getitem__(self, index: int) -> np.ndarray:
        """A writable copy."""
        if self._pixels is None:
            self._pixels = np.memmap(self.path, np.uint8, "r")
        height, width = self.kept[index]
        end = self.ends[index]
        return np.array(self._pixels[end - height * width * 3 : end]).reshape(height, width, 3)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None}  # another process maps the file itself

    def _is_whole(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.ends[-1]

    def _build(self, files: Sequence[Path], sizes: Sizes) -> bool:
        """Write the file, unless another process has just done so; returns whether it was written here."""
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if self._is_whole():
                return False
            needed, free = self.ends[-1] / 1e6, shutil.disk_usage(folder).free / 1e6
            if free < needed:
                raise UserError(
                    f"data.cache: the images take {needed:,.0f} MB, but only {free:,.0f} MB are free in {folder}: make "
                    "space, name another folder, or turn the cache off with data.cache="
                )
            # A unique name, since _alone does not exclude other processes on every system.
            with replacing(self.path, f".{uuid.uuid4().hex}.tmp") as beside:
                self._write(beside, files, sizes)
        return True

    def _write(self, path: Path, files: Sequence[Path], sizes: Sizes) -> None:
        turn = threading.Lock()

        def keep(index: int) -> None:
            image, _ = resize(read_image(files[index], sizes[index], self.remarks), np.zeros((0, 4)), *self.kept[index])
            with turn:
                file.seek(self.ends[index] - image.size)
                file.write(image.tobytes())

        # Threads are enough, because decoding and resizing release Python's lock.
        with path.open("wb") as file, ThreadPoolExecutor() as pool:
            for _ in tqdm(pool.map(keep, range(len(files))), f"cache {path.parent}", len(files), unit="image"):
                pass


def _alone(folder: Path) -> TextIO:
    """A lock for one process at a time; on systems without file locks, several processes do the same work."""
    file = os.fdopen(os.open(folder / ".lock", os.O_RDONLY | os.O_CREAT))  # read-only, since it may be another user's
    with contextlib.suppress(ImportError, OSError):
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX)
    return file
