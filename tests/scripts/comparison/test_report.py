"""The page of a comparison shows everything known of the runs, and unknown values do not break it."""

import json
import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import compare
from scripts.comparison import report, result
from scripts.comparison.rows import Row

METRICS = ("AP", "AP50", "AP75", "AP80", "AP90", "APs", "APm", "APl")


def fabricated(name: str, seed: int, ap: float) -> dict:
    """A result without its run folder."""
    metrics = dict.fromkeys(METRICS, ap) | {"step": 20, "epoch": 2, "images": 5, "seconds_per_step": 0.2 + ap}
    metrics |= {"by_iou": [ap + 0.01 * (5 - i) for i in range(10)], "peak_memory": 2e9}
    metrics["per_class"] = {"cat <b>": {"AP": ap, "AP50": ap}, "dog": {"AP": -1, "AP50": -1}}
    shares = {"class_easy": 0.1, "class_medium": 0.6, "class_outlier": 0.3}
    shares |= {"box_easy": 0.2, "box_medium": 0.3, "box_outlier": 0.5}
    losses = {"class_loss": {"name": name}, "box_loss": {"name": "smooth_l1"}}
    return {
        "config": {"run": f"{name}-s{seed}", "output": "nowhere", "seed": seed, **losses},
        "metrics": metrics,
        "curve": [{"step": step, **dict.fromkeys(("AP", "AP50", "AP75"), ap * step / 20)} for step in (10, 20)],
        "gradient": [{"step": 10, **shares}],
        "probability": [{"step": 10, "true_class_probability": ap}, {"step": 20, "true_class_probability": 2 * ap}],
        "resampled": {"AP": [ap + 0.001 * (i % 7) for i in range(500)]},
        "jobs": 1,
        "timing": {"seconds": 0.5 if name == "ce" else 0.6, "steps": 20, "started": "2026-01-01T00:00:00"},
        "calibration_error": 0.1,
        "variant": name,
        "tuning": {
            "keys": ["box_loss.weight"],
            "trials": [
                {"values": {"box_loss.weight": 1.0}, "AP": ap},
                {"values": {"box_loss.weight": 5.0}, "AP": None},
            ],
            "range": {"box_loss.weight": [0.1, 10]},
            "extended": [],
            "chosen": {"box_loss.weight": 1.0},
            "at_an_end": [],
        },
        "machine": {"device": "2 cores of a machine", "torch": "2.15"},
    }


@pytest.fixture
def files(folder):
    paths = []
    for name, ap in (("ce", 0.4), ("focal", 0.5), ("ghm_c", 0.3)):
        for seed in range(3):
            paths.append(folder / f"{name}-s{seed}.json")
            result.write(paths[-1], fabricated(name, seed, ap + 0.01 * seed))
    return list(map(str, paths))


def words(page):
    return unescape(re.sub(r"<[^>]+>", " ", re.sub(r"data:image/[^\"]+", "", page.read_text())))


def test_the_page_shows_all_known_values(files, folder):
    compare.main([*files, "--html", str(folder / "report.html")])
    printed = words(folder / "report.html")
    for expected in (
        "9 runs of 3 losses",
        "2 cores of a machine",
        "+10.0",  # focal's AP over that of CE
        "better",
        "worse",
        "corrected for 2 comparisons",
        "4 of 5 studies detect",
        "cat <b>",
        "+20.0%",  # seconds a step, 0.6 over 0.5
        "box_loss.weight",
        "box_loss.weight 1 (range 0.1 to 10), 1 of 2 trials failed",
        "its run folder is missing",
    ):
        assert expected in printed, expected
    assert report.NO_GRADIENTS not in printed
    assert (folder / "report.html").read_text().count("<img") == 1 + 4 + 1 + 2  # differences, curves, IoU, gradients


@pytest.mark.parametrize("name", ["ce", "ghm_c[max_weight=null][prior_count=1000]", "ghm_c" * 18])
def test_a_legend_leaves_the_width_to_the_curves(name):
    rows = [SimpleNamespace(name=f"{name} {place}") for place in range(7)]
    plot, axis, styles = report.axes_of(rows, "x", "y")
    for row in rows:
        axis.plot([0, 1], [0, 1], label=row.name, **styles[row.name])
    report.legend_below(axis)
    plot.draw_without_rendering()
    assert axis.get_position().width > 0.7 and axis.get_position().height * plot.get_figheight() > 2  # inches


def test_means_of_parts_keep_the_mean_of_the_training():
    points = [{"step": 20 * place, "value": place**2} for place in range(100)]
    means = result.means(points, 50)
    assert means[:2] == [{"step": 10, "value": 0.5}, {"step": 50, "value": 6.5}] and len(means) == 50
    assert result.means(points[:7], 50) == points[:7] and result.means([], 50) == []
    assert [point["step"] for point in result.means(points[:5], 2)] == [20, 70]


