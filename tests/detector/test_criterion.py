import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detector import criterion as criterion_module
from detector.assigner import ATSSAssigner, IoUAssigner
from detector.box_coder import BoxCoder
from detector.criterion import Criterion
from detector.gradients import observe
from detector.losses import (
    ASL1,
    GHMC,
    GHMR,
    L1,
    BalancedL1,
    CIoU,
    CrossEntropy,
    DIoU,
    Focal,
    GIoU,
    QualityFocal,
    RankSort,
    SmoothL1,
    Varifocal,
    dispatch,
)
from detector.structures import Grid, Predictions, Target

ANCHORS = 40
NOTHING = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def build(**options):
    coder = BoxCoder((1.0, 2.0, 3.0, 4.0))
    parts = {"class_loss": Focal(0.25, 2.0), "box_loss": L1()} | options
    return Criterion(assigner=IoUAssigner(0.5, 0.4), coder=coder, **parts)


def random_case(classes=3, images=2, seed=0):
    """Predictions and targets, with positive and ignored anchors and background in every image."""
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(ANCHORS, 2, generator=rng) * 100
    anchors = torch.cat([corner, corner + 20 + torch.rand(ANCHORS, 2, generator=rng) * 30], dim=1)
    targets = []
    for _ in range(images):
        chosen = torch.randperm(ANCHORS, generator=rng)[:6]
        boxes = anchors[chosen] + torch.randn(6, 4, generator=rng) * 3
        targets.append(Target(boxes, torch.randint(0, classes, (6,), generator=rng)))
    predictions = Predictions(
        torch.randn(images, ANCHORS, classes, generator=rng).requires_grad_(),
        torch.randn(images, ANCHORS, 4, generator=rng).requires_grad_(),
        anchors,
        (ANCHORS,),
    )
    return predictions, targets


def by_hand(predictions, targets, classes):
    """Class loss, box loss, positives, ignored anchors and mean probability of the true class, by plain loops."""
    class_sum = box_sum = probability = 0.0
    positives = ignored = 0
    for logits, deltas, target in zip(predictions.logits.tolist(), predictions.deltas.tolist(), targets):
        matches = [-1] * ANCHORS
        if len(target.boxes):
            matches = Matcher(0.5, 0.4, allow_low_quality_matches=True)(
                box_iou(target.boxes, predictions.anchors)
            ).tolist()
        for anchor, match in enumerate(matches):
            if match == -2:
                ignored += 1
                continue
            for label in range(classes):
                p = 1 / (1 + math.exp(-logits[anchor][label]))
                if match >= 0 and target.labels[match] == label:
                    class_sum += 0.25 * (1 - p) ** 2 * -math.log(p)
                    probability += p
                else:
                    class_sum += 0.75 * p**2 * -math.log(1 - p)
            if match >= 0:
                positives += 1
                ax1, ay1, ax2, ay2 = predictions.anchors[anchor].tolist()
                x1, y1, x2, y2 = target.boxes[match].tolist()
                w, h = ax2 - ax1, ay2 - ay1
                expected = [
                    1 * ((x1 + x2) / 2 - (ax1 + ax2) / 2) / w,
                    2 * ((y1 + y2) / 2 - (ay1 + ay2) / 2) / h,
                    3 * math.log((x2 - x1) / w),
                    4 * math.log((y2 - y1) / h),
                ]
                box_sum += sum(abs(a - b) for a, b in zip(deltas[anchor], expected))
    num_pos = max(positives, 1)
    return class_sum / num_pos, box_sum / num_pos, positives, ignored, probability / num_pos


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_equals_plain_loops(classes):
    predictions, targets = random_case(classes)
    losses = build()(predictions, targets)
    class_loss, box_loss, positives, ignored, probability = by_hand(predictions, targets, classes)
    assert positives > 5 and ignored > 2
    assert losses.terms["class"].item() == pytest.approx(class_loss, rel=1e-4)
    assert losses.terms["box"].item() == pytest.approx(box_loss, rel=1e-4)
    assert losses.diagnostics["true_class_probability"].item() == pytest.approx(probability, rel=1e-4)
    assert losses.diagnostics["positives_per_image"].item() == pytest.approx(positives / 2)


