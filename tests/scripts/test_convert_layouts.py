"""scripts/convert.py on the layouts that tools and people make: folders, file names, splits and label formats.

Image number n has one box, at (n + 1, 2), so that the label of another image is noticed.
"""

import base64
import io
import json
import os
import unicodedata
from pathlib import Path

import pytest
import yaml
from PIL import Image

from scripts import convert

SIZE = (64, 48)
KINDS = {"yolo": ".txt", "voc": ".xml", "labelme": ".json"}


def box(n):
    return (n + 1, 2, 10 + n, 12)


def picture(path, form=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (120, 80, 40)).save(path, form)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def label_of(kind, n, inside="any.jpg", name="cat"):
    x, y, w, h = box(n)
    if kind == "yolo":
        return f"0 {(x + w / 2) / 64} {(y + h / 2) / 48} {w / 64} {h / 48}\n"
    if kind == "voc":
        corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
        object_element = f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
        return f"<annotation><filename>{inside}</filename>{object_element}</annotation>"
    shape = {"label": name, "points": [[x, y], [x + w, y + h]], "shape_type": "rectangle"}
    return json.dumps({"shapes": [shape], "imagePath": inside, "imageData": None})


def make(root, kind, pairs):
    """`pairs` has the paths of the image and label file of each n, with None for a missing file."""
    for n, (image, label) in enumerate(pairs):
        if image:
            picture(root / image)
        if label:
            text(root / label, label_of(kind, n))


def numbered(image, label, count=6):
    return [(image.format(n), label.format(n)) for n in range(count)]


@pytest.fixture
def run(command, folder):
    """Converts folder/src; returns the exit code, the output, and for each split name -> boxes."""

    def call(kind, *sources, options=()):
        code, out, err = command(convert.main, kind, *(sources or (folder / "src",)), folder / "dst", *options)
        splits = {}
        for split in ("train", "val", "test"):
            if (folder / "dst" / f"{split}.json").exists():
                document = json.loads((folder / "dst" / f"{split}.json").read_text())
                images = {entry["id"]: (entry["file_name"], []) for entry in document["images"]}
                for entry in document["annotations"]:
                    images[entry["image_id"]][1].append(tuple(entry["bbox"]))
                splits[split] = dict(images.values())
        return code, out, err.splitlines()[-1] if code else err, splits

    return call


def right(splits, count, number=lambda name: int("".join(filter(str.isdigit, Path(name).stem)))):
    """Checks that every image is there once, with its own box."""
    image_boxes = {**splits["train"], **splits["val"]}
    assert len(image_boxes) == len(splits["train"]) + len(splits["val"]) == count
    for name, boxes in image_boxes.items():
        assert boxes == [pytest.approx(box(number(name)), abs=0.01)], name


def names(split):
    return {Path(name).name for name in split}


# ------------------------------------------------------------------------------------------------ images and labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("img/{}.jpg", "txt/{}"),
        ("images/{}.jpg", "annotations/xmls/{}"),
        ("pictures/{}.png", "json/{}"),
        ("{}.jpg", "{}.jpg"),  # 1.jpg.txt
        ("train_images/{}.jpg", "train_labels/{}"),
        ("a/img/{}.jpg", "a/ann/{}"),
        ("Images/{}.JPG", "Labels/{}"),
        ("images/Foto {}.jpg", "labels/foto%20{}"),
        (
            "images/" + unicodedata.normalize("NFD", "zug é {}.jpg"),
            "labels/" + unicodedata.normalize("NFC", "zug é {}"),
        ),
        ("images/img_{}.jpeg", "labels/IMG_{}"),
    ],
)
def test_labels_are_found_in_every_layout(run, folder, kind, image, label):
    make(folder / "src", kind, numbered(image, label + KINDS[kind]))
    code, out, err, splits = run(kind)
    assert code == 0, err
    right(splits, 6)
    assert "without a label" not in out


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_names_in_several_folders_keep_their_labels(run, folder, kind):
    pairs = [(f"{part}/img/{n}.jpg", f"{part}/lab/{n}{KINDS[kind]}") for n in range(3) for part in ("site a", "site b")]
    make(folder / "src", kind, pairs)
    code, _, err, splits = run(kind)
    assert code == 0, err
    number = {image: n for n, (image, _) in enumerate(pairs)}
    right(splits, 6, number.get)


@pytest.mark.parametrize("kind", ["voc", "labelme"])
def test_the_name_inside_a_label_file_finds_its_image(run, folder, kind):
    for n in range(6):
        picture(folder / "src" / "images" / f"photo {n}.jpg")
        inside = [
            "photo {}.jpg",
            "C:\\me\\photo {}.jpg",
            "/home/me/Photo%20{}.jpg",
            "../images/photo {}.JPG",
            "photo {}",
        ]
        label = label_of(kind, n, inside=inside[n % 5].format(n))
        text(folder / "src" / "annotations" / f"{90 + n}{KINDS[kind]}", label)
    code, out, err, splits = run(kind)
    assert code == 0, err
    right(splits, 6)
    assert "by the name inside their label file: 6" in out


