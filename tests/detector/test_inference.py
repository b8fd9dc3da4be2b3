"""A checkpoint in use: `from detector import load`."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data.coco import CocoDataset
from data.coco_eval import score
from data.images import read_image
from data.loader import eval_loader
from data.transforms import EvalTransform
from detector import assemble, checkpoint, load
from detector.engine import predict
from detector.errors import UserError
from detector.inference import UNKNOWN_THRESHOLD


@pytest.fixture(scope="module")
def learnt(overfit, tmp_path_factory):
    folder, _ = overfit(tmp_path_factory.mktemp("inference"), 3, precision="float32")
    return folder / "best.pt"


@pytest.fixture(scope="module")
def val_set(learnt):
    _, cfg = checkpoint.build_model(checkpoint.read(learnt), learnt)
    files = cfg.data.val
    return CocoDataset(files.annotations, files.images, EvalTransform(cfg.data.short_side, cfg.data.long_side))


def pictures(val_set):
    return [read_image(val_set.folder / name) for name in val_set.file_names]


def test_it_finds_what_evaluation_finds(learnt, val_set):
    model, cfg = checkpoint.build_model(checkpoint.read(learnt), learnt)
    expected = predict(model, eval_loader(val_set, 2), assemble.build_postprocess(cfg), torch.device("cpu"))
    for image_id, found in zip(val_set.image_ids, load(learnt, "cpu").detect(pictures(val_set)), strict=True):
        for own, theirs in zip(found, expected[image_id], strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-3)


def test_images_of_several_sizes_are_as_good_as_one_at_a_time(learnt, val_set):
    detector = load(learnt, "cpu")
    first, second = pictures(val_set)
    second = second[:70]
    for found, image in zip(detector.detect([first, second]), (first, second), strict=True):
        (alone,) = detector.detect([image])
        assert len(found.scores) == len(alone.scores) > 0
        assert (found.boxes - alone.boxes).abs().max() < 1 and (found.scores - alone.scores).abs().max() < 0.05


def test_a_call_gives_what_reaches_the_threshold_of_its_class(learnt, val_set):
    detector = load(learnt, "cpu")
    content = checkpoint.read(learnt)
    assert all(value > 0 for value in content["score_thresholds"])
    detector.thresholds = torch.tensor([0.0, 2.0, detector.thresholds[2]])
    image = pictures(val_set)[0]
    (every,) = detector.detect([image])
    found = detector(image)
    kept = [s >= detector.thresholds[c] for s, c in zip(every.scores, every.labels)]
    assert torch.equal(found.boxes, every.boxes[torch.stack(kept)]) and "colour 1" not in found.names
    assert len(detector(image, min_score=0).scores) == len(every.scores) == len(detector(image, min_score=0).names)
    assert len(detector(image, min_score=1.1).scores) == 0


def test_the_thresholds_are_those_of_the_last_evaluation(learnt, val_set):
    detector = load(learnt, "cpu")
    detections = dict(zip(val_set.image_ids, detector.detect(pictures(val_set))))
    metrics = score(val_set.annotations, detections, val_set.category_ids)
    expected = [metrics["per_class"][name]["threshold"] for name in detector.class_names]
    assert detector.thresholds.tolist() == pytest.approx(expected, abs=1e-3)


def test_sixteen_bits_are_the_same_picture(learnt, val_set):
    detector = load(learnt, "cpu")
    grey = Image.fromarray(pictures(val_set)[0]).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
    assert deep.mode.startswith("I;16")
    found, expected = detector(deep, min_score=0), detector(grey, min_score=0)
    assert torch.equal(found.boxes, expected.boxes) and len(found.scores) > 0
    with pytest.raises(ValueError, match="no fixed range"):
        detector(grey.convert("F"))


def test_a_picture_is_turned_as_its_camera_says(learnt, val_set, tmp_path):
    detector = load(learnt, "cpu")
    image = pictures(val_set)[0]
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(image)))  # stored a quarter turned to the left
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.png", exif=exif)
    found, expected = detector(Image.open(tmp_path / "lying.png")), detector(image)
    assert torch.equal(found.boxes, expected.boxes) and found.names == expected.names


def test_a_checkpoint_without_thresholds_has_one_for_all(learnt, folder):
    content = checkpoint.read(learnt)
    torch.save({**content, "score_thresholds": [0.7, -1.0, -1.0]}, folder / "some.pt")
    del content["score_thresholds"]
    torch.save(content, folder / "older.pt")
    assert load(folder / "some.pt", "cpu").thresholds.tolist() == pytest.approx([0.7] + [UNKNOWN_THRESHOLD] * 2)
    assert load(folder / "older.pt", "cpu").thresholds.tolist() == pytest.approx([UNKNOWN_THRESHOLD] * 3)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), "photo.jpg"])
def test_what_is_no_image_is_refused(learnt, image):
    with pytest.raises(ValueError, match="an image is"):
        load(learnt, "cpu")(image)


def test_a_model_that_diverged_does_not_find_nothing(learnt, val_set, folder):
    content = checkpoint.read(learnt)
    content["model"]["head.logits.bias"][1] = torch.nan
    torch.save(content, folder / "nan.pt")
    detector, images = load(folder / "nan.pt", "cpu"), pictures(val_set)
    for call in (lambda: detector(images[0]), lambda: detector.detect(images)):
        with pytest.raises(FloatingPointError, match="the model's output is not finite"):
            call()


def test_mistakes(tmp_path, learnt):
    with pytest.raises(UserError, match=r"none\.pt"):
        load(tmp_path / "none.pt")
    with pytest.raises(UserError, match="device"):
        load(learnt, "no such device")


def test_who_takes_a_loss_alone_gets_nothing_else():
    code = "import sys; from detector.losses import GHMC; print([m for m in sys.modules if m.startswith('detector')])"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "detector.losses.ghm" in names and "inference" not in names and "config" not in names
