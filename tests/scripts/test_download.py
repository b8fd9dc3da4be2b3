"""scripts/download.py against a local server that breaks off, sends wrong lengths and damages bytes."""

import hashlib
import http.server
import io
import os
import re
import shutil
import stat
import threading
import zipfile
from types import SimpleNamespace

import pytest

from detector.errors import UserError
from scripts import download

PHOTOS = {f"val2017/{number:012}.jpg": os.urandom(3000) for number in range(40)}
LABELS = {f"annotations/instances_{split}2017.json": b'{"images": []}' for split in ("train", "val")}


def zipped(files, links=()) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for name in links:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, "/etc/passwd")
    return data.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`. Each request takes the next entry of `tricks`, which says how to spoil the answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.tricks, self.asked = {}, [], []
        self.version = '"one"'

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        byte_range = self.headers.get("Range")
        server.asked.append((self.path, byte_range))
        trick = server.tricks.pop(0) if server.tricks else ""
        body = server.files.get(self.path)
        if body is None or trick == "busy":
            return self.send_error(503 if trick else 404)
        start = 0
        if byte_range and trick != "no ranges" and self.headers.get("If-Range", server.version) == server.version:
            start = int(re.fullmatch(r"bytes=(\d+)-", byte_range)[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", server.version)
        length = len(body) - start
        self.send_header("Content-Length", str(length // 2 if trick == "too short" else length))
        self.end_headers()
        content = bytearray(body[start:])
        if trick == "damage":
            content[len(content) // 2] ^= 1
        if trick == "break":
            content = content[: length // 3]
        self.wfile.write(bytes(content[: length // 2] if trick == "too short" else content))
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    """A server of a small COCO."""
    http_server = Server()
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    archives = {}
    for name, files, counts in (
        ("annotations", LABELS | {"annotations/captions_val2017.json": b"not wanted"}, dict.fromkeys(LABELS, 1)),
        ("val", PHOTOS, {"val2017": 40}),
    ):
        entry, data = download.ARCHIVES[name], zipped(files)
        http_server.files[f"/{entry.path}"] = data
        archives[name] = entry._replace(size=len(data), md5=hashlib.md5(data).hexdigest(), unpacked=10**5, holds=counts)
    monkeypatch.setattr(download, "ARCHIVES", archives)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    yield http_server
    http_server.shutdown()
    http_server.server_close()


@pytest.fixture
def get(server, folder, command):
    def call(*arguments):
        command_line = ("coco2017", "--output", folder / "coco", "--mirror", server.address, *arguments)
        return command(download.main, *command_line)

    return call


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(err):
    lines = [line for line in re.split(r"[\r\n]+", err) if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_the_download_is_complete_and_a_second_call_requests_nothing(server, get, folder):
    code, out, err = get()
    assert code == 0, err
    assert contents(folder / "coco") == PHOTOS | LABELS
    assert "val2017" in out
    server.asked.clear()
    assert get()[0] == 0 and not server.asked


def test_only_downloads_one_part(server, get, folder):
    assert get("--only", "train")[0] == 0  # of this part the server has only the annotations
    assert contents(folder / "coco") == LABELS


def test_broken_connections_continue_where_they_ended(server, get, folder):
    server.tricks = ["", "break", "busy", "break", "break"]
    code, _, err = get()
    assert code == 0, err
    assert contents(folder / "coco") == PHOTOS | LABELS
    starts = [int(byte_range[6:-1]) for path, byte_range in server.asked if path == "/zips/val2017.zip" and byte_range]
    assert len(starts) == 4 and starts[0] == starts[1] and starts[1:] == sorted(set(starts))


def test_without_ranges_the_download_starts_over(server, get, folder):
    server.tricks = ["", "break", "no ranges"]
    assert get()[0] == 0
    assert contents(folder / "coco") == PHOTOS | LABELS


def test_a_partial_file_of_another_version_is_not_continued(server, get, folder, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    server.tricks = ["", "break", "busy"]
    code, _, err = get()
    assert code == 2 and "continues from there" in one_line(err)
    part = folder / "coco" / "val2017.zip.part"
    part.write_bytes(b"x" * part.stat().st_size)
    server.version = '"two"'
    assert get()[0] == 0
    assert contents(folder / "coco") == PHOTOS | LABELS


def test_damaged_files_are_detected_and_downloaded_again(server, get, folder):
    server.tricks = ["", "damage"]
    code, _, err = get()
    assert code == 0 and "damaged on the way" in err
    assert contents(folder / "coco") == PHOTOS | LABELS


def test_repeated_damage_is_an_error_and_leaves_no_archive(server, get, folder):
    server.tricks = ["", "damage", "damage"]
    code, _, err = get()
    assert code == 2 and "MD5" in one_line(err)
    assert contents(folder / "coco") == LABELS


@pytest.mark.parametrize(
    ("tricks", "expected"), [(["", "too short"], "bytes instead of"), (["", *["busy"] * 9], "HTTP 503")]
)
def test_a_wrong_length_or_a_busy_server_is_an_error(server, get, folder, tricks, expected):
    server.tricks = tricks
    code, _, err = get()
    assert code == 2 and expected in one_line(err)
    assert contents(folder / "coco") == LABELS


def test_a_longer_file_is_not_the_official_one(server, get):
    server.files["/zips/val2017.zip"] += b"more"
    code, _, err = get()
    assert code == 2 and "not the official file" in one_line(err)


def test_mistakes_are_one_line(server, get, folder, command, monkeypatch):
    (folder / "file").write_text("")
    (folder / "half" / "val2017").mkdir(parents=True)
    del server.files["/zips/val2017.zip"]
    for expected, arguments in {
        "404": (),
        "http://": ("--mirror", "ftp://x"),
        "starts with http:// or https://": ("--mirror", "http://[bad"),
        "cannot be written": ("--output", folder / "file" / "below"),
        "0 of 40 files": ("--output", folder / "half"),
    }.items():
        code, _, err = get(*arguments)
        assert code == 2 and expected in one_line(err)
    server.shutdown()
    server.server_close()
    code, _, err = get("--output", folder / "new")
    assert code == 2 and "no data in" in one_line(err)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    code, _, err = get("--output", folder / "new")
    assert code == 2 and "are free" in one_line(err)


def test_downloaded_bytes_need_no_room(folder):
    archive = download.ARCHIVES["val"]
    assert download.downloaded(archive, folder) == 0
    (folder / "val2017.zip.part").write_bytes(b"1234")
    assert download.downloaded(archive, folder) == 4
    (folder / "val2017.zip.part").rename(folder / "val2017.zip")
    assert download.downloaded(archive, folder) == 4


def test_a_full_disk_keeps_the_downloaded_bytes(server, get, folder, monkeypatch):
    def full(file, chunk, name):
        file.write(chunk[:1000])
        file.flush()
        download.fail(OSError(28, "No space left on device"), name)

    server.tricks = [""]
    assert get("--only", "train")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(download, "write", full)
        code, _, err = get()
    assert code == 2 and "free some space" in one_line(err)
    assert (folder / "coco" / "val2017.zip.part").stat().st_size == 1000
    assert get()[0] == 0 and contents(folder / "coco") == PHOTOS | LABELS


@pytest.mark.parametrize("name", ["../out.jpg", "/tmp/out.jpg", "val2017/../../out", "C:\\out", "..\\out", "link"])
def test_archive_entries_cannot_leave_the_folder(folder, name):
    target = folder / "a" / "b"
    target.mkdir(parents=True)
    file = folder / "val.zip"
    file.write_bytes(zipped(PHOTOS, [name]) if name == "link" else zipped(PHOTOS | {name: b"out"}))
    before = contents(folder)
    with pytest.raises(UserError, match="would leave the folder"):
        download.unpack(file, target, {"val2017": 40})
    assert contents(folder) == before


def test_flawed_archives_unpack_nothing(folder):
    valid_zip = zipped(PHOTOS)
    damaged_zip = bytearray(valid_zip)
    damaged_zip[len(valid_zip) // 2] ^= 1
    incomplete_zip = zipped(dict(list(PHOTOS.items())[1:]))
    flawed_zips = {"": b"no zip", "cut": valid_zip[:-30], "damaged": bytes(damaged_zip), "fewer": incomplete_zip}
    for name, data in flawed_zips.items():
        file = folder / f"{name}.zip"
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"cannot be unpacked|instead of 40"):
            download.unpack(file, folder / "to", {"val2017": 40})
        assert not (folder / "to").exists() or not contents(folder / "to")
        (folder / "to").mkdir(exist_ok=True)
