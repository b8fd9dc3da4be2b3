"""Download COCO 2017 and unpack it where configs/coco/*.yaml look for it.

    python scripts/download.py coco2017 [--only val] [--output datasets/coco]

Downloads the official archives: 20.4 GB, with --only val 1.1 GB, with --only train 19.6 GB, each with the annotations.

    datasets/coco/annotations/instances_train2017.json, instances_val2017.json
    datasets/coco/train2017/, val2017/

An interrupted download resumes by itself, or when you run the same command again. Each archive's size and MD5 are
checked before it is unpacked, and it is deleted afterwards. Existing files are left alone.
"""

import argparse
import errno
import hashlib
import http.client
import os
import re
import shutil
import stat
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple, NoReturn

from tqdm import tqdm

from detector.errors import UserError, run_main

SERVER = "http://images.cocodataset.org"
CHUNK = 2**20  # bytes read at a time
TIMEOUT = 60  # seconds without data
TRIES = 6  # attempts in a row without data
PAUSE = 1.0  # seconds before the second attempt; doubled each time


class Archive(NamedTuple):
    """A zip file on the server, and what to unpack from it."""

    path: str
    size: int  # bytes
    md5: str
    unpacked: int  # bytes, approximately
    holds: dict[str, int]  # a file: 1, or a folder: its number of files


ARCHIVES = {
    "annotations": Archive(
        "annotations/annotations_trainval2017.zip",
        252_907_541,
        "f4bbac642086de4f52a3fdda2de5fa2c",
        500_000_000,
        {"annotations/instances_train2017.json": 1, "annotations/instances_val2017.json": 1},
    ),
    "val": Archive(
        "zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", 830_000_000, {"val2017": 5_000}
    ),
    "train": Archive(
        "zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", 19_600_000_000, {"train2017": 118_287}
    ),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["coco2017"])
    parser.add_argument("--only", choices=["train", "val"], help="download one part and the annotations")
    parser.add_argument("--output", type=Path, default=Path("datasets/coco"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument(
        "--mirror", default=SERVER, metavar="URL", help=f"download from another server (default: {SERVER})"
    )
    args = parser.parse_args(argv)
    try:
        known = urllib.parse.urlsplit(args.mirror)
        valid = known.scheme in ("http", "https") and bool(known.hostname)
    except ValueError:  # brackets without an IPv6 address
        valid = False
    if not valid:
        raise UserError(f"--mirror {args.mirror}: give an address that starts with http:// or https://")

    wanted = [archive for name, archive in ARCHIVES.items() if args.only in (None, name) or name == "annotations"]
    missing = [archive for archive in wanted if not is_unpacked(archive, args.output)]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(error, args.output)
    if missing:
        largest = max(archive.size - downloaded(archive, args.output) for archive in missing)
        check_space(args.output, largest + sum(archive.unpacked for archive in missing))
    for archive in missing:
        file = fetch(f"{args.mirror.rstrip('/')}/{archive.path}", archive, args.output)
        unpack(file, args.output, archive.holds)
        file.unlink()
    print(f"{args.output} holds " + ", ".join(name for archive in wanted for name in archive.holds))


def is_unpacked(archive: Archive, folder: Path) -> bool:
    """Whether all its files are there. Raises UserError for an incomplete folder, which may belong to the user."""
    for name, count in archive.holds.items():
        path = folder / name
        if not path.exists():
            return False
        if path.is_dir() and (files := sum(1 for _ in path.iterdir())) < count:
            raise UserError(f"{path} holds {files:,} of {count:,} files: move it away to download it again")
    return True


def check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} are free; give another --output"
        )


def part_of(archive: Archive, folder: Path) -> Path:
    """The file of an incomplete archive."""
    return folder / f"{PurePosixPath(archive.path).name}.part"


def downloaded(archive: Archive, folder: Path) -> int:
    """The bytes of an archive that are on the disk already."""
    part = part_of(archive, folder)
    return max(size_of(part), size_of(part.with_suffix("")))


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def fetch(address: str, archive: Archive, folder: Path) -> Path:
    """The archive in `folder`, downloaded if it is missing. A file with its final name is complete and checked."""
    part = part_of(archive, folder)
    file = part.with_suffix("")
    if file.exists():
        return file
    for _ in range(2):  # again if the data was damaged on the way
        receive(address, part, archive.size)
        digest = md5(part)
        version_of(part).unlink(missing_ok=True)
        if digest == archive.md5:
            os.replace(part, file)
            return file
        part.unlink()
        print(f"{address}: damaged on the way, its MD5 is {digest} instead of {archive.md5}", file=sys.stderr)
    raise UserError(
        f"{address}: is not the official file, or is damaged each time (MD5 {digest}); try another --mirror"
    )


