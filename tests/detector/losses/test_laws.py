"""Laws that every class loss and every box loss must obey."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from detector import losses
from detector.losses import GHMC, GHMR, OHEM, CrossEntropy, Focal


def example():
    """The loss of docs/new_loss.md."""
    text = (Path(__file__).parents[3] / "docs" / "new_loss.md").read_text(encoding="utf-8")
    names = {"__name__": "generalized"}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    return names["GeneralizedCrossEntropy"]


# Every loss that a config can name must obey these laws, and so must settings that run other code.
CLASS_LOSSES = losses.CLASS_LOSSES | {
    "docs_example": example(),
    "ce_balanced": lambda: CrossEntropy(alpha=0.25),
    "ohem_top_k": lambda: OHEM(top_k=17),
    "focal_gamma_half": lambda: Focal(gamma=0.5),
    "ghm_c_all_bins": lambda: GHMC(momentum=0.0, normalizer="all_bins"),
    "ghm_c_exact": lambda: GHMC(density="exact"),
    "ghm_c_near_exact": lambda: GHMC(density="near_exact"),
    "ghm_c_limited": lambda: GHMC(max_weight=2.0),
    "ghm_c_prior": lambda: GHMC(prior_count=3.0),
}
BOX_LOSSES = {name: make for name, make in losses.BOX_LOSSES.items() if not getattr(make(), "takes_boxes", False)} | {
    "ghm_r_all_bins": lambda: GHMR(momentum=0.0, normalizer="all_bins"),
    "ghm_r_exact": lambda: GHMR(density="exact"),
    "ghm_r_near_exact": lambda: GHMR(density="near_exact"),
    "ghm_r_limited": lambda: GHMR(max_weight=2.0),
}
class_losses = pytest.mark.parametrize("make", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
box_losses = pytest.mark.parametrize("make", BOX_LOSSES.values(), ids=BOX_LOSSES)
# A ranking loss needs both positives and negatives. Its value is flat nearly everywhere, so its gradient is not that of
# its value. To compare positives with each other, it must know how many there are.
RANKINGS = {"rank_sort"}
not_rankings = pytest.mark.parametrize("name", sorted(CLASS_LOSSES.keys() - RANKINGS))
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def value_and_grad(loss, x, *rest):
    x = x.clone().requires_grad_()
    value = loss(x, *rest)
    value.backward()
    return value.detach(), x.grad


# ---- class losses


@class_losses
def test_ignored_rows_change_nothing(make, cells):
    logits, labels, valid, num_pos = cells()
    dirty_logits, dirty_labels = logits.clone(), labels.clone()
    dirty_logits[~valid] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, 0.0], dtype=logits.dtype)
    dirty_labels[~valid] = torch.tensor([-1, 0, 999]).repeat(len(labels))[: (~valid).sum()]
    all_valid = torch.ones(int(valid.sum()), dtype=torch.bool)

    first, second = make(), make()
    value, grad = value_and_grad(first, dirty_logits, dirty_labels, valid, num_pos)
    expected, expected_grad = value_and_grad(second, logits[valid], labels[valid], all_valid, num_pos)

    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad[valid], expected_grad)
    assert (grad[~valid] == 0).all()
    for name, buffer in first.state_dict().items():
        assert torch.equal(buffer, second.state_dict()[name]), name


@class_losses
def test_a_label_that_is_no_class_and_other_shapes_are_refused(make, cells):
    logits, labels, valid, num_pos = cells()
    loss = make()
    before = {name: buffer.clone() for name, buffer in loss.state_dict().items()}
    for wrong in (-1, logits.shape[1] + 1):  # -1 is background to some libraries, and ignored to others
        others = labels.clone()
        others[valid.nonzero()[0]] = wrong
        with pytest.raises(ValueError, match=f"label {wrong} of a valid row"):
            loss(logits, others, valid, num_pos)
    for arguments in (
        (logits[None], labels[None], valid[None]),
        (logits, labels[:, None], valid),
        (logits, labels, valid[1:]),
    ):
        with pytest.raises(ValueError, match=r"must be \(N, C\), \(N,\) and \(N,\)"):
            loss(*arguments, num_pos)
    with pytest.raises(ValueError, match="must be bool"):
        loss(logits, labels, valid.to(torch.uint8), num_pos)
    with pytest.raises(ValueError, match="must be int64"):
        loss(logits, labels.float(), valid, num_pos)
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.state_dict().items())


with_quality = pytest.mark.parametrize("name", [k for k, v in CLASS_LOSSES.items() if getattr(v(), "takes_quality", 0)])


@with_quality
def test_quality_of_another_shape_is_refused(name, cells):
    logits, labels, valid, num_pos = cells()
    for shape in ((2,), (len(labels), 1), logits.shape, ()):
        with pytest.raises(ValueError, match=r"quality \(.*\): must be"):
            CLASS_LOSSES[name]()(logits, labels, valid, num_pos, torch.rand(shape))


@with_quality
def test_a_quality_of_nan_on_a_positive_reaches_the_loss(name, cells):
    logits, labels, valid, num_pos = cells()
    assert CLASS_LOSSES[name]()(logits, labels, valid, num_pos, torch.full(labels.shape, torch.nan)).isnan()


@pytest.mark.parametrize("make", losses.BOX_LOSSES.values(), ids=losses.BOX_LOSSES)
def test_boxes_that_would_broadcast_are_refused(make):
    boxes = torch.rand(3, 4)
    for targets in (boxes[:1], boxes[:, :1], boxes[None], boxes[0]):
        with pytest.raises(ValueError, match=r"both must be \(P, 4\)"):
            make()(boxes, targets, 3)


@with_quality
def test_quality_is_read_only_on_positives(name, cells):
    make = CLASS_LOSSES[name]
    logits, labels, valid, num_pos = cells()
    quality = torch.rand(len(labels), generator=torch.Generator().manual_seed(0))
    dirty_quality = torch.where(
        valid & (labels < 5), quality, torch.tensor([torch.nan, torch.inf]).repeat(len(labels) // 2)
    )
    value, grad = value_and_grad(make(), logits, labels, valid, num_pos, dirty_quality)
    expected, expected_grad = value_and_grad(make(), logits, labels, valid, num_pos, quality)
    assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


@class_losses
@pytest.mark.parametrize("rows, share_valid", [(0, 1), (6, 0)], ids=["no rows", "all ignored"])
def test_no_valid_rows_give_zero_and_a_gradient(make, rows, share_valid):
    valid = torch.full((rows,), bool(share_valid))
    labels = torch.zeros(rows, dtype=torch.int64)
    value, grad = value_and_grad(make(), torch.randn(rows, 3), labels, valid, 1)
    assert value == 0
    assert grad.shape == (rows, 3) and (grad == 0).all()


@not_rankings
def test_without_positives_negatives_still_get_a_gradient(name, cells):
    make = CLASS_LOSSES[name]
    logits, labels, valid, _ = cells()
    value, grad = value_and_grad(make(), logits, torch.full_like(labels, 5), valid, 1)
    assert value.isfinite() and value > 0
    assert grad.isfinite().all() and (grad > 0).any() and (grad >= 0).all()


@class_losses
def test_one_class_gives_a_loss_and_a_gradient(make, cells):
    value, grad = value_and_grad(make(), *cells(classes=1))
    assert value.isfinite() and value > 0 and (grad != 0).any()


@class_losses
def test_descent_raises_true_classes_and_lowers_the_others(make, cells, one_hot):
    logits, labels, valid, num_pos = cells(spread=1.0)
    _, grad = value_and_grad(make(), logits, labels, valid, num_pos)
    positive = one_hot(labels, 5).bool() & valid[:, None]
    assert (grad[positive] <= 0).all() and (grad[~positive] >= 0).all()
    assert (grad[positive] < 0).any() and (grad[~positive] > 0).any()


# Not for exact density: beta changes with the logits, but the gradient holds it constant.
@pytest.mark.parametrize("name", sorted(CLASS_LOSSES.keys() - {"ghm_c_exact"} - RANKINGS))
def test_gradcheck(name, cells):
    make = CLASS_LOSSES[name]
    logits, labels, valid, num_pos = cells(rows=8, classes=3)
    loss = make().eval()  # in evaluation beta is the same function of the logits at every call
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, valid, num_pos), logits.requires_grad_())


@class_losses
@pytest.mark.parametrize("size", [50.0, 200.0, 1e4])
def test_extreme_logits_give_finite_value_and_gradient(make, size):
    logits = torch.tensor([[size, -size, 0.0], [-size, size, 0.0], [0.0, size, -size]])
    value, grad = value_and_grad(make(), logits, torch.tensor([0, 0, 3]), torch.ones(3, dtype=torch.bool), 2)
    assert value.isfinite() and value > 0
    assert grad.isfinite().all()


@class_losses
@halves
def test_half_precision_logits_give_the_float32_loss(make, cells, dtype):
    logits, labels, valid, num_pos = cells(rows=20_000, spread=1.0)  # 100,000 cells: more than float16 can count
    rounded = logits.to(dtype)
    value, grad = value_and_grad(make(), rounded, labels, valid, num_pos)
    exact, exact_grad = value_and_grad(make(), rounded.float(), labels, valid, num_pos)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert torch.equal(value, exact)
    torch.testing.assert_close(grad, exact_grad.to(dtype))
    unrounded = make()(logits, labels, valid, num_pos)
    torch.testing.assert_close(value.double(), unrounded, rtol=float(torch.finfo(dtype).eps), atol=0)


@class_losses
@halves
def test_half_precision_gradient_equals_float64s_up_to_two_roundings(make, cells, dtype):
    # 1 / 255 in bfloat16 is 0.39% too large.
    logits, labels, valid, _ = cells(rows=2000, spread=1.0)
    rounded = logits.to(dtype)
    _, grad = value_and_grad(make(), rounded, labels, valid, 255)
    _, expected = value_and_grad(make(), rounded.double(), labels, valid, 255)
    at_edge = (rounded.double().sigmoid() * 30).frac() < 1e-5  # between two of GHM's regions
    grad, expected = grad.double().masked_fill(at_edge, 0), expected.masked_fill(at_edge, 0)
    rounding = torch.finfo(dtype)
    torch.testing.assert_close(grad, expected, rtol=rounding.eps, atol=2 * float(rounding.smallest_normal))
    # The plain sums may be 0: a ranking loss pulls up as much as it pushes down.
    assert grad.abs().sum().item() == pytest.approx(expected.abs().sum().item(), rel=rounding.eps / 16)


@pytest.mark.parametrize("name", sorted(CLASS_LOSSES.keys() - {"ohem_top_k", "ghm_c_prior"}))  # they count cells
def test_doubling_the_batch_changes_nothing(name, cells):
    make = CLASS_LOSSES[name]
    logits, labels, valid, num_pos = cells()
    once = make()(logits, labels, valid, num_pos)
    twice = make()(logits.repeat(2, 1), labels.repeat(2), valid.repeat(2), 2 * num_pos)
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=0)


@class_losses
def test_order_of_rows_does_not_matter(make, cells):
    logits, labels, valid, num_pos = cells()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    value = make()(logits, labels, valid, num_pos)
    other = make()(logits[order], labels[order], valid[order], num_pos)
    torch.testing.assert_close(value, other)


@class_losses
def test_num_pos_may_be_an_int(make, cells):
    logits, labels, valid, num_pos = cells()
    assert make()(logits, labels, valid, num_pos) == make()(logits, labels, valid, int(num_pos))


@not_rankings
def test_no_class_loss_waits_for_the_device(name):
    make = CLASS_LOSSES[name]
    # Meta tensors have no data: .item(), a branch on a value, nonzero and boolean-mask indexing raise on them.
    with torch.device("meta"):
        logits = torch.empty(7, 3, requires_grad=True)
        labels, valid = torch.empty(7, dtype=torch.int64), torch.empty(7, dtype=torch.bool)
        make()(logits, labels, valid, torch.empty(())).backward()
    assert logits.grad.shape == (7, 3)


# ---- box losses


@box_losses
def test_no_boxes_give_zero_and_a_gradient(make):
    value, grad = value_and_grad(make(), torch.zeros(0, 4), torch.zeros(0, 4), 1)
    assert value == 0
    assert grad.shape == (0, 4)


@box_losses
def test_perfect_boxes_cost_nothing(make):
    targets = torch.randn(5, 4)
    value, grad = value_and_grad(make(), targets, targets, 5)
    assert value == 0
    assert (grad == 0).all()


@box_losses
def test_overshooting_costs_as_much_as_undershooting(make, boxes):
    deltas, targets, num_pos = boxes()
    torch.testing.assert_close(make()(deltas, targets, num_pos), make()(targets, deltas, num_pos))


@pytest.mark.parametrize("name", sorted(BOX_LOSSES.keys() - {"ghm_r_exact"}))
def test_box_gradcheck(name, boxes):
    make = BOX_LOSSES[name]
    deltas, targets, num_pos = boxes(rows=6)
    loss = make().eval()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets, num_pos), deltas.requires_grad_())


@box_losses
@pytest.mark.parametrize("size", [1e-30, 50.0, 1e20])
def test_extreme_boxes_give_finite_value_and_gradient(make, size):
    deltas = torch.tensor([[size, -size, 0.0, 1.0]])
    value, grad = value_and_grad(make(), deltas, torch.zeros(1, 4), 1)
    assert value.isfinite() and value > 0
    assert grad.isfinite().all()
    assert grad[0, 0] >= 0 >= grad[0, 1]


@box_losses
@halves
def test_half_precision_deltas_give_the_float32_loss(make, boxes, dtype):
    deltas, targets, num_pos = boxes(rows=20_000)
    rounded, targets = deltas.to(dtype), targets.float()
    value = make()(rounded, targets, num_pos)
    assert value.dtype == torch.float32
    assert torch.equal(value, make()(rounded.float(), targets, num_pos))
    torch.testing.assert_close(value, make()(deltas.float(), targets, num_pos), rtol=1e-3, atol=0)


@box_losses
def test_doubling_the_boxes_changes_nothing(make, boxes):
    deltas, targets, num_pos = boxes()
    once = make()(deltas, targets, num_pos)
    twice = make()(deltas.repeat(2, 1), targets.repeat(2, 1), 2 * num_pos)
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=0)


@box_losses
def test_no_box_loss_waits_for_the_device(make):
    with torch.device("meta"):
        deltas = torch.empty(7, 4, requires_grad=True)
        make()(deltas, torch.empty(7, 4), torch.empty(())).backward()
    assert deltas.grad.shape == (7, 4)


@pytest.mark.parametrize("name", [name for name, make in BOX_LOSSES.items() if hasattr(make(), "takes_valid")])
def test_rows_that_are_not_valid_change_nothing(name, boxes):
    make = BOX_LOSSES[name]
    deltas, targets, num_pos = boxes()
    valid = torch.arange(len(deltas)) % 3 > 0
    dirty_deltas, dirty_targets = deltas.clone(), targets.clone()
    dirty_deltas[~valid] = torch.tensor([torch.nan, torch.inf, 1e30, 0.0], dtype=deltas.dtype)
    dirty_targets[~valid] = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan], dtype=deltas.dtype)

    first, second = make(), make()
    value, grad = value_and_grad(first, dirty_deltas, dirty_targets, num_pos, valid)
    expected, expected_grad = value_and_grad(second, deltas[valid], targets[valid], num_pos)

    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad[valid], expected_grad)
    assert (grad[~valid] == 0).all()
    for key, buffer in first.state_dict().items():
        assert torch.equal(buffer, second.state_dict()[key]), key


# ---- both


@pytest.mark.parametrize("make", [*losses.CLASS_LOSSES.values(), *losses.BOX_LOSSES.values()])
def test_every_option_has_a_type_and_a_default(make):
    parameters = inspect.signature(make).parameters.values()
    assert all(p.annotation is not p.empty and p.default is not p.empty for p in parameters)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_loss_synchronises_on_cuda(cells, boxes):
    class_batch = [t.cuda() for t in cells(rows=1000)]
    box_batch = [t.cuda() for t in boxes(rows=1000)]
    parts = [(make().cuda(), class_batch) for name, make in CLASS_LOSSES.items() if name not in RANKINGS]
    parts += [(make().cuda(), box_batch) for make in BOX_LOSSES.values()]
    for loss, (x, *rest) in parts:
        x = x.float().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss(x, *rest).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