def test_an_image_without_boxes_learns_only_background():
    predictions, targets = random_case(images=3)
    targets[1] = NOTHING
    losses = build()(predictions, targets)
    class_loss, box_loss, *_ = by_hand(predictions, targets, 3)
    assert losses.terms["class"].item() == pytest.approx(class_loss, rel=1e-4)
    assert losses.terms["box"].item() == pytest.approx(box_loss, rel=1e-4)
    losses.total.backward()
    assert predictions.logits.grad[1].all() and not predictions.deltas.grad[1].any()


@pytest.mark.parametrize("losses", [(Focal(), L1()), (GHMC(), GHMR())])
def test_a_batch_without_any_box_has_a_class_loss_only(losses):
    class_loss, box_loss = losses
    predictions, _ = random_case()
    result = build(class_loss=class_loss, box_loss=box_loss)(predictions, [NOTHING, NOTHING])
    assert result.terms["box"].item() == 0 and 0 < result.terms["class"].item() < math.inf
    assert all(value.isfinite() for value in result.diagnostics.values())
    result.total.backward()
    assert predictions.logits.grad.all()
    # A gradient of None would stop DDP.
    assert predictions.deltas.grad is not None and not predictions.deltas.grad.any()


def test_the_class_loss_of_a_batch_without_any_box_by_hand():
    predictions, _ = random_case()
    expected = by_hand(predictions, [NOTHING, NOTHING], 3)[0]
    assert build()(predictions, [NOTHING, NOTHING]).terms["class"].item() == pytest.approx(expected, rel=1e-4)


def test_ignored_anchors_get_no_gradient_and_all_others_do():
    predictions, targets = random_case()
    build()(predictions, targets).total.backward()
    for logits, deltas, target in zip(predictions.logits.grad, predictions.deltas.grad, targets):
        assignment = IoUAssigner(0.5, 0.4)(predictions.anchors, target.boxes)
        assert torch.equal(logits.any(dim=1), ~assignment.ignored)
        assert torch.equal(deltas.any(dim=1), assignment.positive)


def test_weights_multiply_the_losses():
    predictions, targets = random_case()
    plain, weighted = build()(predictions, targets), build(class_weight=3.0, box_weight=0.5)(predictions, targets)
    torch.testing.assert_close(weighted.terms["class"], 3 * plain.terms["class"])
    torch.testing.assert_close(weighted.terms["box"], plain.terms["box"] / 2)
    torch.testing.assert_close(weighted.total, weighted.terms["class"] + weighted.terms["box"])


def test_diagnostics_are_detached_and_do_not_depend_on_weights():
    predictions, targets = random_case()
    plain, weighted = build()(predictions, targets), build(class_weight=3.0, box_weight=0.5)(predictions, targets)
    assert plain.diagnostics.keys() == {"true_class_probability", "positives_per_image"}
    for name, value in plain.diagnostics.items():
        assert not value.requires_grad and value.ndim == 0
        assert torch.equal(value, weighted.diagnostics[name])
    assert plain.terms.keys() == {"class", "box"} and all(term.requires_grad for term in plain.terms.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_taken_in_float32(dtype):
    predictions, targets = random_case()
    half_inputs = predictions._replace(
        logits=predictions.logits.detach().to(dtype).requires_grad_(),
        deltas=predictions.deltas.detach().to(dtype).requires_grad_(),
    )
    float_inputs = half_inputs._replace(
        logits=half_inputs.logits.detach().float(), deltas=half_inputs.deltas.detach().float()
    )
    losses, expected = build()(half_inputs, targets), build()(float_inputs, targets)
    for name, term in losses.terms.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, expected.terms[name])
    for name, value in losses.diagnostics.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected.diagnostics[name])
    losses.total.backward()
    assert half_inputs.logits.grad.dtype == half_inputs.deltas.grad.dtype == dtype
    assert half_inputs.logits.grad.any() and half_inputs.deltas.grad.any()


