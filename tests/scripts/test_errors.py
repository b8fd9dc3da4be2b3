"""scripts/errors.py: the page reports the errors of known detections."""

import json
import re
import shutil
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import analysis
from data.matches import ClassOutcomes, Outcomes
from scripts import errors


@pytest.fixture
def call(learnt, folder, command):
    def run(*arguments):
        command_line = ("--checkpoint", learnt / "best.pt", "--output", folder / "new" / "page.html", *arguments)
        code, out, err = command(errors.main, *command_line)
        page = folder / "new" / "page.html"
        html = re.sub(r"data:image/[^\"]+", "", page.read_text()) if page.exists() else ""
        return code, out, err, " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())

    return run


# The boxes of overfit's two images, as xywh: image 50 has colour 0 and 2, image 51 colour 1 and 0.
TRUTH = [(50, 3, [9, 12, 30, 36]), (50, 11, [54, 45, 33, 30]), (51, 7, [45, 9, 39, 33]), (51, 3, [12, 54, 27, 30])]


def as_results(entries):
    return [
        {"image_id": i, "category_id": c, "bbox": b, "score": 0.99 - 0.01 * n} for n, (i, c, b) in enumerate(entries)
    ]


def test_known_errors_are_reported(call, folder, in_browser):
    detections = [
        *TRUTH[:2],
        (50, 3, [9, 12, 30, 35]),  # a duplicate
        (51, 3, [45, 9, 39, 33]),  # another class
        (50, 7, [80, 5, 10, 10]),  # on nothing
    ]  # and the last box is missed
    (folder / "found.json").write_text(json.dumps(as_results(detections)))
    code, out, err, printed = call("--detections", folder / "found.json")
    assert code == 0, err
    assert "2 of which are right" in printed and "page.html" in out
    for kind, count in (("classification", 1), ("localisation", 0), ("duplicate", 1), ("background", 1), ("missed", 1)):
        assert re.search(rf"{kind} [-\d.]+ {count} ", printed), (kind, printed)
    assert "0.png: " in printed and "1 duplicate" in printed and "1.png: " in printed
    for width in (400, 1280):
        layout = in_browser(folder / "new" / "page.html", width)
        assert layout["wide"] <= width and layout["broken"] == 0 and layout["remote"] == 0 and layout["overlaps"] == []
        assert layout["images"] == 2 + 1 + 1 + 2  # two curves, calibration, confusion, pictures


@pytest.fixture
def plots(monkeypatch):
    """The figures that a page would get."""
    kept = []
    monkeypatch.setattr(errors.page, "figure", lambda plot, words: kept.append(plot) or words)
    return kept


def test_only_classes_with_a_curve_are_in_the_legend(plots):
    def of_class(*right):
        right = np.array([right] * 10, dtype=bool)
        return ClassOutcomes(np.zeros(right.shape[1], int), np.ones(right.shape[1]), right, ~right, np.array([2]))

    classes = [of_class(True, False), of_class(), of_class(False)]
    errors.curves(Outcomes(1, classes), {3: "found", 5: "no detections", 7: "all wrong"})
    for plot in plots:
        assert [text.get_text() for text in plot.axes[0].get_legend().get_texts()] == ["found"]
    assert len(plots) == 2


def test_shades_are_shares_of_the_labels_alone(plots, monkeypatch):
    matrix = np.array([[3, 1, 0], [0, 0, 0], [9, 0, 0]])
    monkeypatch.setattr(errors, "confusion", lambda *_: (matrix, ["a", "b", "background"]))
    errors.confused(SimpleNamespace(annotations=None), [])
    shades = plots[0].axes[0].images[0].get_array()
    np.testing.assert_array_equal(shades[:2].filled(), [[0.75, 0.25, 0], [0, 0, 0]])
    assert shades.mask[2].all()
    assert [text.get_text() for text in plots[0].axes[0].texts] == ["3", "1", "9"]


