"""eval.py scores a checkpoint, ours or torchvision's, on its own or other data, with the metrics of its run."""

import contextlib
import importlib.util
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detector import checkpoint
from scripts import compare

# Not by `import eval`: the name is Python's own.
spec = importlib.util.spec_from_file_location("evaluation", Path(__file__).parents[1] / "eval.py")
evaluation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluation)


def read(path: Path):
    return json.loads(path.read_text())


def named_after(annotations: str) -> str:
    return f"{Path(annotations).parent.name}_{Path(annotations).stem}"


def one_line(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1


def test_a_checkpoint_alone_gives_the_metrics_of_its_run(learnt, folder, command):
    code, out, err = command(evaluation.main, "--checkpoint", learnt / "last.pt", "--output", folder / "deep" / "er")
    assert code == 0, err
    expected = read(learnt / "metrics.json")
    assert expected["AP50"] > 0.9 and len(expected["per_class"]) == 3
    assert read(folder / "deep" / "er" / "metrics.json") == expected
    assert "AP50" in out and "colour 2" in out
    best = command(evaluation.main, "--checkpoint", learnt / "best.pt", "--output", folder)
    assert best[0] == 0 and read(folder / "metrics.json") == expected


def test_benchmark_reports_the_speed_of_each_stage_and_changes_no_metric(learnt, folder, command):
    code, out, err = command(evaluation.main, "--checkpoint", learnt / "last.pt", "--output", folder, "--benchmark")
    assert code == 0, err
    assert read(folder / "metrics.json") == read(learnt / "metrics.json")
    table = [line.split() for line in out.split("images/s   share\n")[1].splitlines()]
    assert [line[0] for line in table] == ["loading", "network", "postprocessing", "scoring", "all"]
    assert sum(float(line[2].rstrip("%")) for line in table[:-1]) == pytest.approx(100, abs=0.3)
    assert all(float(line[1].replace(",", "")) > 0 for line in table)


def test_detections_are_in_cocos_format_and_score_the_same(learnt, folder, command):
    command(evaluation.main, "--checkpoint", learnt / "last.pt", "--output", folder)
    truth = checkpoint.read(learnt / "last.pt")["config"]["data"]["val"]["annotations"]
    metrics = read(folder / "metrics.json")
    expected = [metrics["AP"], metrics["AP50"], metrics["AP75"]]
    assert by_pycocotools(truth, folder / "detections.json") == pytest.approx(expected, abs=1e-3)
    results = read(folder / "detections.json")
    assert {result["category_id"] for result in results} <= {3, 7, 11}
    assert {result["image_id"] for result in results} == {50, 51}


def test_a_file_that_numbers_its_categories_differently_scores_the_same(learnt, folder, command):
    data = checkpoint.read(learnt / "last.pt")["config"]["data"]["val"]
    document, other = read(Path(data["annotations"])), {3: 11, 7: 3, 11: 8}
    for category in document["categories"]:
        category["id"] = other[category["id"]]
    for annotation in document["annotations"]:
        annotation["category_id"] = other[annotation["category_id"]]
    (folder / "test.json").write_text(json.dumps(document))
    files = ("--data", folder / "test.json", data["images"])
    code, out, err = command(evaluation.main, "--checkpoint", learnt / "last.pt", *files, "--output", folder)
    assert code == 0, err
    assert "matched by name" in out
    metrics, expected = read(folder / "metrics.json"), read(learnt / "metrics.json")
    assert metrics["per_class"] == expected["per_class"] and metrics["AP"] == expected["AP"] > 0.5
    # The detections have the file's ids.
    assert by_pycocotools(folder / "test.json", folder / "detections.json")[0] == pytest.approx(metrics["AP"], abs=1e-3)


def by_pycocotools(truth: Path | str, detections: Path) -> list[float]:
    """AP, AP50 and AP75."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(truth))
        coco_eval = COCOeval(known, known.loadRes(str(detections)), "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return coco_eval.stats[:3].tolist()


def test_metrics_and_detections_are_written_before_metrics_are_printed(learnt, folder, command, monkeypatch):
    def fail(metrics):
        raise OSError("No space left on device")  # as of standard output that goes to a file

    monkeypatch.setattr(evaluation, "metrics_table", fail)
    with pytest.raises(OSError):
        command(evaluation.main, "--checkpoint", learnt / "last.pt", "--output", folder)
    assert read(folder / "metrics.json") == read(learnt / "metrics.json") and read(folder / "detections.json")


def test_without_output_results_go_into_the_folder_of_the_checkpoint(learnt, folder, command):
    shutil.copy(learnt / "last.pt", folder)
    code, out, _ = command(evaluation.main, "--checkpoint", folder / "last.pt")
    assert code == 0 and str(folder / "detections.json") in out
    for name in ("metrics.json", "detections.json"):
        assert read(folder / name) == read(learnt / name)


def test_another_data_set_of_the_same_categories_is_scored(learnt, rectangles, folder, command):
    # The images are twice as large as in training, and resized to that size. Boxes are in pixels of the original.
    boxes = [[(0, [18, 24, 60, 72])], [], [(1, [90, 18, 78, 66])]]
    annotations, images = rectangles(folder, boxes, classes=2, side=192)
    arguments = ("--checkpoint", learnt / "last.pt", "--data", annotations, images, "--output", folder)
    code, out, err = command(evaluation.main, *arguments)
    assert code == 0, err
    metrics = read(folder / "metrics.json")
    assert metrics["images"] == 3 and metrics["per_class"].keys() == {"colour 0", "colour 1"}
    assert metrics["AP50"] > 0.9
    assert annotations in out


def test_results_on_another_set_leave_those_of_the_run(learnt, rectangles, folder, command):
    shutil.copy(learnt / "last.pt", folder)
    shutil.copy(learnt / "metrics.json", folder)
    annotations, images = rectangles(folder / "other", [[(0, [18, 24, 60, 72])]], classes=2, side=192)
    settings = (f"data.val.annotations={annotations}", f"data.val.images={images}")
    code, _, err = command(evaluation.main, "--checkpoint", folder / "last.pt", "--set", *settings)
    assert code == 0, err
    assert read(folder / "metrics.json") == read(learnt / "metrics.json")
    assert read(folder / named_after(annotations) / "metrics.json")["images"] == 1


def test_results_on_another_set_are_compared_like_runs(learnt, rectangles, folder, command):
    annotations, images = rectangles(folder / "other", [[(0, [18, 24, 60, 72])]], classes=2, side=192)
    for seed in (0, 1):
        (folder / f"mine-s{seed}").mkdir()
        content = checkpoint.read(learnt / "last.pt")
        content["config"] |= {"run": f"mine-s{seed}", "seed": seed}
        torch.save(content, folder / f"mine-s{seed}" / "best.pt")
        arguments = ("--checkpoint", folder / f"mine-s{seed}" / "best.pt", "--data", annotations, images)
        assert command(evaluation.main, *arguments)[0] == 0
    results = [folder / f"mine-s{seed}" / "other_annotations" for seed in (0, 1)]
    code, out, err = command(compare.main, *results, "--html", folder / "page.html")
    assert code == 0, err
    assert "no pictures" not in (folder / "page.html").read_text()
    (row,) = [line.split() for line in out.splitlines() if line.startswith("mine")]
    ap = 100 * read(folder / "mine-s0" / "other_annotations" / "metrics.json")["AP"]
    assert row[0] == "mine" and row[3] == f"{ap:.1f}±0.0"  # a row of two seeds
    assert not (folder / "mine-s0" / "config.yaml").exists()  # a run's own folder keeps what it has
    (folder / "again").mkdir()
    shutil.copytree(folder / "mine-s0", folder / "again" / "mine-s0")
    code, out, err = command(compare.main, results[0], folder / "again" / "mine-s0" / "other_annotations")
    assert code == 0 and out.count("mine (") >= 2, err  # two folders of one name and seed: a row each
    code, _, err = command(evaluation.main, "--checkpoint", folder / "mine-s0" / "best.pt", "--output", learnt)
    assert code == 2 and one_line(err) and "of another run" in err


def test_set_changes_options(learnt, folder, command):
    settings = ("postprocess.max_detections=1", "evaluation.batch_size=1")
    code, _, err = command(evaluation.main, "--checkpoint", learnt / "last.pt", "--output", folder, "--set", *settings)
    assert code == 0, err
    assert len(read(folder / "detections.json")) == 2


def test_a_mistake_gives_one_line_and_exit_code_2(learnt, rectangles, folder, command):
    annotations, images = rectangles(folder, [[(0, [5, 5, 20, 20])]], classes=1)
    document = read(Path(annotations))
    document["categories"] = [{"id": 4, "name": "other"}]
    document["annotations"][0]["category_id"] = 4
    Path(annotations).write_text(json.dumps(document))
    (folder / "text.pt").write_text("hello")
    last = learnt / "last.pt"
    mistakes = {
        "category 4": ("--checkpoint", last, "--data", annotations, images),
        "missing.json": ("--checkpoint", last, "--data", "missing.json", images),
        "text.pt": ("--checkpoint", folder / "text.pt"),
        "none.pt": ("--checkpoint", folder / "none.pt"),
        "error: --set postprocess.nms=0.5: postprocess.nms: unknown": (
            "--checkpoint",
            last,
            "--set",
            "postprocess.nms=0.5",
        ),
        "/dev/null/x": ("--checkpoint", last, "--output", "/dev/null/x"),
    }
    for expected, arguments in mistakes.items():
        code, _, err = command(evaluation.main, *arguments)
        assert code == 2 and one_line(err), (expected, err)
        assert expected in err


def test_a_model_that_diverged_is_reported_in_one_line_and_exit_code_1(learnt, folder, command):
    content = checkpoint.read(learnt / "best.pt")
    content["model"]["head.logits.weight"].fill_(torch.nan)
    torch.save(content, folder / "nan.pt")
    code, _, err = command(evaluation.main, "--checkpoint", folder / "nan.pt", "--output", folder / "out")
    assert code == 1 and one_line(err)
    assert "images [50, 51]" in err and "the model's output is not finite" in err
    assert not (folder / "out").exists()


def test_a_torchvision_checkpoint_is_scored_without_conversion(rectangles, folder, command):
    torch.manual_seed(0)
    model = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    torch.save(model.state_dict(), folder / "retinanet.pth")
    annotations, images = rectangles(folder, [[(0, [5, 5, 20, 20])], [(1, [8, 9, 30, 20])]], classes=2)
    small_images = ("device=cpu", "data.workers=0", "data.short_side=64", "data.long_side=64")
    arguments = ("--checkpoint", folder / "retinanet.pth", "--set", *small_images, "postprocess.score_threshold=0")
    code, _, err = command(evaluation.main, *arguments)
    assert code == 2 and "--data" in err and one_line(err)
    code, out, err = command(evaluation.main, *arguments, "--data", annotations, images)
    assert code == 0, err
    folder /= named_after(annotations)  # a folder beside the checkpoint, so that no file there is overwritten
    assert 0 <= read(folder / "metrics.json")["AP"] < 0.5
    assert len(read(folder / "detections.json")) == 200 and "colour 1" in out
