"""scripts/check_data.py: it finds planted flaws, and its figures on anchors agree with brute force."""

import itertools
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detector.anchors import Anchors, TorchvisionAnchors
from scripts import check_data


def words(page: Path) -> str:
    html = re.sub(r"data:image/[^\"]+", "", page.read_text())
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


@pytest.fixture
def call(folder, command):
    def run(*arguments):
        code, out, err = command(check_data.main, "--output", folder / "new" / "page.html", *arguments)
        return code, out, err, words(folder / "new" / "page.html") if code == 0 else ""

    return run


def brute(anchors, boxes, sizes):
    """The best IoU of each box over all anchors of the grid, in float64."""
    best_ious = []
    for box, size in zip(boxes.astype(np.float64), sizes):
        padded = tuple(-(-side // 32) * 32 for side in size)
        map_sizes = [tuple(-(-side // stride) for side in padded) for stride in (8, 16, 32, 64, 128)]
        grid = anchors.build(map_sizes, padded).double().numpy()
        low, high = np.maximum(grid[:, :2], box[:2]), np.minimum(grid[:, 2:], box[2:])
        overlap = np.clip(high - low, 0, None).prod(axis=1)
        areas = (grid[:, 2:] - grid[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
        best_ious.append((overlap / (areas - overlap)).max())
    return np.array(best_ious)


@pytest.mark.parametrize("kind", [Anchors, TorchvisionAnchors])
def test_best_iou_is_the_maximum_over_all_anchors(kind):
    rng = np.random.default_rng(0)
    sizes = [[(300, 400), (417, 290), (64, 800)][number % 3] for number in range(120)]
    corner = np.array([[rng.uniform(-5, size[1] - 4), rng.uniform(-5, size[0] - 4)] for size in sizes])
    boxes = np.column_stack([corner, corner + np.exp(rng.uniform(1, 6, (120, 2)))]).astype(np.float32)
    anchors = kind(sizes=(16, 40, 64, 128, 256), octaves=2, ratios=(0.6, 1.0, 2.5))
    np.testing.assert_allclose(check_data.best_iou(anchors, boxes, sizes), brute(anchors, boxes, sizes), atol=2e-5)


def noise(folder, names, size=96):
    rng = np.random.default_rng(0)
    for name in names:
        low_resolution = rng.integers(0, 256, (8, 8, 3), np.uint8)  # a smooth image, or it would have no hash
        Image.fromarray(low_resolution).resize((size, size), Image.BICUBIC).save(folder / name)


def annotations(path, boxes, size=96):
    """`boxes` maps each file name to boxes (class, x, y, w, h)."""
    document = {"images": [], "annotations": [], "categories": [{"id": k + 1, "name": n} for k, n in enumerate("ab")]}
    for number, (name, image_boxes) in enumerate(boxes.items(), start=1):
        document["images"].append({"id": number, "file_name": name, "width": size, "height": size})
        for label, *box in image_boxes:
            entry = {"id": len(document["annotations"]) + 1, "image_id": number, "category_id": label, "iscrowd": 0}
            document["annotations"].append(entry | {"bbox": box, "area": box[2] * box[3]})
    path.write_text(json.dumps(document))
    return str(path)


@pytest.fixture
def planted(folder):
    images = folder / "images"
    images.mkdir()
    names = [f"{n}.png" for n in range(6)]
    noise(images, names)
    duplicate = Image.open(images / "2.png").resize((90, 90)).resize((96, 96))
    duplicate.save(images / "again.jpg", quality=80)
    train = {name: [(1, 10, 10, 40, 40)] for name in names}
    train["0.png"] += [(1, 10, 10, 40, 41), (2, 0, 0, 96, 95)]  # twice; the whole image
    train["1.png"] += [(1, 5, 60, 2, 3), (1, 2, 80, 90, 6)]  # tiny; thin
    val = {"again.jpg": [(1, 10, 10, 40, 40)]}
    arguments = ("--train", annotations(folder / "train.json", train), "--val", annotations(folder / "val.json", val))
    sizes = ("data.short_side=96", "data.long_side=96", "anchors.sizes=[24,32,48,64,96]")
    return (*arguments, "--images", images, "--set", *sizes)


def test_planted_flaws_are_found(planted, call, folder, in_browser):
    code, out, err, printed = call(*planted)
    assert code == 0, err
    assert "warning: 1 training image also in val, equal or nearly so: remove them from one of the two" in out
    assert "train: 2.png" in printed and "val: again.jpg" in printed
    assert "classes without a box in val, which cannot be scored: b" in out
    for kind, place in {
        "less than 4 pixels": r"1\.png: a \[5\.0, 60\.0, 7\.0, 63\.0\]",
        "more than 95% of the image": r"0\.png: b \[0\.0, 0\.0, 96\.0, 95\.0\]",
        "more than ten times": r"1\.png: a \[2\.0, 80\.0, 92\.0, 86\.0\]",
        "the same class twice": r"0\.png: a \[10\.0, 10\.0, 50\.0, 51\.0\]",
    }.items():
        assert re.search(rf"1 box, {kind}[^:]*: {place}", printed), kind
    assert re.search(r"a 9 6 1 1 ", printed) and re.search(r"b 1 1 0 0 ", printed)  # boxes and images of each class
    for width in (400, 1280):
        layout = in_browser(folder / "new" / "page.html", width)
        assert layout["wide"] <= width and layout["broken"] == 0 and layout["remote"] == 0 and layout["overlaps"] == []
        assert layout["images"] == 2 + 2 + 6  # plots, the pair, samples


def test_a_clean_set_has_no_findings(folder, call):
    (folder / "images").mkdir()
    noise(folder / "images", ["a.png", "b.png", "c.png"])
    boxes = {"a.png": [(1, 10, 10, 40, 40), (2, 20, 30, 60, 60)], "b.png": []}
    train = annotations(folder / "train.json", boxes)
    val = annotations(folder / "val.json", {"c.png": boxes["a.png"]})
    image_size = ("--set", "data.short_side=96", "data.long_side=96")
    code, out, err, printed = call("--train", train, "--val", val, *image_size)
    assert code == 0, err
    assert "no training image is also in val" in out and "boxes:" not in out and "anchors.sizes" not in out
    assert "Boxes to look at" not in printed and "In train and in val" not in printed
    code, out, _, _ = call("--train", train, *image_size)  # without val
    assert code == 0 and "in val" not in out


def test_anchors_that_fit_more_boxes_are_suggested(folder, call):
    (folder / "images").mkdir()
    names = [f"{n}.png" for n in range(8)]
    noise(folder / "images", names)
    rng = np.random.default_rng(1)
    boxes = {n: [(1, *rng.uniform(0, 60, 2), *rng.uniform(9, 14, 2)) for _ in range(9)] for n in names}
    train = annotations(folder / "train.json", boxes)
    arguments = ("--train", train, "--set", "data.short_side=96", "data.long_side=96")
    code, out, err, _ = call(*arguments)  # the smallest anchor is 32 pixels wide
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("with --set"))
    settings, after, before = re.search(r"--set (\S+ \S+) it is ([\d.]+)%.* instead of ([\d.]+)%", line).groups()
    assert float(before) > 90 and float(after) < 30
    _, out, _, _ = call(*arguments, *settings.split())
    assert f"{after}% of the training boxes have no anchor" in out


def test_a_config_supplies_the_files_and_options(tiny, folder, call):
    code, out, err, printed = call("--config", tiny(folder))
    assert code == 0, err
    assert "8 images" in out and "4 images" in out and "no anchor with IoU 0.5" in printed


def test_images_are_searched_for_beside_each_annotation_file(folder, call):
    for split, name in (("train", "a.png"), ("valid", "b.png")):
        (folder / split).mkdir()
        noise(folder / split, [name])
        annotations(folder / split / "_annotations.coco.json", {name: [(1, 10, 10, 40, 40)]})
    files = [folder / split / "_annotations.coco.json" for split in ("train", "valid")]
    image_size = ("--set", "data.short_side=96", "data.long_side=96")
    code, out, err, _ = call("--train", files[0], "--val", files[1], *image_size)
    assert code == 0, err
    assert out.count("1 image, 1 box") == 2
    code, _, err, _ = call("--train", files[0], "--val", files[1], "--images", folder / "train", *image_size)
    assert code == 2 and f"1 of 1 images of {files[1]} are not there" in err and f"all are in {folder / 'valid'}" in err


def test_flaws_that_are_accepted_are_counted(folder, call):
    (folder / "images").mkdir()
    names = ["a.jpg", "b.jpg", "c.png", "d.png"]
    noise(folder / "images", names)
    for name in names[:2]:
        path = folder / "images" / name
        path.write_bytes(path.read_bytes()[:-2])
    for name in names[2:]:
        pixels = np.asarray(Image.open(folder / "images" / name).convert("L")).astype(np.uint16) << 4
        Image.fromarray(pixels).save(folder / "images" / name)
    boxes = {name: [("1", 10, 10, 40, 40)] for name in names}
    train = annotations(folder / "train.json", boxes)
    code, out, err, printed = call("--train", train, "--set", "data.short_side=96", "data.long_side=96")
    assert code == 0, err
    for line in (
        "Accepted: 4 numbers in quotes (the first in annotations[0]).",
        "images with their last bytes missing (read as far as possible): 2 (such as ",
        "images with 16 bits of which only the lower 12 are used, which look dark; scale them to the full range: 2",
    ):
        assert line in out and line in printed


def test_a_set_without_boxes_is_refused_unless_trusted(folder, call):
    (folder / "images").mkdir()
    noise(folder / "images", ["a.png"])
    train = annotations(folder / "train.json", {"a.png": []})
    arguments = ("--train", train, "--set", "data.short_side=96", "data.long_side=96")
    code, _, err, _ = call(*arguments)
    assert code == 2 and "no box to learn from" in err
    code, out, err, _ = call(*arguments, "data.trust=true")
    assert code == 0, err
    assert "no positive anchors in 1 training images" in out


def test_mistakes_are_one_line(planted, call, folder, tiny):
    (folder / "images" / "3.png").write_bytes(b"no image")
    (folder / "broken.json").write_text("{")
    shutil.copytree(folder / "images", folder / "fewer")
    (folder / "fewer" / "0.png").unlink()
    for expected, arguments in {
        "3.png": planted,
        "1 of 6 images cannot be used": planted,
        "give --config": (),
        "goes with --train or --val": ("--config", tiny(folder), "--images", folder / "images"),
        "is a folder; give the name of a file": ("--config", tiny(folder), "--output", folder),
        "none.yaml": ("--config", "none.yaml"),
        "broken.json": ("--train", folder / "broken.json", "--images", folder),
        "are not there": (*planted, "--images", folder / "fewer"),
        "data.short": (*planted, "--set", "data.short=1"),
        "cannot be written": ("--config", tiny(folder), "--output", "/dev/null/page.html"),
    }.items():
        code, _, err, _ = call(*arguments)
        assert code == 2 and expected in err.splitlines()[-1], (expected, err)
        assert err.splitlines()[-1].startswith("error: ")


def test_positives_and_negatives_are_counted_over_all_anchors(folder, call):
    (folder / "images").mkdir()
    noise(folder / "images", ["a.png", "b.png"])
    train = annotations(folder / "train.json", {"a.png": [(1, 10, 10, 40, 40)], "b.png": []})
    box, ious = np.array([10, 10, 50, 50]), []
    for stride, size in zip((8, 16, 32, 64, 128), (32, 64, 128, 256, 512)):
        for row, column, octave, ratio in itertools.product(*[range(-(-96 // stride))] * 2, range(3), (0.5, 1.0, 2.0)):
            area = (size * 2 ** (octave / 3)) ** 2
            half = np.array([(area / ratio) ** 0.5, (area * ratio) ** 0.5]) / 2
            centre = np.array([column, row]) * stride
            overlap = np.clip(np.minimum(centre + half, box[2:]) - np.maximum(centre - half, box[:2]), 0, None).prod()
            ious.append(overlap / (area + 40 * 40 - overlap))
    positives = sum(iou >= 0.5 for iou in ious)
    negatives = sum(iou < 0.4 for iou in ious) + len(ious)  # the other image has only negatives
    assert positives > 1  # so that the box's best anchor is among them
    code, out, err, printed = call("--train", train, "--set", "data.short_side=96", "data.long_side=96")
    assert code == 0, err
    cells = (2 * (positives + negatives) - positives) / positives
    line = f"1 positive to {negatives / positives:,.0f} negatives among the anchors of 2 training images, "
    line += f"1 to {cells:,.0f} with 2 classes for each anchor (iou)"
    assert line in out and line in printed
