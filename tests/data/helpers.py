"""What several tests of data share: detections, an annotation file, the check of a message."""

import torch

from detector.structures import Detections


def detections_of(boxes, scores, labels) -> Detections:
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
    )


NOTHING = detections_of([], [], [])


def file_of(boxes, image_ids=(1,), categories=((1, "cat"),)) -> dict:
    """A file without `info`, `licenses`, `area` and `iscrowd`; boxes are (image, category, xywh)."""
    return {
        "images": [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in image_ids],
        "categories": [{"id": i, "name": name} for i, name in categories],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": list(xywh)}
            for n, (image, category, xywh) in enumerate(boxes, start=1)
        ],
    }


def one_line(excinfo, *parts):
    message = str(excinfo.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
