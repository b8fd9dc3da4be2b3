"""scripts/predict.py: it draws and writes the detections of evaluation, and it loses none."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detector import checkpoint
from detector.images import read_image
from scripts import predict


@pytest.fixture(scope="module")
def learnt(learnt):
    """best.pt of the run that conftest.py trains, and the folder of its two images."""
    return learnt / "best.pt", learnt.parent.parent / "val" / "images"


@pytest.fixture
def call(learnt, folder, command):
    def run(*arguments):
        code, out, err = command(
            predict.main, "--checkpoint", learnt[0], "--output", folder / "out", "--device", "cpu", *arguments
        )
        results = folder / "out" / "detections.json"
        return code, out, err, json.loads(results.read_text()) if results.exists() else None

    return run


def one_line(err):
    return [line for line in err.splitlines() if line.startswith("error: ")][-1:] and "Traceback" not in err


def test_detections_are_those_of_evaluation(learnt, call):
    code, out, err, results = call(learnt[1], "--score", "0.05")
    assert code == 0, err
    evaluation = json.loads((learnt[0].parent / "detections.json").read_text())
    for number, image_id in ((0, 50), (1, 51)):  # eval.py takes the ids of the annotation file
        predicted = sorted(
            (box["category_id"], box["score"], *box["bbox"]) for box in results if box["image_id"] == number
        )
        evaluated = sorted(
            (box["category_id"], box["score"], *box["bbox"]) for box in evaluation if box["image_id"] == image_id
        )
        assert len(predicted) == len(evaluated) > 0
        np.testing.assert_allclose(np.array(predicted), np.array(evaluated), atol=2e-3)
    assert "2 images" in out


def test_thresholds_are_those_of_the_last_evaluation(learnt, call):
    _, out, _, results = call(learnt[1])
    thresholds = checkpoint.read(learnt[0])["score_thresholds"]
    assert all(threshold > 0 for threshold in thresholds)
    for name, threshold in zip(("colour 0", "colour 1", "colour 2"), thresholds):
        assert f"{name} {threshold:.2f}" in out
        assert all(box["score"] >= threshold - 1e-5 for box in results if box["category"] == name)
    in_first_image = [box for box in results if box["image_id"] == 0]
    assert {box["category"] for box in in_first_image} == {"colour 0", "colour 2"}  # what overfit draws there
    counts = [len(call(learnt[1], "--score", score)[3]) for score in (0, 0.05, 1)]
    assert counts[0] > counts[1] > len(results) > counts[2]


def test_boxes_are_drawn_in_their_place_and_nowhere_else(learnt, call, folder):
    _, _, _, results = call(learnt[1] / "0.png")
    drawn = read_image(folder / "out" / "0.jpg").astype(int)
    original = read_image(learnt[1] / "0.png").astype(int)
    changed = np.abs(drawn - original).max(axis=2) > 40
    x, y, _, height = (round(v) for v in results[0]["bbox"])
    assert changed[y : y + height, x].mean() > 0.5
    assert changed[90:, :40].mean() < 0.02  # no object is there


def test_a_video_keeps_its_frames_rate_and_size(learnt, call, folder):
    images = [cv2.imread(str(learnt[1] / name)) for name in ("0.png", "1.png")] * 4
    writer = cv2.VideoWriter(str(folder / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 12, (96, 96))
    for image in images:
        writer.write(image)
    writer.release()
    code, out, err, results = call(folder / "film.avi")
    assert code == 0, err
    video = cv2.VideoCapture(str(folder / "out" / "film.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 8 and video.get(cv2.CAP_PROP_FPS) == 12
    assert (video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (96, 96)
    assert {box["frame"] for box in results} == set(range(8)) == {box["image_id"] for box in results}
    assert not list((folder / "out").glob("*.part*")) and "8 images" in out


def test_every_source_has_a_separate_picture_and_outputs_are_not_sources(learnt, call, folder):
    for name in ("a/x.png", "a/x.jpg", "a/deep/x.png", "b/x.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(learnt[1] / "0.png", folder / name)
    code, _, err, results = call(folder / "a", folder / "b" / "x.png", folder / "a" / "x.png")
    assert code == 0, err
    pictures = {str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*.jpg")}
    assert pictures == {"a/x.jpg", "a/x_2.jpg", "a/deep/x.jpg", "x.jpg", "x_2.jpg"}
    assert {box["image_id"] for box in results} == set(range(5))
    code, out, _, _ = call(folder)  # which holds out/
    assert code == 0 and "4 images" in out


def test_a_broken_image_does_not_stop_the_others(learnt, call, folder):
    shutil.copytree(learnt[1], folder / "in")
    (folder / "in" / "00.png").write_bytes(b"no image")
    (folder / "in" / "z.mp4").write_bytes(b"no video")
    code, out, err, results = call(folder / "in")
    assert code == 2 and one_line(err) and "2 of 4 files" in err
    assert len(re.findall(r"^skipped: .*(00\.png|z\.mp4)", err, re.M)) == 2  # each is reported
    assert {Path(box["file_name"]).name for box in results} == {"0.png", "1.png"} and "2 images" in out


def test_every_image_format_is_read_and_other_files_are_reported(learnt, call, folder):
    (folder / "in").mkdir()
    with Image.open(learnt[1] / "0.png") as image:
        for suffix, kind in (("jfif", "JPEG"), ("JPE", "JPEG"), ("gif", "GIF"), ("avif", "AVIF"), ("webp", "WEBP")):
            image.save(folder / "in" / f"{suffix}.{suffix}", kind)
    (folder / "in" / "link.png").symlink_to(learnt[1] / "1.png")
    (folder / "in" / "notes.txt").write_text("hello")
    (folder / "in" / "._0.jpg").write_text("a Mac's")
    code, out, err, results = call(folder / "in", "--score", "0")
    assert code == 0, err
    assert len({box["file_name"] for box in results}) == 6 and "6 images" in out
    assert "not used: .txt files: 1" in out and "hidden files: 1" in out
    (folder / "in" / "phone.HEIC").write_text("?")
    code, out, err, _ = call(folder / "in")
    assert code == 2 and "6 images" in out and one_line(err)
    assert "1 of 7 files" in err and "phone.HEIC: this image format cannot be read; save it as .jpg" in err


def test_mistakes_are_one_line(learnt, call, folder):
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("hello")
    (folder / "text.pt").write_text("hello")
    image = learnt[1] / "0.png"
    for expected, arguments in {
        "no such file": (folder / "none.jpg",),
        "no image or video": (folder / "empty",),
        "neither an image": (folder / "text.txt",),
        "--score 2": (image, "--score", "2"),
        "text.pt": (image, "--checkpoint", folder / "text.pt"),
        "cannot be written": (image, "--output", "/dev/null/x"),
    }.items():
        code, _, err, _ = call(*arguments)
        assert code == 2 and one_line(err) and expected in err, (expected, err)


def test_a_model_that_diverged_is_reported_in_one_line_and_exit_code_1(learnt, folder, command):
    content = checkpoint.read(learnt[0])
    content["model"]["head.deltas.bias"].fill_(torch.inf)
    torch.save(content, folder / "inf.pt")
    arguments = ("--checkpoint", folder / "inf.pt", "--output", folder / "out", "--device", "cpu", learnt[1])
    code, _, err = command(predict.main, *arguments)
    first = sorted(learnt[1].iterdir())[0]
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"error: {first}: the model's output is not finite")
    assert [path.name for path in (folder / "out").iterdir()] == ["detections.json"]


def test_no_original_is_overwritten(learnt, folder, command):
    place = folder / "own"
    shutil.copytree(learnt[1], place)
    shutil.copy(place / "0.png", place / "2.jpg")  # the name that its picture would have
    original = (place / "2.jpg").read_bytes()
    arguments = ("--checkpoint", learnt[0], "--device", "cpu", place / "2.jpg", place / "0.png", "--output")
    code, _, err = command(predict.main, *arguments, place)
    assert code == 0, err
    assert (place / "2.jpg").read_bytes() == original and (place / "2_2.jpg").exists() and (place / "0.jpg").exists()
    code, _, err = command(predict.main, *arguments, learnt[0].parent)
    assert code == 2 and "has files of train.py or eval.py" in err


@pytest.mark.parametrize("output", ["src", "src/out", ".", "other"])
def test_a_folder_is_read_wherever_its_results_go_and_stays_as_it_is(learnt, folder, command, output):
    for name in ("src/0.png", "src/more/1.png", "b/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(learnt[1] / "0.png", folder / name)
    originals = {path: path.read_bytes() for path in folder.rglob("*.png")}
    arguments = ("--checkpoint", learnt[0], "--device", "cpu", folder / "src", folder / "b", "--output")
    for _ in range(2 if output != "." else 1):  # there, results lie among the originals
        code, out, err = command(predict.main, *arguments, folder / output)
        assert code == 0 and out.startswith("shown") and "\n3 images" in out, err
        assert {path: path.read_bytes() for path in folder.rglob("*.png")} == originals
    inside = output.startswith("src")
    assert ("left out: files in the folder of the results: " in out) == inside  # on the second run


def test_pictures_stay_in_the_output_folder(learnt, folder, command, monkeypatch):
    (folder / "own" / "deep").mkdir(parents=True)
    shutil.copy(learnt[1] / "0.png", folder / "own" / "0.png")
    monkeypatch.chdir(folder / "own" / "deep")
    code, _, err = command(predict.main, "--checkpoint", learnt[0], "--device", "cpu", "..")
    assert code == 0, err
    assert (folder / "own" / "deep" / "predictions" / "own" / "0.jpg").exists()
    assert not (folder / "own" / "deep" / "0.jpg").exists()


def test_a_picture_that_cannot_be_drawn_does_not_stop_the_others(learnt, call, folder):
    (folder / "in").mkdir()
    Image.new("RGB", (70_000, 4)).save(folder / "in" / "a.png")  # wider than a JPEG may be
    shutil.copy(learnt[1] / "0.png", folder / "in" / "b.png")
    code, out, err, results = call(folder / "in")
    assert code == 2 and one_line(err) and "a.png: cannot be drawn on" in err and "1 images" in out
    assert {Path(box["file_name"]).name for box in results} == {"b.png"}


def test_a_full_disk_is_one_line_and_leaves_no_partial_file(learnt, call, folder, full_disk):
    (folder / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)  # no format makes it small
    cv2.imwrite(str(folder / "in" / "photo.png"), noise)
    writer = cv2.VideoWriter(str(folder / "in" / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 12, (640, 480))
    for _ in range(6):
        writer.write(noise)
    writer.release()
    for name, output_name in (("photo.png", "photo.jpg"), ("film.avi", "film.mp4")):
        with full_disk(60_000):
            code, _, err, _ = call(folder / "in" / name)
        assert code == 2 and one_line(err) and f"{output_name}: cannot be written" in err, err
        assert [path.name for path in (folder / "out").iterdir()] == ["detections.json"]
    with full_disk(100):
        code, _, err, results = call(folder / "in" / "photo.png", "--score", "0")
    assert code == 2 and one_line(err) and results == []  # still those of the call before
    assert call(folder / "in")[0] == 0


def test_detections_from_before_ctrl_c_are_kept(learnt, call, folder, monkeypatch):
    def interrupted(detector, source, *rest):
        if source.name == "1.png":
            raise KeyboardInterrupt
        return process_image(detector, source, *rest)

    process_image = predict.process_image
    monkeypatch.setattr(predict, "process_image", interrupted)
    code, _, _, results = call(learnt[1])
    assert code == 130 and {box["image_id"] for box in results} == {0}
