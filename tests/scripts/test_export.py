"""scripts/export.py: the file agrees with PyTorch, also on other image sizes, or no file is written."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from detector import assemble, checkpoint, load
from detector.errors import UserError
from scripts import export

ROOT = Path(__file__).parents[2]
TO_ONNX, GRAPHS = export.to_onnx, {}


@pytest.fixture(scope="module")
def learnt(learnt):
    """best.pt of the run that conftest.py trains."""
    return learnt / "best.pt"


def exported(learnt, preprocessing, nms):
    model, cfg = checkpoint.build_model(checkpoint.read(learnt), learnt)
    postprocess = assemble.build_postprocess(cfg)
    return export.Exported(model.eval(), postprocess, preprocessing=preprocessing == "inside", nms=nms == "inside")


def pixels(size, count, inside, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)
    images[:, 10:40, 5:50] = (255, 60, 60)  # an object to detect
    return images if inside else ((images.transpose(0, 3, 1, 2) - 115) / 58).astype(np.float32)


@pytest.fixture(autouse=True)
def made_once(monkeypatch):
    """Building a graph takes most of a minute for any model, so each kind is built once."""

    def cached(model, metadata):
        kind = model.preprocessing, model.nms
        if kind not in GRAPHS:
            GRAPHS[kind] = TO_ONNX(model, metadata)
        return deepcopy(GRAPHS[kind])

    monkeypatch.setattr(export, "to_onnx", cached)


@pytest.mark.parametrize(("preprocessing", "nms"), [("inside", "inside"), ("outside", "outside")])
def test_the_file_agrees_with_pytorch(learnt, folder, command, preprocessing, nms):
    target = folder / "new" / "mine.onnx"
    choices = ("--preprocessing", preprocessing, "--nms", nms, "--images", 2)
    code, out, err = command(export.main, "--checkpoint", learnt, "--format", "onnx", "--output", target, *choices)
    assert code == 0, err
    assert "boxes of 2 images agree with PyTorch" in out and "images/s" in out
    assert [path.name for path in target.parent.iterdir()] == ["mine.onnx"]
    session = onnxruntime.InferenceSession(str(target))
    worst = {"boxes": 0, "ties": 0, "pixels": 0.0, "score": 0.0}
    model = exported(learnt, preprocessing, nms)
    for size, count in (((64, 64), 1), ((96, 32), 3), ((352, 288), 2)):
        images = pixels(size, count, preprocessing == "inside")
        pairs = zip(export.reference(model, images), export.onnx_detections(model, session, images), strict=True)
        for torch_detections, onnx_detections in pairs:
            export.compare(torch_detections, onnx_detections, model.postprocess, worst)
            assert (np.diff(onnx_detections[1]) <= 0).all()  # best first
    assert worst["boxes"] > 20 and worst["pixels"] < export.PIXELS and worst["score"] < export.SCORE
    if preprocessing == "inside":  # sides that are not multiples of 32
        images = pixels((75, 61), 2, True)
        for torch_detections, onnx_detections in zip(
            export.reference(model, images), export.onnx_detections(model, session, images), strict=True
        ):
            export.compare(torch_detections, onnx_detections, model.postprocess, worst)


def test_an_export_that_differs_from_the_model_leaves_no_file(learnt, folder, command, monkeypatch):
    to_onnx = export.to_onnx

    def spoilt(model, metadata):
        graph = to_onnx(model, metadata)
        (bias,) = (value for value in graph.graph.initializer if value.name.endswith("head.deltas.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
        return graph

    monkeypatch.setattr(export, "to_onnx", spoilt)
    target = folder / "mine.onnx"
    code, _, err = command(export.main, "--checkpoint", learnt, "--format", "onnx", "--output", target)
    assert code == 2 and "the export differs from the model" in err and not list(folder.iterdir())


def test_a_full_disk_is_one_line_and_keeps_the_previous_file(learnt, folder, command, full_disk):
    target = folder / "mine.onnx"
    target.write_text("the one before")
    with full_disk(2**20):
        code, _, err = command(export.main, "--checkpoint", learnt, "--format", "onnx", "--output", target)
    assert code == 2 and "mine.onnx: cannot be written" in err.splitlines()[-1] and "Traceback" not in err, err
    assert target.read_text() == "the one before" and os.listdir(folder) == ["mine.onnx"]


def test_a_check_that_compared_no_box_says_so(learnt, folder, command, monkeypatch):
    build = assemble.build_postprocess

    def nothing(cfg):
        postprocess = build(cfg)
        postprocess.score_threshold = 1 - 1e-6
        return postprocess

    monkeypatch.setattr(assemble, "build_postprocess", nothing)
    arguments = ("--checkpoint", learnt, "--format", "onnx", "--output", folder / "mine.onnx", "--nms", "outside")
    code, out, err = command(export.main, *arguments, "--preprocessing", "outside", "--images", 2)
    assert code == 0, err
    assert "the check compared nothing" in out and "no object in 2 images" in out and "agree" not in out


def detections(*rows):
    boxes, scores, labels = (np.array(column, dtype) for column, dtype in zip(zip(*rows), (float, float, int)))
    return boxes.reshape(-1, 4), scores, labels


def test_detections_may_differ_by_rounding_only(learnt):
    postprocess = exported(learnt, "inside", "inside").postprocess
    first, second = ([1, 2, 30, 40], 0.9, 0), ([5, 5, 20, 20], 0.6, 1)
    worst = {"boxes": 0, "ties": 0, "pixels": 0.0, "score": 0.0}
    export.compare(detections(first, second), detections(second, ([1, 2.04, 30, 40], 0.90005, 0)), postprocess, worst)
    assert worst == {"boxes": 2, "ties": 0, "pixels": pytest.approx(0.04), "score": pytest.approx(5e-5)}
    edge = ([7, 7, 9, 9], postprocess.score_threshold + 5e-5, 1)  # may be on either side of the threshold
    export.compare(detections(first, edge), detections(first), postprocess, worst)
    export.compare(detections(first), detections(first, edge), postprocess, worst)
    for other in (([12, 2, 41, 40], 0.9, 0), ([1, 2, 30, 40], 0.8998, 0), ([1, 2, 30, 40], 0.9, 1)):
        with pytest.raises(UserError):
            export.compare(detections(first), detections(other), postprocess, worst)
    for torch_rows, onnx_rows in (((first, second), (first,)), ((first,), (first, second)), ((first,), (first, first))):
        with pytest.raises(UserError):
            export.compare(detections(*torch_rows), detections(*onnx_rows), postprocess, worst)


def test_a_few_ties_in_nms_are_accepted_and_many_are_not(learnt, monkeypatch):
    first, shifted = ([1, 2, 30, 40], 0.9, 0), ([3, 2, 32, 40], 0.90005, 0)  # NMS keeps one of them
    others = [([50 * i, 50, 50 * i + 40, 90], 0.5, 1) for i in range(1, 81)]
    monkeypatch.setattr(export, "images_of", lambda *_: [np.zeros((1, 64, 64, 3), np.uint8)])
    monkeypatch.setattr(export, "reference", lambda *_: [detections(first, *others)])
    model = exported(learnt, "inside", "inside")
    monkeypatch.setattr(export, "onnx_detections", lambda *_: [detections(shifted, *others)])
    counts = export.check(model, None, [0], 1)
    assert counts["ties"] == 3 and counts["boxes"] == 3 * 80  # three batches
    moved_boxes = [([box[0] + 2, *box[1:3], box[3] + 1], score, label) for box, score, label in others[:5]]
    monkeypatch.setattr(export, "onnx_detections", lambda *_: [detections(first, *moved_boxes, *others[5:])])
    with pytest.raises(UserError, match="in 15 places onnxruntime finds another box than PyTorch, and in 228 the same"):
        export.check(model, None, [0], 1)


def test_the_example_needs_no_torch_and_finds_the_same_boxes(learnt, folder, command):
    assert command(export.main, "--checkpoint", learnt, "--format", "onnx", "--output", folder / "mine.onnx")[0] == 0
    images = Path(checkpoint.read(learnt)["config"]["data"]["val"]["images"])
    photo = folder / "photo.png"
    Image.open(images / "0.png").resize((150, 120)).save(photo)
    script = ROOT / "scripts" / "run_onnx.py"
    code = f"import runpy, sys; sys.argv = ['run', {str(folder / 'mine.onnx')!r}, {str(photo)!r}]; "
    code += f"runpy.run_path({str(script)!r}); assert 'torch' not in sys.modules"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = load(learnt, "cpu")(Image.open(photo))
    lines = [line.split() for line in process.stdout.splitlines()]
    assert len(lines) == len(expected.scores) > 0
    for line, box, score, name in zip(lines, expected.boxes.tolist(), expected.scores.tolist(), expected.names):
        assert " ".join(line[1:-5]) == name and float(line[-5]) == pytest.approx(score, abs=2e-2)  # bfloat16 here
        assert [float(value) for value in line[-4:]] == pytest.approx(box, abs=1.5)
    model = onnx.load(folder / "mine.onnx")
    (names,) = (entry for entry in model.metadata_props if entry.key == "class_names")
    names.value = json.dumps(["细胞", "é", "Жук"])
    onnx.save(model, folder / "named.onnx")
    command_line = [sys.executable, str(script), str(folder / "named.onnx"), str(photo)]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = subprocess.run(command_line, capture_output=True, text=True, check=True, env=ascii_only)
    assert len(process.stdout.splitlines()) == len(lines) and " \\u7ec6\\u80de " in process.stdout
    code_lines = [line for line in script.read_text().split('"""')[2].splitlines() if line.strip()]
    assert len(code_lines) <= 38
    many = f"{sys.executable} {script} {folder / 'mine.onnx'} {f'{photo} ' * 200}| head -1"
    process = subprocess.run(many, shell=True, capture_output=True, text=True)
    assert process.stdout.count("\n") == 1 and process.stderr == ""
    process = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert process.returncode == 0 and "run_onnx.py mine.onnx photo.jpg" in process.stdout
    for arguments, message in (
        ([], "give a model and images"),
        (["none.onnx", str(photo)], "none.onnx: not a model of scripts/export.py"),
        ([str(folder / "mine.onnx"), "none.jpg"], "none.jpg: no such file\n"),
        ([str(folder / "mine.onnx"), str(script)], "run_onnx.py: cannot be read as an image\n"),
    ):
        process = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
        assert process.returncode == 2 and process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
        assert message in process.stderr