def test_the_model_scores_as_in_evaluation(learnt, call):
    code, out, err, printed = call("--images", 0)
    assert code == 0, err
    metrics = json.loads((learnt / "metrics.json").read_text())
    assert f"AP {100 * metrics['AP']:.1f}, AP50 {100 * metrics['AP50']:.1f}" in out
    assert metrics["APl"] == -1 and "APl" not in out  # no box is that large
    assert "No errors" in printed


def test_the_page_reports_a_missing_hotcoco(call, monkeypatch):
    monkeypatch.setattr(analysis, "hotcoco", None)
    code, _, err, printed = call()
    assert code == 0, err
    assert "pip install hotcoco" in printed


def test_no_detections_and_another_data_set_are_accepted(call, folder, rectangles):
    (folder / "none.json").write_text("[]")
    code, _, err, printed = call("--detections", folder / "none.json")
    assert code == 0 and "2 missed" in printed, err
    annotations, images = rectangles(folder, [[]], classes=3)
    code, _, err, _ = call("--data", annotations, images)
    assert code == 0, err


def test_the_page_of_another_set_leaves_that_of_the_run(learnt, folder, rectangles, command):
    shutil.copy(learnt / "last.pt", folder)
    (folder / "errors.html").write_text("of the run")
    annotations, images = rectangles(folder / "other", [[(0, [9, 12, 30, 36])]], classes=3, side=96)
    code, out, err = command(errors.main, "--checkpoint", folder / "last.pt", "--data", annotations, images)
    assert code == 0, err
    assert (folder / "errors.html").read_text() == "of the run"
    assert str(folder / "other_annotations" / "errors.html") in out


@pytest.mark.parametrize("factor", [-1, 100])
def test_scores_that_are_no_probabilities_are_refused(call, folder, factor):
    entries = [entry | {"score": factor * entry["score"]} for entry in as_results(TRUTH)]
    (folder / "found.json").write_text(json.dumps(entries))
    code, _, err, _ = call("--detections", folder / "found.json")
    assert code == 2 and "scores outside 0..1" in err and err.count("\n") == 1


def test_a_class_that_the_scored_file_lacks_is_shown(call, learnt, folder, rectangles):
    annotations, images = rectangles(folder, [[(0, [9, 12, 30, 36])]], classes=3, side=96)
    document = json.loads(Path(annotations).read_text())
    del document["categories"][1]
    Path(annotations).write_text(json.dumps(document))
    for right in (0, 1):
        detections = [(50, 7, [50, 50, 20, 20]), (50, 3, [9, 12, 30, 36])][: 1 + right]
        (folder / "found.json").write_text(json.dumps(as_results(detections)))
        code, _, err, printed = call("--data", annotations, images, "--detections", folder / "found.json")
        assert code == 0, err
        assert "0.png: 1 background" + ", 1 missed" * (not right) in printed


def test_mistakes_are_one_line(learnt, call, folder):
    for name, text in (("broken", "{"), ("dict", "{}"), ("text", "hello")):
        (folder / f"{name}.json").write_text(text)
    (folder / "nan.json").write_text(json.dumps(as_results(TRUTH)).replace("0.99", "NaN"))
    (folder / "id.json").write_text(json.dumps(as_results([(9, 3, [1, 1, 5, 5])])))
    for expected, arguments in {
        "broken.json": ("--detections", folder / "broken.json"),
        "dict.json": ("--detections", folder / "dict.json"),
        "id.json: detection 0": ("--detections", folder / "id.json"),
        "nan.json: ": ("--detections", folder / "nan.json"),
        "is a folder; give the name of a file": ("--output", folder),
        "none.json": ("--detections", folder / "none.json"),
        "text.json": ("--checkpoint", folder / "text.json"),
        "--images -1": ("--images", "-1"),
        "missing.json": ("--data", "missing.json", "."),
        "cannot be written": ("--output", "/dev/null/page.html"),
    }.items():
        code, _, err, _ = call(*arguments)
        assert code == 2 and expected in err and err.splitlines()[-1].startswith("error: "), (expected, err)
    assert Path(learnt / "best.pt").exists()
