"""The lists of a large JSON object, some records at a time: neither the file nor its records are ever whole in memory.

for name, part in read_lists(file, ("images", "annotations")):
    records = msgspec.json.decode(part)
"""

import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import msgspec
import numpy as np

BLOCK = 2**20  # bytes that are parsed together
STEP = np.zeros(256, np.int8)  # change of the depth at each character
STEP[list(b"[{")], STEP[list(b"]}")] = 1, -1
DIVIDES = bytes(character in b'[]{}"' for character in range(256))
OPENING = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:\s*\[$', re.DOTALL)  # of a list: its key


def read_lists(file: BinaryIO, names: Sequence[str], block: int = BLOCK) -> Iterator[tuple[str, bytes]]:
    """Yield each top-level list of these names, in the order of the file, in parts: (name, JSON list of some records).

    Does not check the content of the parts. Raises ValueError, at the end at the latest, if the text around the lists
    is no JSON object in UTF-8, or a list is missing or present twice; the parts yielded before are then invalid.
    """
    depth, quoted, pending, rest = 0, 0, b"", bytearray()  # rest: all that is not in one of the lists
    name, seen, first = "", set(), True  # the list that is read, if any; whether its next part is its first
    while text := file.read(block):
        plain = text
        if b"\\" in text:  # a quote after a backslash does not count
            plain = re.sub(rb"\\.", b"..", text, flags=re.DOTALL)
            if plain.endswith(b"\\"):
                text += file.read(1)
                plain = plain[:-1] + b".."[: len(text) - len(plain) + 1]
        places = np.flatnonzero(np.frombuffer(plain.translate(DIVIDES), bool))
        codes = np.frombuffer(plain, np.uint8)[places]
        quotes = np.cumsum(codes == ord('"')) + quoted
        steps = np.where(quotes & 1, 0, STEP[codes])
        depths = np.cumsum(steps) + depth
        # The object's values begin at depth 2 and end at depth 1; the records of one that is a list end at depth 2.
        cuts = np.flatnonzero((steps > 0) & (depths <= 2) | (steps < 0) & (depths <= 1)).tolist()
        record_ends = np.flatnonzero((steps < 0) & (depths == 2))
        if len(record_ends) and (not cuts or record_ends[-1] > cuts[-1]):
            cuts.append(int(record_ends[-1]))
        start = 0
        for cut in cuts:
            end = int(places[cut]) + 1
            piece, pending, start = pending + text[start:end], b"", end
            opens, level = steps[cut] > 0, depths[cut]
            if name:
                yield name, _list(piece if level == 2 else piece[:-1], first, last=level == 1)
                first = False
                if level == 1:
                    rest += piece[-1:]
                    seen.add(name)
                    name = ""
                continue
            rest += piece
            if opens and level == 2 and codes[cut] == ord("["):
                key = OPENING.search(piece)
                name, first = key[1].decode() if key else "", True
                if name in seen:
                    raise ValueError("a list that is there twice")
                name = name if name in names else ""
        pending += text[start:]
        if len(places):
            depth, quoted = int(depths[-1]), int(quotes[-1] & 1)
    msgspec.json.decode(rest + pending, type=dict[str, msgspec.Raw])
    if seen != set(names):
        raise ValueError("not all of the lists")


def _list(text: bytes, first: bool, last: bool) -> bytes:
    """A JSON list of these records. Unless they are the first, the text starts with a comma."""
    text = text.strip()
    if not first and text:
        if text[:1] != b"," or not text[1:].strip():
            raise ValueError("records without a comma between them, or a comma without a record")
        text = text[1:]
    elif not first and not last:
        raise ValueError("no record")
    return b"[" + text + b"]"
