"""Laws of the demo set: reproducible, disjoint splits, tight boxes, honest outliers, no half-written set."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.datasets import load_digits

from data import demo
from data.demo import (
    CLASS_WEIGHTS,
    FULL,
    MAX_COVERED,
    PHOTO_COLUMNS,
    QUICK,
    covered,
    plan_scenes,
    render,
    split_digits,
    styled,
    write_demo,
)
from detector.configure import configure
from detector.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = dict(train_images=30, val_images=6)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    write_demo(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoilt")
    write_demo(folder, **SMALL, wrong_labels=0.2, shifted_boxes=0.1)
    return folder


@pytest.fixture(scope="module")
def train_scenes():
    return plan_scenes("train", 200, seed=0)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(folder, split):
    return json.loads((folder / f"{split}.json").read_text())


def test_same_seed_same_bytes(clean, tmp_path):
    write_demo(tmp_path, **SMALL)
    assert contents(tmp_path) == contents(clean)


def test_other_seed_other_pictures(clean, tmp_path):
    write_demo(tmp_path, **SMALL, seed=1)
    ours, theirs = contents(clean), contents(tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours)


def test_more_scenes_keep_the_first_ones():
    two_scenes, four_scenes = plan_scenes("val", 2, seed=3), plan_scenes("val", 4, seed=3)
    assert all(np.array_equal(render(a), render(b)) for a, b in zip(two_scenes, four_scenes))


def test_splits_share_no_digit_and_no_photo_column(train_scenes):
    train, val = split_digits().values()
    assert sorted([*train, *val]) == list(range(1797))
    assert set(load_digits().target[val]) == set(range(10))
    for split, scenes in {"train": train_scenes, "val": plan_scenes("val", 50, seed=0)}.items():
        assert {digit.source for scene in scenes for digit in scene.digits} <= set(split_digits()[split])
        first, last = PHOTO_COLUMNS[split]
        assert all(first <= scene.crop[0] and scene.crop[0] + scene.crop[2] <= last for scene in scenes)
    assert PHOTO_COLUMNS["train"][1] <= PHOTO_COLUMNS["val"][0]


def test_labels_are_those_of_the_real_digits(train_scenes):
    target = load_digits().target
    assert all(target[digit.source] == digit.label for scene in train_scenes for digit in scene.digits)


def test_drawing_a_digit_changes_its_box_and_nothing_else(train_scenes):
    for scene in train_scenes[:20]:
        if not scene.digits:
            continue
        without = scene._replace(digits=scene.digits[:-1])
        changed = (render(scene) != render(without)).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        ink = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert ink == scene.digits[-1].box


def test_digits_contrast_with_the_background(train_scenes):
    for scene in train_scenes[:20]:
        for i, digit in enumerate(scene.digits):
            x, y, width, height = digit.box
            window = np.s_[y : y + height, x : x + width]
            before = render(scene._replace(digits=scene.digits[:i]))[window].astype(float)
            after = render(scene._replace(digits=scene.digits[: i + 1]))[window].astype(float)
            assert np.abs(after - before).mean(axis=2)[digit.alpha == 1].mean() > 55


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_lie_in_images_of_the_stated_size(spoilt, split):
    dataset = load(spoilt, split)
    images = {image["id"]: image for image in dataset["images"]}
    for image in images.values():
        picture = cv2.imread(str(spoilt / split / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
    for annotation in dataset["annotations"]:
        x, y, width, height = annotation["bbox"]
        image = images[annotation["image_id"]]
        assert 0 <= x < x + width <= image["width"] and 0 <= y < y + height <= image["height"]
        assert annotation["area"] == width * height >= 40 and annotation["iscrowd"] == 0


def test_overlap_is_limited(train_scenes):
    for scene in train_scenes:
        boxes = [digit.box for digit in scene.digits]
        assert all(covered(a, b) <= MAX_COVERED for i, a in enumerate(boxes) for b in boxes[:i])


def test_covered_worked_by_hand():
    assert covered([0, 0, 4, 4], [2, 3, 2, 2]) == 2 / 4
    assert covered([0, 0, 4, 4], [4, 0, 4, 4]) == 0
    assert covered([0, 0, 2, 2], [5, 5, 2, 2]) == 0


def test_truth_as_detections_scores_one(clean):
    truth = COCO(clean / "val.json")
    detections = truth.loadRes([dict(annotation, score=1.0) for annotation in truth.dataset["annotations"]])
    evaluation = COCOeval(truth, detections, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_scenes_have_a_long_tail_of_classes_many_sizes_crowds_and_empty_images(train_scenes):
    digits = [digit for scene in train_scenes for digit in scene.digits]
    counts = Counter(digit.label for digit in digits)
    shares = np.array([counts[label] for label in range(10)]) / len(digits)
    assert np.abs(shares - CLASS_WEIGHTS / CLASS_WEIGHTS.sum()).max() < 0.04
    sides = [max(digit.alpha.shape) for digit in digits]
    assert min(sides) < 17 and max(sides) > 50
    crowds = [len(scene.digits) for scene in train_scenes]
    assert 0.02 < np.mean(np.equal(crowds, 0)) < 0.1
    assert 0.05 < np.mean(np.greater_equal(crowds, 20)) < 0.2
    assert {scene.width > scene.height for scene in train_scenes} == {True, False}


def test_outliers_change_only_marked_train_annotations(clean, spoilt):
    before, after = contents(clean), contents(spoilt)
    assert all(before[name] == after[name] for name in before if name.suffix == ".jpg")
    assert load(clean, "val")["annotations"] == load(spoilt, "val")["annotations"]

    truth, noisy = load(clean, "train")["annotations"], load(spoilt, "train")["annotations"]
    kinds = Counter(annotation.get("outlier") for annotation in noisy)
    assert kinds["label"] == round(0.2 * len(truth)) and kinds["box"] == round(0.1 * len(truth))
    expected_keys = {None: set(), "label": {"category_id", "outlier"}, "box": {"bbox", "outlier"}}
    for a, b in zip(truth, noisy, strict=True):
        changed_keys = {key for key in b if a.get(key) != b[key]}
        assert changed_keys == expected_keys[b.get("outlier")]
        assert 1 <= b["category_id"] <= 10
        if b.get("outlier") == "box":  # equal sizes: IoU = c / (2 - c) for a covered share c
            share = covered(a["bbox"], b["bbox"])
            assert a["bbox"][2:] == b["bbox"][2:] and share / (2 - share) < 0.35


def test_every_annotation_may_be_an_outlier(tmp_path):
    write_demo(tmp_path, train_images=5, val_images=1, wrong_labels=0.5, shifted_boxes=0.5)
    annotations = load(tmp_path, "train")["annotations"]
    assert sum("outlier" in annotation for annotation in annotations) >= len(annotations) - 1


def test_options_set_the_image_size_and_the_number_and_size_of_digits(tmp_path):
    options = dict(SMALL, size=(256, 224), objects=(2, 4), digit_size=(10, 12))
    write_demo(tmp_path, **options)
    for split in ("val", "train"):
        dataset = load(tmp_path, split)
        assert {(image["width"], image["height"]) for image in dataset["images"]} == {(256, 224)}
        assert cv2.imread(str(tmp_path / split / dataset["images"][0]["file_name"])).shape == (224, 256, 3)
        counts = Counter(annotation["image_id"] for annotation in dataset["annotations"])
        assert all(2 <= counts[image["id"]] <= 4 for image in dataset["images"])
        sides = [max(annotation["bbox"][2:]) for annotation in dataset["annotations"]]
        assert min(sides) >= 8 and max(sides) <= 15  # rotated and trimmed, a digit is up to a quarter larger
    assert set(counts.values()) == {2, 3, 4}
    with pytest.raises(UserError, match="another data set"):
        write_demo(tmp_path, **options | dict(objects=(2, 5)))
    with pytest.raises(UserError, match="another data set"):
        write_demo(tmp_path, **SMALL)


def test_a_digit_size_also_limits_crowded_scenes():
    style = styled(FULL._replace(kinds=(0, 1, 0)), size=None, objects=None, digit_size=(8, 12))
    sides = [side for scene in plan_scenes("val", 3, 0, style) for digit in scene.digits for side in digit.box[2:]]
    assert len(sides) > 40 and max(sides) <= 15


def test_scenes_may_be_larger_than_the_photos():
    (scene,) = plan_scenes("val", 1, seed=0, style=QUICK._replace(sizes=((1024, 768),)))
    assert render(scene).shape == (768, 1024, 3)
    first, last = PHOTO_COLUMNS["val"]
    assert first <= scene.crop[0] and scene.crop[0] + scene.crop[2] <= last


def test_a_finished_set_is_left_alone_and_another_is_refused(tmp_path, capsys):
    write_demo(tmp_path, train_images=2, val_images=2)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    write_demo(tmp_path, train_images=2, val_images=2)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="--force"):
        write_demo(tmp_path, train_images=1, val_images=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps

    write_demo(tmp_path, train_images=1, val_images=2, force=True)
    assert len(load(tmp_path, "train")["images"]) == len(list((tmp_path / "train").iterdir())) == 1


def test_a_foreign_data_set_is_refused(tmp_path):
    (tmp_path / "train.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="another data set"):
        write_demo(tmp_path, train_images=1, val_images=1)
    assert (tmp_path / "train.json").read_text() == '{"images": []}'


def test_an_interrupted_run_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.demo.add_outliers", interrupt)
        write_demo(tmp_path, train_images=2, val_images=1)
    assert list(tmp_path.rglob("*.jpg")) and not list(tmp_path.glob("*.json"))
    write_demo(tmp_path, train_images=2, val_images=1)
    assert len(load(tmp_path, "train")["images"]) == 2


@pytest.mark.parametrize(
    "mistake",
    [
        dict(train_images=0),
        dict(val_images=-1),
        dict(seed=-1),
        dict(wrong_labels=1.1),
        dict(shifted_boxes=float("nan")),
        dict(wrong_labels=0.6, shifted_boxes=0.6),
        dict(size=(31, 64)),
        dict(objects=(3, 2)),
        dict(objects=(-1, 2)),
        dict(digit_size=(20, 14)),
        dict(digit_size=(14, 70)),
        dict(digit_size=(7, 14)),
    ],
)
def test_the_error_names_the_wrong_option(tmp_path, mistake):
    with pytest.raises(UserError, match=next(iter(mistake))):
        write_demo(tmp_path, **mistake)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_its_options_say(tmp_path, command):
    options = ["--train-images", 3, "--val-images", 2, "--seed", 5, "--wrong-labels", 0.5, "--objects", 2, 4]
    assert command(demo.main, "--output", tmp_path / "a", *options)[0] == 0
    write_demo(tmp_path / "b", train_images=3, val_images=2, seed=5, wrong_labels=0.5, objects=(2, 4))
    files = [path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file()]
    assert len(files) == 7
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


@pytest.mark.parametrize(
    "option, counts", [([], (750, 150)), (["--quick"], (640, 100)), (["--val-images", 9], (750, 9))]
)
def test_the_numbers_of_scenes_are_those_of_the_help_text(option, counts, command, monkeypatch):
    given = {}
    monkeypatch.setattr(demo, "write_demo", lambda folder, **options: given.update(options))
    page = " ".join(command(demo.main, "--help")[1].split())
    assert "(default: 750; --quick: 640)" in page and "(default: 150; --quick: 100)" in page
    assert command(demo.main, *option)[0] == 0 and (given["train_images"], given["val_images"]) == counts


@pytest.mark.parametrize("option, config", [([], "demo_long"), (["--quick"], "demo")])
def test_without_output_the_set_lies_where_its_config_reads_it(option, config, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(demo.main, *option, "--train-images", 1, "--val-images", 1)
    paths = configure(ROOT / f"configs/{config}/base.yaml").data
    assert code == 0 and all(Path(split.annotations).is_file() for split in (paths.train, paths.val)), err


def test_a_folder_that_cannot_be_written_is_named(tmp_path, command):
    (tmp_path / "file").touch()
    code, _, err = command(demo.main, "--output", tmp_path / "file" / "set", "--train-images", 1, "--val-images", 1)
    assert code == 2 and err.startswith(f"error: --output: {tmp_path / 'file' / 'set'} cannot be written")


@pytest.mark.usefixtures("warm_starts")
def test_a_mistake_on_the_command_line_ends_in_one_line(tmp_path):
    command = [sys.executable, "-m", "data.demo", "--output", str(tmp_path), "--wrong-labels", "2"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: wrong_labels: 2.0, a share must lie in 0..1\n"
