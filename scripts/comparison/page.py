"""Self-contained HTML pages: text, tables, figures and pictures in one file that opens offline and fits any width.

    body = [page.text("Of 72 images."), page.table(("class", "AP"), rows), page.figure(fig, "Calibration")]
    page.write(Path("errors.html"), "Errors of runs/mine", [("Calibration", body)])

Each part of a page is a str of HTML. These functions escape all text that they are given.
"""

import base64
import io
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files and needs no display

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.text import Text
from PIL import Image

from data import fonts
from detector import atomic
from detector.errors import CONTROL, UserError

matplotlib.rcParams["text.parse_math"] = False  # a class may be named $x

FIGURE = (5, 3.4)  # inches: readable on a phone, and two fit side by side on a screen
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 0 auto; padding: 0 16px 48px; }
h1 { font-size: 1.5em; overflow-wrap: anywhere; } h2 { font-size: 1.2em; margin-top: 2em; }
p, li { max-width: 75ch; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9em; margin: 1em 0; }
th, td { padding: 3px 6px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th.text, td.text { text-align: left; }
.row { display: flex; flex-wrap: wrap; gap: 16px; } figure { margin: 0; max-width: 100%; }
figure.plot { width: 560px; } figure.photo { width: 360px; } figure.large { width: 100%; }
img { display: block; width: 100%; } figcaption { font-size: 0.85em; color: #555; overflow-wrap: anywhere; }
"""


def text(words: str) -> str:
    """A paragraph."""
    return f"<p>{_plain(words)}</p>"


def items(lines: Iterable[str]) -> str:
    """A bulleted list."""
    return "<ul>" + "".join(f"<li>{_plain(line)}</li>" for line in lines) + "</ul>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A table with `left` columns of text, then numbers aligned right. It scrolls if it is wider than the page."""
    sides = ['class="text"' if column < left else "" for column in range(len(header))]
    head = "".join(f"<th {side}>{_plain(cell)}</th>" for side, cell in zip(sides, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td {side}>{_plain(cell)}</td>" for side, cell in zip(sides, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(plot: Figure, caption: str) -> str:
    """A matplotlib figure, which is closed. One wider than FIGURE gets the page's full width."""
    from matplotlib import pyplot as plt

    data = io.BytesIO()
    save(plot, data, format="png", dpi=160, bbox_inches="tight")
    plt.close(plot)
    kind = "plot" if plot.get_figwidth() <= FIGURE[0] else "large"
    return _picture(data.getvalue(), "png", caption, kind)


def save(
    plot: Figure, target: io.BytesIO | Path, *, dpi: int, format: str | None = None, bbox_inches: str | None = None
) -> None:
    """Save a matplotlib figure with fonts that have all its characters; the options are those of savefig."""
    for axis in plot.axes:
        axis.get_xticklabels(), axis.get_yticklabels()  # creates the tick labels, which matplotlib makes on demand
    texts = plot.findobj(Text)
    files = dict.fromkeys(file for text in texts for _, file in fonts.stretches(text.get_text()))
    for file in files.keys() - {font.fname for font in fontManager.ttflist}:
        fontManager.addfont(file)
    families = [FontProperties(fname=file).get_name() for file in {fonts.DEJAVU: None} | files]
    for text in texts:
        text.set_fontfamily(families)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # data/fonts.py reports them once
        plot.savefig(target, dpi=dpi, format=format, bbox_inches=bbox_inches)


def logarithmic(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis. Matplotlib's own are TeX, which is off because of names such as $x."""
    axis.axes.minorticks_off()
    axis.set_major_formatter("{x:,g}")


def label(name: str) -> str:
    """A name for a legend: matplotlib leaves out names that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def photo(image: np.ndarray, caption: str, kind: str = "photo") -> str:
    """An image (h, w, 3) uint8 RGB; `kind`, "photo", "plot" or "large", sets its width on the page."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=85)
    return _picture(data.getvalue(), "jpeg", caption, kind)


def row(parts: Iterable[str]) -> str:
    """Figures and photos side by side, as many as fit."""
    return f'<div class="row">{"".join(parts)}</div>'


def refuse_folder(path: Path) -> None:
    """Raise UserError if `path` is a folder. Commands call this before their work, not after it."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file, such as {path / 'page.html'}")


def write(path: Path, title: str, sections: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Write the page: sections of a heading, which may be empty, and parts. Raises UserError if that fails."""
    refuse_folder(path)
    parts = [f"<h1>{_plain(title)}</h1>"]
    for heading, body in sections:
        parts += [f"<section>{f'<h2>{_plain(heading)}</h2>' if heading else ''}", *body, "</section>"]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_plain(title)}</title>'
    document = f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, "\n".join([document, *parts, "</body></html>\n"]))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another file") from None


def _picture(data: bytes, kind: str, caption: str, shown: str) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    words = _plain(caption)
    return f'<figure class="{shown}"><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'


def _plain(value: object) -> str:
    return escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)))
