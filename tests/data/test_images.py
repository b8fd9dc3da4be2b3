import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data.images import UPRIGHT, read_image
from detector.errors import UserError


def one_line(excinfo, *parts):
    message = str(excinfo.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


RGB = np.random.default_rng(1).integers(0, 256, (24, 36, 3), dtype=np.uint8)
WIDE = np.random.default_rng(2).integers(0, 65536, (24, 36, 3), dtype=np.uint16)
ALPHA = np.dstack([RGB, RGB[:, :, :1]])


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.bmp", "x.tif", "x.gif"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_ordinary_images_are_as_pil_shows_them(tmp_path, name, mode):
    if name == "x.jpg" and mode in "1P":
        pytest.skip("JPEG has no such kind")
    Image.fromarray(RGB).convert(mode).save(tmp_path / name)
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    assert np.array_equal(read_image(tmp_path / name), expected)


@pytest.mark.filterwarnings("error")
def test_alpha_is_dropped_and_colour_kept(tmp_path):
    Image.fromarray(ALPHA).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), RGB)
    Image.fromarray(ALPHA).convert("LA").save(tmp_path / "la.png")
    assert np.array_equal(read_image(tmp_path / "la.png")[:, :, 0], np.asarray(Image.fromarray(RGB).convert("L")))
    palette = Image.fromarray(RGB).convert("P")
    palette.save(tmp_path / "p.png", transparency=bytes(range(256)))
    assert np.array_equal(read_image(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
@pytest.mark.parametrize("kind", ["gray", "colour"])
def test_16_bits_become_the_upper_8(tmp_path, name, kind):
    pixels = WIDE[:, :, 0] if kind == "gray" else WIDE
    cv2.imwrite(str(tmp_path / name), pixels if kind == "gray" else pixels[:, :, ::-1])
    expected = (pixels >> 8).astype(np.uint8)
    assert np.array_equal(read_image(tmp_path / name), expected if kind == "colour" else np.dstack([expected] * 3))


def test_cmyk_is_not_shown_inverted(tmp_path):
    flat = np.full((32, 32, 3), (220, 60, 30), np.uint8)
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "x.jpg", quality=98)  # PIL writes Adobe's inverted kind
    assert b"Adobe" in (tmp_path / "x.jpg").read_bytes()
    assert np.abs(read_image(tmp_path / "x.jpg").astype(int) - flat).max() <= 4


def test_float_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UserError) as excinfo:
        read_image(tmp_path / "x.tif")
    one_line(excinfo, "x.tif", "'F'")


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_follows_the_record(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / name, exif=exif)
    stored = np.asarray(Image.open(tmp_path / name))
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / name)))
    assert np.array_equal(read_image(tmp_path / name), shown)
    assert np.array_equal(read_image(tmp_path / name, shown.shape[:2]), shown)
    if orientation in (5, 6, 7, 8):
        assert np.array_equal(read_image(tmp_path / name, stored.shape[:2]), stored)


def test_every_turn_is_known():
    assert sorted(UPRIGHT) == list(range(2, 9))


def test_a_size_that_is_not_the_records_is_refused(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "x.png")
    for size in ((36, 24), (24, 35)):
        with pytest.raises(UserError) as excinfo:
            read_image(tmp_path / "x.png", size)
        one_line(excinfo, "x.png", "36 x 24", f"{size[1]} x {size[0]}")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.tif", "x.bmp"])
def test_broken_files_are_one_line(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(np.kron(RGB, np.ones((8, 8, 1), np.uint8))).save(path)
    whole = path.read_bytes()
    for data in (b"", b"hello", whole[:50], whole[: len(whole) // 2], whole[: -len(whole) // 10]):
        path.write_bytes(data)
        with pytest.raises(UserError) as excinfo:
            read_image(path)
        one_line(excinfo, name, "replace it")
    path.unlink()
    with pytest.raises(UserError) as excinfo:
        read_image(path)
    one_line(excinfo, name)


def test_decompression_bombs_are_refused(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "x.png")
    data = bytearray((tmp_path / "x.png").read_bytes())
    data[16:24] = struct.pack(">II", 20_000, 20_000)  # the size in the header, and the checksum after it
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(UserError) as excinfo:
        read_image(tmp_path / "x.png")
    one_line(excinfo, "x.png", "400000000 pixels")
