import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.coco import CocoDataset, load_annotations
from data.images import read_image
from data.transforms import EvalTransform
from detector.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "data"


def keep(image, boxes, labels, seed):
    return image, boxes, labels


GOOD = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "sub/b.png", "width": 20, "height": 50},
        {"id": 9, "file_name": "c.png", "width": 16, "height": 16},
    ],
    "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4]},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [-5, 10.5, 20, 100], "area": 1.0, "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 90, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": 90, "bbox": [10, 10, -4, 5]},
        {"id": 5, "image_id": 3, "category_id": 5, "bbox": [30, 10, 5, 5]},
        {"id": 6, "image_id": 3, "category_id": 5, "bbox": [0, 0, 20.05, 50], "segmentation": [[0, 0, 1, 1, 0, 1]]},
    ],
}


@pytest.fixture
def folder(tmp_path):
    """A data set: annotations.json and images/."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for record in GOOD["images"]:
        pixels = generator.integers(0, 256, (record["height"], record["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / record["file_name"])
    write(tmp_path, GOOD)
    return tmp_path


def write(folder, document):
    path = folder / "annotations.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def dataset(folder, **options):
    return CocoDataset(folder / "annotations.json", folder / "images", keep, **options)


def one_line(excinfo, *parts):
    message = str(excinfo.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# ------------------------------------------------------------------------------------------------- samples


def test_labels_are_positions_of_sorted_category_ids(folder):
    data = dataset(folder)
    assert data.category_ids == [5, 90] and data.class_names == ["cat", "dog"]
    assert data.image_ids == [7, 3, 9] and data.aspects == [40 / 30, 20 / 50, 1.0]
    assert data[1][1].labels.tolist() == [1, 0]


def test_categories_of_one_name_are_told_apart(folder):
    document = copy.deepcopy(GOOD)
    document["categories"][1]["name"] = "dog"
    write(folder, document)
    assert dataset(folder).class_names == ["dog (id 5)", "dog (id 90)"]
    document["categories"].append({"id": 1, "name": "dog (id 5)"})
    write(folder, document)
    assert dataset(folder).class_names == ["dog (id 5) (id 1)", "dog (id 5)", "dog (id 90)"]


def test_boxes_are_converted_clipped_and_dropped(folder):
    data = dataset(folder)
    image, target, image_id, size = data[0]
    assert (image.shape, image_id, size) == ((3, 30, 40), 7, (30, 40))
    assert target.boxes.tolist() == [[0, 10.5, 15, 30]]  # the crowd and the negative width are left out
    assert data[1][1].boxes.tolist() == [[1, 2, 4, 6], [0, 0, 20, 50]]
    assert data[2][1].boxes.shape == (0, 4) and data[2][1].labels.shape == (0,)
    summary = data.summary()
    assert "3 images, 3 boxes, 2 classes; 1 images without boxes, 1 crowd boxes" in summary
    assert "1 boxes clipped" in summary  # 0.05 px too far is rounding
    assert "2 boxes without area dropped (annotation ids 4, 5)" in summary


def test_pixels_are_those_of_the_file(folder):
    expected = np.asarray(Image.open(folder / "images" / "a.png"))
    assert np.array_equal(dataset(folder)[0][0].permute(1, 2, 0).numpy(), expected)


def test_only_what_the_scorer_needs_is_filled_in(folder):
    records = load_annotations(folder / "annotations.json")["annotations"]
    assert [record["area"] for record in records] == [12, 1.0, 1200, 0, 25, 1002.5]
    assert [record["iscrowd"] for record in records] == [0, 0, 1, 0, 0, 0]
    assert not any("segmentation" in record for record in records)


def test_validation_takes_the_label_space_of_training(folder):
    data = dataset(folder, category_ids=[5, 8, 90], class_names=["cat", "bird", "dog"])
    assert data[1][1].labels.tolist() == [2, 0] and data.class_names == ["cat", "bird", "dog"]
    with pytest.raises(UserError) as excinfo:
        dataset(folder, category_ids=[5])
    one_line(excinfo, "annotations.json", "category 90", "'dog'")
    with pytest.raises(UserError) as excinfo:
        dataset(folder, category_ids=[5, 90], class_names=["cat", "horse"])
    one_line(excinfo, "category 90 is 'dog' here and 'horse' in training")


def test_missing_images_are_counted_at_once(folder):
    (folder / "images" / "sub" / "b.png").unlink()
    (folder / "images" / "c.png").unlink()
    with pytest.raises(UserError) as excinfo:
        dataset(folder)
    one_line(excinfo, "2 of 3", "'sub/b.png'", str(folder / "images"))
    with pytest.raises(UserError) as excinfo:
        CocoDataset(folder / "annotations.json", folder / "nowhere", keep)
    one_line(excinfo, "nowhere")


def test_a_folder_is_listed_once_however_many_images_it_has(folder, monkeypatch):
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    dataset(folder)
    assert sorted(listed) == [folder / "images", folder / "images" / "sub"]


@pytest.mark.parametrize("outside", ["file", "folder", "by way of a link"])
def test_links_out_of_the_image_folder_are_refused(folder, outside):
    images, elsewhere = folder / "images", folder / "images of others"
    elsewhere.mkdir()
    if outside == "folder":
        (images / "sub").rename(elsewhere / "sub")
        (images / "sub").symlink_to(elsewhere / "sub")
    else:
        (images / "sub" / "b.png").rename(elsewhere / "b.png")
        (folder / "link").symlink_to(elsewhere)
        (images / "sub" / "b.png").symlink_to((folder / "link" if "link" in outside else elsewhere) / "b.png")
    with pytest.raises(UserError) as excinfo:
        dataset(folder)
    one_line(excinfo, str(images), "'sub/b.png'", str(elsewhere), "put the file itself there")


def test_links_that_stay_inside_are_followed(folder):
    images = folder / "images"
    (images / "c.png").rename(images / "real c.png")
    (images / "c.png").symlink_to("real c.png")
    (images / "sub").rename(images / "real")
    (images / "sub").symlink_to(images / "real")
    images.rename(folder / "store")
    images.symlink_to(folder / "store")  # the image folder may itself be a link
    (images / "sub").unlink()
    (images / "sub").symlink_to("real")
    (images / "not an image").symlink_to("/")  # and what no record names may lead anywhere
    (images / "circle").symlink_to("circle")
    assert len(list(dataset(folder))) == 3


@pytest.mark.parametrize("kind", ["folder", "dangling link", "link to itself", "pipe"])
def test_what_is_no_file_is_missing(folder, kind):
    path = folder / "images" / "c.png"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    else:
        path.symlink_to("c.png" if kind == "link to itself" else "nowhere.png")
    with pytest.raises(UserError) as excinfo:
        dataset(folder)
    one_line(excinfo, "1 of 3", "'c.png'")


# ---------------------------------------------------------------------------------------------- real images


@pytest.mark.parametrize("name, images", [("bccd", 72), ("coco_free", 46)])
def test_real_data_is_read_as_pil_and_the_file_say(name, images):
    if not (REAL / name).is_dir():
        pytest.skip(f"no {REAL / name}")
    data = CocoDataset(REAL / name / "val.json", REAL / name / "images", EvalTransform(64, 128))
    document = json.loads((REAL / name / "val.json").read_text())
    assert len(data) == images
    for index, image_id in enumerate(data.image_ids[:20]):
        path = data.folder / data.file_names[index]
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        assert np.array_equal(read_image(path, data.sizes[index]), expected)
        records = [r for r in document["annotations"] if r["image_id"] == image_id and not r["iscrowd"]]
        target = data[index][1]
        assert [data.category_ids[label] for label in target.labels] == [r["category_id"] for r in records]
