import math

import pytest
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from detector.box_coder import BoxCoder
from detector.postprocess import NonFiniteOutput, Postprocess
from detector.structures import Predictions

SIZE = (100, 160)
LEVELS = (40, 20, 10)


def random_predictions(images=2, classes=3, seed=0, mean=-2.0):
    rng = torch.Generator().manual_seed(seed)
    count = sum(LEVELS)
    corner = torch.rand(count, 2, generator=rng) * 120 - 10
    anchors = torch.cat([corner, corner + 10 + torch.rand(count, 2, generator=rng) * 50], dim=1)
    logits = torch.randn(images, count, classes, generator=rng) * 2 + mean
    deltas = torch.randn(images, count, 4, generator=rng) * 0.3
    return Predictions(logits, deltas, anchors, LEVELS)


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def plain_loop(logits, deltas, anchors, size, threshold, top_k, nms_iou, max_detections):
    """The detections of one image by plain loops: (score, label, box), best first."""
    candidates, start = [], 0
    for count in LEVELS:
        level = []
        for anchor in range(start, start + count):
            for label, logit in enumerate(logits[anchor]):
                score = 1 / (1 + math.exp(-logit))
                if score > threshold:
                    level.append((score, label, anchor))
        candidates += sorted(level, reverse=True)[:top_k]
        start += count
    detections = []
    for score, label, anchor in sorted(candidates, reverse=True):
        x1, y1, x2, y2 = anchors[anchor]
        dx, dy, dw, dh = deltas[anchor]
        x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
        w, h = (x2 - x1) * math.exp(dw), (y2 - y1) * math.exp(dh)
        height, width = size
        box = [
            min(max(value, 0), limit)
            for value, limit in zip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], [width, height, width, height])
        ]
        if all(kept_label != label or overlap(box, kept_box) <= nms_iou for _, kept_label, kept_box in detections):
            detections.append((score, label, box))
    return detections[:max_detections]


