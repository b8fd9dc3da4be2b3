import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.assemble import classes_without_boxes
from data.coco import CocoDataset
from data.transforms import EvalTransform
from detector.errors import UserError
from detector.images import read_image
from tests.data.helpers import one_line

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


# ------------------------------------------------------------------------------------------------- samples


def test_labels_are_positions_of_sorted_category_ids(folder):
    data = dataset(folder)
    assert data.category_ids == [5, 90] and data.class_names == ["cat", "dog"]
    assert data.image_ids == [7, 3, 9] and data.aspects == [40 / 30, 20 / 50, 1.0]
    assert data[1][1].labels.tolist() == [1, 0]


def test_an_image_that_is_listed_twice_needs_the_same_boxes(folder):
    document = copy.deepcopy(GOOD)
    document["images"].append({**GOOD["images"][1], "id": 8})
    twins = [{**record, "image_id": 8, "id": 100 + record["id"]} for record in GOOD["annotations"]]
    document["annotations"] += [twins[n] for n in (5, 4, 0)]
    write(folder, document)
    assert len(dataset(folder)) == 4
    for change in ({"bbox": [1, 2, 3, 5]}, {"category_id": 5}, {"image_id": 7}):
        twin = document["annotations"][-1]
        document["annotations"][-1] = {**twin, **change}
        write(folder, document)
        with pytest.raises(UserError) as excinfo:
            dataset(folder)
        one_line(excinfo, "annotations.json", "sub/b.png", "ids 3 and 8", "list it once")
        document["annotations"][-1] = twin


def test_repeated_class_names_get_their_category_id(folder):
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
    assert "3 images, 3 boxes, 2 classes, 1 image without boxes, 1 crowd box left out of training, " in summary
    assert "1 box clipped" in summary  # 0.05 px outside the image count as rounding
    assert "2 boxes without area dropped (annotation ids [4, 5])" in summary
    document = GOOD | {"images": GOOD["images"][1:2], "annotations": [GOOD["annotations"][0] | {"area": 12}]}
    path = write(folder, document)
    assert dataset(folder).summary() == f"{path}: 1 image, 1 box, 2 classes."  # counts of 0 are left out


def test_pixels_are_those_of_the_file(folder):
    expected = np.asarray(Image.open(folder / "images" / "a.png"))
    assert np.array_equal(dataset(folder)[0][0].permute(1, 2, 0).numpy(), expected)


def test_validation_uses_the_labels_of_training(folder):
    data = dataset(folder, category_ids=[5, 8, 90], class_names=["cat", "bird", "dog"])
    assert data[1][1].labels.tolist() == [2, 0] and data.class_names == ["cat", "bird", "dog"]
    with pytest.raises(UserError) as excinfo:
        dataset(folder, category_ids=[5])
    one_line(excinfo, "annotations.json", "category 90", "'dog'")
    with pytest.raises(UserError) as excinfo:
        dataset(folder, category_ids=[5, 90], class_names=["cat", "horse"])
    one_line(excinfo, "category 90 is 'dog' here and 'horse' in training")


def test_validation_may_have_an_extra_class_only_without_boxes(folder):
    document = copy.deepcopy(GOOD)
    document["categories"].append({"id": 6, "name": "bird"})
    write(folder, document)
    data = dataset(folder, category_ids=[5, 90], class_names=["cat", "dog"])
    assert data[1][1].labels.tolist() == [1, 0] and data.class_names == ["cat", "dog"]
    assert "1 category unknown to training, none with a box (the first is 'bird')" in data.summary()
    document["annotations"][0]["category_id"] = 6
    write(folder, document)
    with pytest.raises(UserError) as excinfo:
        dataset(folder, category_ids=[5, 90], class_names=["cat", "dog"])
    one_line(excinfo, "category 6 ('bird') is unknown to the model")


def test_categories_that_a_file_numbers_by_itself_are_matched_by_name(folder):
    training = {"category_ids": [5, 6, 90], "class_names": ["cat", "bird", "dog"]}
    labels = [target.labels.tolist() for _, target, _, _ in dataset(folder, **training)]
    for other in ({90: 5, 5: 90}, {90: 1, 5: 2}, {90: 6, 5: 5}, {90: 91, 5: 6}):  # swapped, new, half, and bird's
        document = copy.deepcopy(GOOD)
        for category in document["categories"]:
            category["id"] = other[category["id"]]
        for annotation in document["annotations"]:
            annotation["category_id"] = other[annotation["category_id"]]
        write(folder, document)
        data = dataset(folder, **training)
        assert [target.labels.tolist() for _, target, _, _ in data] == labels
        assert data.class_names == training["class_names"]
        assert [data.category_ids[0], data.category_ids[2]] == [other[5], other[90]]
        assert len(set(data.category_ids)) == 3 and data.category_ids[1] not in other.values()
        example = ("dog", other[90], 90) if other[5] == 5 else ("cat", other[5], 5)
        assert "matched by name, because '{}' has the id {} here and {} in training".format(*example) in data.summary()


