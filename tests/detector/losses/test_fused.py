"""The fast form of each class loss is its definition, whatever the input, compiled or in pieces."""

import copy
import shutil
import warnings
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from detector.losses import GHMC, OHEM, CrossEntropy, Focal, fused

LOSSES = {
    "ce": CrossEntropy(),
    "ce_balanced": CrossEntropy(alpha=0.25),
    "focal": Focal(),
    "focal_1.5": Focal(alpha=0.4, gamma=1.5),
    "focal_0": Focal(gamma=0.0),
    "ohem": OHEM(),
    "ohem_top_k": OHEM(top_k=50),
    "ghm_c": GHMC(),
    "ghm_c_7": GHMC(bins=7, momentum=0.0),
    "ghm_c_1": GHMC(bins=1),
}
every = pytest.mark.parametrize("name", LOSSES)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def batch(rows=300, classes=20, seed=0, spread=2.0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=rng) * spread - 2).to(dtype)
    labels = torch.randint(0, 5 * classes, (rows,), generator=rng).clamp(max=classes)
    valid = torch.rand(rows, generator=rng) < 0.9
    labels[~valid] = -7  # anything
    return logits, labels, valid


def value_and_grad(function, logits, *rest):
    logits = logits.clone().requires_grad_()
    value = function(logits, *rest, 3)
    (2.5 * value).backward()
    return value.detach(), logits.grad


def check(name, case, rtol=2e-6):
    """Both forms from the same state, in float64 the definition, which is then the truth for all."""
    loss = copy.deepcopy(LOSSES[name])
    logits, *rest = case
    truth, slope = value_and_grad(copy.deepcopy(loss).definition, logits.double(), *rest)
    value, grad = value_and_grad(loss, *case)
    assert grad.dtype == logits.dtype
    torch.testing.assert_close(value.double(), truth, rtol=rtol, atol=1e-12)
    rounding = float(torch.finfo(logits.dtype).eps)
    torch.testing.assert_close(grad.double(), slope, rtol=max(rtol, 2 * rounding), atol=1e-7)


@pytest.fixture(params=["pieces", pytest.param("compiled", marks=needs_compiler)])
def way(request, monkeypatch):
    monkeypatch.setattr(fused, "_broken", [])
    if request.param == "compiled":
        monkeypatch.setattr(fused, "COMPILED_FROM", 1)
    else:
        monkeypatch.setattr(fused, "PIECE", 500)
    yield request.param
    torch.compiler.reset()
    assert not fused._broken, "it fell back to the uncompiled form"


@every
def test_random(name, way):
    for seed in range(2):
        check(name, batch(rows=300 + seed, seed=seed))


def test_wide_rows_and_one_class(way):
    check("ghm_c", batch(rows=40, classes=300))
    check("ghm_c", batch(rows=400, classes=1))


@every
def test_extreme_logits(name):
    for size in (50.0, 200.0, 1e4):
        logits = torch.tensor([[size, -size, 0.0], [-size, size, 0.0], [0.0, size, -size]])
        check(name, (logits, torch.tensor([0, 0, 3]), torch.ones(3, dtype=torch.bool)))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(name, dtype):
    check(name, batch(dtype=dtype))


@every
def test_nothing_at_all_and_all_ignored(name, way):
    for rows in (0, 5):
        logits, labels, valid = batch(rows=rows)
        value, grad = value_and_grad(LOSSES[name], logits, labels, torch.zeros_like(valid))
        assert value == 0 and grad.shape == logits.shape and not grad.any()


@pytest.mark.parametrize("name", ["ce", "ohem", "focal", "ghm_c"])
def test_a_second_backward_gives_the_first_gradient(name):
    logits, *rest = batch()
    logits.requires_grad_()
    loss = LOSSES[name](logits, *rest, 3)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss, logits, grad_outputs=torch.tensor(2.0))
    torch.testing.assert_close(second, 2 * first)


def test_focal_gradient_is_closer_to_float64_than_autograds():
    # Confident negatives, where autograd through the power loses digits.
    logits, labels = torch.randn(2000, 20) * 2 - 8, torch.full((2000,), 20)
    valid = torch.ones(2000, dtype=torch.bool)
    _, truth = value_and_grad(Focal().definition, logits.double(), labels, valid)
    error = {
        form: ((value_and_grad(form, logits, labels, valid)[1].double() - truth) / truth).abs().median().item()
        for form in (Focal().forward, Focal().definition)
    }
    fast, plain = error.values()
    assert fast < 1e-6 and fast <= plain


