"""scripts/convert.py: boxes written in another format come back unchanged, and unused data is reported."""

import json
import random
import shlex
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
import yaml
from PIL import Image

from data.coco import CocoDataset
from data.transforms import EvalTransform
from detector.configure import configure
from scripts import convert

NAMES = ["cat", "dog & <co>", "größe"]
SIZES = [(64, 48), (48, 64), (80, 80)]
REAL = Path(__file__).parents[3] / "shared" / "data" / "bccd"


@pytest.fixture
def known():
    """Returns name -> (size, boxes), in whole pixels, which every format can express."""
    rng = random.Random(0)
    images = {}
    for number in range(9):
        width, height = SIZES[number % 3]
        boxes = []
        for _ in range(number % 4):
            w, h = rng.randint(4, 30), rng.randint(4, 30)
            boxes.append((rng.choice(NAMES), (rng.randint(0, width - w), rng.randint(0, height - h), w, h)))
        images[f"{number}.jpg"] = (width, height), boxes
    return images


def paint(folder, images):
    for name, ((width, height), _) in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), (120, 80, 40)).save(folder / name)


def as_yolo(folder, images, names=NAMES, **entries):
    paint(folder / "images", images)
    for name, ((width, height), boxes) in images.items():
        (folder / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f"{names.index(n)} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}"
            for n, (x, y, w, h) in boxes
        ]
        (folder / "labels" / name).with_suffix(".txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(yaml.safe_dump({"names": names, **entries}, allow_unicode=True), encoding="utf-8")


def as_voc(folder, images):
    paint(folder / "JPEGImages", images)
    (folder / "Annotations").mkdir(exist_ok=True)
    for name, ((width, height), boxes) in images.items():
        object_elements = "".join(
            f"<object><name>{escape(n)}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for n, (x, y, w, h) in boxes
        )
        text = f"<annotation><size><width>{width}</width><height>{height}</height></size>{object_elements}</annotation>"
        (folder / "Annotations" / name).with_suffix(".xml").write_text(text, encoding="utf-8")


def as_labelme(folder, images):
    paint(folder, images)
    for name, ((width, height), boxes) in images.items():
        shapes = [
            {"label": n, "shape_type": "rectangle", "points": [[x + w, y], [x, y + h]]} for n, (x, y, w, h) in boxes
        ]
        content = {"shapes": shapes, "imagePath": name, "imageWidth": width, "imageHeight": height}
        (folder / name).with_suffix(".json").write_text(json.dumps(content))


def read(folder):
    """Returns name -> (size, boxes) over all files, and the file names of each split."""
    images, splits = {}, {}
    for split in [split for split in ("train", "val", "test") if (folder / f"{split}.json").exists()]:
        document = json.loads((folder / f"{split}.json").read_text())
        names = {entry["id"]: entry["name"] for entry in document["categories"]}
        splits[split] = {entry["file_name"] for entry in document["images"]}
        for image in document["images"]:
            boxes = [
                (names[entry["category_id"]], tuple(entry["bbox"]))
                for entry in document["annotations"]
                if entry["image_id"] == image["id"]
            ]
            images[image["file_name"]] = (image["width"], image["height"]), boxes
    return images, splits


def same(converted, known):
    converted = {Path(name).name: value for name, value in converted.items()}
    assert converted.keys() == known.keys()
    for name, (size, boxes) in known.items():
        assert converted[name][0] == size
        assert [box[0] for box in converted[name][1]] == [box[0] for box in boxes]
        coordinates = np.array([box[1] for box in converted[name][1]]).reshape(-1, 4)
        np.testing.assert_allclose(coordinates, np.array([box[1] for box in boxes]).reshape(-1, 4), atol=1e-3)


@pytest.mark.parametrize(("form", "write"), [("yolo", as_yolo), ("voc", as_voc), ("labelme", as_labelme)])
def test_boxes_survive_a_round_trip(known, folder, command, form, write):
    write(folder / "src", known)
    code, out, err = command(convert.main, form, folder / "src", folder / "dst")
    assert code == 0, err
    converted, splits = read(folder / "dst")
    same(converted, known)
    assert len(splits["val"]) == 2 and not splits["val"] & splits["train"]  # a fifth of nine
    dataset = CocoDataset(folder / "dst" / "train.json", folder / "dst" / "images", EvalTransform(64, 64))
    assert set(dataset.class_names) == set(NAMES)
    assert "check_data.py" in out and "train.py" in out and (folder / "dst" / "report.txt").exists()
    assert not list(folder.glob(".*"))


def test_the_same_seed_gives_the_same_files(known, folder, command):
    as_yolo(folder / "src", known)
    files = {}
    for name, options in (("a", ()), ("b", ()), ("c", ("--seed", 1)), ("d", ("--val", 0.5))):
        assert command(convert.main, "yolo", folder / "src", folder / name, *options)[0] == 0
        files[name] = [(folder / name / f"{split}.json").read_bytes() for split in ("train", "val")]
    assert files["a"] == files["b"] != files["c"]
    assert len(read(folder / "d")[1]["val"]) == 4


@pytest.mark.parametrize("how", ["data.yaml", "list", "folders", "voc"])
def test_the_split_of_the_set_is_kept(known, folder, command, how):
    if how == "voc":
        as_voc(folder / "src", known)
        (folder / "src" / "ImageSets" / "Main").mkdir(parents=True)
        (folder / "src" / "ImageSets" / "Main" / "val.txt").write_text("3\n5\n")
    else:
        images = {("valid/" if name in ("3.jpg", "5.jpg") else "train/") + name: image for name, image in known.items()}
        entries = {"data.yaml": {"val": "../images/valid"}, "list": {"val": "val.txt"}, "folders": {}}[how]
        as_yolo(folder / "src", images, **entries)
        (folder / "src" / "val.txt").write_text("images/valid/3.jpg\nimages/valid/5.jpg\n")
    code, out, err = command(convert.main, "voc" if how == "voc" else "yolo", folder / "src", folder / "dst")
    assert code == 0, err
    assert {Path(name).name for name in read(folder / "dst")[1]["val"]} == {"3.jpg", "5.jpg"}
    assert "drawn by" not in out


@pytest.mark.parametrize("how", ["data.yaml", "folders", "voc", "list and same val"])
def test_the_test_part_gets_a_file_of_its_own(known, folder, command, how):
    names = list(known)
    if how == "voc":
        as_voc(folder / "src", known)
        (folder / "src" / "ImageSets" / "Main").mkdir(parents=True)
        (folder / "src" / "ImageSets" / "Main" / "test.txt").write_text("3  1\n5 -1\n")
        test_images = {"3.jpg", "5.jpg"}
    else:
        parts = {"test": names[:2], "valid": names[2:4], "train": names[4:]}
        entries = {"val": "images/valid", "test": "images/test"} if how == "data.yaml" else {}
        if how == "list and same val":  # then validation images are drawn, but not from the test part
            entries = {"val": "images/train", "test": "test.txt"}
            parts = {"test": names[:2], "train": names[2:]}
        images = {f"{part}/{name}": known[name] for part, part_names in parts.items() for name in part_names}
        as_yolo(folder / "src", images, **entries)
        (folder / "src" / "test.txt").write_text("".join(f"images/test/{name}\n" for name in parts["test"]))
        test_images = set(parts["test"])
    code, out, err = command(convert.main, "voc" if how == "voc" else "yolo", folder / "src", folder / "dst")
    assert code == 0, err
    converted, splits = read(folder / "dst")
    same(converted, known)
    assert {Path(name).name for name in splits["test"]} == test_images and splits["train"] and splits["val"]
    assert sum(map(len, splits.values())) == len(known) and "2 images for a test" in out
    assert f"--data {folder / 'dst' / 'test.json'} {folder / 'dst' / 'images'}" in out


def test_a_random_split_keeps_the_test_part(known, folder, command):
    names = list(known)
    of_parts = {f"{'test' if name in names[:2] else 'train'}/{name}": known[name] for name in names}
    all_test = {f"test/{name}": known[name] for name in names}
    for source, images, kept in (("parts", of_parts, set(names[:2])), ("all", all_test, set())):
        as_yolo(folder / source, images)
        target = folder / f"{source}_converted"
        code, out, err = command(convert.main, "yolo", folder / source, target, "--split", "random")
        assert code == 0, err
        assert {Path(name).name for name in read(target)[1].get("test", ())} == kept and "drawn by --seed 0" in out


def test_a_test_part_that_repeats_another_part_is_none(known, folder, command):
    names = list(known)
    images = {f"{'val' if name in names[:2] else 'train'}/{name}": known[name] for name in names}
    for number, (test, options) in enumerate([("val", ()), ("val", ("--split", "random")), ("train", ())]):
        as_yolo(folder / "src", images, train="images/train", val="images/val", test=f"images/{test}")
        code, _, err = command(convert.main, "yolo", folder / "src", folder / f"dst{number}", *options)
        assert code == 0, err
        splits = read(folder / f"dst{number}")[1]
        assert splits.keys() == {"train", "val"} and sum(map(len, splits.values())) == len(known)
        if not options:
            assert {Path(name).name for name in splits["val"]} == set(names[:2])


def test_a_test_part_without_labels_is_left_out(known, folder, command):
    names = list(known)
    images = {f"{'test' if name in names[:2] else 'train'}/{name}": known[name] for name in names}
    as_yolo(folder / "src", images)
    for name in names[:2]:
        (folder / "src" / "labels" / "test" / name).with_suffix(".txt").unlink()
    for target, options, parts in (("dst", (), {"train", "val"}), ("all", ("--val", 1), {"val"})):
        code, out, err = command(convert.main, "yolo", folder / "src", folder / target, *options)
        assert code == 0, err
        converted, splits = read(folder / target)
        assert splits.keys() == parts and {Path(name).name for name in converted} == set(names[2:])
        assert "left out: images of the test part, which has no boxes: 2" in out


def test_all_images_can_be_for_scoring(known, folder, command):
    images = {f"{'test' if name == '3.jpg' else 'train'}/{name}": value for name, value in known.items()}
    as_yolo(folder / "src", images)
    code, out, err = command(convert.main, "yolo", folder / "src", folder / "dst", "--val", 1)
    assert code == 0, err
    converted, splits = read(folder / "dst")
    same(converted, known)
    assert splits.keys() == {"val"} and "eval.py" in out and "train.py" not in out


def test_a_list_may_hold_paths_and_names_with_spaces(known, folder, command):
    image = known["3.jpg"]
    known = {"a/1.jpg": image, "b/1.jpg": image, "b/a photo.jpg": image, "b/v1.2.jpg": image}
    as_yolo(folder / "src", known, val="val.txt")
    (folder / "src" / "val.txt").write_text("./images/b/1.jpg\n/home/me/src/images/b/a photo.jpg\nv1.2\ngone.jpg\n")
    code, out, err = command(convert.main, "yolo", folder / "src", folder / "dst")
    assert code == 0, err
    assert read(folder / "dst")[1]["val"] == {"images/b/1.jpg", "images/b/a photo.jpg", "images/b/v1.2.jpg"}
    assert "lines of val.txt that name no image: 1 (gone.jpg)" in out


def test_shared_and_second_label_files_are_reported(known, folder, command):
    as_yolo(folder / "src", known)
    name, (_, boxes) = next((name, image) for name, image in known.items() if image[1])
    images, labels = folder / "src" / "images", folder / "src" / "labels"
    Image.open(images / name).save(images / f"{Path(name).stem}.png")
    (folder / "src" / f"{Path(name).stem}.txt").write_text((labels / f"{Path(name).stem}.txt").read_text())
    code, out, err = command(convert.main, "yolo", folder / "src", folder / "dst")
    assert code == 0, err
    assert "a second label file of the same image: 1" in out and "share a label file with another: 1" in out
    image_boxes = {Path(path).name: boxes_of_image for path, (_, boxes_of_image) in read(folder / "dst")[0].items()}
    assert len(image_boxes[f"{Path(name).stem}.png"]) == len(image_boxes[name]) == len(boxes)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"2": "größe", "0": "cat", "1": "dog & <co>"}, None),
        ({"a": "cat"}, "each name needs a number"),
        ({99999999: "cat"}, "numbers go from 0 to 99999"),
        (["cat", "two\nlines"], "is called 'two\\nlines'"),
        (["cat", ""], "is called ''"),
    ],
)
def test_class_names_must_be_printable_and_have_valid_numbers(known, folder, command, names, expected):
    as_yolo(folder / "src", known)
    (folder / "src" / "data.yaml").write_text(yaml.safe_dump({"names": names}, allow_unicode=True), encoding="utf-8")
    code, _, err = command(convert.main, "yolo", folder / "src", folder / "a b")
    if expected:
        assert code == 2 and expected in err.splitlines()[-1] and not (folder / "a b").exists(), err
    else:
        assert code == 0 and {box[0] for _, boxes in read(folder / "a b")[0].values() for box in boxes} <= set(NAMES), (
            err
        )


