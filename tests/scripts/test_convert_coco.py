"""scripts/convert.py coco: one file is split, several become one set, and no box, crowd or class is mixed up."""

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts import convert

SIZE = (64, 48)


def write(file, images, classes=("cat", "dog"), first=1, **changes):
    """images: file_name -> [(class, x, y, width, height)]; ids count from `first`."""
    document = {"images": [], "annotations": [], "categories": []}
    document["categories"] = [{"id": first + 3 * c, "name": name} for c, name in enumerate(classes)]
    for number, (name, boxes) in enumerate(images.items(), start=first):
        document["images"].append({"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        for kind, *box in boxes:
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + first,
                    "image_id": number,
                    "category_id": first + 3 * classes.index(kind),
                    "bbox": box,
                    **changes,
                }
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))


def paint(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE).save(path)


def read(folder):
    """split -> file_name -> [(class, *box)]; ids are 1, 2, ... and each is there once."""
    splits = {}
    for split in ("train", "val"):
        document = json.loads((folder / f"{split}.json").read_text())
        names = {one["id"]: one["name"] for one in document["categories"]}
        for kind in ("images", "annotations", "categories"):
            assert [one["id"] for one in document[kind]] == list(range(1, len(document[kind]) + 1))
        splits[split] = {
            image["file_name"]: [
                (names[one["category_id"]], *one["bbox"])
                for one in document["annotations"]
                if one["image_id"] == image["id"]
            ]
            for image in document["images"]
        }
        assert all((folder / "images" / name).is_file() for name in splits[split])
    return splits


def boxes(n):
    return [("cat", n + 1, 2, 10, 12), ("dog", 3, n + 2, 8, 9)]


@pytest.fixture
def run(command, folder):
    def call(*sources, options=()):
        code, out, err = command(convert.main, "coco", *sources, folder / "dst", *options)
        return code, out, err.splitlines()[-1] if code else err, read(folder / "dst") if not code else None

    return call


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_default.json", "images"),
        ("annotations/instances_default.json", "images/default"),
        ("annotations/instances_train2017.json", "train2017"),
        ("_annotations.coco.json", "."),
        ("result.json", "images"),
        ("labels/labels.json", "data"),
        ("set/annotations.json", "."),
        ("test.json", "images"),  # of one file the name says nothing
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_one_file_is_split_wherever_its_images_are(run, folder, file, images, whole):
    known = {f"{n}.jpg": boxes(n) for n in range(10)}
    write(folder / "src" / file, known)
    paint(*(folder / "src" / images / name for name in known))
    code, out, err, splits = run(folder / "src" if whole else folder / "src" / file)
    assert code == 0, err
    assert {**splits["train"], **splits["val"]} == known
    assert len(splits["val"]) == 2 and "drawn by --seed 0" in out


@pytest.mark.parametrize(
    "name", ["sub dir/{}.jpg", "images/sub dir/{}.jpg", "sub%20dir\\{}.jpg", "./sub dir/{}.JPG", "{}.jpg"]
)
def test_names_as_other_tools_write_them(run, folder, name):
    write(folder / "src" / "result.json", {name.format(n): boxes(n) for n in range(6)})
    paint(*(folder / "src" / "images" / "sub dir" / f"{n}.jpg" for n in range(6)))
    code, _, err, splits = run(folder / "src" / "result.json")
    assert code == 0, err
    assert {**splits["train"], **splits["val"]} == {f"{n}.jpg": boxes(n) for n in range(6)}


def test_crowds_and_areas_are_kept(run, folder):
    outline = {"segmentation": {"size": [48, 64], "counts": "abc"}}
    write(folder / "a.json", {f"{n}.jpg": boxes(n) for n in range(4)}, iscrowd=1, area=7.5, **outline)
    write(folder / "b.json", {f"b{n}.jpg": boxes(n) for n in range(4)})
    paint(*(folder / f"{name}{n}.jpg" for n in range(4) for name in ("", "b")))
    assert run(folder / "a.json", folder / "b.json")[0] == 0
    made = [json.loads((folder / "dst" / f"{split}.json").read_text()) for split in ("train", "val")]
    names = [{one["id"]: one["file_name"] for one in document["images"]} for document in made]
    found = [(names[i][one["image_id"]], one) for i in (0, 1) for one in made[i]["annotations"]]
    for name, one in found:
        crowd = not name.startswith("b")
        assert one["iscrowd"] == crowd and one["area"] == (7.5 if crowd else one["bbox"][2] * one["bbox"][3])
    assert len(found) == 16