def test_regions_are_counted_exactly_beyond_what_float32_counts():
    rows, classes = 2**18, 80  # 21 million cells
    logits = torch.full((1, classes), -9.0).expand(rows, classes)
    labels, valid = torch.full((rows,), classes), torch.ones(rows, dtype=torch.bool)
    labels[0] = 3  # g of its cell is nearly 1
    counts = fused.count_regions(logits, labels, valid, 30)
    assert counts.tolist() == [rows * classes - 1] + [0] * 28 + [1]


def test_regions_are_those_of_the_gradient_norm(way):
    logits, labels, valid = batch(rows=500)
    targets = F.one_hot(labels.clamp(min=0), 21)[:, :20]
    norms = (logits.double().sigmoid() - targets).abs()[valid]
    for bins in (1, 2, 10, 30, 100, 1000):
        expected = torch.bincount((norms * bins).long().flatten(), minlength=bins)
        assert torch.equal(fused.count_regions(logits, labels, valid, bins), expected)


def test_one_region_may_hold_every_cell(way):
    rows, classes = 400, 3
    for region in range(30):
        logits = torch.full((rows, classes), (region + 0.5) / 30).logit()
        counts = fused.count_regions(logits, torch.full((rows,), classes), torch.ones(rows, dtype=torch.bool), 30)
        assert counts[region] == rows * classes == counts.sum()


def test_the_kth_largest_is_that_of_a_sort(monkeypatch):
    monkeypatch.setattr(fused, "PIECE", 100)
    rng = torch.Generator().manual_seed(0)
    special = torch.tensor([[0.0, -0.0, 1e-40, -1e-40], [torch.inf, -torch.inf, 3e38, -3e38], [2.0, 2.0, 2.0, -2.0]])
    logits = torch.cat([special, torch.randn(60, 4, generator=rng), torch.randn(20, 4, generator=rng).round()])
    labels = torch.full((len(logits),), 4)
    valid = torch.ones(len(logits), dtype=torch.bool)
    ranked = logits.flatten().sort(descending=True).values
    for k in (1, 2, 3, 50, 120, 180, 300, len(ranked)):
        threshold, tied = fused.kth_largest(logits, labels, valid, k, negatives=False)
        assert threshold == ranked[k - 1]
        above, level = (ranked > threshold).sum(), (ranked == threshold).sum()
        assert tied.item() == pytest.approx(((k - above) / level).item())


def test_a_cell_on_the_edge_of_two_regions_weighs_something():
    # A head with prior 0.1 starts with every logit at -log 9, where g is the edge 3 / 30 but for rounding.
    logits = torch.full((50, 4), -torch.tensor(9.0).log().item())
    value = GHMC(bins=30)(logits, torch.full((50,), 4), torch.ones(50, dtype=torch.bool), 1)
    assert value.item() == pytest.approx(F.softplus(logits).mean().item(), rel=1e-6)


def test_many_losses_and_types_in_one_process_all_stay_compiled(monkeypatch):
    # Dynamo counts variants and gives a function up past its limit, whatever the backend: this one takes no minutes.
    monkeypatch.setattr(fused, "_compiled", cache(partial(torch.compile, dynamic=True, backend="eager")))
    monkeypatch.setattr(fused, "_broken", [])
    monkeypatch.setattr(fused, "COMPILED_FROM", 1)
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for name in ("ce", "focal", "ohem"):
                check(name, batch(dtype=dtype))
        for bins in range(2, 7):
            value_and_grad(GHMC(bins=bins), *batch())
        limit = torch._dynamo.config.recompile_limit
    assert not fused._broken and limit == torch._dynamo.config.recompile_limit < 9  # the user's own is left alone
    torch.compiler.reset()


def test_without_a_compiler_the_losses_run_all_the_same(monkeypatch):
    def no_compiler(_):
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setattr(fused, "_broken", [])
    monkeypatch.setattr(fused, "_compiled", no_compiler)
    monkeypatch.setattr(fused, "COMPILED_FROM", 1)
    with pytest.warns(UserWarning, match="no C.. compiler found$"):
        check("focal", batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once is enough
        check("ghm_c", batch())
