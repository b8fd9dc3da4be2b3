"""Laws of data/annotations.py: it takes and counts values with one plain meaning, and refuses all else in one line."""

import copy
import json

import numpy as np
import pytest

from data.annotations import load_annotations, parse_annotations
from detector.errors import UserError
from tests.data.helpers import one_line

GOOD = {
    "info": {"year": 2017, "of": [{"a": "}, {"}]},
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "sub/b.png", "width": 20, "height": 50},
        {"id": 9, "file_name": "c.png", "width": 16, "height": 16},
    ],
    "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 10, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [-5, 10.5, 20, 100], "area": 1.0, "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 90, "bbox": [0, 0, 40, 30], "area": 99.5, "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": 90, "bbox": [10, 10, -4, 5], "area": 7, "iscrowd": 0},
        {"id": 5, "image_id": 3, "category_id": 5, "bbox": [3, 10, 5, 5], "area": 25, "iscrowd": 0,
         "segmentation": [[3, 10, 8, 10, 8, 15]]},
    ],
}  # fmt: skip
COLUMNS = ("image_ids", "sizes", "ids", "images", "categories", "boxes", "areas", "crowds")


def write(folder, document):
    path = folder / "annotations.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def same(annotations, expected, changed_columns=()):
    for name in COLUMNS:
        if name not in changed_columns:
            np.testing.assert_array_equal(getattr(annotations, name), getattr(expected, name), name)
    assert annotations.names == expected.names and annotations.file_names == expected.file_names


def every(name, key, change):
    """A change of one value in every record of a list."""

    def apply(document):
        for record in document[name]:
            if change is KeyError:
                record.pop(key, None)
            else:
                record[key] = change(record[key]) if callable(change) else change

    return apply


def test_columns_hold_the_values_of_the_file(tmp_path):
    annotations = load_annotations(write(tmp_path, GOOD))
    assert annotations.image_ids.tolist() == [7, 3, 9] and annotations.file_names == ["a.png", "sub/b.png", "c.png"]
    assert annotations.sizes.tolist() == [[30, 40], [50, 20], [16, 16]]
    assert annotations.names == {90: "dog", 5: "cat"} and list(annotations.names) == [90, 5]
    assert annotations.ids.tolist() == [1, 2, 3, 4, 5] and annotations.images.tolist() == [1, 0, 0, 0, 1]
    assert annotations.categories.tolist() == [90, 5, 90, 90, 5] and annotations.crowds.tolist() == [0, 0, 1, 0, 0]
    assert annotations.boxes.tolist() == [entry["bbox"] for entry in GOOD["annotations"]]
    assert annotations.areas.tolist() == [entry["area"] for entry in GOOD["annotations"]] and annotations.remarks == []


def test_a_document_has_the_contents_of_the_file(tmp_path):
    annotations = load_annotations(write(tmp_path, GOOD))
    same(load_annotations(write(tmp_path, annotations.document())), annotations)
    subset = parse_annotations(annotations.document([1]))
    assert subset.image_ids.tolist() == [3] and subset.ids.tolist() == [1, 5] and subset.names == annotations.names


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_and_a_document_in_memory_read_the_same(tmp_path, encoding):
    expected = load_annotations(write(tmp_path, GOOD))
    (tmp_path / "other.json").write_bytes(json.dumps(GOOD).encode(encoding))
    same(load_annotations(tmp_path / "other.json"), expected)
    same(parse_annotations(GOOD), expected)


