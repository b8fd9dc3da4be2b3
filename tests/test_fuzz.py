"""Annotation files and configs with flaws of all kinds: they work, or are refused in one line.

The tests try some hundreds of each; to try more, and see how many were refused (here 20,000 and 5,000):

    python tests/test_fuzz.py 20000 5000  # some 8 minutes
"""

import copy
import json
import os
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import cv2
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.coco import CocoDataset
from data.coco_eval import score
from data.tables import metrics_table, per_class_table
from data.transforms import TrainTransform
from detector import config
from detector.configure import configure
from detector.errors import UserError
from detector.structures import Detections

SIZES = {"a.png": (40, 30), "b.png": (20, 50), "c.png": (1, 3), "d.png": (64, 64)}  # width, height
TRANSFORMS = [
    TrainTransform(32, 64, horizontal_flip=0.5, vertical_flip=0.5, scale_jitter=(0.5, 2)),
    TrainTransform(32, 64, strong=True),
]
GOOD = {
    "info": {"year": 2017},
    "images": [{"id": 3 + 2 * i, "file_name": name, "width": SIZES[name][0], "height": SIZES[name][1]}
               for i, name in enumerate(SIZES)],
    "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        {"id": 2, "image_id": 3, "category_id": 5, "bbox": [-5, 10.5, 20, 100], "segmentation": [[0, 0, 1, 1, 0, 1]]},
        {"id": 3, "image_id": 5, "category_id": 90, "bbox": [0, 0, 20, 50], "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": 90, "bbox": [0, 0, 1, 3], "area": 3.5},
        {"id": 5, "image_id": 9, "category_id": 5, "bbox": [63.5, 60, 0.5, 4]},
    ],
}  # fmt: skip
CONFIG = {
    "run": "x",
    "seed": 1,
    "precision": "float32",
    "data": {"train": {"annotations": "a.json", "images": "a"}, "short_side": 64, "long_side": 128, "workers": 0,
             "scale_jitter": [0.8, 1.25], "strong": True},
    "model": {"backbone": "resnet18", "weights": "none", "norm": "gn", "head": {"depth": 1, "width": 32}},
    "anchors": {"name": "grid", "sizes": [16, 32, 64, 128, 256], "octaves": 3, "ratios": [0.5, 1, 2]},
    "assigner": {"name": "iou"},
    "class_loss": {"name": "ghm_c", "bins": 30, "momentum": 0.75, "weight": 1.0},
    "box_loss": {"name": "smooth_l1", "beta": 0.1},
    "box_coder": {"weights": [1, 1, 1, 1]},
    "solver": {"lr": 0.01, "batch_size": 4, "decay_at": [0.5, 0.75], "ema": 0.99, "clip_norm": None},
    "postprocess": {"top_k": 100, "nms_iou": 0.5},
}  # fmt: skip

QUIRKS = {  # other ways in which exporters write a number
    "in quotes": str,
    "with a point": lambda value: value + 0.0 if abs(value) < 2**53 else value,
    "in quotes, with a point": lambda value: f" {value}.0" if isinstance(value, int) else f"{value}",
    "null": lambda value: None,
    "empty": lambda value: "",
}
TEXTS = st.one_of(
    st.sampled_from(["", "a\nb", "\0", "\x1b[2J", "\u2028", "\ud800", "a" * 5000, "..", "/", ".", "a.png", "a.png/",
                     "./a.png", "sub\\a.png", "cat", "cat (id 5)", "ümlaut", "1", "nan", "1e-3", "none", "null", "no",
                     "gn", "focal", "iou"]),
    st.text(max_size=8),
)  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 0.0, -0.0, 1.5, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 1e9, -1e9, 1e308,
                     1e-320, float("nan"), float("inf"), -float("inf"), 3, 5, 7, 90, 1e-3, 0.9999, 4096, 178956971]),
    st.integers(-100, 100),
    st.floats(-100, 100),
)  # fmt: skip
VALUES = st.one_of(
    NUMBERS,
    TEXTS,
    st.booleans(),
    st.none(),
    st.lists(NUMBERS, max_size=5),
    st.dictionaries(TEXTS, NUMBERS, max_size=2),
    st.sampled_from([20, 100]).map(nested := lambda depth: [nested(depth - 1)] if depth else 0),
)


def places(value, path=()):
    """The path of every value in a document."""
    paths = [path] if path else []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        paths += places(value[key], (*path, key))
    return paths