def test_boxes_stay_as_they_are(run, folder):
    """What cuts them off is the reader, which also sees when too many reach out of their images."""
    write(folder / "a.json", {f"{n}.jpg": [("cat", 50, 40, 30, 30), ("dog", -2, 1, 9, 9)] for n in range(4)})
    paint(*(folder / f"{n}.jpg" for n in range(4)))
    code, out, err, splits = run(folder / "a.json")
    assert code == 0 and "cut off" not in out, err
    assert splits["val"] == {name: [("cat", 50, 40, 30, 30), ("dog", -2, 1, 9, 9)] for name in splits["val"]}


def test_several_files_become_one_set(run, folder):
    """The same file names in two folders, other ids, other orders of the classes, a class more."""
    write(folder / "a" / "x.json", {f"{n}.jpg": boxes(n) for n in range(4)})
    more = {f"{n}.jpg": [*boxes(n + 10), ("owl", 1, 1, 5, 5)] for n in range(4)}
    write(folder / "b" / "x.json", more, classes=("dog", "owl", "cat"), first=1000)
    paint(*(folder / place / "images" / f"{n}.jpg" for n in range(4) for place in "ab"))
    code, _, err, splits = run(folder / "a" / "x.json", folder / "b" / "x.json")
    assert code == 0, err
    expected = {f"a/images/{n}.jpg": boxes(n) for n in range(4)}
    expected |= {f"b/images/{n}.jpg": more[f"{n}.jpg"] for n in range(4)}
    assert {**splits["train"], **splits["val"]} == expected
    document = json.loads((folder / "dst" / "train.json").read_text())
    assert [one["name"] for one in document["categories"]] == ["cat", "dog", "owl"]