def test_label_files_that_name_another_image_are_refused_unless_all_name_the_same(run, folder):
    for n in range(6):
        picture(folder / "src" / f"{n}.jpg")
        text(folder / "src" / f"{n}.xml", label_of("voc", n, inside="0.jpg"))
    code, _, err, splits = run("voc")
    assert code == 0, err
    right(splits, 6)
    (folder / "dst").rename(folder / "first")
    for n in range(6):
        text(folder / "src" / f"{n}.xml", label_of("voc", n, inside=f"{(n + 1) % 6}.jpg"))
    code, _, err, _ = run("voc")
    assert (
        code == 2 and "6 label files have the name of one image but name another image inside" in err and "0.xml" in err
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_with_two_possible_label_files_is_not_background(run, folder, kind):
    make(folder / "src", kind, numbered("images/{}.jpg", "labels/{}" + KINDS[kind]))
    picture(folder / "src" / "images" / "x.jpg")
    for n, annotator in enumerate("ab"):
        text(folder / "src" / annotator / f"x{KINDS[kind]}", label_of(kind, n))
    code, out, err, splits = run(kind)
    assert code == 0, err
    right(splits, 6)
    assert "may or may not belong to a label file of their name: 1" in out


def test_an_image_with_two_different_label_files_is_left_out(run, folder):
    make(folder / "src", "yolo", numbered("images/{}.jpg", "labels/{}.txt"))
    picture(folder / "src" / "images" / "x.jpg")
    text(folder / "src" / "labels" / "x.txt", label_of("yolo", 1))
    text(folder / "src" / "x.txt", label_of("yolo", 2))
    code, out, err, splits = run("yolo")
    assert code == 0 and "may or may not belong to a label file of their name: 1" in out, err
    right(splits, 6)


def test_two_images_that_match_one_label_file_are_left_out(run, folder):
    make(folder / "src", "yolo", numbered("images/{}.jpg", "labels/{}.txt"))
    for name in ("Foto a.jpg", "foto%20A.jpg"):
        picture(folder / "src" / "images" / name)
    text(folder / "src" / "labels" / "foto a.txt", label_of("yolo", 1))
    code, out, err, splits = run("yolo")
    assert code == 0 and "may or may not belong to a label file of their name: 2" in out, err
    right(splits, 6)


def test_a_label_of_another_folder_does_not_fit_an_image_whose_folder_has_labels(run, folder):
    make(folder / "src", "yolo", numbered("a/images/{}.jpg", "a/labels/{}.txt"))
    make(folder / "src", "yolo", [("a/images/x.jpg", None), (None, "b/labels/x.txt")])
    code, out, err, splits = run("yolo")
    assert code == 0 and "may or may not belong to a label file of their name: 1" in out, err
    right(splits, 6)


def test_a_label_of_another_part_does_not_fit_an_image(run, folder):
    """The first image of train is background. Val has a label of that name, but lost its image."""
    pairs = [(f"{part}/images/{n}.jpg", f"{part}/labels/{n}.txt") for n in range(1, 4) for part in ("train", "val")]
    make(folder / "src", "yolo", [("train/images/0.jpg", None), (None, "val/labels/0.txt"), *pairs])
    code, out, err, splits = run("yolo")
    assert code == 0, err
    assert splits["train"]["train/images/0.jpg"] == [] and "val/images/0.jpg" not in splits["val"]
    assert "taken as without boxes: 1" in out and "text without an image: 1" in out


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_file_without_a_valid_box_does_not_mean_background(run, folder, kind):
    make(folder / "src", kind, numbered("{}.jpg", "{}" + KINDS[kind]))
    picture(folder / "src" / "x.jpg")
    point = {"label": "cat", "shape_type": "point", "points": [[3, 4]]}
    label = {
        "yolo": "0 0.5 0.5\n",
        "voc": "<annotation><object><name>cat</name></object></annotation>",
        "labelme": json.dumps({"shapes": [point]}),
    }[kind]
    text(folder / "src" / f"x{KINDS[kind]}", label)
    code, out, err, splits = run(kind)
    assert code == 0, err
    right(splits, 6)
    assert "none of what it holds is a box" in out


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_do_not_belong_together_are_reported_with_their_folders(run, folder, kind):
    make(folder / "src", kind, [(f"pics/a{n}.jpg", None) for n in range(4)])
    make(folder / "src", kind, [(None, f"marks/b{n}{KINDS[kind]}") for n in range(4)])
    code, _, err, splits = run(kind)
    assert code == 2 and not splits, err
    assert f"4 images in pics, 4 {KINDS[kind]} files in marks, 0 belong together" in err


def test_boxes_outside_their_image_do_not_mean_background(run, folder):
    make(folder / "src", "yolo", numbered("{}.jpg", "{}.txt"))
    picture(folder / "src" / "x.jpg")
    text(folder / "src" / "x.txt", "0 320 240 100 80\n")  # pixels
    code, out, err, splits = run("yolo")
    assert code == 0 and "images none of whose boxes lies in them: 1" in out, err
    right(splits, 6)


# --------------------------------------------------------------------------------------- suffixes, links, other files


def test_every_image_format_is_read_and_other_files_are_reported(run, folder):
    kinds = ["jfif", "jpe", "JPG", "gif", "avif", "webp", "bmp", "tif", "png", "jp2", "ppm"]
    make(folder / "src", "yolo", [(f"images/{n}.{kind}", f"labels/{n}.txt") for n, kind in enumerate(kinds)])
    for name in ("99.HEIC", "notes.csv", "._0.jpg", ".DS_Store", "film.mp4", "98.cr2"):
        text(folder / "src" / "images" / name, "?")
    code, out, err, splits = run("yolo")
    assert code == 0, err
    right(splits, len(kinds))
    printed = (folder / "dst" / "report.txt").read_text()
    for line in (
        ".heic pictures, which cannot be read here; save them as .jpg or .png: 1",
        ".cr2 pictures, which cannot be read here; save them as .jpg or .png: 1",
        "not used: .csv files: 1",
        "not used: .mp4 files: 1",
        "hidden files: 2",
    ):
        assert line in printed and line in out, line


def test_a_set_of_only_unreadable_pictures_is_refused(run, folder):
    text(folder / "src" / "a.heic", "?")
    code, _, err, _ = run("yolo")
    assert code == 2 and "no images in it that can be read" in err and "but .heic; save those as .jpg" in err


@pytest.mark.parametrize("how", ["folder", "each", "hub"])
def test_links_are_followed(run, folder, how):
    make(folder / "store", "yolo", [(f"{n}.jpg", None) for n in range(6)])
    make(folder / "src", "yolo", [(None, f"labels/train/{n}.txt") for n in range(6)])
    (folder / "src" / "images").mkdir()
    if how == "folder":
        (folder / "src" / "images" / "train").symlink_to(folder / "store", target_is_directory=True)
        (folder / "src" / "images" / "again").symlink_to(folder / "src", target_is_directory=True)  # an endless loop
    else:
        store, images = folder / "store", folder / "src" / "images" / "train"
        if how == "hub":
            store = store.rename(folder / "src" / "blobs")
        images.mkdir()
        for n in range(6):
            (images / f"{n}.jpg").symlink_to(os.path.relpath(store / f"{n}.jpg", images))
        (images / "lost.jpg").symlink_to("nowhere.jpg")
    code, out, err, splits = run("yolo")
    assert code == 0, err
    right(splits, 6)
    assert all(name.startswith("images/train/") for name in splits["train"])
    assert not any(path.is_symlink() for path in (folder / "dst").rglob("*"))
    assert ("lead back" if how == "folder" else "broken links") in out


# ------------------------------------------------------------------------------------------------ the split of the set


def yolo_parts(root, val="valid", train="train", order="{part}/{what}/{n}"):
    """Writes six training images and the validation images 6 and 7."""
    for n in range(8):
        place = order.format(part=val if n > 5 else train, what="{}", n=n)
        make_one(root, place, n)


def make_one(root, place, n):
    picture(root / f"{place.format('images')}.jpg")
    text(root / f"{place.format('labels')}.txt", label_of("yolo", n))


def yaml_of(root, **content):
    text(root / "data.yaml", yaml.safe_dump({"names": ["cat"], **content}))


FOLDERS = [
    {"val": "valid/images"},
    {"val": "../valid/images", "train": "../train/images"},
    {"val": "/content/cells-3/valid/images/", "train": "/content/cells-3/train/images"},
    {"val": "D:\\sets\\cells\\valid\\images", "train": "D:\\sets\\cells\\train\\images"},
    {"val": ".\\valid\\images", "train": ".\\train\\images"},
    {"val": "Valid/Images"},
    {"val": ["valid/images"], "train": ["train/images"]},
    {"val": "valid/images/*.jpg", "train": "train/images/*.jpg"},
    {"val": "valid", "train": "train"},
    {"path": "/datasets/cells", "val": "valid/images", "train": "train/images"},
    {"path": "../datasets", "val": "valid/images", "train": ["train/images"]},
    {"path": ".", "val": "valid/images", "train": "."},
    {"valid": "valid/images"},
    {"val": "/old/validation/images"},
    {},
]
LISTS = [
    {"val": "val.txt", "train": "train.txt"},
    {"val": "/home/me/cells/val.txt", "train": "/home/me/cells/train.txt"},
    {"path": "C:\\cells", "val": "lists\\val.txt", "train": "lists\\train.txt"},
    {},
]
LINES = [
    "valid/images/{}.jpg",
    "/home/me/cells/valid/images/{}.jpg",
    "D:\\cells\\valid\\images\\{}.jpg",
    "{}",
    "{}.PNG",
]


@pytest.mark.parametrize(
    ("entries", "line"),
    [*((entries, None) for entries in FOLDERS), *((entries, line) for entries in LISTS for line in LINES)],
)
def test_a_split_is_found_however_it_is_written(run, folder, entries, line):
    part = "a" if line and "valid" not in line else "valid"  # where folders name no part, the lists set it
    yolo_parts(folder / "src", part, "train" if part == "valid" else "b")
    yaml_of(folder / "src", **entries)
    if line:
        place = folder / "src" / ("lists" if "lists" in str(entries) else "")
        text(place / "val.txt", "".join(line.format(n) + "\r\n" for n in (6, 7)))
        text(place / "train.txt", "".join(line.replace("valid", "train").format(n) + "\n" for n in range(6)))
    code, out, err, splits = run("yolo")
    assert code == 0, err
    right(splits, 8)
    assert names(splits["val"]) == {"6.jpg", "7.jpg"} and "drawn by" not in out


@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "val2017", "images_val", "Validation Set"])
def test_folder_names_mark_the_validation_part(run, folder, val):
    yolo_parts(folder / "src", val)
    code, _, err, splits = run("yolo")
    assert code == 0, err
    assert names(splits["val"]) == {"6.jpg", "7.jpg"} and len(splits["train"]) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_label_folders_name_the_part_too(run, folder, kind):
    parts = ["train"] * 4 + ["val"] * 2
    make(folder / "src", kind, [(f"images/{n}.jpg", f"labels/{part}/{n}{KINDS[kind]}") for n, part in enumerate(parts)])
    code, _, err, splits = run(kind)
    assert code == 0, err
    right(splits, 6)
    assert names(splits["val"]) == {"4.jpg", "5.jpg"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"val": "../holdout/images"}, "data.yaml: no image of its part val is found (../holdout/images)"),
        ({"val": "/data/val/images", "train": "/data/train/images"}, "no image of its part"),
        ({"val": "val.txt"}, "no image of its part val is found (val.txt)"),
        ({"val": "images"}, None),  # it would be all images
        ({"val": "a/images", "train": "c/images"}, "no image of its part train is found (c/images)"),
    ],
)
def test_a_part_without_images_is_refused_unless_the_split_is_random(run, folder, entries, words):
    yolo_parts(folder / "src", "a", "b")
    yaml_of(folder / "src", **entries)
    code, _, err, splits = run("yolo")
    assert code == 2 and not splits
    assert "--split random" in err and (words or "no image of its part val is found") in err
    code, out, err, splits = run("yolo", options=("--split", "random"))
    assert code == 0 and "drawn by --seed 0" in out, err
    right(splits, 8)


