"""The use of a checkpoint: `from detector import load`."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data.coco import CocoDataset
from data.coco_eval import score
from data.loader import eval_loader
from data.transforms import EvalTransform
from detector import assemble, checkpoint, load
from detector.engine import predict
from detector.errors import UserError
from detector.images import read_image
from detector.inference import UNKNOWN_THRESHOLD
from detector.structures import Detections
from tests.data.helpers import one_line


@pytest.fixture(scope="module")
def learnt(learnt):
    """best.pt of the run that conftest.py trains."""
    return learnt / "best.pt"


@pytest.fixture(scope="module")
def val_set(learnt):
    _, cfg = checkpoint.build_model(checkpoint.read(learnt), learnt)
    files = cfg.data.val
    return CocoDataset(files.annotations, files.images, EvalTransform(cfg.data.short_side, cfg.data.long_side))


def pictures(val_set):
    return [read_image(val_set.folder / name) for name in val_set.file_names]


def test_detect_finds_the_same_as_evaluation(learnt, val_set):
    model, cfg = checkpoint.build_model(checkpoint.read(learnt), learnt)
    expected = predict(model, eval_loader(val_set, 2), assemble.build_postprocess(cfg), torch.device("cpu"))
    for image_id, detections in zip(val_set.image_ids, load(learnt, "cpu").detect(pictures(val_set)), strict=True):
        for ours, theirs in zip(detections, expected[image_id], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_images_of_several_sizes_give_almost_the_same_as_one_at_a_time(learnt, val_set):
    detector = load(learnt, "cpu")
    first, second = pictures(val_set)
    second = second[:70]
    for batched, image in zip(detector.detect([first, second]), (first, second), strict=True):
        (single,) = detector.detect([image])
        assert len(batched.scores) == len(single.scores) > 0
        assert (batched.boxes - single.boxes).abs().max() < 1 and (batched.scores - single.scores).abs().max() < 0.05


def test_a_call_returns_detections_that_reach_the_threshold_of_their_class(learnt, val_set):
    detector = load(learnt, "cpu")
    content = checkpoint.read(learnt)
    assert all(value > 0 for value in content["score_thresholds"])
    detector.thresholds = torch.tensor([0.05, 2.0, detector.thresholds[2]])
    image = pictures(val_set)[0]
    (unfiltered,) = detector.detect([image])
    detections = detector(image)
    is_kept = [s >= detector.thresholds[c] for s, c in zip(unfiltered.scores, unfiltered.labels)]
    assert torch.equal(detections.boxes, unfiltered.boxes[torch.stack(is_kept)]) and "colour 1" not in detections.names
    assert len(detector(image, min_score=0.05).scores) == len(unfiltered.scores)
    assert len(detector(image, min_score=1.1).scores) == 0


def test_a_score_below_that_of_evaluation_is_respected(learnt, val_set):
    detector = load(learnt, "cpu")
    image = pictures(val_set)[0]
    (evaluated,) = detector.detect([image])
    every = detector(image, min_score=0)
    low = (detector.postprocess.score_threshold + float(every.scores.min())) / 2
    assert 0 < every.scores.min() < low < detector.postprocess.score_threshold
    expected = every.scores >= low
    found = detector(image, min_score=low)
    assert torch.equal(found.boxes, every.boxes[expected]) and len(found.names) == int(expected.sum())
    detector.thresholds.fill_(low)
    assert torch.equal(detector(image).boxes, found.boxes)
    (again,) = detector.detect([image])  # the threshold of evaluation has not changed
    assert torch.equal(again.scores, evaluated.scores)


def test_the_thresholds_are_those_of_the_last_evaluation(learnt, val_set):
    detector = load(learnt, "cpu")
    detections = dict(zip(val_set.image_ids, detector.detect(pictures(val_set))))
    metrics = score(val_set.annotations, detections, val_set.category_ids)
    expected = [metrics["per_class"][name]["threshold"] for name in detector.class_names]
    assert detector.thresholds.tolist() == pytest.approx(expected, abs=1e-3)


def test_a_sixteen_bit_image_gives_the_same_detections(learnt, val_set):
    detector = load(learnt, "cpu")
    grey_image = Image.fromarray(pictures(val_set)[0]).convert("L")
    deep_image = Image.fromarray(np.asarray(grey_image).astype(np.uint16) * 256)
    assert deep_image.mode.startswith("I;16")
    detections, expected = detector(deep_image, min_score=0), detector(grey_image, min_score=0)
    assert torch.equal(detections.boxes, expected.boxes) and len(detections.scores) > 0
    with pytest.raises(ValueError, match="no fixed range"):
        detector(grey_image.convert("F"))


def test_an_image_is_rotated_as_its_exif_says(learnt, val_set, tmp_path):
    detector = load(learnt, "cpu")
    image = pictures(val_set)[0]
    rotated = Image.fromarray(np.ascontiguousarray(np.rot90(image)))  # stored after a quarter turn to the left
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "lying.png", exif=exif)
    expected = detector(image)
    for given in (tmp_path / "lying.png", str(tmp_path / "lying.png"), Image.open(tmp_path / "lying.png")):
        detections = detector(given)
        assert torch.equal(detections.boxes, expected.boxes) and detections.names == expected.names
    grey_image = np.asarray(Image.fromarray(image).convert("L"))
    deep_image = Image.fromarray(np.ascontiguousarray(np.rot90(grey_image)).astype(np.uint16) * 256)
    deep_image.save(tmp_path / "deep.png", exif=exif)
    deep, grey = (detector(given, min_score=0) for given in (tmp_path / "deep.png", Image.fromarray(grey_image)))
    assert torch.equal(deep.boxes, grey.boxes) and len(grey.scores) > 0


def seen_by(detector, given):
    """The pixels of an image, in any form, that the model gets."""
    seen, nothing = [], Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    detector.detect = lambda images, *_: seen.extend(images) or [nothing]
    detector(given)
    return seen[0]


def test_files_and_pil_images_are_read_as_in_training(learnt, tmp_path):
    detector = load(learnt, "cpu")
    pixels = np.random.default_rng(4).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    twelve = pixels[:, :, 0].astype(np.uint16) << 4
    Image.fromarray(twelve).save(tmp_path / "twelve.tif", tiffinfo={281: 4095})  # MaxSampleValue
    Image.fromarray(pixels).convert("P").save(tmp_path / "palette.png", transparency=bytes(range(256)))
    Image.fromarray(pixels).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-2])
    assert np.array_equal(seen_by(detector, tmp_path / "twelve.tif")[:, :, 0], pixels[:, :, 0])
    for path in sorted(tmp_path.iterdir()):
        assert np.array_equal(seen_by(detector, str(path)), read_image(path)), path
        if path.suffix != ".jpg":  # PIL cannot decode it
            assert np.array_equal(seen_by(detector, Image.open(path)), read_image(path)), path


def test_a_gray_array_is_as_a_gray_pil_image(learnt, val_set):
    detector = load(learnt, "cpu")
    gray_image = Image.fromarray(pictures(val_set)[0]).convert("L")
    assert np.array_equal(seen_by(detector, np.asarray(gray_image)), seen_by(detector, gray_image))


def test_a_file_that_cannot_be_read_is_an_error_of_one_line(learnt, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for path, reason in ((tmp_path / "gone.jpg", "No such file"), (tmp_path / "text.jpg", "no image format")):
        with pytest.raises(UserError) as excinfo:
            load(learnt, "cpu")(path)
        one_line(excinfo, str(path), reason)


def test_a_checkpoint_without_thresholds_uses_one_for_all_classes(learnt, folder):
    content = checkpoint.read(learnt)
    torch.save({**content, "score_thresholds": [0.7, -1.0, -1.0]}, folder / "some.pt")
    del content["score_thresholds"]
    torch.save(content, folder / "older.pt")
    assert load(folder / "some.pt", "cpu").thresholds.tolist() == pytest.approx([0.7] + [UNKNOWN_THRESHOLD] * 2)
    assert load(folder / "older.pt", "cpu").thresholds.tolist() == pytest.approx([UNKNOWN_THRESHOLD] * 3)


NO_IMAGES = [
    np.zeros((4, 4), np.float32),
    np.zeros((4, 4, 3), np.float32),
    np.zeros((4, 4, 4), np.uint8),
    np.zeros(4, np.uint8),
    np.zeros((0, 4, 3), np.uint8),
    np.zeros((4, 0), np.uint8),
    Image.new("RGB", (0, 4)),
    7,
]


@pytest.mark.parametrize("image", NO_IMAGES, ids=lambda image: f"{type(image).__name__} {getattr(image, 'shape', '')}")
def test_an_input_that_is_no_image_is_refused(learnt, image):
    with pytest.raises(ValueError, match="an image is"):
        load(learnt, "cpu")(image)


def test_a_model_that_diverged_raises_an_error(learnt, val_set, folder):
    content = checkpoint.read(learnt)
    content["model"]["head.logits.bias"][1] = torch.nan
    torch.save(content, folder / "nan.pt")
    detector, images = load(folder / "nan.pt", "cpu"), pictures(val_set)
    for call in (lambda: detector(images[0]), lambda: detector.detect(images)):
        with pytest.raises(FloatingPointError, match="the model's output is not finite"):
            call()


def test_a_missing_file_and_an_unknown_device_are_refused(tmp_path, learnt):
    with pytest.raises(UserError, match=r"none\.pt"):
        load(tmp_path / "none.pt")
    with pytest.raises(UserError, match="device"):
        load(learnt, "no such device")


def test_importing_a_loss_does_not_import_the_rest():
    code = "import sys; from detector.losses import GHMC; print(*(m for m in sys.modules if m.startswith('detector')))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "detector.losses.ghm" in names
    assert {name for name in names if not name.startswith("detector.losses")} <= {
        "detector", "detector.distributed", "detector.errors", "detector.structures",
    }  # fmt: skip