def test_losses_receive_float32():
    class Strict(L1):
        def forward(self, deltas, targets, num_pos):
            assert deltas.dtype == targets.dtype == torch.float32
            return super().forward(deltas, targets, num_pos)

    predictions, targets = random_case()
    half_inputs = predictions._replace(logits=predictions.logits.bfloat16(), deltas=predictions.deltas.bfloat16())
    build(box_loss=Strict())(half_inputs, targets)


def test_each_loss_is_called_once_on_the_whole_batch():
    calls = []

    class Recorded(Focal):
        def forward(self, logits, labels, valid, num_pos):
            calls.append((logits, labels, valid, num_pos))
            return super().forward(logits, labels, valid, num_pos)

    predictions, targets = random_case()
    build(class_loss=Recorded())(predictions, targets)
    ((logits, labels, valid, num_pos),) = calls
    assert logits.shape == (2 * ANCHORS, 3) and labels.shape == valid.shape == (2 * ANCHORS,)
    assert torch.equal(logits[ANCHORS:], predictions.logits[1])  # images one after the other
    assert num_pos == ((labels < 3) & valid).sum()


def test_permuting_the_images_changes_nothing():
    predictions, targets = random_case()
    swapped = predictions._replace(logits=predictions.logits.flip(0), deltas=predictions.deltas.flip(0))
    losses, other = build()(predictions, targets), build()(swapped, targets[::-1])
    for name, term in losses.terms.items():
        torch.testing.assert_close(other.terms[name], term)


def test_the_state_of_the_losses_is_saved_and_changes_only_in_training():
    predictions, targets = random_case()
    criterion = build(class_loss=GHMC(), box_loss=GHMR())
    assert {"class_loss.average", "box_loss.average"} <= criterion.state_dict().keys()
    criterion.eval()
    criterion(predictions, targets)
    assert not criterion.class_loss.updates and not criterion.box_loss.updates
    criterion.train()
    criterion(predictions, targets)
    assert criterion.class_loss.updates == criterion.box_loss.updates == 1


def positives(predictions, targets):
    """The assignment of each image; and image, anchor and box of each positive: by the assigner alone."""
    assignments = [IoUAssigner(0.5, 0.4)(predictions.anchors, target.boxes) for target in targets]
    image, anchor = torch.stack([assignment.positive for assignment in assignments]).nonzero(as_tuple=True)
    boxes = torch.stack([targets[i].boxes[assignments[i].gt_index[a]] for i, a in zip(image.tolist(), anchor.tolist())])
    return assignments, image, anchor, boxes


def test_a_box_loss_that_takes_boxes_receives_pixels():
    predictions, targets = random_case()
    _, image, anchor, boxes = positives(predictions, targets)
    criterion = build(box_loss=GIoU())
    decoded = criterion.coder.decode(predictions.deltas[image, anchor], predictions.anchors[anchor])
    expected = GIoU()(decoded, boxes, len(boxes))
    torch.testing.assert_close(criterion(predictions, targets).terms["box"], expected)


def test_a_class_loss_that_takes_quality_receives_the_iou_of_the_predicted_boxes():
    predictions, targets = random_case()
    assignments, image, anchor, boxes = positives(predictions, targets)
    criterion = build(class_loss=QualityFocal())
    losses = criterion(predictions, targets)

    decoded = criterion.coder.decode(predictions.deltas[image, anchor].detach(), predictions.anchors[anchor])
    quality = torch.zeros(len(targets), ANCHORS)
    quality[image, anchor] = box_iou(decoded, boxes).diagonal()
    labels = torch.stack([torch.where(a.positive, t.labels[a.gt_index], 3) for a, t in zip(assignments, targets)])
    valid = ~torch.stack([a.ignored for a in assignments])
    rest = labels.flatten(), valid.flatten(), len(boxes), quality.flatten()
    torch.testing.assert_close(losses.terms["class"], QualityFocal()(predictions.logits.flatten(0, 1), *rest))
    losses.terms["class"].backward()
    assert predictions.deltas.grad is None or not predictions.deltas.grad.any()