def test_a_folder_that_does_not_name_the_part_is_not_taken_for_it(run, folder):
    make(folder / "src", "yolo", numbered("images/{}.jpg", "labels/{}.txt"))
    picture(folder / "src" / "more" / "x.jpg")
    yaml_of(folder / "src", val="/data/cells/val/images")
    code, _, err, _ = run("yolo")
    assert code == 2 and "no image of its part val is found" in err and "--split random" in err


@pytest.mark.parametrize("kind", KINDS)
def test_image_names_like_those_of_parts_do_not_set_the_split(run, folder, kind):
    """Their labels are not lists either, even if a label is empty or its image is missing."""
    pairs = [
        (f"images/{part}_{n}.jpg", f"labels/{part}_{n}{KINDS[kind]}") for n, part in enumerate(["train", "val"] * 3)
    ]
    make(folder / "src", kind, [*pairs, ("images/test.jpg", f"labels/test{KINDS[kind]}")])
    text(folder / "src" / "labels" / "val_99.txt", label_of("yolo", 9))
    text(folder / "src" / "labels" / "val_98.txt", "")
    code, out, err, splits = run(kind)
    assert code == 0 and "drawn by --seed 0" in out, err
    right(splits, 7, lambda name: 6 if "test" in name else int(Path(name).stem.split("_")[1]))