def test_names_that_do_not_decide_leave_the_error(folder):
    document = copy.deepcopy(GOOD)
    document["categories"] = [{"id": 90, "name": "cat"}, {"id": 5, "name": "fox"}]  # the cat moved; what is the fox?
    write(folder, document)
    with pytest.raises(UserError) as excinfo:
        dataset(folder, category_ids=[5, 90], class_names=["cat", "dog"])
    one_line(excinfo, "category 5 is 'fox' here and 'cat' in training")
    write(folder, document | {"annotations": [a for a in GOOD["annotations"] if a["category_id"] == 90]})
    data = dataset(folder, category_ids=[5, 90], class_names=["cat", "dog"])  # without a box of the fox
    assert data.category_ids[0] == 90 and data[1][1].labels.tolist() == [0]
    assert "1 category unknown to training, none with a box (the first is 'fox')" in data.summary()


def test_the_fingerprint_tells_what_training_and_scoring_read(folder):
    changes = {
        "a label": lambda document: document["annotations"][0].update(category_id=5),
        "a box": lambda document: document["annotations"][0]["bbox"].__setitem__(2, 5),
        "the image of a box": lambda document: document["annotations"][0].update(image_id=9),
        "a crowd": lambda document: document["annotations"][0].update(iscrowd=1),
        "two files": lambda document: swap(document["images"], "file_name"),
    }
    fingerprints = [dataset(folder).fingerprint()]
    for change in changes.values():
        document = copy.deepcopy(GOOD)
        change(document)
        write(folder, document)
        fingerprints.append(dataset(folder).fingerprint())
    assert len(set(fingerprints)) == len(fingerprints)


def test_the_fingerprint_does_not_depend_on_the_image_folder(folder):
    document = copy.deepcopy(GOOD)
    for record in document["images"]:
        record["file_name"] = f"images/{record['file_name']}"
    path = write(folder, document)
    inner, outer = (CocoDataset(path, place, keep) for place in (folder / "images", folder))
    assert inner.file_names != outer.file_names and inner.fingerprint() == outer.fingerprint()


def swap(records, key):
    records[0][key], records[1][key] = records[1][key], records[0][key]


@pytest.mark.parametrize("sides", [{}, {"width": 0, "height": 0}, {"width": None, "height": None}, {"width": 16}])
def test_missing_sizes_are_read_from_the_images(folder, sides):
    document, expected = copy.deepcopy(GOOD), dataset(folder)
    for record in document["images"]:
        del record["width"], record["height"]
        record |= sides
    write(folder, document)
    data = dataset(folder)
    assert data.sizes == expected.sizes and data.fingerprint() == expected.fingerprint()
    assert (
        "3 images without width and height, which are read from the image (the first is image id 7)" in data.summary()
    )
    (folder / "images" / "c.png").write_bytes(b"no image")
    with pytest.raises(UserError) as excinfo:
        dataset(folder)
    one_line(excinfo, "c.png: cannot read the image's size")