# kind -> the changes, the remark, and the columns whose values change
PLAIN = {
    "ids in quotes": (
        [every("images", "id", str), every("annotations", "image_id", str), every("categories", "id", "{}.0".format),
         every("annotations", "category_id", lambda n: f" {n} "), every("annotations", "id", str)],
        "20 numbers in quotes (the first in images[0])", (),
    ),
    "one id in quotes": (
        [every("categories", "id", lambda n: "90" if n == 90 else n)],
        "1 numbers in quotes (the first in categories[0])", (),
    ),
    "sides in quotes": ([every("images", "width", str)], "3 numbers in quotes", ()),
    "sides with a point": (
        [every("images", "width", float), every("images", "height", lambda n: f"{n}.00")],
        "3 whole numbers with a decimal point (the first in images[0]); 3 numbers in quotes", (),
    ),
    "ids with a point": (
        [every("images", "id", float), every("annotations", "category_id", float)], "8 whole numbers", (),
    ),
    "boxes in quotes": (
        [every("annotations", "bbox", lambda box: list(map(str, box))), every("annotations", "area", str)],
        "25 numbers in quotes", (),
    ),
    "crowds in quotes": ([every("annotations", "iscrowd", str)], "5 numbers in quotes", ()),
    "crowds with a point": ([every("annotations", "iscrowd", float)], "5 whole numbers with", ()),
    "crowds as true and false": ([every("annotations", "iscrowd", bool)], "", ()),
    "no sides": ([every("images", "width", KeyError)], "", ("sizes",)),
    "sides of zero": ([every("images", "width", 0)], "", ("sizes",)),
    "sides of null": ([every("images", "height", None)], "", ("sizes",)),
    "no ids": ([every("annotations", "id", KeyError)], "5 annotations without an id numbered", ()),
    "ids of null": ([every("annotations", "id", None)], "5 annotations without an id numbered", ()),
    "one id of null": ([every("annotations", "id", lambda n: None if n == 1 else n)], "1 annotations without", ()),
    "names that are numbers": (
        [every("categories", "name", len)], "2 class names that are numbers; 2 categories with the name", "names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("by", ["parts", "json", "memory"])
def test_values_with_one_plain_meaning_are_taken_and_counted(tmp_path, kind, by):
    changes, remark, changed_columns = PLAIN[kind]
    expected, document = parse_annotations(GOOD), copy.deepcopy(GOOD)
    for change in changes:
        change(document)
    if by == "memory":
        annotations = parse_annotations(document)
    else:
        text = json.dumps(document)
        annotations = load_annotations(
            write(tmp_path, text if by == "parts" else text.replace('"year": 2017', '"year": NaN'))
        )
    if changed_columns == "names":
        assert annotations.names == {90: "3 (id 90)", 5: "3 (id 5)"}
    else:
        same(annotations, expected, changed_columns)
    if "sizes" in changed_columns:
        assert annotations.sizes.tolist() == [[0, 0]] * 3
    remarks = [part for part in remark.split("; ") if part]
    assert len(annotations.remarks) == len(remarks)
    assert all(any(part in line for line in annotations.remarks) for part in remarks), annotations.remarks


NO_AREA = {"missing": KeyError, "null": None, "zero": 0, "negative": -1, "empty": "", "NaN": float("nan")}


@pytest.mark.parametrize("kind", NO_AREA)
def test_a_missing_area_is_width_times_height(tmp_path, kind):
    document = copy.deepcopy(GOOD)
    every("annotations", "area", NO_AREA[kind])(document)
    annotations = load_annotations(write(tmp_path, document))
    expected = [12, 2000, 1200, NO_AREA[kind] if kind in ("zero", "negative") else 0, 25]
    assert annotations.areas.tolist() == expected  # a box of negative width keeps the area in the file
    assert annotations.remarks == [
        "4 boxes without an area, which is taken as width x height (the first is annotation id 1)"
    ]


@pytest.mark.parametrize("empty", [None, "", float("nan")], ids=repr)
def test_an_empty_iscrowd_is_0(tmp_path, empty):
    document = copy.deepcopy(GOOD)
    every("annotations", "iscrowd", empty)(document)
    annotations = load_annotations(write(tmp_path, document))
    assert not annotations.crowds.any()
    assert annotations.remarks == ["5 empty iscrowd taken as 0 (the first in annotations[0])"]


@pytest.mark.parametrize("bbox", [[], None, KeyError], ids=repr)
def test_an_annotation_without_bbox_and_segmentation_is_left_out(tmp_path, bbox):
    document = copy.deepcopy(GOOD)
    document["annotations"][1]["segmentation"] = []
    changed("annotations", 1, "bbox", bbox)(document)
    annotations, expected_document = load_annotations(write(tmp_path, document)), copy.deepcopy(GOOD)
    del expected_document["annotations"][1]
    same(annotations, parse_annotations(expected_document))
    (remark,) = annotations.remarks
    assert remark == "1 annotations with neither bbox nor segmentation left out (the first is annotation id 2)"


def test_ids_too_large_for_a_float_stay_exact(tmp_path):
    document = copy.deepcopy(GOOD)
    for index, new_id in enumerate((2**63 - 1, 2**53 + 1, -(2**63) + 1)):
        old_id = document["images"][index]["id"]
        document["images"][index]["id"] = new_id if index else str(new_id)
        for record in document["annotations"]:
            record["image_id"] = new_id if record["image_id"] == old_id else record["image_id"]
    table = load_annotations(write(tmp_path, document))
    assert table.image_ids.tolist() == [2**63 - 1, 2**53 + 1, -(2**63) + 1] and table.images.tolist() == [1, 0, 0, 0, 1]


# ------------------------------------------------------------------------------------------------- segmentations


def test_a_flawed_segmentation_matters_only_without_a_bbox(tmp_path):
    document = copy.deepcopy(GOOD)
    document["annotations"][4]["segmentation"] = [[1, 2, 3]]
    same(load_annotations(write(tmp_path, document)), parse_annotations(GOOD))
    document["annotations"][4]["bbox"] = None
    with pytest.raises(UserError) as excinfo:
        load_annotations(write(tmp_path, document))
    one_line(excinfo, "annotations[4] (id 5): bbox is None and segmentation [[1, 2, 3]]")


@pytest.mark.parametrize("bbox", [[], None, KeyError], ids=repr)
def test_a_missing_bbox_is_the_bounds_of_its_segmentation(tmp_path, bbox):
    document = copy.deepcopy(GOOD)
    changed("annotations", 4, "bbox", bbox)(document)
    annotations = load_annotations(write(tmp_path, document))
    same(annotations, parse_annotations(GOOD))
    assert annotations.remarks == ["1 boxes taken as the bounds of their segmentation (the first in annotations[4])"]


# --------------------------------------------------------------------------------------------------------- flaws


def changed(*path_and_value):
    *path, last, value = path_and_value

    def change(document):
        for key in path:
            document = document[key]
        if value is KeyError:
            del document[last]
        else:
            document[last] = value

    return change


FLAWS = {
    "no images list": (changed("images", KeyError), ["'images'"]),
    "no annotations list": (changed("annotations", KeyError), ["'annotations'"]),
    "categories no list": (changed("categories", {}), ["'categories'"]),
    "no images": (changed("images", []), ["'images' is empty"]),
    "no categories": (changed("categories", []), ["'categories' is empty"]),
    "record no object": (changed("annotations", 2, 5), ["annotations[2] is 5"]),
    "id absent": (changed("images", 1, "id", KeyError), ["images[1]", "id is None"]),
    "id text": (changed("annotations", 1, "id", "x"), ["annotations[1]", "id is 'x'"]),
    "id bool": (changed("categories", 1, "id", True), ["categories[1]", "id is True"]),
    "id of 65 bits": (changed("images", 1, "id", 2**63), ["images[1]", "9223372036854775808 exceeds 64 bits"]),
    "too many pixels": (changed("images", 0, "width", 6_000_000), ["images[0] (id 7)", "6000000 x 30", "178956970"]),
    "file name of two lines": (changed("images", 2, "file_name", "a\nb.png"), ["images[2] (id 9)", r"'a\nb.png'"]),
    "category name of two lines": (changed("categories", 0, "name", "a\nb"), ["categories[0] (id 90)", r"'a\nb'"]),
    "half a character": (changed("categories", 0, "name", "\ud800"), ["categories[0] (id 90)", r"'\ud800'"]),
    "image id twice": (changed("images", 1, "id", 7), ["images[1]", "id 7"]),
    "annotation id twice": (changed("annotations", 1, "id", 1), ["annotations[1]", "id 1"]),
    "category id twice": (changed("categories", 1, "id", 90), ["categories[1]", "id 90"]),
    "category without name": (changed("categories", 0, "name", KeyError), ["categories[0] (id 90)", "name is None"]),
    "height negative": (changed("images", 0, "height", -1), ["images[0] (id 7)", "height is -1"]),
    "width text": (changed("images", 0, "width", "40 px"), ["images[0] (id 7)", "width is '40 px'"]),
    "width fraction": (changed("images", 0, "width", 40.5), ["images[0] (id 7)", "width is 40.5"]),
    "width bool": (changed("images", 0, "width", True), ["images[0] (id 7)", "width is True"]),
    "no file name": (changed("images", 2, "file_name", KeyError), ["images[2] (id 9)", "file_name is None"]),
    "empty file name": (changed("images", 2, "file_name", ""), ["images[2] (id 9)", "file_name is ''"]),
    "id fraction": (changed("images", 1, "id", 3.5), ["images[1]", "id is 3.5"]),
    "id of infinity": (changed("images", 1, "id", float("inf")), ["images[1]", "id is inf"]),
    "id of words": (changed("images", 1, "id", "three"), ["images[1]", "id is 'three'"]),
    "id once as text": (changed("images", 1, "id", "7"), ["images[1]", "id 7 is taken"]),
    "outside": (changed("images", 2, "file_name", "s/../../x.png"), ["images[2] (id 9)", "../x.png"]),
    "outside with backslashes": (
        changed("images", 2, "file_name", "s\\..\\..\\x.png"),
        ["images[2] (id 9)", "file_name"],
    ),
    "file name of dots": (changed("images", 2, "file_name", "./."), ["images[2] (id 9)", "file_name is './.'"]),
    "unknown image": (changed("annotations", 0, "image_id", 8), ["annotations[0] (id 1)", "image_id is 8"]),
    "unhashable image": (changed("annotations", 0, "image_id", [3]), ["annotations[0] (id 1)", "image_id is [3]"]),
    "unknown category": (changed("annotations", 0, "category_id", 6), ["annotations[0] (id 1)", "category_id is 6"]),
    "bbox an object": (changed("annotations", 4, "bbox", {"x": 1}), ["annotations[4] (id 5)", "bbox is {'x': 1}"]),
    "bbox with null": (changed("annotations", 4, "bbox", [1, 2, None, 4]), ["annotations[4] (id 5)", "None"]),
    "bbox of three": (changed("annotations", 4, "bbox", [1, 2, 3]), ["annotations[4] (id 5)", "[1, 2, 3]"]),
    "bbox text": (changed("annotations", 4, "bbox", [1, 2, 3, "4 px"]), ["annotations[4] (id 5)", "'4 px'"]),
    "bbox huge": (changed("annotations", 4, "bbox", [1, 2, 3, 1e9]), ["annotations[4] (id 5)", "1000000000.0"]),
    "bbox NaN": (changed("annotations", 4, "bbox", [1, 2, float("nan"), 4]), ["annotations[4] (id 5)", "nan"]),
    "bbox infinite": (changed("annotations", 4, "bbox", [1, 2, 3, float("inf")]), ["annotations[4] (id 5)", "inf"]),
    "area infinite": (changed("annotations", 4, "area", float("inf")), ["annotations[4] (id 5)", "area is inf"]),
    "area a list": (changed("annotations", 4, "area", [1]), ["annotations[4] (id 5)", "area is [1]"]),
    "iscrowd": (changed("annotations", 4, "iscrowd", "no"), ["annotations[4] (id 5)", "iscrowd is 'no'"]),
    "iscrowd of two": (changed("annotations", 4, "iscrowd", 2), ["annotations[4] (id 5)", "iscrowd is 2"]),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_of_a_record_is_reported_in_one_line(tmp_path, flaw):
    change, parts = FLAWS[flaw]
    document = copy.deepcopy(GOOD)
    change(document)
    with pytest.raises(UserError) as excinfo:
        load_annotations(write(tmp_path, document))
    one_line(excinfo, "annotations.json", *parts)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "[" * 100_000, '{"images": "\\'], ids=repr)
def test_each_flaw_of_a_file_is_reported_in_one_line(tmp_path, text):
    with pytest.raises(UserError) as excinfo:
        load_annotations(write(tmp_path, text))
    one_line(excinfo, "annotations.json")


def test_an_unreadable_file_is_reported_in_one_line(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"images": "caf\xe9"}')
    for name in ("absent.json", ".", "latin.json"):
        with pytest.raises(UserError) as excinfo:
            load_annotations(tmp_path / name)
        one_line(excinfo, str(tmp_path))


def test_classes_of_one_name_are_remarked_on():
    document = copy.deepcopy(GOOD)
    assert not any("name" in remark for remark in parse_annotations(document).remarks)
    document["categories"].append({"id": 6, "name": GOOD["categories"][0]["name"]})
    (remark,) = (remark for remark in parse_annotations(document).remarks if "name" in remark)
    first = GOOD["categories"][0]["id"]
    expected = "2 categories with the name of another, kept apart by their ids"
    assert remark == f"{expected} (the first is category id {first})"
