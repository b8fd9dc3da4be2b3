"""One key for all spellings of a file name."""

import unicodedata
from urllib.parse import unquote


def spelling(name: str) -> str:
    """The key on which the spellings of one file name agree.

    It undoes what tools and file systems change on the way: separators (Windows), percent-encoding (web tools), the
    Unicode normal form (a Mac's archives) and upper or lower case (cameras). Look for the exact name first: two files
    may differ in case alone.
    """
    return unicodedata.normalize("NFC", unquote(name).replace("\\", "/")).casefold()