def receive(address: str, part: Path, size: int) -> None:
    """Download to `part` until it has `size` bytes, with as many connections as necessary."""
    failures = 0
    if size_of(part) > size:
        part.unlink()
    with tqdm(total=size, unit="B", unit_scale=True, desc=part.stem) as progress:
        while (have := size_of(part)) < size:
            progress.n = have
            progress.refresh()
            reason = "the connection ended early"
            try:
                receive_once(address, part, size, progress)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):
                    raise UserError(f"{address}: {reason}; check the address, or give another --mirror") from None
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            failures = 0 if size_of(part) > have else failures + 1
            if failures == TRIES:
                raise UserError(
                    f"{address}: no data in {TRIES} attempts ({reason}); {size_of(part):,} of {size:,} bytes are kept,"
                    " and the same command continues from there"
                )
            if size_of(part) < size:
                time.sleep(PAUSE * 2**failures / 2)
        progress.n = size


def receive_once(address: str, part: Path, size: int, progress: tqdm) -> None:
    """Append the data of one connection to `part`."""
    have, version = size_of(part), version_of(part)
    headers = {"User-Agent": "curl/8"}  # some servers refuse Python's own
    if have:
        headers["Range"] = f"bytes={have}-"
        if version.exists():  # otherwise two versions of a file could be mixed
            headers["If-Range"] = version.read_text(encoding="utf-8")
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT) as answer:
        total = answer.headers.get("Content-Length")
        if resumed := answer.status == 206:
            content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not content_range or int(content_range[1]) != have:
                part.unlink()  # the server sent another part
                raise http.client.HTTPException("the server did not continue where it was asked to")
            total = None if content_range[2] == "*" else content_range[2]
        if total is not None and total.isdigit() and int(total) != size:
            raise UserError(f"{address}: has {int(total):,} bytes instead of {size:,}: not the official file")
        try:
            if tag := answer.headers.get("ETag") or answer.headers.get("Last-Modified"):
                version.write_text(tag, encoding="utf-8")
            with part.open("ab" if resumed else "wb") as file:
                progress.n = file.tell()
                while chunk := answer.read(CHUNK):
                    if file.tell() + len(chunk) > size:
                        raise UserError(f"{address}: has more than {size:,} bytes: not the official file")
                    write(file, chunk, part)
                    progress.update(len(chunk))
        except PermissionError as error:
            fail(error, part)


def write(file, chunk: bytes, name: Path) -> None:
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        fail(error, name)


def version_of(part: Path) -> Path:
    """The file that holds the server's name of this version of the archive."""
    return part.with_suffix(".version")


def md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as content, tqdm(total=size_of(file), unit="B", unit_scale=True, desc="checking") as progress:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()


def unpack(file: Path, folder: Path, holds: dict[str, int]) -> None:
    """Unpack the files and folders in `holds` into `folder`, each completely or not at all.

    Raises UserError, with nothing unpacked, if an entry would leave the folder (an absolute path, "..", a link) or the
    disk lacks room for the sizes that the entries state.
    """
    beside = folder / f".{file.stem}.unpacking"
    shutil.rmtree(beside, ignore_errors=True)  # from an earlier attempt
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                check_entry(file, entry)
            entries = [entry for entry in archive.infolist() if not entry.is_dir() and is_within(entry.filename, holds)]
            check_space(folder, sum(entry.file_size for entry in entries))
            for entry in tqdm(entries, desc=f"unpacking {file.name}", unit="file"):
                archive.extract(entry, beside)
        for name, count in holds.items():
            files = sum(1 for entry in entries if is_within(entry.filename, [name]))
            if files != count:
                raise UserError(f"{file}: holds {files:,} files of {name} instead of {count:,}: not the official file")
        for name in holds:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / name, folder / name)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
        raise UserError(f"{file}: cannot be unpacked ({error}); delete it to download it again") from None
    except OSError as error:
        fail(error, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_entry(file: Path, entry: zipfile.ZipInfo) -> None:
    """Raise UserError if an entry of a zip file is a link or would leave the folder."""
    name = entry.filename
    outside = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in re.split(r"[/\\]", name)
    if outside or stat.S_ISLNK(entry.external_attr >> 16):
        raise UserError(
            f"{file}: its entry {name!r} would leave the folder; nothing was unpacked, do not trust this file"
        )


def is_within(name: str, places) -> bool:
    return any(name == place or name.startswith(place + "/") for place in places)


def fail(error: OSError, where: Path) -> NoReturn:
    advice = (
        "free some space and run the same command again" if error.errno == errno.ENOSPC else "give another --output"
    )
    raise UserError(f"{where}: cannot be written ({error.strerror}); {advice}") from None


if __name__ == "__main__":
    run_main(main)
