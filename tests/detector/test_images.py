import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from detector.errors import UserError
from detector.images import MAX_PIXELS, OTHER_PICTURES, UPRIGHT, image_size, read_image, suffixes
from tests.data.helpers import one_line

ROOT = Path(__file__).parents[2]
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


def chunks(data):
    """The chunks of a PNG, each with its length, name and checksum."""
    at = 8
    while at < len(data):
        end = at + 12 + struct.unpack(">I", data[at : at + 4])[0]
        yield data[at:end]
        at = end


@pytest.mark.parametrize("where", ["eXIf", "text", "XMP"])
@pytest.mark.parametrize("place", ["before the pixels", "behind them"])
def test_a_png_may_have_its_orientation_anywhere(tmp_path, where, place):
    exif, info, options = Image.Exif(), PngImagePlugin.PngInfo(), {}
    exif[0x0112] = 6
    if where == "eXIf":
        options["exif"] = exif
    elif where == "text":
        content = exif.tobytes()
        info.add_text("Raw profile type exif", f"\nexif\n{len(content):8}\n{content.hex()}\n", zip=True)
    else:
        info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>', zip=True)
    path = tmp_path / "x.png"
    Image.fromarray(RGB).save(path, pnginfo=info, **options)
    if place == "behind them":
        data = path.read_bytes()
        head, *middle, end = chunks(data)
        path.write_bytes(data[:8] + b"".join([head, *sorted(middle, key=lambda chunk: chunk[4:8] != b"IDAT"), end]))
    assert np.array_equal(read_image(path), np.rot90(RGB, -1))


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_an_ordinary_image_is_decoded_once(tmp_path, monkeypatch, name):
    Image.fromarray(RGB).save(tmp_path / name)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded by PIL"))
    assert read_image(tmp_path / name).shape == RGB.shape


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", ["oblong", "square"])
def test_an_orientation_that_no_size_can_show_is_remarked_on(tmp_path, name, orientation, shape):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB if shape == "oblong" else RGB[:, :24]).save(tmp_path / name, exif=exif)
    shown = read_image(tmp_path / name, remarks=(remarks := {}))
    assert not remarks  # there is no record
    assert np.array_equal(read_image(tmp_path / name, shown.shape[:2], remarks), shown)
    hidden = orientation > 1 if shape == "square" else orientation in (2, 3, 4)
    assert [kind.split(",")[0] for kind in remarks] == ["an EXIF orientation that keeps their size"] * hidden


@pytest.mark.parametrize("name", ["x.tif", "x.gif", "x.png", "x.webp"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_pages_after_the_first_are_remarked_on(tmp_path, name, count):
    pages = [Image.fromarray(np.roll(RGB, n, axis=0)) for n in range(count)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], lossless=True)
    first = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    assert np.array_equal(read_image(tmp_path / name, remarks=(remarks := {})), first)
    assert [kind.split(",")[0] for kind in remarks] == ["several pages or frames"] * (count > 1)


def test_broken_frames_after_the_first_do_not_matter(tmp_path):
    path = tmp_path / "x.gif"
    frame = Image.fromarray(RGB)
    frame.save(path, save_all=True, append_images=[Image.fromarray(RGB[::-1])])
    data, first = path.read_bytes(), read_image(path)
    second = data.rindex(b"\x21\xf9\x04")  # its extension block
    for cut in range(second, second + 40):
        path.write_bytes(data[:cut])
        assert np.array_equal(read_image(path), first), cut


def test_the_other_views_of_a_cameras_mpo_are_not(tmp_path):
    pages = [Image.fromarray(RGB)] * 2
    pages[0].save(tmp_path / "x.mpo", save_all=True, append_images=pages[1:])
    assert Image.open(tmp_path / "x.mpo").n_frames == 2
    read_image(tmp_path / "x.mpo", remarks=(remarks := {}))
    assert not remarks


def test_every_exif_orientation_is_known():
    assert sorted(UPRIGHT) == list(range(2, 9))


def test_a_size_that_differs_from_the_record_is_refused(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "x.png")
    for size in ((36, 24), (24, 35)):
        with pytest.raises(UserError) as excinfo:
            read_image(tmp_path / "x.png", size)
        one_line(excinfo, "x.png", "36 x 24", f"{size[1]} x {size[0]}")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.tif", "x.bmp"])
def test_a_broken_file_is_reported_in_one_line(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(np.kron(RGB, np.ones((8, 8, 1), np.uint8))).save(path)
    content = path.read_bytes()
    for data in (b"", b"hello", content[:50], content[: len(content) // 2], content[: -len(content) // 10]):
        path.write_bytes(data)
        with pytest.raises(UserError) as excinfo:
            read_image(path)
        one_line(excinfo, name, "replace it")
    path.unlink()
    with pytest.raises(UserError) as excinfo:
        read_image(path)
    one_line(excinfo, name)


MISSING = "their last bytes missing (read as far as possible)"
SMOOTH = cv2.resize(np.random.default_rng(3).integers(0, 256, (9, 12, 3), np.uint8), (360, 240))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 95}], ids=str)
def test_a_jpeg_that_lacks_a_few_bytes_is_read_and_a_cut_one_is_not(tmp_path, options):
    path = tmp_path / "x.jpg"
    Image.fromarray(SMOOTH).save(path, **options)
    data, expected = path.read_bytes(), read_image(path).astype(int)
    for lost in (1, 2, 3, 5, 10):
        path.write_bytes(data[:-lost])
        pixels = read_image(path, (240, 360), remarks := {})
        assert remarks == {MISSING: {str(path)}}
        wrong_pixels = np.abs(pixels - expected).max(axis=2) > 8
        assert wrong_pixels.mean() < 0.01 and not wrong_pixels[:200].any() and (lost > 2 or not wrong_pixels.any())
    for share in (0.8, 0.5, 0.2):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError) as excinfo:
            read_image(path)
        one_line(excinfo, "x.jpg", "truncated")