def test_a_list_does_not_select_images_of_another_part(run, folder):
    make(folder / "src", "yolo", numbered("train/images/{}.jpg", "train/labels/{}.txt"))  # val was not downloaded
    text(folder / "src" / "val.txt", "/data/val/images/1.jpg\n/data/val/images/2.jpg\n")
    code, _, err, _ = run("yolo")
    assert code == 2 and "val.txt: no image of its part val is found" in err


@pytest.mark.parametrize("line", ["%20", "images/%20", "%C2%A0", "''", "."])
def test_a_line_without_a_name_finds_no_image(run, folder, line):
    make(folder / "src", "yolo", numbered("images/{}.jpg", "labels/{}.txt"))
    text(folder / "src" / "train.txt", f"{line}\n" + "".join(f"images/{n}.jpg\n" for n in range(4)))
    text(folder / "src" / "val.txt", "images/4.jpg\nimages/5.jpg\n")
    code, out, err, splits = run("yolo")
    assert code == 0, err
    right(splits, 6)
    assert "lines of train.txt that name no image: 1 (" in out


def test_a_list_of_missing_images_is_refused(run, folder):
    yolo_parts(folder / "src", "a", "b")
    text(folder / "src" / "val.txt", "gone1.jpg\ngone2.jpg\n")
    code, _, err, _ = run("yolo")
    assert code == 2 and "val.txt: no image of its part val is found" in err and "--split random" in err


