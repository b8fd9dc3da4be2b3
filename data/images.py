"""Image files of any kind -> RGB of 8 bits, turned as their boxes are."""

import io
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from detector.errors import UserError

# Larger images are refused before they are decoded, whatever the size of the file: 179 million, PIL's own limit.
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS
# Of PIL's formats those that hold pictures and whose pixels read_image gives; AVIF only where PIL was built with it.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
# Suffixes of pictures that, unless PIL can after all, cannot be read: cameras' own formats and the like.
OTHER_PICTURES = (
    *(".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),
    *(".avif", ".dcm", ".dicom", ".exr", ".hdr", ".heic", ".heif", ".hif", ".jxl", ".jxr", ".psd", ".svg", ".xcf"),
)
ORIENTATION = 0x0112  # the EXIF tag
# What undoes each value of the tag; image (h, w, 3).
UPRIGHT = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}
# Marks of a PNG that may have one. PIL decodes the pixels to see whether there is any behind them.
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
# Complete files of these formats end so; OpenCV would fill up the rest of a truncated one with gray.
END_MARK = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


@cache
def suffixes() -> frozenset[str]:
    """The endings, such as ".jpg", of the image files that can be read; in lower case."""
    return frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS)


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file as (h, w, 3) uint8 RGB; alpha is dropped, 16 bits become the upper 8.

    `size` is the (height, width) of its record, which says in which frame the boxes are: if that is the stored
    one and not the one that the EXIF orientation asks for, the image is not turned. Raises UserError for a file
    that cannot be decoded, and, before it is, for one that has another size or more than MAX_PIXELS.
    """
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as file:
            _check_header(path, file.size, size)
            image = _decode(file, data)
            # Asked after decoding: PIL turns a TIFF itself and then takes the tag away.
            plain = file.format == "PNG" and not any(mark in data for mark in PNG_ORIENTATION)
            orientation = 1 if plain else file.getexif().get(ORIENTATION, 1)
    except UserError:
        raise
    except Exception as error:  # decoders raise all kinds; whichever it is, the file is at fault
        if isinstance(error, UnidentifiedImageError):
            error = "no image format that is known" if data else "the file is empty"
        reason = " ".join(str(error).split()) or type(error).__name__  # a MemoryError says nothing
        raise UserError(f"{path}: cannot read the image ({reason}); replace it or remove its record") from None
    stored = image.shape[:2]
    upright = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    if size is not None and tuple(size) not in (stored, upright):
        raise _other_size(path, stored, size)
    if orientation in UPRIGHT and (size is None or tuple(size) == upright):
        image = UPRIGHT[orientation](image)
    return np.ascontiguousarray(image)


def _check_header(path: str | Path, found: tuple[int, int], size: tuple[int, int] | None) -> None:
    """Raise UserError where the (width, height) that a file's header claims is too large or not the record's."""
    if found[0] * found[1] > MAX_PIXELS:  # PIL refuses it too, unless somebody has lifted its limit
        raise UserError(f"{path}: the image is {found[0]} x {found[1]}, more than {MAX_PIXELS} pixels; make it smaller")
    if size is not None and sorted(found) != sorted(size):  # which side is which, the orientation says
        raise _other_size(path, found[::-1], size)


def _other_size(path: str | Path, found: tuple[int, int], size: tuple[int, int]) -> UserError:
    return UserError(
        f"{path}: the image is {found[1]} x {found[0]} pixels, its record says {size[1]} x {size[0]}; correct "
        "the record or put the image there that was annotated"
    )


def _decode(file: Image.Image, data: bytes) -> np.ndarray:
    """The pixels as stored, (h, w, 3) uint8 RGB, not turned."""
    if file.mode in ("L", "RGB") and data.endswith(END_MARK.get(file.format, b"no such end")):
        # OpenCV gives the same pixels as PIL in less time; it would turn the image by its EXIF tag if let.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is not None:
            return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if file.mode in ("F", "I"):
        raise ValueError(f"its pixels, of PIL mode {file.mode!r}, have no fixed range; convert it to 8 or 16 bits")
    if file.mode.startswith("I;16"):  # PIL would clip it at 255
        return np.repeat((np.asarray(file) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    # A palette by way of RGBA, since PIL warns where one has alpha and is to lose it.
    return np.array(file.convert("RGBA" if file.mode == "P" else "RGB"))[:, :, :3]