def test_scope_level_sums_one_call_of_a_loss_for_each_level():
    predictions, targets = random_case()
    levels = (25, 10, 5)
    assignments, image, anchor, boxes = positives(predictions, targets)
    criterion = build(class_loss=GHMC(scope="level"), box_loss=GHMR(scope="level"))
    losses = criterion(predictions._replace(levels=levels), targets)

    class_loss, box_loss, class_sum, box_sum, start = GHMC(), GHMR(), 0.0, 0.0, 0
    labels = torch.stack([torch.where(a.positive, t.labels[a.gt_index], 3) for a, t in zip(assignments, targets)])
    valid = ~torch.stack([a.ignored for a in assignments])
    encoded = criterion.coder.encode(boxes, predictions.anchors[anchor])
    for size in levels:
        level = slice(start, start + size)
        logits = predictions.logits[:, level].flatten(0, 1)
        class_sum += class_loss(logits, labels[:, level].flatten(), valid[:, level].flatten(), len(boxes))
        in_level = (anchor >= level.start) & (anchor < level.stop)
        box_sum += box_loss(predictions.deltas[image, anchor][in_level], encoded[in_level], len(boxes))
        start += size
    torch.testing.assert_close(losses.terms["class"], class_sum)
    torch.testing.assert_close(losses.terms["box"], box_sum)
    assert criterion.class_loss.updates == 3
    assert torch.equal(criterion.class_loss.average, class_loss.average)


# --------------------------------------------------------------------------------- no step may wait for the device

CLASS_LOSSES = [CrossEntropy, Focal, GHMC, partial(GHMC, scope="level"), QualityFocal, Varifocal, RankSort]
BOX_LOSSES = [SmoothL1, L1, ASL1, BalancedL1, GHMR, partial(GHMR, scope="level"), GIoU, DIoU, CIoU]
PAIRS = [*((loss, L1) for loss in CLASS_LOSSES), *((Focal, loss) for loss in BOX_LOSSES)]


@pytest.mark.parametrize(("class_loss", "box_loss"), PAIRS)
@pytest.mark.parametrize("boxes", ["everywhere", "in one image", "nowhere"])
def test_matching_before_the_model_runs_changes_nothing(class_loss, box_loss, boxes):
    results = []
    for match_first in (True, False):
        predictions, targets = random_case()
        targets = targets if boxes == "everywhere" else [targets[0] if boxes == "in one image" else NOTHING, NOTHING]
        predictions = predictions._replace(levels=(25, 10, 5))
        criterion = build(class_loss=class_loss(), box_loss=box_loss())
        matches = criterion.match(Grid(predictions.anchors, predictions.levels), targets) if match_first else None
        losses = criterion(predictions, targets, matches)
        losses.total.backward()
        observation = observe(criterion, predictions, targets, matches=matches)
        results.append(
            [
                losses.terms,
                losses.diagnostics,
                predictions.logits.grad,
                predictions.deltas.grad,
                criterion.state_dict(),
                observation,
            ]
        )
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(("class_loss", "box_loss"), PAIRS)
def test_outputs_that_no_loss_uses_may_be_anything(class_loss, box_loss):
    results = []
    for filler in (None, torch.nan, torch.inf, -torch.inf):
        predictions, targets = random_case()
        if filler is not None:
            assignments, *_ = positives(predictions, targets)
            with torch.no_grad():
                predictions.logits[torch.stack([one.ignored for one in assignments])] = filler
                predictions.deltas[~torch.stack([one.positive for one in assignments])] = filler
        one = build(class_loss=class_loss(), box_loss=box_loss())
        losses = one(predictions._replace(levels=(25, 10, 5)), targets)
        losses.total.backward()
        results.append([losses.terms, losses.diagnostics, predictions.logits.grad, predictions.deltas.grad])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("assigner", [IoUAssigner, ATSSAssigner])
