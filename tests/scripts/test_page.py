"""Self-contained pages."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from detector.errors import UserError
from scripts import page


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
def test_it_can_be_read_on_any_width(tmp_path, in_browser, width):
    page.write(tmp_path / "page.html", "A title", sections())
    seen = in_browser(tmp_path / "page.html", width)
    assert seen["width"] == width and seen["wide"] <= width
    assert seen["images"] == 3 and seen["broken"] == 0 and seen["remote"] == 0 and seen["overlaps"] == []


def test_a_row_of_another_length_is_our_slip():
    with pytest.raises(ValueError):
        page.table(("a", "b"), [(1,)])


def test_a_folder_is_no_place_for_it(tmp_path):
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        page.write(tmp_path, "A title", [])


def test_words_with_dollars_are_words():
    plot, axis = plt.subplots()
    axis.set_title(r"$\frac$ and $x")
    assert "<img" in page.figure(plot, "a caption")


def test_where_it_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"page\.html: cannot be written"):
        page.write(tmp_path / "file" / "page.html", "A title", [])


def test_a_full_disk_leaves_the_page_before(tmp_path, full_disk):
    page.write(tmp_path / "page.html", "A title", [])
    before = (tmp_path / "page.html").read_text()
    with full_disk(5000), pytest.raises(UserError, match=r"page\.html: cannot be written"):
        page.write(tmp_path / "page.html", "Another", [("", [page.text("long " * 5000)])])
    assert (tmp_path / "page.html").read_text() == before and len(list(tmp_path.iterdir())) == 1