@st.composite
def changed(draw, document, at_most=3):
    """The document after some changes: a value replaced, left out, repeated, or added under a new key."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, at_most))):
        paths = places(document)
        if not paths:
            break
        *path, last = draw(st.sampled_from(paths))
        parent = document
        for key in path:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace"] * 3 + ["nudge"] * 3 + ["quirk", "drop", "repeat", "add", "empty"]))
        if kind == "drop":
            del parent[last]
        elif kind == "nudge" and isinstance(parent[last], int | float):
            parent[last] = draw(st.one_of(st.integers(-9, 99), st.floats(-9, 99)))
        elif kind == "quirk" and type(parent[last]) in (int, float):
            parent[last] = QUIRKS[draw(st.sampled_from(list(QUIRKS)))](parent[last])
        elif kind == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
            if isinstance(parent[-1], dict) and draw(st.booleans()):
                parent[-1]["id"] = draw(st.integers())
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(TEXTS)] = draw(VALUES)
        else:
            parent[last] = type(parent[last])() if kind == "empty" and parent[last] is not None else draw(VALUES)
    return document


@st.composite
def encoded(draw, text):
    """The bytes of a text: mostly UTF-8, some in other encodings, some cut off or with bytes changed."""
    encoding = draw(
        st.sampled_from(["utf-8"] * 40 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037"])
    )
    data = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    kind = draw(st.sampled_from(["whole"] * 40 + ["cut", "byte", "twice"]))
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if kind == "byte" and data:
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    return data * 2 if kind == "twice" else data


@st.composite
def annotation_files(draw):
    document = draw(changed(GOOD))
    if draw(st.integers(0, 3)) == 0:  # one key, written in another way in all records
        key, quirk = (
            draw(st.sampled_from(["id", "image_id", "area", "width", "iscrowd"])),
            draw(st.sampled_from(list(QUIRKS))),
        )
        for name in ("images", "annotations", "categories"):
            for record in document[name] if isinstance(document.get(name), list) else ():
                if isinstance(record, dict) and type(record.get(key)) in (int, float):
                    record[key] = QUIRKS[quirk](record[key])
    return draw(
        encoded(json.dumps(document, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, None, 1]))))
    )


# Features of YAML itself, which a random change is unlikely to produce.
ODD_YAML = [
    "!!python/object/apply:os.system ['false']", "!!python/name:os.system", "!!bool x", "!!int ''", "!!float x",
    "!!timestamp x", "!!binary '%'", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!x y",
    "2024-01-01", "2024-13-45", "0001-01-01 00:00:00 +23:59", "1:1:1", "1:" * 300 + "1.5", "0x" + "f" * 5000,
    "9" * 5000, "1_000", ".inf", ".nan", "-.inf", "0o17", "=", "<<", "*x", "&x [*x]", "&x {a: *x}", "[" * 500,
    "{" * 500, "- " * 500, "|\n  text", ">", "'", '"\\x0a\\u2028"', "{<<: [{a: 1}, {b: 2}]}", "%YAML 9.9", "---", "...",
    "\t", "a: b: c", "? x", "\x00", "\x1b", "\ud800", "!<tag:%0A> x", "y", "~", "{a: 1, a: 2}",
]  # fmt: skip


def laughs(levels, width, merge=False):
    """A text of a few hundred bytes whose aliases stand for width ** levels values."""
    lines = ["l0: &l0 {lol: 1}"]
    for level in range(1, levels):
        aliases = ", ".join([f"*l{level - 1}"] * width)
        lines.append(f"l{level}: &l{level} " + (f"{{<<: [{aliases}]}}" if merge else f"[{aliases}]"))
    return "\n".join(lines) + "\n"


@st.composite
def config_files(draw):
    values = draw(changed(CONFIG))
    try:
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=draw(st.booleans()))
    except (ValueError, RecursionError):  # JSON can write what PyYAML cannot, and YAML reads nearly all of it
        text = json.dumps(values)
    lines = text.splitlines(keepends=True)
    kind = draw(st.sampled_from(["as it is"] * 6 + ["odd", "odd", "odd", "line twice", "laughs", "base"]))
    at = draw(st.integers(0, max(0, len(lines) - 1)))
    if kind == "odd" and lines:
        key, colon, _ = lines[at].partition(":")
        lines[at] = f"{key}{colon} {draw(st.sampled_from(ODD_YAML))}\n"
    elif kind == "line twice" and lines:
        lines.insert(draw(st.integers(0, len(lines))), lines[at])
    elif kind == "laughs":
        bomb = laughs(draw(st.integers(2, 40)), draw(st.integers(2, 10)), draw(st.booleans()))
        key = draw(st.sampled_from(["class_loss", "data", "run", "solver", "x"]))
        lines = [bomb, *lines, f"{key}: {draw(st.sampled_from(['*l1', '{name: *l1}', '{gamma: *l0}', '[*l1, *l1]']))}"]
    elif kind == "base":
        lines.append(f"base: {draw(TEXTS.map(json.dumps))}\n")
    return draw(encoded("".join(lines)))


SETTINGS = st.one_of(
    st.sampled_from([f"{key}={json.dumps(value)}" for key, value in config.flat(CONFIG).items()]),
    st.tuples(
        st.one_of(st.sampled_from([".".join(map(str, path)) for path in places(CONFIG)]), TEXTS, st.just("a." * 2000)),
        st.sampled_from(["=", "=", "=", "=", "", "=="]),
        st.one_of(VALUES.map(lambda value: json.dumps(value) if not isinstance(value, str) else value),
                  st.sampled_from(ODD_YAML)),
    ).map("".join)
)  # fmt: skip


def is_one_line(text):
    """Whether a terminal shows the text as one line and nothing else happens."""
    return text != "" and not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def refused(error):
    message = str(error)
    assert is_one_line(message) and len(message) < 20_000, message
    return "refused"


def try_annotations(folder, data):
    """Load the file, read all samples and score detections of them; "accepted" or "refused"."""
    path = folder / "annotations.json"
    path.write_bytes(data)
    try:
        datasets = [CocoDataset(path, folder, transform) for transform in TRANSFORMS]
    except UserError as error:
        return refused(error)
    refusals = 0
    detections = {}
    for dataset in datasets:
        assert is_one_line(dataset.summary())
        for index in range(len(dataset)):
            try:
                image, target, image_id, size = dataset[index, index]
            except UserError as error:  # an image that differs from its record
                refused(error)
                refusals += 1
                continue
            height, width = image.shape[1:]
            boxes, labels = target
            assert boxes.dtype == torch.float32 and boxes.shape == (len(labels), 4) and boxes.isfinite().all()
            assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([width, height])).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert ((labels >= 0) & (labels < len(dataset.category_ids))).all()
            box = torch.tensor([[0.0, 0.0, size[1], size[0]]])
            detections[image_id] = Detections(box, torch.tensor([0.5]), torch.tensor([len(dataset.category_ids) - 1]))
    check_untransformed(datasets[0], data)
    metrics = score(datasets[0].annotations, detections, datasets[0].category_ids)
    assert metrics["images"] == len(detections)
    assert all(-1 <= value <= 1 for key, value in metrics.items() if key.startswith(("AP", "AR")))
    assert len(metrics["per_class"]) == len(datasets[0].category_ids)
    assert all(is_one_line(line) for line in metrics_table(metrics).split("\n") if line)
    assert len(per_class_table(metrics).splitlines()) == 1 + len(datasets[0].category_ids)
    return "accepted" if not refusals else "refused"


def number(value):
    """The value of a number in a file, in quotes or not; None for none. It shares no code with the reader."""
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, str):
        return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def expected_boxes(document):
    """(image id, category id, crowd, x, y, w, h, area) of all annotations of a file that is accepted."""
    rows = []
    for record in document["annotations"]:
        box = record.get("bbox") or None
        if box is None and record.get("segmentation"):
            polygons = record["segmentation"]
            assert isinstance(polygons, list)  # these changes make no valid mask
            flat = [value for polygon in polygons for value in (polygon if isinstance(polygon, list) else [polygon])]
            flat = [value for value in flat if not isinstance(value, list)]
            x, y = flat[0::2], flat[1::2]
            box = flat and [min(x), min(y), max(x) - min(x), max(y) - min(y)]
        if box:
            x, y, w, h = map(number, box)
            area, box_area = number(record.get("area")), max(w, 0) * max(h, 0)
            area = box_area if area is None or (area <= 0 < box_area) else area
            ids = number(record["image_id"]), number(record["category_id"]), bool(number(record.get("iscrowd")))
            rows.append((*ids, x, y, w, h, area))
    return rows


def check_untransformed(dataset, data):
    """The data set has the boxes of the file and no others. Here Python's own parser reads the file."""
    annotations = dataset.annotations
    try:
        document = json.loads(data)
    except UnicodeDecodeError:  # in a text that nothing uses
        document = json.loads(data.decode("utf-8", "replace"))
    columns = (
        annotations.image_ids[annotations.images],
        annotations.categories,
        annotations.crowds,
        *annotations.boxes.T,
        annotations.areas,
    )
    rows = list(zip(*(column.tolist() for column in columns)))
    assert rows == expected_boxes(document)
    assert annotations.image_ids.tolist() == [number(record["id"]) for record in document["images"]]
    assert sorted(annotations.names) == sorted(number(record["id"]) for record in document["categories"])
    for record, (height, width), name in zip(document["images"], dataset.sizes, dataset.file_names):
        sides = number(record.get("width")), number(record.get("height"))
        assert (width, height) == (sides if all(sides) else SIZES[os.path.basename(name)])
    sizes = dict(zip(dataset.image_ids, dataset.sizes))
    expected = 0
    for image, _, crowd, x, y, w, h, _ in rows:
        height, width = sizes[image]
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        expected += not crowd and x2 - x1 > 1.1e-3 and y2 - y1 > 1.1e-3
    assert dataset.num_boxes >= expected
    assert dataset.num_boxes + dataset.num_crowd + len(dataset.dropped_ids) == len(rows)