def test_images_matched_together_get_the_matches_of_each_alone(assigner, monkeypatch):
    """A GPU matches images together, padded with boxes of zeros. One image here has no box."""
    predictions, targets = random_case()
    predictions = predictions._replace(levels=(25, 10, 5))
    targets[-1] = Target(targets[-1].boxes[:0], targets[-1].labels[:0])
    criterion = build()
    criterion.assigner = assigner()
    separate_matches = criterion.match(predictions, targets)
    monkeypatch.setattr(criterion_module, "split_boxes", lambda compared, boxes, counts: boxes.split(len(boxes)))
    joint_matches = criterion.match(predictions, targets)
    assert len(separate_matches.boxes) > 0
    for name in ("labels", "valid", "positive", "num_pos", "rows", "anchors", "boxes"):
        assert torch.equal(getattr(separate_matches, name), getattr(joint_matches, name))


@pytest.mark.parametrize(("class_loss", "box_loss"), [pair for pair in PAIRS if RankSort not in pair])  # RankSort waits
@pytest.mark.parametrize("assigner", [IoUAssigner, ATSSAssigner])
@pytest.mark.parametrize("boxes", [6, 0])  # of the first image; the second has none
def test_on_a_gpu_no_step_depends_on_data(class_loss, box_loss, assigner, boxes, monkeypatch):
    """With tensors that have no values, any step that needs one raises. No numbers are copied from the host."""
    monkeypatch.setattr(dispatch, "compiles", lambda logits: False)
    monkeypatch.setattr(dispatch, "triton_for", lambda logits: None)  # it would run on these tensors' values
    pending = SimpleNamespace(get=lambda: torch.tensor(7))  # a value that the criterion copies without a wait
    monkeypatch.setattr(criterion_module, "PendingCopy", lambda number: pending)
    with FakeTensorMode(), Copies() as copies:
        cuda = torch.device("cuda", 0)
        predictions = Predictions(
            torch.randn(2, ANCHORS, 3, device=cuda, dtype=torch.bfloat16).requires_grad_(),
            torch.randn(2, ANCHORS, 4, device=cuda, dtype=torch.bfloat16).requires_grad_(),
            torch.rand(ANCHORS, 4, device=cuda),
            (25, 10, 5),
        )
        labels = torch.zeros(boxes, dtype=torch.int64, device=cuda)
        targets = [Target(torch.rand(boxes, 4, device=cuda), labels), Target(predictions.anchors[:0], labels[:0])]
        with torch.device(cuda):  # the losses' own state
            criterion = build(class_loss=class_loss(), box_loss=box_loss())
        criterion.assigner = assigner()
        losses = criterion(predictions, targets)
        assert losses.total.device == cuda and all(value.device == cuda for value in losses.diagnostics.values())
        with pytest.raises(RuntimeError):
            losses.total.item()  # proof that a wait would raise
    assert not copies.found


class Copies(TorchDispatchMode):
    """Records the operations that copy from the host to the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        from_host = any(isinstance(arg, torch.Tensor) and arg.device.type == "cpu" and arg.ndim for arg in args)
        if from_host and isinstance(result, torch.Tensor) and result.device.type == "cuda":
            self.found.append(func)
        return result


@pytest.mark.parametrize("assigner, compared", [(IoUAssigner(), ANCHORS), (ATSSAssigner(), ANCHORS // 5)])
def test_a_batch_is_split_by_what_its_assigner_compares(assigner, compared, monkeypatch):
    seen = []

    def split(places, boxes, counts):
        seen.append(len(places))
        return boxes.split(1)

    monkeypatch.setattr(criterion_module, "split_boxes", split)
    anchors = torch.rand(ANCHORS // 5, 4).repeat_interleave(5, dim=0)
    criterion = build()
    criterion.assigner = assigner
    criterion.match(Grid(anchors, (ANCHORS,), 5), [Target(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0]))])
    assert seen == [compared]