@pytest.mark.parametrize("size", [(12, 9), (96, 96), (33, 50)])
def test_small_jpegs_that_lack_a_few_bytes_are_remarked_on(tmp_path, size):
    thumbnail = io.BytesIO()
    Image.fromarray(SMOOTH[::8, ::8]).save(thumbnail, "JPEG")
    exif = Image.Exif()
    exif[0x9286] = thumbnail.getvalue()  # a comment that holds an image, which has an end marker, too
    for seed in range(8):
        picture = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(cv2.resize(picture, size)).save(tmp_path / "x.jpg", exif=exif)
        (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-2])
        read_image(tmp_path / "x.jpg", remarks=(remarks := {}))
        assert list(remarks) == [MISSING]


def test_bytes_after_a_jpeg_do_not_matter(tmp_path):
    Image.fromarray(SMOOTH).save(tmp_path / "x.jpg")
    data, expected = (tmp_path / "x.jpg").read_bytes(), read_image(tmp_path / "x.jpg")
    for more in (b"\0", b"\0" * 100, b"appended", data):
        (tmp_path / "x.jpg").write_bytes(data + more)
        assert np.array_equal(read_image(tmp_path / "x.jpg", remarks=(remarks := {})), expected) and not remarks


def test_a_png_without_its_end_is_read(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:-12])
    assert np.array_equal(read_image(tmp_path / "x.png", remarks=(remarks := {})), RGB)
    assert list(remarks) == [MISSING]


TWELVE = WIDE[:, :, 0] >> 4  # values of 12 bits
SEEN = np.dstack([(TWELVE >> 4).astype(np.uint8)] * 3)


def tiff(path, pixels, bits, **tags):
    """Write a TIFF of 12 packed bits, or of 16 bits, gray or as `tags` say, which are more of its tags by number."""
    height, width = pixels.shape[:2]
    data = pixels.astype("<u2").tobytes()
    if bits == 12:
        unpacked = np.unpackbits(pixels.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
        data = np.packbits(unpacked.reshape(-1)).tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: len(data)}
    entries |= {int(tag[1:]): value for tag, value in tags.items()}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0) + data)