def test_metadata_has_all_that_inference_needs(learnt, folder, command):
    assert command(export.main, "--checkpoint", learnt, "--format", "onnx", "--output", folder / "m.onnx")[0] == 0
    metadata = onnxruntime.InferenceSession(str(folder / "m.onnx")).get_modelmeta().custom_metadata_map
    metadata = {key: json.loads(value) for key, value in metadata.items()}
    content = checkpoint.read(learnt)
    assert metadata["class_names"] == ["colour 0", "colour 1", "colour 2"] and metadata["short_side"] == 64
    assert metadata["score_thresholds"] == content["score_thresholds"] and metadata["category_ids"] == [3, 7, 11]


def test_mistakes_are_one_line(learnt, folder, command, monkeypatch):
    (folder / "text.pt").write_text("hello")
    for expected, arguments in {
        "none.pt": ("--checkpoint", folder / "none.pt", "--format", "onnx"),
        "text.pt": ("--checkpoint", folder / "text.pt", "--format", "onnx"),
        "is a folder; give the name of a file": ("--checkpoint", learnt, "--format", "onnx", "--output", folder),
        "--images 0": ("--checkpoint", learnt, "--format", "onnx", "--images", "0"),
        "missing.json": ("--checkpoint", learnt, "--format", "onnx", "--data", "missing.json", folder),
        "cannot be written": ("--checkpoint", learnt, "--format", "onnx", "--output", "/dev/null/x.onnx"),
    }.items():
        code, _, err = command(export.main, *arguments)
        assert code == 2 and expected in err and err.splitlines()[-1].startswith("error: "), (expected, err)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = command(export.main, "--checkpoint", learnt, "--format", "onnx")
    assert code == 2 and "pip install" in err
