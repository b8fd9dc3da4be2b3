"""Font files for names in any script. DejaVu, from matplotlib, has accented Latin, Greek and Cyrillic letters. At the
first letter that DejaVu lacks, the machine's fonts are searched."""

import sys
import unicodedata
from functools import cache
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from tqdm import tqdm

from detector.errors import CONTROL

DEJAVU = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
PLAIN = ("Regular", "Roman", "Book", "Normal", "Medium")  # styles that are neither bold, thin nor slanted
NO_LETTERS = ("lastresort", "adobeblank", "notdef")  # fonts that have a box, or nothing, for every letter


def stretches(text: str) -> list[tuple[str, str]]:
    """Split a text into stretches that one font can write, each with its file; one line, accents joined to letters.

    DejaVu draws a square for a letter that no font has, and a message says once which font to install.
    """
    text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", unicodedata.normalize("NFC", text))
    files = [(letter, _file(letter)) for letter in text]
    missing = "".join(dict.fromkeys(letter for letter, file in files if file is None))
    if missing:
        _warn(missing)
    grouped = groupby(files, key=lambda pair: pair[1] or DEJAVU)
    return [("".join(letter for letter, _ in group), file) for file, group in grouped]


def _file(letter: str) -> str | None:
    return DEJAVU if ord(letter) in _dejavu() else _others().get(ord(letter))


@cache
def _dejavu() -> frozenset[int]:
    return frozenset(FT2Font(DEJAVU).get_charmap())


@cache
def _others() -> dict[int, str]:
    """The code of each letter -> a font file of this machine that has the letter, upright and plain if possible.

    Of those, the font with the most letters comes first, so that one font writes whole words.
    """
    from matplotlib.font_manager import findSystemFonts  # searches for fonts when imported, which is slow

    fonts = []
    for file in sorted(findSystemFonts()):
        try:
            font = FT2Font(file)
            letters = font.get_charmap()
        except (OSError, RuntimeError, ValueError):
            continue  # broken, or of a kind that FreeType does not read
        name = font.family_name.lower().replace(" ", "")
        if font.scalable and not name.startswith(NO_LETTERS):  # fonts of one size are bitmaps, such as coloured emoji
            fonts.append(((font.style_name not in PLAIN, "unifont" in name, -len(letters)), letters, file))
    by_letter: dict[int, str] = {}
    for _, letters, file in sorted(fonts, key=lambda entry: entry[0]):
        for letter in letters:
            by_letter.setdefault(letter, file)
    return by_letter


def _warn(missing: str) -> None:
    """Print a message once, for the first missing letters."""
    if not _missing:
        cure = "install one, such as Noto Sans CJK for Chinese, Japanese, Korean (Debian: apt install fonts-noto-cjk)"
        tqdm.write(f"pictures: no font on this machine has {missing[:20]}, squares are drawn; {cure}", file=sys.stderr)
    _missing.update(missing)


_missing: set[str] = set()