@pytest.mark.parametrize("names_file", ["obj.names", "data/obj.names", "cells.names"])
def test_darknet_lists_set_the_split(run, folder, names_file):
    for n in range(8):
        picture(folder / "src" / "data" / "obj" / f"{n}.jpg")
        text(folder / "src" / "data" / "obj" / f"{n}.txt", label_of("yolo", n))
    lines = {"train": range(5), "valid": (5, 6)}
    for part, numbers in lines.items():
        text(folder / "src" / "data" / f"{part}.txt", "".join(f"data/obj/{n}.jpg\n" for n in numbers))
    text(folder / "src" / names_file, "cell\n")
    content = f"classes = 1\ntrain  = data/train.txt\nvalid=data/valid.txt\nnames = {names_file}\nbackup = backup/\n"
    text(folder / "src" / "data" / "obj.data", content)
    code, out, err, splits = run("yolo")
    assert code == 0, err
    assert names(splits["val"]) == {"5.jpg", "6.jpg"} and len(splits["train"]) == 5
    assert "cell: 5 and 2 boxes" in out
    assert "in no part of the set's own split: 1 (data/obj/7.jpg)" in out


def test_no_validation_image_is_trained_on(run, folder):
    yolo_parts(folder / "src")
    yaml_of(folder / "src", train="train.txt", val="val.txt")
    text(folder / "src" / "train.txt", "".join(f"{n}.jpg\n" for n in range(8)))
    text(folder / "src" / "val.txt", "6.jpg\n7.jpg\n")
    code, out, err, splits = run("yolo")
    assert code == 0, err
    assert names(splits["val"]) == {"6.jpg", "7.jpg"} and len(splits["train"]) == 6
    assert "used for validation only: 2" in out


def test_the_same_images_in_both_parts_are_split_at_random(run, folder):
    make(folder / "src", "yolo", numbered("images/train2017/{}.jpg", "labels/train2017/{}.txt"))
    yaml_of(folder / "src", path="../datasets/coco128", train="images/train2017", val="images/train2017")
    code, out, err, splits = run("yolo")
    assert code == 0, err
    right(splits, 6)
    assert "are the same" in out and "drawn by --seed 0" in out


def test_two_voc_sets_below_one_folder_keep_their_lists(run, folder):
    for year in ("VOC2007", "VOC2012"):
        root = folder / "src" / year
        for n in range(5):
            picture(root / "JPEGImages" / f"{n}.jpg")
            text(root / "Annotations" / f"{n}.xml", label_of("voc", n, inside=f"{n}.jpg"))
        lists = {"train": (0, 1), "val": (2,), "trainval": (0, 1, 2), "test": (3,), "cat_train": (4,)}
        for part, numbers in lists.items():
            text(root / "ImageSets" / "Main" / f"{part}.txt", "".join(f"{n}  1\n" for n in numbers))
        text(root / "ImageSets" / "Segmentation" / "val.txt", "0\n")
    code, _, err, splits = run("voc")
    assert code == 0, err
    assert set(splits["val"]) == {f"{year}/JPEGImages/2.jpg" for year in ("VOC2007", "VOC2012")}
    assert len(splits["train"]) == 4
    assert set(splits["test"]) == {f"{year}/JPEGImages/3.jpg" for year in ("VOC2007", "VOC2012")}


# ------------------------------------------------------------------------------------------------- describing the set


def test_a_data_yaml_is_found_in_a_subfolder_or_given_by_path(run, folder):
    yolo_parts(folder / "src" / "Cells-3")
    yaml_of(folder / "src" / "Cells-3", val="../valid/images", train="../train/images")
    code, out, err, splits = run("yolo")
    assert code == 0 and names(splits["val"]) == {"6.jpg", "7.jpg"} and "cat: 6 and 2 boxes" in out, err
    (folder / "dst").rename(folder / "first")
    yolo_parts(folder / "src" / "Cells-2")
    text(folder / "src" / "Cells-2" / "data.yaml", "names: [dog]\nval: valid/images\n")
    code, _, err, _ = run("yolo")
    assert code == 2 and "Cells-2/data.yaml, Cells-3/data.yaml" in err
    code, out, err, _ = run("yolo", folder / "src" / "Cells-2" / "data.yaml")
    assert code == 0 and "dog: 6 and 2 boxes" in out, err