def test_a_missing_size_is_that_of_the_upright_image(folder):
    pixels = np.zeros((10, 30, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(folder / "images" / "a.jpg", exif=turned)
    document = copy.deepcopy(GOOD) | {"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": []}
    write(folder, document)
    assert dataset(folder)[0][3] == (30, 10) and dataset(folder)[0][0].shape == (3, 30, 10)


# --------------------------------------------------------------------- boxes that look like another format


def boxes(folder, make, count=30, **options):
    """A data set of random boxes. `make` turns x1, y1, x2, y2 and the w, h of the image into the bbox in the file."""
    rng = np.random.default_rng(0)
    document = copy.deepcopy(GOOD) | {"images": GOOD["images"][:2], "annotations": []}
    for number in range(count):
        record = GOOD["images"][number % 2]
        size = np.array([record["width"], record["height"]], float)
        low, high = np.sort(rng.uniform(0, 1, (2, 2)), axis=0)
        low, high = low * (size - 4), low * (size - 4) + 3 + (high - low) * (size - 4)
        bbox = make(*low, *high, *size)
        entry = {"id": number + 1, "image_id": record["id"], "category_id": 5}
        document["annotations"].append(entry | {"bbox": [round(float(value), 4) for value in bbox]})
    write(folder, document)
    return dataset(folder, **options)


OTHER_FORMATS = {
    "corners": (lambda x1, y1, x2, y2, w, h: (x1, y1, x2, y2), ["as corners x1, y1, x2, y2", "x2 - x1, y2 - y1"]),
    "corners, y first": (lambda x1, y1, x2, y2, w, h: (y1, x1, y2, x2), ["as corners y1, x1, y2, x2"]),
    "in 0..1": (
        lambda x1, y1, x2, y2, w, h: (x1 / w, y1 / h, (x2 - x1) / w, (y2 - y1) / h),
        ["30 boxes all lie in 0..1", "multiply"],
    ),
    "corners in 0..1": (lambda x1, y1, x2, y2, w, h: (x1 / w, y1 / h, x2 / w, y2 / h), ["all lie in 0..1"]),
    "centres": (
        lambda x1, y1, x2, y2, w, h: ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1),
        ["as a centre with width and height", "subtract half"],
    ),
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_boxes_of_another_format_are_refused_unless_trusted(folder, kind):
    make, parts = OTHER_FORMATS[kind]
    with pytest.raises(UserError) as excinfo:
        boxes(folder, make)
    one_line(excinfo, "annotations.json", "data.trust=true", *parts)
    assert len(boxes(folder, make, trust=True).annotations.boxes) == 30


def test_boxes_of_the_right_format_are_accepted(folder):
    def right(x1, y1, x2, y2, w, h):
        return x1, y1, x2 - x1, y2 - y1

    assert boxes(folder, right).num_boxes == 30
    shifted = boxes(folder, lambda x1, y1, x2, y2, w, h: (x1 - w / 2, y1 - h / 2, w, h))  # as after augmentation
    assert shifted.num_clipped > 20
    assert boxes(folder, lambda x1, y1, x2, y2, w, h: (0, 0, w, h)).num_clipped == 0  # each box is the whole image
    assert boxes(folder, lambda x1, y1, x2, y2, w, h: (1, 1, w, h)).num_clipped > 20  # and a pixel beyond it
    assert boxes(folder, lambda x1, y1, x2, y2, w, h: (x1, y1, 0, 0)).num_boxes == 0
    assert boxes(folder, OTHER_FORMATS["corners"][0], count=2).num_boxes == 2  # too few to be sure


@pytest.mark.parametrize("kind", ["none", "crowds", "without area", "without place"])
def test_a_set_without_boxes_to_learn_from_says_why(folder, kind):
    document = copy.deepcopy(GOOD)
    for record in document["annotations"]:
        record |= {"crowds": {"iscrowd": 1}, "without area": {"bbox": [1, 1, 0, 5]}, "without place": {"bbox": []},
                   "none": {}}[kind] | {"segmentation": []}  # fmt: skip
    document["annotations"] = [] if kind == "none" else document["annotations"]
    write(folder, document)
    with pytest.raises(UserError) as excinfo:
        dataset(folder).refuse_without_boxes()
    crowds, flat = {"none": (0, 0), "crowds": (6, 0), "without area": (1, 5), "without place": (0, 0)}[kind]
    parts = [f"{crowds} boxes are crowds", f"{flat} have no area"]
    parts += ["6 annotations with neither bbox nor segmentation left out"] if kind == "without place" else []
    one_line(excinfo, "no box to learn from", *parts, "data.trust=true")


def test_classes_without_a_box_to_train_on_are_named(folder):
    assert classes_without_boxes(dataset(folder)) == []
    document = copy.deepcopy(GOOD)
    for record in document["annotations"]:
        if not record.get("iscrowd"):
            record["category_id"] = 5
    write(folder, document)
    (remark,) = classes_without_boxes(dataset(folder))
    assert remark == "no box of 1 of the 2 classes, which cannot be learnt (the first is 'dog')"


# ---------------------------------------------------------------------------------------------- real images


@pytest.mark.parametrize("name, images", [("bccd", 72), ("coco_free", 46)])
def test_real_data_has_the_pixels_that_pil_reads_and_the_labels_of_the_file(name, images):
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
