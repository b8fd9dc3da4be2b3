"""scripts/comparison/page.py: self-contained pages."""

import io
import warnings

import numpy as np
import pytest
from matplotlib import pyplot as plt

from detector.errors import UserError
from scripts.comparison import page


def sections():
    plot, axes = plt.subplots(figsize=page.FIGURE)
    axes.plot([0, 1], [0, 1])
    photo = page.photo(np.full((40, 60, 3), 200, np.uint8), "a <photo> & its name" + "x" * 90)
    wide = page.table([f"column {number}" for number in range(30)], [[number] * 30 for number in range(3)])
    return [("", [page.text("first <b>"), wide]), ("Second", [page.row([page.figure(plot, "line"), photo, photo])])]


def test_all_text_is_escaped(tmp_path):
    page.write(tmp_path / "new" / "page.html", "<script>alert(1)</script>\x00", sections())
    html = (tmp_path / "new" / "page.html").read_text()
    assert "<script>" not in html and "first <b>" not in html and "\x00" not in html
    assert "a &lt;photo&gt; &amp; its name" in html and "http" not in html


@pytest.mark.parametrize("width", [400, 1280])
def test_a_page_can_be_read_at_any_width(tmp_path, in_browser, width):
    page.write(tmp_path / "page.html", "A title", sections())
    layout = in_browser(tmp_path / "page.html", width)
    assert layout["width"] == width and layout["wide"] <= width
    assert layout["images"] == 3 and layout["broken"] == 0 and layout["remote"] == 0 and layout["overlaps"] == []


def test_a_table_row_of_the_wrong_length_raises_an_error():
    with pytest.raises(ValueError):
        page.table(("a", "b"), [(1,)])


def test_a_page_cannot_replace_a_folder(tmp_path):
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        page.write(tmp_path, "A title", [])


def test_dollar_signs_are_not_read_as_math():
    plot, axis = plt.subplots()
    axis.set_title(r"$\frac$ and $x")
    assert "<img" in page.figure(plot, "a caption")


def ink(place, name):
    """How many more pixels are dark in a plot with this name than in one without."""
    dark_pixels = []
    for word in (name, ""):
        plot, axis = plt.subplots(figsize=page.FIGURE, layout="constrained")
        axis.bar([word if place == "tick" and word else "i"], [0])  # matplotlib makes a tick's text when it draws it
        axis.set_title(word if place == "title" else "")
        axis.plot([0, 0], [0, 0], label=word if place == "legend" and word else "i")
        axis.legend()
        buffer = io.BytesIO()
        page.save(plot, buffer, format="rgba", dpi=100)
        plt.close(plot)
        dark_pixels.append(int((np.frombuffer(buffer.getvalue(), np.uint8).reshape(-1, 4)[:, 0] < 128).sum()))
    return dark_pixels[0] - dark_pixels[1]


@pytest.mark.parametrize("place", ["tick", "title", "legend"])
def test_words_of_any_script_are_drawn(machine, font, capsys, place):
    machine()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        squares = ink(place, "细胞细胞")  # matplotlib would warn of each letter, in dozens of lines
    assert capsys.readouterr().err.count("\n") == 1
    machine(font("a", "细胞", advance=3000, name=f"Made for {place}"))
    assert ink(place, "细胞细胞") > 1.2 * squares > 0  # the new font draws solid squares, DejaVu draws outlines
    assert capsys.readouterr().err == ""


def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    plot, axis = plt.subplots()
    for name in ("_cell", "cell", "__"):
        axis.plot([0, 1], [0, 1], label=page.label(name))
    assert [entry.get_text().strip() for entry in axis.legend().get_texts()] == ["_cell", "cell", "__"]
    plt.close(plot)


def test_an_unwritable_page_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"page\.html: cannot be written"):
        page.write(tmp_path / "file" / "page.html", "A title", [])


def test_a_full_disk_keeps_the_previous_page(tmp_path, full_disk):
    page.write(tmp_path / "page.html", "A title", [])
    previous_page = (tmp_path / "page.html").read_text()
    with full_disk(5000), pytest.raises(UserError, match=r"page\.html: cannot be written"):
        page.write(tmp_path / "page.html", "Another", [("", [page.text("long " * 5000)])])
    assert (tmp_path / "page.html").read_text() == previous_page and len(list(tmp_path.iterdir())) == 1