NAMES = ["no", "yes", "on", "off", "010", "1.10", "null", "~", "2020-01-01", "1:30", "cat"]


@pytest.mark.parametrize("form", ["list", "one line", "numbers"])
def test_class_names_are_read_as_written(run, folder, form):
    make(folder / "src", "yolo", numbered("{}.jpg", "{}.txt"))
    content = {
        "list": "names:\n" + "".join(f"- {name}\n" for name in NAMES),
        "one line": f"names: [{', '.join(NAMES)}]\n",
        "numbers": "names:\n" + "".join(f"  {n}: {name}\n" for n, name in enumerate(NAMES)),
    }[form]
    text(folder / "src" / "data.yaml", content + "path:\nkpt_shape: null\ntest: ~\n")
    code, _, err, splits = run("yolo")
    assert code == 0, err
    right(splits, 6)
    categories = json.loads((folder / "dst" / "train.json").read_text())["categories"]
    assert [category["name"] for category in categories] == NAMES


def test_empty_names_are_those_of_the_list(run, folder):
    make(folder / "src", "yolo", numbered("{}.jpg", "{}.txt"))
    text(folder / "src" / "data.yaml", "names:\n")
    text(folder / "src" / "classes.txt", "cell\n")
    assert run("yolo")[0] == 0
    assert json.loads((folder / "dst" / "train.json").read_text())["categories"] == [{"id": 1, "name": "cell"}]


@pytest.mark.parametrize(
    "shape",
    ["17", "[17]", "[17, 3, 1]", "[0, 3]", "[17, x]", "[17, 2.5]", "[[17], 3]", "{17: 3}", f"[{'9' * 5000}, 3]"],
)
def test_an_invalid_kpt_shape_is_one_line(run, folder, shape):
    make(folder / "src", "yolo", numbered("{}.jpg", "{}.txt"))
    text(folder / "src" / "data.yaml", f"names: [cat]\nkpt_shape: {shape}\n")
    code, _, err, _ = run("yolo")
    assert code == 2 and err.startswith("error: ") and "kpt_shape is " in err and "such as [17, 3]" in err


@pytest.mark.parametrize("key", ["names", "kpt_shape"])
def test_aliases_that_expand_to_a_billion_values_are_refused_in_one_line(run, folder, key):
    make(folder / "src", "yolo", numbered("{}.jpg", "{}.txt"))
    lines = [f"a0: &a0 [{', '.join('x' * 30)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 30)}]" for n in range(1, 7)]
    values = {"names": "[cat]"} | {key: "[cat, *a6]"}
    text(folder / "src" / "data.yaml", "\n".join([*lines, *(f"{name}: {value}" for name, value in values.items())]))
    code, _, err, _ = run("yolo")
    assert code == 2 and err.startswith("error: ") and len(err) < 500 and "\n" not in err, err[:500]


def test_class_lists_that_disagree_are_refused(run, folder):
    make(folder / "src", "yolo", numbered("a/{}.jpg", "a/{}.txt"))
    text(folder / "src" / "a" / "classes.txt", "cat\ndog\n")
    text(folder / "src" / "b" / "classes.txt", "cat\n")  # labelling began with fewer
    code, out, err, _ = run("yolo")
    assert code == 0 and "cat:" in out, err
    (folder / "dst").rename(folder / "first")
    text(folder / "src" / "b" / "classes.txt", "dog\ncat\n")
    code, _, err, _ = run("yolo")
    assert code == 2 and "number the classes differently" in err


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "utf-8-sig", "utf-8"])
def test_class_names_must_be_unicode(run, folder, encoding):
    make(folder / "src", "yolo", numbered("{}.jpg", "{}.txt"))
    (folder / "src" / "classes.txt").write_bytes("血小板\n".encode(encoding))
    code, out, err, _ = run("yolo")
    if encoding == "gbk":
        assert code == 2 and "classes.txt: is not text in UTF-8; save it as UTF-8" in err
    else:
        assert code == 0 and "血小板: " in out, err


