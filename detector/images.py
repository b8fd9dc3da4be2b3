"""Image files of any kind -> RGB of 8 bits, in the orientation of their boxes."""

import io
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from detector.errors import UserError

# Larger images are refused before they are decoded, whatever the size of the file: 179 million, PIL's own limit.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**30 // 12)
# The picture formats of PIL that read_image can read; AVIF only if PIL was built with it.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
# Suffixes of pictures that cannot be read, unless PIL supports them: raw formats of cameras and others.
OTHER_PICTURES = (
    *(".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),
    *(".avif", ".dcm", ".dicom", ".exr", ".hdr", ".heic", ".heif", ".hif", ".jxl", ".jxr", ".psd", ".svg", ".xcf"),
)
ORIENTATION = 0x0112  # the EXIF tag
# Undoes each value of the tag; image (h, w, 3).
UPRIGHT = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}
# Marks of a PNG that may have an orientation. PIL decodes the pixels to look for one after them.
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
# Complete files of these formats end so; OpenCV would fill up the rest of a truncated one with gray.
END_MARK = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
TAIL, LOST = 64, 0.01  # bytes whose absence shows how far a cut JPEG goes; share of its picture it may lack
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # TIFF tags
DARK_BITS = 14  # of 16: an image that uses no more is below a quarter of the range


Remarks = dict[str, set[str]]  # an oddity of images that are read all the same -> their files


def add_remarks(remarks: Remarks, more: Remarks) -> None:
    """Put `more` into `remarks`."""
    for kind, files in more.items():
        remarks.setdefault(kind, set()).update(files)


def remark_lines(*remarks: Remarks) -> list[str]:
    """One line for each kind, with the number of images and an example."""
    every: Remarks = {}
    for more in remarks:
        add_remarks(every, more)
    return [f"images with {kind}: {len(files):,} (such as {min(files)})" for kind, files in sorted(every.items())]


@cache
def suffixes() -> frozenset[str]:
    """The endings, such as ".jpg", of the image files that can be read; in lower case."""
    return frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS)


def read_image(path: str | Path, size: tuple[int, int] | None = None, remarks: Remarks | None = None) -> np.ndarray:
    """An image file as (h, w, 3) uint8 RGB. Alpha is dropped; of 16 bits, the upper 8 that the file uses are kept.

    `size` is the (height, width) of its record, which decides the frame of the boxes: if it is the stored size and not
    the size after turning by the EXIF orientation, the image is not turned. Oddities of the file are added to
    `remarks`. Raises UserError if the file cannot be decoded, and before decoding if it has another size or more than
    MAX_PIXELS.
    """
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as file:
            _check_header(path, file.size, size)
            of_tiff = file.tag_v2.get(ORIENTATION) if isinstance(file, TiffImageFile) else None
            image, odd = _decode(file, data)
            # Asked after decoding: PIL turns a TIFF itself and then takes the tag away.
            plain = file.format == "PNG" and not any(mark in data for mark in PNG_ORIENTATION)
            orientation = 1 if plain else file.getexif().get(ORIENTATION, 1)
            if _has_more_frames(file):
                odd.append("several pages or frames, of which only the first is read")
    except UserError:
        raise
    except Exception as error:  # decoders raise all kinds; whichever it is, the file is at fault
        if isinstance(error, UnidentifiedImageError):
            reason = "no image format that is known" if data else "the file is empty"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__  # a MemoryError says nothing
        raise UserError(f"{path}: cannot read the image ({reason}); replace it or remove its record") from None
    stored = image.shape[:2]
    upright = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    if size is not None and tuple(size) not in (stored, upright):
        raise _other_size(path, stored, size)
    if orientation in UPRIGHT and (size is None or tuple(size) == upright):
        image = UPRIGHT[orientation](image)
    turn = of_tiff or orientation
    if size is not None and (turn in (2, 3, 4) or (turn in UPRIGHT and stored[0] == stored[1])):
        odd.append(
            "an EXIF orientation that keeps their size, by which they are turned, though their records cannot tell "
            "whether the boxes are (look at them with scripts/check_data.py)"
        )
    if remarks is not None:
        add_remarks(remarks, {kind: {str(path)} for kind in odd})
    return np.ascontiguousarray(image)


def from_pil(image: Image.Image) -> np.ndarray:
    """A PIL image as read_image gives its file. Raises ValueError if its pixels have no fixed range.

    Copies and crops have lost their file's tags: then a 12-bit TIFF counts as one of 16 bits.
    """
    pixels = _pixels(image, _stored_bits(image, b""))
    orientation = image.getexif().get(ORIENTATION, 1)  # asked after decoding, as in read_image
    return np.ascontiguousarray(UPRIGHT[orientation](pixels) if orientation in UPRIGHT else pixels)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file, turned by its EXIF orientation. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as file:
            _check_header(path, file.size, None)
            # Some versions of PIL have already turned the size of a TIFF, so read its tags.
            size = (file.tag_v2[256], file.tag_v2[257]) if isinstance(file, TiffImageFile) else file.size
            turned = file.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return size if turned else size[::-1]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot read the image's size ({error}); replace it or remove its record") from None