def try_config(folder, data, arguments=()):
    """Configure as train.py does; "accepted" or "refused". An accepted config can be written and read again."""
    path = folder / "x.yaml"
    path.write_bytes(data)
    try:
        cfg = configure(str(path), list(arguments))
    except UserError as error:
        return refused(error)
    text = config.dump(cfg)
    path.write_text(text, encoding="utf-8")
    assert config.dump(configure(str(path))) == text
    return "accepted"


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("fuzz"))


def write_images(folder):
    for name, (width, height) in SIZES.items():
        cv2.imwrite(str(folder / name), np.full((height, width, 3), 99, np.uint8))
    return folder


def limits(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


@limits(250)
@given(data=annotation_files())
def test_annotation_files_work_or_are_refused_in_one_line(images, data):
    try_annotations(images, data)


@limits(250)
@given(data=config_files())
def test_configs_work_or_are_refused_in_one_line(images, data):
    try_config(images, data)


@limits(250)
@given(arguments=st.lists(SETTINGS, min_size=1, max_size=3))
def test_settings_work_or_are_refused_in_one_line(images, arguments):
    try_config(images, b"", arguments)


@pytest.mark.parametrize("odd", ODD_YAML, ids=lambda text: ascii(text)[:30])
def test_odd_yaml_works_or_is_refused_in_one_line(images, odd):
    for text in (odd, f"run: {odd}", f"class_loss: {odd}", f"class_loss: {{name: focal, gamma: {odd}}}"):
        try_config(images, text.encode("utf-8", "surrogatepass"))
        try_config(images, b"", [f"class_loss={odd}", odd])


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("use", ["run: *l1", "solver: {lr: *l39}", "class_loss: *l39", "x: {y: [*l39]}", "run: x"])
def test_aliases_that_multiply_are_refused_at_once(images, use, merge):
    start = time.perf_counter()
    assert try_config(images, (laughs(40, 10, merge) + use).encode()) == "refused"
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_may_be_in_any_unicode_encoding(images, encoding):
    assert try_annotations(images, json.dumps(GOOD).encode(encoding)) == "accepted"


@pytest.mark.parametrize("depth", [10, 300, *range(880, 1000, 10), 100_000])
def test_deep_nesting_is_refused_in_one_line(images, depth):
    for key in ("bbox", "image_id", "area", "iscrowd", "id"):
        text = json.dumps(GOOD).replace(f'"{key}": ', f'"{key}": {"[" * depth}{"]" * depth}, "x": ', 1)
        assert try_annotations(images, text.encode()) == "refused"


def test_a_hundred_thousand_boxes_in_one_image_are_accepted(images):
    document = copy.deepcopy(GOOD)
    box = GOOD["annotations"][0]
    document["annotations"] = [{**box, "id": i, "bbox": [i % 30, i % 20, 5, 5]} for i in range(100_000)]
    assert try_annotations(images, json.dumps(document).encode()) == "accepted"


def main(annotation_count, config_count):
    def run(name, examples, strategy, attempt):
        counts, start = Counter(), time.perf_counter()
        if not examples:
            return

        @limits(examples)
        @given(strategy)
        def every(case):
            counts[attempt(folder, case)] += 1

        every()
        print(f"{name}: {dict(counts)} in {time.perf_counter() - start:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = write_images(Path(name))
        run("annotation files", annotation_count, annotation_files(), try_annotations)
        run("configs", config_count, config_files(), try_config)
        arguments = st.lists(SETTINGS, min_size=1, max_size=3)
        run("settings", config_count, arguments, lambda folder, case: try_config(folder, b"", case))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