@pytest.mark.parametrize("layout", ["roboflow", "coco", "files", "cvat"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_own_split_is_kept(run, folder, layout, whole):
    parts = {"train": range(4), "valid": (4, 5), "test": (6,)}
    files = []
    for part, own in parts.items():
        file, images = {
            "roboflow": (f"{part}/_annotations.coco.json", part),
            "coco": (f"annotations/instances_{part}2017.json", f"{part}2017"),
            "files": (f"{part}.json", "images"),
            "cvat": (f"annotations/instances_{part}.json", f"images/{part}"),
        }[layout]
        # Each part has an image of this name.
        known = {"same.jpg": boxes(20 + own[0])} if layout != "files" else {}
        write(folder / "src" / file, known | {f"{n}.jpg": boxes(n) for n in own})
        paint(*(folder / "src" / images / f"{n}.jpg" for n in (*own, *(["same"] if known else []))))
        files.append(folder / "src" / file)
    code, out, err, splits = run(*([folder / "src"] if whole else files))
    assert code == 0, err
    for split, part in (("train", "train"), ("val", "valid")):
        expected = {f"{n}.jpg": boxes(n) for n in parts[part]}
        if layout != "files":
            expected["same.jpg"] = boxes(20 + parts[part][0])
        assert {Path(name).name: own for name, own in splits[split].items()} == expected
    assert "images to test on" in out and "the split is that of its files" in out


def test_one_file_over_folders_of_parts_keeps_them(run, folder):
    known = {f"{part}/{n}.jpg": boxes(n) for part, n in (("train", 0), ("train", 1), ("val", 2), ("test", 3))}
    write(folder / "all.json", known)
    paint(*(folder / "images" / name for name in known))
    code, _, err, splits = run(folder / "all.json")
    assert code == 0, err
    assert set(splits["train"]) == {"train/0.jpg", "train/1.jpg"} and set(splits["val"]) == {"val/2.jpg"}
    (folder / "dst").rename(folder / "first")
    code, out, err, splits = run(folder / "all.json", options=("--split", "random", "--val", "0.5"))
    assert code == 0 and len(splits["val"]) == len(splits["train"]) == 2 and "drawn" in out, err


def test_an_image_in_two_files_is_there_once_and_scored_on_where_one_says_so(run, folder):
    write(folder / "annotations" / "instances_train.json", {f"{n}.jpg": boxes(n) for n in range(5)})
    write(folder / "annotations" / "keypoints_train.json", {f"{n}.jpg": boxes(n)[:1] for n in range(5)})
    write(folder / "annotations" / "instances_val.json", {"4.jpg": [*boxes(4), ("cat", 1, 1, 4, 4)]})
    paint(*(folder / "images" / f"{n}.jpg" for n in range(5)))
    code, out, err, splits = run(folder)
    assert code == 0, err
    assert splits["train"] == {f"{n}.jpg": boxes(n) for n in range(4)}
    assert splits["val"].keys() == {"4.jpg"} and sorted(splits["val"]["4.jpg"]) == sorted(
        [*boxes(4), ("cat", 1, 1, 4, 4)]
    )
    assert "listed more than once, and their boxes joined: 6" in out and "kept to score on: 1" in out


def test_what_is_not_used_is_reported(run, folder):
    src = folder / "src"
    write(src / "a.json", {f"{n}.jpg": boxes(n) for n in range(4)} | {"gone.jpg": boxes(9), "twice.jpg": boxes(8)})
    paint(*(src / f"{n}.jpg" for n in range(5)), src / "x" / "twice.jpg", src / "y" / "twice.jpg")
    (src / "captions.json").write_text('{"images": [], "annotations": []}')
    (src / "a.heic").write_text("?")
    code, out, err, splits = run(src)
    assert code == 0, err
    assert len(splits["train"]) + len(splits["val"]) == 4
    for line in (
        "images that are not there: 1 (a.json: gone.jpg)",
        "of which several have the name: 1 (a.json: twice.jpg)",
        "images that no annotation file names: 3",
        "not used: .json files: 1 (captions.json)",
        ".heic pictures, which cannot be read here",
    ):
        assert line in out, (line, out)


def test_classes_that_differ_in_case_alone_are_reported(run, folder):
    write(folder / "a.json", {f"{n}.jpg": boxes(n) for n in range(3)})
    write(folder / "b.json", {f"{n}.jpg": [("Cat", 2, 2, 9, 9)] for n in (3, 4)}, classes=("Cat",))
    paint(*(folder / f"{n}.jpg" for n in range(5)))
    code, out, err, _ = run(folder / "a.json", folder / "b.json")
    assert code == 0 and "'cat' and 'Cat'" in out, err


def test_mistakes_are_one_line(run, folder):
    write(folder / "a" / "a.json", {"0.jpg": boxes(0), "1.jpg": boxes(1)})
    (folder / "empty").mkdir()
    (folder / "bad.json").write_text('{"images": [], "annotations": [], "categories": []}')
    for expected, sources in {
        "none of the images is found, such as '0.jpg'": [folder / "a" / "a.json"],
        "no COCO file in it": [folder / "empty"],
        "the list 'images' is empty": [folder / "bad.json"],
        "no such folder or file": [folder / "none.json"],
    }.items():
        code, _, err, _ = run(*sources)
        assert code == 2 and err.startswith("error: ") and expected in err, (expected, err)
        assert not (folder / "dst").exists()


def test_boxes_that_look_like_corners_are_refused_unless_trusted(run, folder):
    corners = {f"{n}.png": [("cat", 30 + n, 20, 50 + n, 40), ("dog", 20, 25, 45, 44)] for n in range(8)}
    write(folder / "src" / "all.json", corners)
    paint(*(folder / "src" / name for name in corners))
    code, _, err, _ = run(folder / "src" / "all.json")
    assert code == 2 and "as corners x1, y1, x2, y2 all would be inside" in err
    assert "--trust" in err and not (folder / "dst").exists()
    code, _, err, made = run(folder / "src" / "all.json", options=["--trust"])
    assert code == 0 and len(made["train"]) + len(made["val"]) == 8, err