# ------------------------------------------------------------------------------------------------------- label formats


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ([2, 3], "0.5 0.5 0.25 0.5 0.1 0.1 2 0.9 0.9 1"),
        ([2, 2], "0.5 0.5 0.25 0.5 0.1 0.1 0.9 0.9"),
        ([2, 2], "0.5 0.5 0.25 0.5"),
        (None, "0.5 0.5 0.25 0.5 0.1 0.1 2 0.9 0.9 1"),  # a polygon has no 2
        (None, "0.5 0.5 0.25 0.5 0.1 0.1 1 0.9 0.9 1 0 0 0"),  # nor an odd count
        (None, "0.375 0.25 0.625 0.25 0.625 0.75 0.375 0.75"),  # an oriented box
        (None, "0.375 0.25 0.625 0.25 0.625 0.75 0.375 0.75 0.9"),
        (None, "0.375 0.5 0.5 0.25 0.625 0.5 0.5 0.75 0.4 0.4"),
        (None, "0.5 0.5 0.25 0.5 0.87"),
    ],
)
def test_boxes_keypoints_and_polygons_become_boxes(run, folder, shape, numbers):
    make(folder / "src", "yolo", [(f"{n}.jpg", None) for n in range(2)])
    for n in range(2):
        text(folder / "src" / f"{n}.txt", f"0 {numbers}\n")
    yaml_of(folder / "src", **({"kpt_shape": shape} if shape else {}))
    code, _, err, splits = run("yolo")
    assert code == 0, err
    assert [*splits["train"].values(), *splits["val"].values()] == [[(24, 12, 16, 24)]] * 2


def test_a_polygon_at_the_border_is_not_a_box_with_keypoints(run, folder):
    make(folder / "src", "yolo", [(f"{n}.jpg", None) for n in range(2)])
    for n in range(2):
        text(folder / "src" / f"{n}.txt", "0 0.5 0.5 0.75 0.25 0.75 0.25 1 0.5 0.75 1\n")
    code, _, err, splits = run("yolo")
    assert code == 0, err
    assert [*splits["train"].values(), *splits["val"].values()] == [[(32, 12, 32, 36)]] * 2


@pytest.mark.parametrize("line", ["0 .1 .2 .3 .4 .5 .6 .7", "1.5 .1 .2 .3 .4", "0 .1 .2 .3", "-1 .1 .2 .3 .4"])
def test_invalid_lines_are_reported(run, folder, line):
    make(folder / "src", "yolo", numbered("{}.jpg", "{}.txt"))
    with (folder / "src" / "0.txt").open("a") as file:
        file.write(line)
    code, out, err, splits = run("yolo")
    assert code == 0 and "lines that are not class cx cy w h" in out, err
    right(splits, 6)


def voc_corners(folder, corners, encoding="utf-8", name="cat"):
    for n, values in enumerate(corners):
        picture(folder / "src" / f"{n}.jpg")
        edges = "".join(f"<{edge}>{value}</{edge}>" for edge, value in zip(("xmin", "ymin", "xmax", "ymax"), values))
        head = f'<?xml version="1.0" encoding="{encoding}"?>\n'
        content = f"{head}<annotation><object><name>{name}</name><bndbox>{edges}</bndbox></object></annotation>"
        (folder / "src" / f"{n}.xml").write_bytes(content.encode(encoding))


@pytest.mark.parametrize(
    ("corners", "expected", "words"),
    [
        ([(11, 6, 30, 25), (1, 2, 10, 9)], [(10, 5, 20, 20), (0, 1, 10, 8)], None),
        ([(30, 25, 11, 6), (1, 9, 10, 2)], [(10, 5, 20, 20), (0, 1, 10, 8)], "exchanged, now sorted: 2"),
        ([(10, 5, 30, 25), (0, 2, 10, 9)], [(10, 5, 20, 20), (0, 2, 10, 7)], "as counted from 0"),
        ([(10.5, 5, 30, 25), (1.25, 2, 10, 9.5)], [(10.5, 5, 19.5, 20), (1.25, 2, 8.75, 7.5)], "as counted from 0"),
        ([(10.5, 5, 30, 25), *[(1, 2, 10, 9)] * 9], [(9.5, 4, 20.5, 21), (0, 1, 10, 8)], "as pixels counted from 1"),
        ([(0, 5, 30, 25), *[(1, 2, 10, 9)] * 20], [(0, 4, 30, 21), (0, 1, 10, 8)], "as pixels counted from 1"),
    ],
)
def test_voc_corners_become_boxes(run, folder, corners, expected, words):
    voc_corners(folder, corners)
    code, out, err, splits = run("voc")
    assert code == 0, err
    image_boxes = {**splits["train"], **splits["val"]}
    assert [image_boxes[f"{n}.jpg"] for n in range(len(expected))] == [[expected_box] for expected_box in expected]
    assert words is None or words in out


@pytest.mark.parametrize("encoding", ["gb2312", "gbk", "utf-16", "iso-8859-1", "windows-1252", "shift_jis"])
def test_xml_is_read_in_the_encoding_that_it_declares(run, folder, encoding):
    name = "größe" if "125" in encoding or "8859" in encoding else "白" if encoding == "shift_jis" else "白细胞"
    voc_corners(folder, [(2, 2, 9, 9)] * 3, encoding, name)
    code, out, err, _ = run("voc")
    assert code == 0 and f"{name}: " in out, err