def test_12_bits_are_scaled_where_the_file_says_so(tmp_path):
    tiff(tmp_path / "packed.tif", TWELVE, 12)
    tiff(tmp_path / "said.tif", TWELVE, 16, t281=4095)
    tiff(tmp_path / "more.tif", WIDE[:, :, 0], 16, t281=65535)
    (tmp_path / "x.pgm").write_bytes(b"P5\n36 24\n4095\n" + TWELVE.astype(">u2").tobytes())
    remarks = {}
    assert np.array_equal(read_image(tmp_path / "packed.tif", remarks=remarks), SEEN)
    assert np.array_equal(read_image(tmp_path / "said.tif", remarks=remarks), SEEN)
    assert np.array_equal(read_image(tmp_path / "more.tif", remarks=remarks)[:, :, 0], WIDE[:, :, 0] >> 8)
    assert np.abs(read_image(tmp_path / "x.pgm", remarks=remarks).astype(int) - SEEN).max() <= 1
    assert not remarks


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bits", [2, 8, 10, 12, 14, 15, 16])
def test_bits_that_are_not_used_are_remarked_on(tmp_path, name, channels, bits):
    pixels = np.dstack([WIDE >> (16 - bits), WIDE[:, :, :1] >> (16 - bits)])[:, :, :channels]
    cv2.imwrite(str(tmp_path / name), pixels)
    image = read_image(tmp_path / name, remarks=(remarks := {}))
    seen = image[:, :, 0] if channels == 1 else image[:, :, ::-1]
    assert np.array_equal(seen, pixels.squeeze()[..., :3] >> 8 if channels > 1 else pixels[:, :, 0] >> 8)
    expected = f"16 bits of which only the lower {max(bits, 8)} are used"
    assert [kind.split(",")[0] for kind in remarks] == [expected] * (bits <= 14)


def test_bits_of_a_colour_tiff_are_not_scaled_whatever_it_declares(tmp_path):
    tiff(tmp_path / "x.tif", WIDE >> 4, 16, t262=2, t277=3, t281=4095)
    assert np.array_equal(read_image(tmp_path / "x.tif", remarks=(remarks := {})), WIDE >> 12)
    assert [kind.split(",")[0] for kind in remarks] == ["16 bits of which only the lower 12 are used"]


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
def test_the_size_is_that_of_the_upright_image(tmp_path, name, orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / name, exif=exif)
    assert image_size(tmp_path / name) == read_image(tmp_path / name).shape[:2]


def png(path, width, height, depth, pixels):
    """Write a gray PNG of these compressed pixels, whatever the header says."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


def jpeg(path, width, height):
    """Write a JPEG whose header claims this size."""
    Image.fromarray(RGB).save(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("limit", ["PIL's", "ours"])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    if limit == "ours":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    pixels = zlib.compress(b"\0" * 100)
    for path in (
        png(tmp_path / "header.png", 100_000, 100_000, 8, pixels),
        png(tmp_path / "whole.png", 20_000, 20_000, 1, zlib.compress(bytes(20_000 * 2_501))),
        jpeg(tmp_path / "x.jpg", 60_000, 60_000),
    ):
        assert path.stat().st_size < 60_000
        with pytest.raises(UserError) as excinfo:
            read_image(path)
        one_line(excinfo, path.name, "pixels", str(MAX_PIXELS))


def test_an_image_whose_size_differs_from_its_record_is_not_decoded(tmp_path):
    """The peak memory of a separate process shows it."""
    png(tmp_path / "x.png", 13_000, 13_000, 1, zlib.compress(bytes(13_000 * 1_626)))  # within the limit
    jpeg(tmp_path / "x.jpg", 13_000, 13_000)
    code = (
        "import resource, sys\n"
        "from detector.images import read_image\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_image(path, (24, 36))\n"
        "    except Exception as error: print(error)\n"
        "print((peak() - before) // 1024)\n"
    )
    files = [str(tmp_path / "x.png"), str(tmp_path / "x.jpg")]
    result = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, cwd=ROOT, check=True)
    *refusals, megabytes = result.stdout.splitlines()
    assert len(refusals) == 2 and all("13000 x 13000 pixels, its record says 36 x 24" in line for line in refusals)
    assert int(megabytes) < 100


def test_every_suffix_that_is_listed_is_read(tmp_path):
    Image.init()
    for suffix in suffixes():
        path = tmp_path / f"image{suffix}"
        with path.open("wb") as file:
            kind = Image.registered_extensions()[suffix]
            Image.new("RGB", (8, 6), "red").save(file, kind)
        assert read_image(path).shape == (6, 8, 3), suffix
    assert {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp"} <= suffixes()
    assert ".heic" in OTHER_PICTURES and ".heic" not in suffixes()