def _check_header(path: str | Path, seen: tuple[int, int], size: tuple[int, int] | None) -> None:
    """Raise UserError where the (width, height) that a file's header claims is too large or not the record's."""
    if seen[0] * seen[1] > MAX_PIXELS:  # PIL refuses it too, unless somebody has lifted its limit
        raise UserError(f"{path}: the image is {seen[0]} x {seen[1]}, more than {MAX_PIXELS} pixels; make it smaller")
    if size is not None and sorted(seen) != sorted(size):  # the orientation decides which side is which
        raise _other_size(path, seen[::-1], size)


def _other_size(path: str | Path, seen: tuple[int, int], size: tuple[int, int]) -> UserError:
    return UserError(
        f"{path}: the image is {seen[1]} x {seen[0]} pixels, its record says {size[1]} x {size[0]}; correct "
        "the record or replace the file with the image that was annotated"
    )


def _decode(file: Image.Image, data: bytes) -> tuple[np.ndarray, list[str]]:
    """The pixels as stored, (h, w, 3) uint8 RGB, not turned; and the file's oddities."""
    if file.mode in ("L", "RGB") and data.endswith(END_MARK.get(file.format or "", b"no such end")):
        # OpenCV gives the same pixels as PIL in less time; it would turn the image by its EXIF tag if let.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is not None:
            return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), _darkness(image, _stored_bits(file, data))
    try:
        file.load()
        whole = _has_end(data) if file.format == "JPEG" else file.format != "PNG" or b"IEND" in data
    except OSError:
        if file.format != "JPEG" or not _is_nearly_whole(data):
            raise
        file, whole = Image.open(io.BytesIO(data + END_MARK["JPEG"])), False
    odd = [] if whole else ["their last bytes missing (read as far as possible)"]
    bits = _stored_bits(file, data)
    image = _pixels(file, bits)
    return image, odd + _darkness(image, bits)


def _pixels(image: Image.Image, bits: int) -> np.ndarray:
    """A PIL image as (h, w, 3) uint8 RGB, not turned; the upper 8 of `bits` if it is gray and has more than 8."""
    # PIL has scaled a PPM to 16 bits from the range that the file declares, and would clip other formats at 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        gray = np.clip(np.asarray(image) >> (bits - 8), 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("F", "I"):
        raise ValueError(f"its pixels, of PIL mode {image.mode!r}, have no fixed range; convert it to 8 or 16 bits")
    # A palette goes through RGBA, since PIL warns if a palette with alpha becomes RGB.
    return np.array(image.convert("RGBA" if image.mode == "P" else "RGB"))[:, :, :3]


def _darkness(image: np.ndarray, bits: int) -> list[str]:
    """The remark on an image that was read from the upper 8 of 16 bits and does not use them."""
    if bits != 16 or (used := 8 + int(image.max(initial=0)).bit_length()) > DARK_BITS:
        return []
    return [f"16 bits of which only the lower {used} are used, which look dark; scale them to the full range"]


def _stored_bits(file: Image.Image, data: bytes) -> int:
    """Bits of a sample: 8 or 16, or those of its 16 that a gray image claims to use, as microscopes write 12."""
    gray = file.mode.startswith("I")
    if not isinstance(file, TiffImageFile):
        deep_png = file.format == "PNG" and data[24:25] == b"\x10"  # a PNG's first chunk has its depth
        return 16 if gray or deep_png else 8
    bits, most = (file.tag_v2.get(tag, 0) for tag in (BITS_PER_SAMPLE, MAX_SAMPLE_VALUE))
    bits, most = (max(value) if isinstance(value, tuple) and value else value for value in (bits, most))
    if not gray:
        return bits  # PIL has kept the upper 8 of 16
    declared = min(bits or 16, int(most).bit_length() if most else 16)
    return declared if 8 < declared < 16 else 16


def _has_more_frames(file: Image.Image) -> bool:
    """Whether pages or frames follow the first. Those of a camera's MPO are other views of the scene."""
    try:
        return file.format != "MPO" and getattr(file, "is_animated", False)
    except Exception:  # they are broken, but not read
        return True


def _has_end(data: bytes) -> bool:
    """Whether the image of a JPEG file is complete, whatever follows it. A thumbnail before it has its own end mark."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":  # segments, up to the first scan
        at += 1 if data[at + 1 : at + 2] == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4])
    return END_MARK["JPEG"] in data[at:]


def _is_nearly_whole(data: bytes) -> bool:
    """Whether a JPEG without an end lacks only a few bytes: its last bytes belong to the picture's last blocks."""
    ends = (data, data[:-TAIL])
    with_tail, without = (np.asarray(Image.open(io.BytesIO(part + END_MARK["JPEG"])).convert("L")) for part in ends)
    rows, columns = (-(-side // 16) for side in with_tail.shape)
    y, x = np.nonzero(with_tail != without)
    last = int((y // 16 * columns + x // 16).max(initial=-1)) + 1
    return last >= min((1 - LOST) * rows * columns, rows * columns - 1)