def test_xml_in_another_encoding_than_it_declares_is_reported(run, folder):
    voc_corners(folder, [(2, 2, 9, 9)] * 3)
    (folder / "src" / "0.xml").write_bytes('<?xml version="1.0" encoding="utf-8"?><a>白细胞</a>'.encode("gbk"))
    code, out, err, splits = run("voc")
    assert code == 0 and "0.xml: is not text in UTF-8; save it as UTF-8" in out, err
    assert len(splits["train"]) == len(splits["val"]) == 1


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("mask", [[3, 4], [13, 24]]),
        ("rotation", [[3, 14], [8, 4], [13, 14], [8, 24]]),
        (None, [[3, 4], [13, 4], [9, 24]]),
        ("rectangle", [[13, 24], [3, 4]]),
        ("rectangle", [[3, 4], [13, 4], [13, 24], [3, 24]]),
        ("quadrilateral", [[3, 4], [13, 4], [13, 24], [3, 20]]),
    ],
)
def test_labelme_outlines_become_boxes(run, folder, kind, points):
    for n in range(2):
        picture(folder / "src" / f"{n}.jpg")
        shape = {"label": "cat", "points": points, "shape_type": kind, "mask": "iVBORw0KGgo="}
        size = {"imageWidth": "64", "imageHeight": 48.0}
        text(folder / "src" / f"{n}.json", json.dumps({"shapes": [shape], "imageData": None, **size}))
    code, _, err, splits = run("labelme")
    assert code == 0, err
    assert [*splits["train"].values(), *splits["val"].values()] == [[(3, 4, 10, 20)]] * 2


def labelme(folder, shapes, **content):
    for n in range(2):
        picture(folder / "src" / f"{n}.jpg")
        text(folder / "src" / f"{n}.json", json.dumps({"shapes": shapes, "imagePath": f"{n}.jpg", **content}))


def test_shapes_of_one_label_and_group_are_one_object(run, folder):
    corners = {(1, 2): ("cat", 7), (30, 20): ("cat", 7), (5, 5): ("cat", None), (9, 9): ("cat", None)}
    corners |= {(40, 3): ("dog", 7), (12, 30): ("cat", 0)}
    shapes = [
        {"label": name, "points": [[x, y], [x + 6, y], [x, y + 8]], "group_id": group}
        for (x, y), (name, group) in corners.items()
    ]
    labelme(folder, [*shapes, {"label": "cat", "points": [[1, 1], [2, 2]], "shape_type": "line", "group_id": 7}])
    code, out, err, splits = run("labelme")
    assert code == 0, err
    expected = [(1, 2, 35, 26), (5, 5, 6, 8), (9, 9, 6, 8), (40, 3, 6, 8), (12, 30, 6, 8)]
    assert [*splits["train"].values(), *splits["val"].values()] == [expected] * 2
    assert "shapes of one label and group_id, joined to one box: 2 (" in out


def test_numbers_too_large_for_a_float_are_reported(run, folder):
    huge = 10**400
    shapes = [{"label": "cat", "points": [[1, 2], [7, 9]], "shape_type": "rectangle"}]
    labelme(folder, [*shapes, {"label": "cat", "points": [[huge, 2], [7, 9]]}], imageWidth=huge, imageHeight=48)
    code, out, err, splits = run("labelme")
    assert code == 0, err
    assert [*splits["train"].values(), *splits["val"].values()] == [[(1, 2, 6, 7)]] * 2
    assert "shapes that outline nothing, such as points and lines: 2 (" in out


def test_images_inside_labelme_files_are_written_out(run, folder):
    for n in range(6):
        data = io.BytesIO()
        Image.new("RGB", SIZE).save(data, "PNG" if n % 2 else "JPEG")
        content = json.loads(label_of("labelme", n, inside=f"..\\x\\{n}.jpg"))
        content["imageData"] = base64.b64encode(data.getvalue()).decode()
        text(folder / "src" / "sub" / f"{n}.json", json.dumps(content))
    text(folder / "src" / "sub" / "6.json", json.dumps({**content, "imageData": "no picture"}))
    text(folder / "src" / "package.json", "{}")
    picture(folder / "src" / "sub" / "0.jpg")  # this image also has a file
    code, out, err, splits = run("labelme")
    assert code == 0, err
    right(splits, 6)
    assert "only inside their label file: 5" in out and "6.json: the image in it cannot be read" in out
    assert {path.name for path in (folder / "dst").iterdir()} == {"train.json", "val.json", "images", "report.txt"}
    assert (folder / "dst" / "images" / "1.png").exists() or (folder / "dst" / "images" / "sub" / "1.png").exists()
