"""scripts/convert.py coco: one file is split, several become one set, and no box, crowd or class is mixed up."""

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts import convert

SIZE = (64, 48)


def write(file, images, classes=("cat", "dog"), first=1, **changes):
    """`images` maps each file_name to boxes (class, x, y, width, height). Ids count from `first`."""
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
    """Returns split -> file_name -> [(class, *box)]. Checks that the ids are 1, 2, ... and that every image exists."""
    splits = {}
    for split in [split for split in ("train", "val", "test") if (folder / f"{split}.json").exists()]:
        document = json.loads((folder / f"{split}.json").read_text())
        names = {entry["id"]: entry["name"] for entry in document["categories"]}
        for kind in ("images", "annotations", "categories"):
            assert [entry["id"] for entry in document[kind]] == list(range(1, len(document[kind]) + 1))
        splits[split] = {
            image["file_name"]: [
                (names[entry["category_id"]], *entry["bbox"])
                for entry in document["annotations"]
                if entry["image_id"] == image["id"]
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
        ("test.json", "images"),  # the name of a single file sets no part
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_one_file_is_split_wherever_its_images_are(run, folder, file, images, whole):
    image_boxes = {f"{n}.jpg": boxes(n) for n in range(10)}
    write(folder / "src" / file, image_boxes)
    paint(*(folder / "src" / images / name for name in image_boxes))
    code, out, err, splits = run(folder / "src" if whole else folder / "src" / file)
    assert code == 0, err
    assert {**splits["train"], **splits["val"]} == image_boxes
    assert len(splits["val"]) == 2 and "drawn by --seed 0" in out


@pytest.mark.parametrize(
    "name", ["sub dir/{}.jpg", "images/sub dir/{}.jpg", "sub%20dir\\{}.jpg", "./sub dir/{}.JPG", "{}.jpg"]
)
def test_file_names_in_the_forms_of_other_tools_find_their_images(run, folder, name):
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
    documents = [json.loads((folder / "dst" / f"{split}.json").read_text()) for split in ("train", "val")]
    names = [{entry["id"]: entry["file_name"] for entry in document["images"]} for document in documents]
    annotations = [(names[i][entry["image_id"]], entry) for i in (0, 1) for entry in documents[i]["annotations"]]
    for name, entry in annotations:
        crowd = not name.startswith("b")
        assert entry["iscrowd"] == crowd and entry["area"] == (7.5 if crowd else entry["bbox"][2] * entry["bbox"][3])
    assert len(annotations) == 16


def test_boxes_that_leave_their_image_stay_as_they_are(run, folder):
    """The reader cuts them off, and it also notices when too many boxes leave their images."""
    write(folder / "a.json", {f"{n}.jpg": [("cat", 50, 40, 30, 30), ("dog", -2, 1, 9, 9)] for n in range(4)})
    paint(*(folder / f"{n}.jpg" for n in range(4)))
    code, out, err, splits = run(folder / "a.json")
    assert code == 0 and "cut off" not in out, err
    assert splits["val"] == {name: [("cat", 50, 40, 30, 30), ("dog", -2, 1, 9, 9)] for name in splits["val"]}


def test_several_files_become_one_set(run, folder):
    """Two folders have the same file names, but the second has other ids, another class order and one more class."""
    write(folder / "a" / "x.json", {f"{n}.jpg": boxes(n) for n in range(4)})
    second_file = {f"{n}.jpg": [*boxes(n + 10), ("owl", 1, 1, 5, 5)] for n in range(4)}
    write(folder / "b" / "x.json", second_file, classes=("dog", "owl", "cat"), first=1000)
    paint(*(folder / place / "images" / f"{n}.jpg" for n in range(4) for place in "ab"))
    code, _, err, splits = run(folder / "a" / "x.json", folder / "b" / "x.json")
    assert code == 0, err
    expected = {f"a/images/{n}.jpg": boxes(n) for n in range(4)}
    expected |= {f"b/images/{n}.jpg": second_file[f"{n}.jpg"] for n in range(4)}
    assert {**splits["train"], **splits["val"]} == expected
    document = json.loads((folder / "dst" / "train.json").read_text())
    assert [category["name"] for category in document["categories"]] == ["cat", "dog", "owl"]


@pytest.mark.parametrize("layout", ["roboflow", "coco", "files", "cvat"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_split_of_the_files_is_kept(run, folder, layout, whole):
    parts = {"train": range(4), "valid": (4, 5), "test": (6,)}
    files = []
    for part, members in parts.items():
        file, images = {
            "roboflow": (f"{part}/_annotations.coco.json", part),
            "coco": (f"annotations/instances_{part}2017.json", f"{part}2017"),
            "files": (f"{part}.json", "images"),
            "cvat": (f"annotations/instances_{part}.json", f"images/{part}"),
        }[layout]
        # Each part has an image of this name.
        same_named = {"same.jpg": boxes(20 + members[0])} if layout != "files" else {}
        write(folder / "src" / file, same_named | {f"{n}.jpg": boxes(n) for n in members})
        paint(*(folder / "src" / images / f"{n}.jpg" for n in (*members, *(["same"] if same_named else []))))
        files.append(folder / "src" / file)
    code, out, err, splits = run(*([folder / "src"] if whole else files))
    assert code == 0, err
    for split, part in (("train", "train"), ("val", "valid"), ("test", "test")):
        expected = {f"{n}.jpg": boxes(n) for n in parts[part]}
        if layout != "files":
            expected["same.jpg"] = boxes(20 + parts[part][0])
        assert {Path(name).name: members for name, members in splits[split].items()} == expected
    assert "for a test" in out and "the split is that of its files" in out


def test_the_part_folders_of_one_file_are_kept_and_only_the_test_part_if_the_split_is_random(run, folder):
    image_boxes = {f"{part}/{n}.jpg": boxes(n) for part, n in (("train", 0), ("train", 1), ("val", 2), ("test", 3))}
    write(folder / "all.json", image_boxes)
    paint(*(folder / "images" / name for name in image_boxes))
    code, _, err, splits = run(folder / "all.json")
    assert code == 0, err
    assert set(splits["train"]) == {"train/0.jpg", "train/1.jpg"}
    assert set(splits["val"]) == {"val/2.jpg"} and set(splits["test"]) == {"test/3.jpg"}
    (folder / "dst").rename(folder / "first")
    code, out, err, splits = run(folder / "all.json", options=("--split", "random", "--val", "0.5"))
    assert code == 0 and len(splits["val"]) == 2 and len(splits["train"]) == 1 and "drawn" in out, err
    assert set(splits["test"]) == {"test/3.jpg"}  # never trained on


def test_an_image_in_two_files_appears_once_and_in_val_if_one_file_says_so(run, folder):
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
    assert "listed more than once, and their boxes joined: 6" in out and "used for validation only: 1" in out


def test_names_of_missing_folders_do_not_take_images_of_others(run, folder):
    """The images of cam2/ are not there. Its names must not find those of cam1/."""
    cameras = {name: {f"{n}.jpg": boxes(10 * c + n) for n in range(4)} for c, name in enumerate(("cam1", "cam2"))}
    paint(*(folder / place / "cam1" / f"{n}.jpg" for n in range(4) for place in ("one/images/set", "beside", "each")))
    every = {f"{camera}/{name}": listed for camera, images in cameras.items() for name, listed in images.items()}
    write(folder / "one" / "all.json", every)
    write(folder / "beside" / "all.json", every)
    for camera, images in cameras.items():
        write(folder / "each" / camera / "labels.json", images)
    for place in ("one", "beside", "each"):
        code, out, err, splits = run(folder / place)
        assert code == 0, err
        found = {Path(name).name: listed for name, listed in {**splits["train"], **splits["val"]}.items()}
        assert found == cameras["cam1"] and "images that are not there: 4 (" in out and "joined" not in out
        (folder / "dst").rename(folder / f"{place}_dst")


@pytest.mark.parametrize("layout", ["{part}/_annotations.coco.json {part}", "annotations/{part}.json images/{part}"])
def test_missing_images_of_a_part_are_not_taken_from_another(run, folder, layout):
    for part, first in (("train", 0), ("valid", 10)):
        file, images = layout.format(part=part).split()
        members = {f"{n}.jpg": boxes(first + n) for n in range(5)}
        write(folder / "src" / file, members)
        paint(*(folder / "src" / images / name for name in list(members)[: 5 if part == "train" else 2]))
    code, out, err, splits = run(folder / "src")
    assert code == 0, err
    assert {Path(name).name: listed for name, listed in splits["train"].items()} == {
        f"{n}.jpg": boxes(n) for n in range(5)
    }
    assert {Path(name).name: listed for name, listed in splits["val"].items()} == {
        f"{n}.jpg": boxes(10 + n) for n in range(2)
    }
    assert "images that are not there: 3 (" in out


def test_a_file_of_a_part_without_any_of_its_images_stops_the_conversion(run, folder):
    for part, first in (("train", 0), ("valid", 10)):
        write(folder / "src" / f"{part}.json", {f"{part}_{first + n}.jpg": boxes(n) for n in range(3)})
    write(folder / "src" / "more.json", {"gone.jpg": boxes(0)})
    paint(*(folder / "src" / "images" / f"train_{n}.jpg" for n in range(3)))
    files = {part: folder / "src" / f"{part}.json" for part in ("train", "valid", "more")}
    for sources, missing in (
        ([folder / "src"], "valid.json"),
        ([files["train"], files["valid"]], "valid.json"),
        ([files["train"], files["more"]], "more.json"),
    ):
        code, _, err, _ = run(*sources)
        assert code == 2 and f"{missing}: none of its" in err and "\n" not in err, err
        assert not (folder / "dst").exists()


def test_two_names_that_fit_one_image_equally_are_left_out(run, folder):
    write(folder / "a.json", {f"{n}.jpg": boxes(n) for n in range(4)} | {"x/9.jpg": boxes(8), "y/9.jpg": boxes(9)})
    paint(*(folder / f"{n}.jpg" for n in range(4)), folder / "z" / "9.jpg")
    code, out, err, splits = run(folder)
    assert code == 0, err
    assert {**splits["train"], **splits["val"]}.keys() == {f"{n}.jpg" for n in range(4)}
    assert "names that all fit one image, z/9.jpg: 2 (a.json: x/9.jpg; a.json: y/9.jpg)" in out


def test_a_name_with_and_one_without_folders_mean_the_same_image(run, folder):
    """As in COCO's layout, in which the file is not beside the images."""
    write(folder / "annotations" / "instances_train2017.json", {f"{n}.jpg": boxes(n)[:1] for n in range(5)})
    write(folder / "annotations" / "more.json", {f"train2017/{n}.jpg": boxes(n)[1:] for n in range(5)})
    paint(*(folder / "train2017" / f"{n}.jpg" for n in range(5)))
    code, _, err, splits = run(folder)
    assert code == 0, err
    assert {name: sorted(listed) for name, listed in {**splits["train"], **splits["val"]}.items()} == {
        f"{n}.jpg": boxes(n) for n in range(5)
    }


def test_files_that_disagree_about_the_size_of_an_image_are_refused(run, folder):
    for name in "ab":
        write(folder / f"{name}.json", {f"{n}.jpg": boxes(n) for n in range(4)})
    document = json.loads((folder / "b.json").read_text())
    document["images"][2] |= {"width": 2 * SIZE[0], "height": 2 * SIZE[1]}
    (folder / "b.json").write_text(json.dumps(document))
    paint(*(folder / f"{n}.jpg" for n in range(4)))
    code, _, err, _ = run(folder / "a.json", folder / "b.json")
    assert code == 2 and err.startswith("error: 2.jpg: ") and "64 x 48 in a.json and 128 x 96 in b.json" in err
    del document["images"][2]["width"]
    (folder / "b.json").write_text(json.dumps(document))
    code, _, err, splits = run(folder / "a.json", folder / "b.json")
    assert code == 0 and {**splits["train"], **splits["val"]} == {f"{n}.jpg": boxes(n) for n in range(4)}, err


def test_unused_files_are_reported(run, folder):
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
        "names that fit several images: 1 (a.json: twice.jpg)",
        "images that no annotation file names: 3",
        "not used: .json files: 1 (captions.json)",
        ".heic pictures, which cannot be read here",
    ):
        assert line in out, (line, out)


def test_classes_that_differ_only_in_case_are_reported(run, folder):
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
    code, _, err, splits = run(folder / "src" / "all.json", options=["--trust"])
    assert code == 0 and len(splits["train"]) + len(splits["val"]) == 8, err