def test_commands_can_be_pasted(known, folder, command):
    as_yolo(folder / "src", known)
    _, out, _ = command(convert.main, "yolo", folder / "src", folder / "a b")
    words = shlex.split(next(line for line in out.splitlines() if line.startswith("look at it")))
    assert str(folder / "a b/train.json") in words
    words = shlex.split(next(line for line in out.splitlines() if line.startswith("train:")))
    cfg = configure(words[words.index("--config") + 1], words[words.index("--set") + 1 :])
    assert cfg.data.val.annotations == str(folder / "a b/val.json")


def test_the_current_folder_can_be_the_target(known, folder, command, monkeypatch):
    as_yolo(folder / "src", known)
    (folder / "hands").mkdir()
    monkeypatch.chdir(folder / "hands")
    code, out, err = command(convert.main, "yolo", folder / "src", ".")
    assert code == 0 and f"run=hands data.train.annotations={folder}/hands/train.json " in out, err
    assert (folder / "hands" / "train.json").exists()


def test_unused_data_is_reported(known, folder, command):
    as_yolo(folder / "src", known)
    labels = folder / "src" / "labels"
    (labels / "1.txt").write_text(
        "0 0.5 0.5 0.2 0.2\n\nhello\n0 0.5 0.5 0 0.2\n1 0.95 0.5 0.2 0.2 0.9\n7 0.5 0.5 0.1 0.1\n0 nan 0.5 0.1 0.1\n"
        "1 0.1 0.2 0.3 0.2 0.3 0.6\n"
    )
    (labels / "2.txt").unlink()
    (labels / "99.txt").write_text("0 0.5 0.5 0.2 0.2")
    (folder / "src" / "images" / "4.jpg").write_bytes(b"no image")
    code, out, err = command(convert.main, "yolo", folder / "src", folder / "dst")
    assert code == 0, err
    printed = (folder / "dst" / "report.txt").read_text()
    for kind, count in {
        "lines that are not class cx cy w h": 1,
        "boxes without area": 1,
        "cut off at the border": 1,
        "boxes of a class without a name; add it to data.yaml or classes.txt": 1,
        "not finite": 1,
        "without a label file, taken as without boxes": 1,
        "text without an image": 1,
        "images or labels that cannot be used": 1,
    }.items():
        (line,) = (line for line in printed.splitlines() if kind in line)
        assert line.endswith(f": {count}") and line.split(":")[0] in out, line
    (image_boxes,) = (boxes for name, (_, boxes) in read(folder / "dst")[0].items() if name.endswith("/1.jpg"))
    assert [name for name, _ in image_boxes] == ["cat", "dog & <co>", "class 7", "dog & <co>"]
    assert image_boxes[3][1] == pytest.approx((0.1 * 48, 0.2 * 64, 0.2 * 48, 0.4 * 64), abs=1e-3)  # the polygon


