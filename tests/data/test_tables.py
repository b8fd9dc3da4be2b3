"""The tables of metrics, as people read them."""

import pytest

from data.annotations import parse_annotations
from data.coco_eval import score
from data.tables import explain_missing, metrics_line, metrics_table, per_class_table
from tests.data.helpers import NOTHING, detections_of, file_of


@pytest.fixture
def small():
    """Metrics of three classes, one of them without boxes, and of detections with IoUs of 1 and 0.8."""
    categories = [(1, "a"), (2, "traffic light"), (3, "c")]
    document = file_of([(1, 1, (0, 0, 50, 50)), (1, 2, (90, 90, 50, 50))], categories=categories)
    detections = {1: detections_of([[0, 0, 50, 50], [90, 90, 140, 130]], [0.9, 0.8], [0, 1])}
    return score(parse_annotations(document), detections, [1, 2, 3])


def test_the_line_of_metrics_by_eye(small):
    assert metrics_line(small) == "AP 85.0, AP50 100.0, AP75 100.0, APs -, APm 85.0, APl -"


def test_the_tables_by_eye(small):
    head, *table = metrics_table(small).splitlines()
    assert head == f"1 images, {small['engine']}, in percent"
    assert table == [
        "",
        "     AP   AP50   AP75   AP80   AP90    APs    APm    APl",
        "   85.0  100.0  100.0  100.0   50.0      -   85.0      -",
        "    AR1   AR10  AR100    ARs    ARm    ARl",
        "   85.0   85.0   85.0      -   85.0      -",
        "",
        "APs and ARs are unknown (-1 in the files): the validation set has no small boxes (area < 32^2 px)",
        "APl and ARl are unknown (-1 in the files): the validation set has no large boxes (area > 96^2 px)",
        "AP of c is unknown (-1 in the files) and not in the mean: the validation set has no such boxes",
    ]
    assert per_class_table(small).splitlines() == [
        "class            boxes     AP   AP50   AP75",
        "a                    1  100.0  100.0  100.0",
        "traffic light        1   70.0  100.0  100.0",
        "c                    0      -      -      -",
    ]


def test_the_table_of_eighty_classes_is_aligned_and_names_few_missing_ones():
    categories = [(i, f"class {i}") for i in range(1, 81)]
    boxes = [(1, 1, (0, 0, 10, 10)), (1, 1, (0, 0, 50, 50)), (1, 1, (0, 0, 100, 100))]
    metrics = score(parse_annotations(file_of(boxes, categories=categories)), {1: NOTHING}, list(range(1, 81)))
    lines = per_class_table(metrics).splitlines()
    assert len(lines) == 81 and len({len(line) for line in lines}) == 1
    (line,) = explain_missing(metrics)
    assert line.startswith("AP of class 2, class 3, class 4, class 5, class 6 and 74 more is unknown")
