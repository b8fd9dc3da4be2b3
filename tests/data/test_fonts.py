"""Letters of all scripts. The tests make their fonts, because the machine may have none."""

import numpy as np
import pytest
from PIL import Image

from data import fonts
from data.draw import annotate


def test_dejavu_has_european_letters(machine, capsys):
    machine()
    for text in ("Zelle", "Größe ångström œuvre", "Ελληνικά", "Жук ёлка", "€ ½ × ±", "e\u0301"):
        assert [file for _, file in fonts.stretches(text)] == [fonts.DEJAVU]
    assert capsys.readouterr().err == ""


def test_accents_join_their_letters_and_control_characters_are_replaced(machine):
    machine()
    assert fonts.stretches("e\u0301\nx\x00") == [("é\ufffdx\ufffd", fonts.DEJAVU)]
    assert fonts.stretches("") == []


def test_other_letters_are_written_with_a_font_of_the_machine(machine, font, capsys):
    chinese, korean = font("a", "细胞"), font("b", "세포")
    machine(chinese, korean, "gone.ttf")
    assert fonts.stretches("é 细胞 세 1") == [
        ("é ", fonts.DEJAVU), ("细胞", chinese), (" ", fonts.DEJAVU), ("세", korean), (" 1", fonts.DEJAVU)
    ]  # fmt: skip
    assert capsys.readouterr().err == ""


def test_a_regular_font_with_many_of_the_letters_comes_first(machine, font):
    bold_font = font("a", "细胞核血", style="Bold")
    one_letter_font = font("b", "细")
    two_letter_font = font("c", "细胞")
    last_resort_font = font("d", "细胞核血小板", name="Last Resort")
    machine(bold_font, one_letter_font, two_letter_font, last_resort_font)
    assert fonts.stretches("细胞核板") == [("细胞", two_letter_font), ("核", bold_font), ("板", fonts.DEJAVU)]


def test_letters_that_no_font_has_are_reported_once(machine, font, capsys):
    machine(font_file := font("a", "细"))
    for _ in range(2):
        assert fonts.stretches("细胞") == [("细", font_file), ("胞", fonts.DEJAVU)]
        fonts.stretches("板")
    (line,) = capsys.readouterr().err.splitlines()
    assert "no font on this machine has 胞," in line and "install" in line and "fonts-noto-cjk" in line


def test_a_caption_is_drawn_with_the_font_that_has_its_letters(machine, font):
    def caption(text):
        canvas = Image.new("RGB", (200, 60))
        annotate(canvas, np.array([[10.0, 30.0, 190.0, 50.0]]), [text], ["#ff7f0e"])
        pixels = np.asarray(canvas).astype(int)[15:29]  # above the box
        coloured = (pixels != 0).any(axis=2).any(axis=0)
        black = (pixels.sum(axis=2) == 0) & coloured[None]
        return int(coloured.sum()), int(black.sum())

    machine(font("a", "细", advance=3000))
    width, ink = caption("细细")
    assert width == pytest.approx(2 * 3 * 11, abs=2)  # letters of 11 pixels, three times as wide as high
    assert ink == pytest.approx(2 * (0.8 * 11) ** 2, rel=0.3)
    machine()
    assert caption("细细")[0] < width / 2