def test_flaws_of_voc_and_labelme_files_are_reported(known, folder, command):
    as_voc(folder / "voc", known)
    annotation = folder / "voc" / "Annotations" / "1.xml"
    annotation.write_text("<!DOCTYPE annotation>" + annotation.read_text().replace("<difficult>0", "<difficult>1"))
    (folder / "voc" / "Annotations" / "2.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>')
    (folder / "voc" / "Annotations" / "3.xml").unlink()
    (folder / "voc" / "Annotations" / "4.xml").write_text("<annotation><object/></annotation>")
    annotation = folder / "voc" / "Annotations" / "5.xml"
    annotation.write_text(annotation.read_text().replace("<width>80", "<width>800"))
    annotation = folder / "voc" / "Annotations" / "6.xml"
    annotation.write_text(annotation.read_text().replace("<width>64", "<width>inf"))  # counts as no width
    code, _, err = command(convert.main, "voc", folder / "voc", folder / "dst")
    assert code == 0, err
    printed = (folder / "dst" / "report.txt").read_text()
    for words in (
        "difficult objects",
        "declares entities",
        "3.jpg",
        "objects without a name",
        "5.jpg: the image is 80 x 80",
    ):
        assert words in printed, words
    documents = [json.loads((folder / "dst" / f"{split}.json").read_text()) for split in ("train", "val")]
    assert sum(annotation["iscrowd"] for document in documents for annotation in document["annotations"]) == 1

    as_labelme(folder / "labelme", known)
    shapes = [
        {"label": "cat", "shape_type": "circle", "points": [[20, 20], [23, 24]]},
        {"label": "cat", "shape_type": "polygon", "points": [[1, 2], [11, 4], [5, 22]]},
        {"label": "cat", "shape_type": "line", "points": [[1, 2], [11, 4]]},
    ]
    (folder / "labelme" / "1.json").write_text(json.dumps({"shapes": shapes}))
    (folder / "labelme" / "2.json").write_text("{}")
    assert command(convert.main, "labelme", folder / "labelme", folder / "dst2")[0] == 0
    printed = (folder / "dst2" / "report.txt").read_text()
    assert "cat line" in printed and "is not labelme's" in printed
    boxes = read(folder / "dst2")[0]["1.jpg"][1]
    assert boxes == [("cat", (15, 15, 10, 10)), ("cat", (1, 2, 10, 20))]


def test_a_rotated_photo_is_read_as_it_was_labelled(folder, command):
    """EXIF asks for a rotation. YOLO labels refer to the rotated image, VOC files may refer to the stored one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    known = {"a.jpg": ((60, 40), [("cat", (5, 6, 20, 10))]), "b.jpg": ((60, 40), [("cat", (1, 1, 9, 9))])}
    as_voc(folder / "voc", known)
    rotated = {name: ((40, 60), boxes) for name, (_, boxes) in known.items()}
    as_yolo(folder / "yolo", rotated, names=["cat"])
    for place in ("voc/JPEGImages", "yolo/images"):
        for name in known:
            Image.new("RGB", (60, 40)).save(folder / place / name, exif=exif)
    for form, expected in (("voc", known), ("yolo", rotated)):
        assert command(convert.main, form, folder / form, folder / f"{form}_dst")[0] == 0
        same(read(folder / f"{form}_dst")[0], expected)
        for split in ("train", "val"):
            dataset = CocoDataset(
                folder / f"{form}_dst" / f"{split}.json", folder / f"{form}_dst" / "images", EvalTransform(96, 96)
            )
            assert dataset[0][0].shape[1:] == ((64, 96) if form == "voc" else (96, 64))


def test_mistakes_are_one_line_and_nothing_is_left(known, folder, command, monkeypatch):
    as_yolo(folder / "src", known)
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("")
    as_labelme(folder / "single", dict(list(known.items())[1:2]))
    as_yolo(folder / "twice", known, names=[*NAMES, "cat"])
    src, dst = folder / "src", folder / "dst"
    for expected, arguments in {
        "no such folder": ("yolo", folder / "none", dst),
        "no images": ("yolo", folder / "empty", dst),
        "is there already": ("yolo", src, folder / "full"),
        "--val 1.5": ("yolo", src, dst, "--val", "1.5"),
        "no boxes in the format of voc": ("voc", src, dst),
        "one is needed": ("labelme", folder / "single", dst),
        "a name is there twice": ("yolo", folder / "twice", dst),
        "cannot be written": ("yolo", src, "/dev/null/dst"),
    }.items():
        code, _, err = command(convert.main, *arguments)
        assert code == 2 and expected in err and err.splitlines()[-1].startswith("error: "), (expected, err)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    code, _, err = command(convert.main, "yolo", src, dst)
    assert code == 2 and "No space left" in err and not dst.exists() and not list(folder.glob(".*"))


@pytest.mark.skipif(not REAL.exists(), reason="no real images beside the project (../shared/data)")
def test_real_boxes_survive_a_round_trip_through_yolo(folder, command):
    document = json.loads((REAL / "val.json").read_text())
    names = [entry["name"] for entry in document["categories"]]
    class_names = {entry["id"]: entry["name"] for entry in document["categories"]}
    known = {}
    for image in document["images"][:20]:
        boxes = [
            (class_names[entry["category_id"]], tuple(entry["bbox"]))
            for entry in document["annotations"]
            if entry["image_id"] == image["id"]
        ]
        known[image["file_name"]] = (image["width"], image["height"]), boxes
    as_yolo(folder / "src", known, names=names)
    for name in known:
        (folder / "src" / "images" / name).write_bytes((REAL / "images" / name).read_bytes())
    code, _, err = command(convert.main, "yolo", folder / "src", folder / "dst")
    assert code == 0, err
    same(read(folder / "dst")[0], known)