def test_spread_is_the_mean_and_the_sample_deviation():
    mean, deviation = report.spread([[1, 2], [3, 6]])
    assert mean.tolist() == [2, 4] and deviation == pytest.approx([2**0.5, 8**0.5])
    assert report.spread([[1, 2]])[1].tolist() == [0, 0]


def test_a_search_is_shown_with_its_ranges_and_unequal_budgets_cause_a_warning(folder, capsys):
    values = {"class_loss.weight": 9.0, "box_loss.weight": 2.0}
    trials = [{"values": values, "AP": 0.123}, {"values": values, "AP": None}]
    search = {"keys": list(values), "trials": trials, "chosen": values, "extended": ["box_loss.weight"]}
    search |= {"range": {key: [0.1, 10] for key in values}, "at_an_end": ["class_loss.weight"]}
    files = [str(folder / f"{name}.json") for name in ("ce", "focal")]
    for file in files:
        result.write(Path(file), fabricated(Path(file).stem, 0, 0.2) | {"tuning": search})
    compare.main([*files, "--html", str(folder / "report.html")])
    printed = " ".join(words(folder / "report.html").split())
    assert "class_loss.weight, box_loss.weight 12.3 - class_loss.weight 9 (range" in printed
    assert (
        "class_loss.weight 9 (range 0.1 to 10, at an end of it), box_loss.weight 2 (range 0.1 to 10, extended)"
        in printed
    )
    assert "differ in tuning" not in capsys.readouterr().out
    result.write(folder / "ce.json", fabricated("ce", 0, 0.2) | {"tuning": search | {"trials": trials * 2}})
    compare.main(files)
    assert "not a fair comparison, ce / focal differ in tuning (" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "name"), [("cpu", "cores of"), ("auto", "GPU None"), ("cuda:1", "GPU cuda:1")])
def test_a_run_on_the_cpu_and_one_on_the_gpu_beside_it_had_different_machines(device, name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device}")
    assert name in result.machine(device)["device"]


def test_pictures_of_another_run_are_not_shown(learnt, folder, in_browser):
    content = result.collect(learnt)
    parts = report.pictures([Row("mine", [content], [])])
    assert len(parts) == 1 + 2 and all(part.count("<img") == 2 for part in parts[1:])  # two images, each with its truth
    other_content = {**content, "metrics": {**content["metrics"], "AP": 0.123}}
    assert "holds another run" in " ".join(report.pictures([Row("mine", [other_content], [])]))
    compare.main([str(learnt), "--html", str(folder / "report.html")])
    for width in (400, 1280):
        layout = in_browser(folder / "report.html", width)
        assert layout["wide"] <= width and layout["broken"] == 0 and layout["remote"] == 0 and layout["overlaps"] == []
        assert layout["images"] >= 4


def test_the_page_shows_a_failed_run_and_a_run_with_few_known_values(folder):
    failed_run = {"config": {**fabricated("ce", 0, 0.1)["config"]}, "failure": "the loss is nan", "variant": "ce"}
    sparse_run = fabricated("focal", 0, 0.2)
    for key in ("curve", "gradient", "probability", "resampled", "tuning", "machine", "calibration_error", "jobs"):
        del sparse_run[key]
    sparse_run["metrics"] = {key: sparse_run["metrics"][key] for key in ("AP", "AP50")}
    for name, content in (("a", failed_run), ("b", sparse_run)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    compare.main([str(folder / "a.json"), str(folder / "b.json"), "--html", str(folder / "report.html")])
    printed = words(folder / "report.html")
    assert "the loss is nan" in printed and "focal" in printed and report.NO_GRADIENTS in printed


def test_single_runs_get_no_verdict_on_the_page(folder):
    for name, ap in (("ce", 0.2), ("focal", 0.4)):
        result.write(folder / f"{name}.json", fabricated(name, 0, ap) | {"jobs": 2, "timing": None})
    compare.main([str(folder / "ce.json"), str(folder / "focal.json"), "--html", str(folder / "report.html")])
    printed = words(folder / "report.html")
    assert "no verdict: ce has one seed" in printed and "--seeds 3" in printed and "studies" not in printed
    assert "not shown: runs shared the machine" in printed and "seconds a step" not in printed


def test_an_unwritable_page_is_reported_in_one_line(files, command):
    code, _, err = command(compare.main, *files, "--html", "/dev/null/report.html")
    assert code == 2 and "cannot be written" in err and err.count("\n") == 1


def test_a_coco_row_shows_the_published_ap(folder):
    content = fabricated("focal", 0, 0.36)
    data = {"val": {"annotations": "a/instances_val2017.json"}}
    content["config"] |= {"model": {"backbone": "resnet50"}, "assigner": {"name": "iou"}, "solver": {"epochs": 12}}
    content["config"] |= {"data": data}
    content["config"]["class_loss"]["gamma"] = 2.0
    result.write(folder / "focal.json", content)
    compare.main([str(folder / "focal.json"), "--html", str(folder / "report.html")])
    assert "AP 35.6" in words(folder / "report.html")
