"""Observed gradients against plain counting."""

import numpy as np
import pytest
import torch

from detector import gradients
from detector.assigner import IoUAssigner
from detector.box_coder import BoxCoder
from detector.criterion import Criterion
from detector.losses import ASL1, GHMC, GHMR, CrossEntropy, SmoothL1
from detector.structures import Predictions, Target

ANCHORS = 60


def build(class_loss, box_loss, **weights):
    return Criterion(IoUAssigner(), BoxCoder(), class_loss, box_loss, **weights)


def random_case(images=2, classes=3):
    rng = torch.Generator().manual_seed(0)
    corner = torch.rand(ANCHORS, 2, generator=rng) * 100
    anchors = torch.cat([corner, corner + 20 + torch.rand(ANCHORS, 2, generator=rng) * 30], dim=1)
    targets = [
        Target(anchors[i : i + 6] + torch.randn(6, 4, generator=rng) * 2, torch.arange(6) % classes)
        for i in range(images)
    ]
    logits = torch.randn(images, ANCHORS, classes, generator=rng) * 3
    deltas = torch.randn(images, ANCHORS, 4, generator=rng) * 0.05
    return Predictions(logits.requires_grad_(), deltas.requires_grad_(), anchors, (ANCHORS,)), targets


def test_counts_and_gradients_equal_plain_numpy():
    predictions, targets = random_case()
    criterion = build(CrossEntropy(), ASL1(mu=gradients.MU), class_weight=2.0)
    cells, boxes = gradients.observe(criterion, predictions, targets)

    matches = criterion.match(predictions, targets)
    num_pos = int(matches.num_pos)
    one_hot = torch.nn.functional.one_hot(matches.anchor_labels(3), 4)[..., :3]
    g = (predictions.logits.detach().double().sigmoid() - one_hot).abs()[matches.valid].flatten().numpy()
    assert cells.counts.tolist() == np.histogram(g, 30, (0, 1))[0].tolist()
    expected = np.histogram(g, 30, (0, 1), weights=2 * g / num_pos)[0]  # the slope of cross entropy is g itself
    assert cells.gradient.numpy() == pytest.approx(expected, rel=1e-5)

    d = predictions.deltas.detach().flatten(0, 1)[matches.rows] - criterion.coder.encode(matches.boxes, matches.anchors)
    g = (d.abs() / (d * d + gradients.MU**2).sqrt()).flatten().numpy()
    assert boxes.counts.tolist() == np.histogram(g, 10, (0, 1))[0].tolist()
    assert boxes.gradient.numpy() == pytest.approx(np.histogram(g, 10, (0, 1), weights=g / num_pos)[0], rel=1e-4)


def test_with_ghm_the_gradient_of_a_region_is_proportional_to_its_norm():
    predictions, targets = random_case()
    cells, _ = gradients.observe(build(GHMC(momentum=0.0), GHMR(momentum=0.0)), predictions, targets)
    filled = cells.counts > 0
    centres = (torch.arange(30) + 0.5) / 30
    # All regions weigh the same, so a region's gradient is its mean norm over their number.
    torch.testing.assert_close(cells.gradient[filled] * filled.sum(), centres[filled].double(), rtol=0, atol=0.5 / 30)


@pytest.mark.parametrize("scope", ["batch", "level"])
def test_in_training_the_observed_gradient_is_that_of_the_step(scope):
    predictions, targets = random_case()
    predictions = predictions._replace(levels=(ANCHORS // 2, ANCHORS - ANCHORS // 2))
    criterion = build(GHMC(momentum=0.9, scope=scope), SmoothL1())
    criterion(predictions._replace(logits=predictions.logits * 0.2), targets)  # the average now differs from the batch
    cells, _ = gradients.observe(criterion, predictions, targets)
    (gradient,) = torch.autograd.grad(criterion(predictions, targets).total, predictions.logits)

    matches = criterion.match(predictions, targets)
    one_hot = torch.nn.functional.one_hot(matches.anchor_labels(3), 4)[..., :3]
    g = (predictions.logits.detach().double().sigmoid() - one_hot).abs()[matches.valid].flatten().numpy()
    expected = np.histogram(g, 30, (0, 1), weights=gradient[matches.valid].abs().flatten().numpy())[0]
    assert cells.gradient.numpy() == pytest.approx(expected, rel=1e-4)


def test_observing_changes_nothing():
    predictions, targets = random_case()
    criterion = build(GHMC(), GHMR())
    criterion(predictions, targets)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    gradients.observe(criterion, predictions, targets)
    assert criterion.training and criterion.class_loss.training
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())
    assert predictions.logits.grad is None and predictions.deltas.grad is None


def test_shares_density_and_beta_by_hand():
    regions = gradients.Regions(torch.tensor([80, 10, 0, 0, 0, 0, 0, 0, 0, 10]), torch.arange(10.0).double())
    assert regions.shares() == pytest.approx({"easy": 0.0, "medium": 36 / 45, "outlier": 9 / 45})
    assert regions.density.tolist() == pytest.approx([8, 1] + [0] * 7 + [1])
    assert regions.beta.tolist() == pytest.approx([0.125, 1] + [0] * 7 + [1])


def test_a_batch_without_boxes_has_no_box_gradients():
    predictions, _ = random_case()
    empty_target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    cells, boxes = gradients.observe(build(CrossEntropy(), SmoothL1()), predictions, [empty_target, empty_target])
    assert cells.counts.sum() == 2 * ANCHORS * 3 and boxes.counts.sum() == 0
    assert boxes.shares() == {"easy": 0.0, "medium": 0.0, "outlier": 0.0}