@pytest.mark.parametrize(
    ("threshold", "top_k", "nms_iou", "max_detections"),
    [(0.05, 1000, 0.5, 100), (0.3, 1000, 0.5, 100), (0.05, 7, 0.5, 100), (0.05, 1000, 0.2, 5), (0.0, 9, 0.7, 100)],
)
def test_equals_a_plain_loop(threshold, top_k, nms_iou, max_detections):
    predictions, sizes = random_predictions(), [SIZE, (70, 90)]
    detections = Postprocess(BoxCoder(), threshold, top_k, nms_iou, max_detections)(predictions, sizes)
    for index, size in enumerate(sizes):
        logits, deltas = predictions.logits[index].tolist(), predictions.deltas[index].tolist()
        expected = plain_loop(
            logits, deltas, predictions.anchors.tolist(), size, threshold, top_k, nms_iou, max_detections
        )
        assert len(expected) > 3
        assert detections[index].labels.tolist() == [label for _, label, _ in expected]
        assert detections[index].scores.tolist() == pytest.approx([score for score, _, _ in expected], rel=1e-5)
        torch.testing.assert_close(
            detections[index].boxes, torch.tensor([box for _, _, box in expected]), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize(("top_k", "max_detections"), [(1000, 300), (6, 300), (1000, 4)])
def test_equals_torchvision(top_k, max_detections):
    backbone = nn.Conv2d(3, 4, 1)
    backbone.out_channels = 4
    theirs = RetinaNet(
        backbone,
        num_classes=3,
        anchor_generator=AnchorGenerator(((8,),), ((1.0,),)),
        topk_candidates=top_k,
        detections_per_img=max_detections,
    )
    predictions, sizes = random_predictions(seed=5), [SIZE, (70, 90)]
    outputs = {
        "cls_logits": list(predictions.logits.split(LEVELS, dim=1)),
        "bbox_regression": list(predictions.deltas.split(LEVELS, dim=1)),
    }
    expected = theirs.postprocess_detections(outputs, [list(predictions.anchors.split(LEVELS))] * 2, sizes)
    detections = Postprocess(BoxCoder(), 0.05, top_k, 0.5, max_detections)(predictions, sizes)
    for ours, other in zip(detections, expected, strict=True):
        assert len(ours.scores) > 0
        assert torch.equal(ours.labels, other["labels"])
        torch.testing.assert_close(ours.scores, other["scores"])
        torch.testing.assert_close(ours.boxes, other["boxes"])


def test_no_candidates_give_empty_detections():
    predictions = random_predictions(mean=-50)
    for detections in Postprocess(BoxCoder())(predictions, [SIZE, SIZE]):
        assert detections.boxes.shape == (0, 4) and detections.scores.shape == (0,) and detections.labels.shape == (0,)
        assert (
            detections.boxes.dtype == detections.scores.dtype == torch.float32
            and detections.labels.dtype == torch.int64
        )


def test_a_level_and_an_image_may_have_no_candidates():
    predictions = random_predictions()
    predictions.logits[0, :40] = -50
    predictions.logits[1] = -50
    first, second = Postprocess(BoxCoder())(predictions, [SIZE, SIZE])
    assert len(first.scores) > 0 and len(second.scores) == 0


def test_top_k_applies_to_each_level():
    predictions = random_predictions(images=1)
    (detections,) = Postprocess(BoxCoder(), 0.0, top_k=2, nms_iou=1.0)(predictions, [SIZE])
    assert len(detections.scores) == 2 * len(LEVELS)
    best_scores = [level.flatten().topk(2).values for level in predictions.logits[0].sigmoid().split(LEVELS)]
    torch.testing.assert_close(detections.scores, torch.cat(best_scores).sort(descending=True).values)


def test_max_detections_keeps_the_best():
    predictions = random_predictions()
    limited_results = Postprocess(BoxCoder(), max_detections=3)(predictions, [SIZE, SIZE])
    full_results = Postprocess(BoxCoder(), max_detections=1000)(predictions, [SIZE, SIZE])
    for limited, full in zip(limited_results, full_results):
        assert len(full.scores) > 3
        assert torch.equal(limited.boxes, full.boxes[:3])
        assert torch.equal(limited.scores, full.scores.sort(descending=True).values[:3])


def test_a_score_of_exactly_the_threshold_is_dropped():
    predictions = random_predictions(images=1, mean=-50)
    predictions.logits[0, 3, 1] = 0.0
    predictions.logits[0, 4, 1] = 1e-6
    (detections,) = Postprocess(BoxCoder(), score_threshold=0.5)(predictions, [SIZE])
    assert len(detections.scores) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_processed_in_float32(dtype):
    predictions = random_predictions()
    half_inputs = predictions._replace(logits=predictions.logits.to(dtype), deltas=predictions.deltas.to(dtype))
    float_inputs = half_inputs._replace(logits=half_inputs.logits.float(), deltas=half_inputs.deltas.float())
    postprocess = Postprocess(BoxCoder())
    for ours, expected in zip(postprocess(half_inputs, [SIZE, SIZE]), postprocess(float_inputs, [SIZE, SIZE])):
        assert ours.boxes.dtype == ours.scores.dtype == torch.float32 and len(ours.scores) > 0
        assert all(torch.equal(a, b) for a, b in zip(ours, expected))


@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("output", ["logits", "deltas"])
def test_outputs_that_are_not_finite_are_reported_with_their_images(output, value, dtype, threshold):
    predictions = random_predictions(images=3)
    predictions = predictions._replace(logits=predictions.logits.to(dtype), deltas=predictions.deltas.to(dtype))
    Postprocess(BoxCoder(), threshold)(predictions, [SIZE] * 3)
    getattr(predictions, output)[1, 7, 2] = value
    with pytest.raises(NonFiniteOutput, match=r"^the model's output is not finite: .*solver.lr.*precision") as error:
        Postprocess(BoxCoder(), threshold)(predictions, [SIZE] * 3)
    assert error.value.images == [1] and "\n" not in str(error.value)


def test_the_largest_finite_outputs_are_accepted():
    predictions = random_predictions(images=1)
    predictions.logits[0, :, 0] = torch.finfo(torch.float32).max
    predictions.logits[0, :, 1] = torch.finfo(torch.float32).min
    (detections,) = Postprocess(BoxCoder())(predictions, [SIZE])
    assert detections.labels[0] == 0 and detections.scores[0] == 1 and (detections.labels != 1).all()


def test_boxes_are_decoded_by_the_given_coder():
    predictions = random_predictions(images=1)
    weights = (10.0, 10.0, 5.0, 5.0)
    scaled_predictions = predictions._replace(deltas=predictions.deltas * torch.tensor(weights))
    (expected,) = Postprocess(BoxCoder())(predictions, [SIZE])
    (detections,) = Postprocess(BoxCoder(weights))(scaled_predictions, [SIZE])
    torch.testing.assert_close(detections.boxes, expected.boxes)


def test_detections_need_no_gradient():
    predictions = random_predictions()
    predictions.logits.requires_grad_()
    assert not any(value.requires_grad for value in Postprocess(BoxCoder())(predictions, [SIZE, SIZE])[0])
