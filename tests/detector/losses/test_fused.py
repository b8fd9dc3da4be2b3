"""The sum of each class loss is the paper's formula, whichever way it runs: in pieces, compiled, or by Triton."""

import copy
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from detector.losses import GHMC, OHEM, CrossEntropy, Focal, QualityFocal, Varifocal, dispatch, ohem, regions
from detector.losses.fused import SlopeByAutograd, cell_sum
from detector.losses.ohem import kth_largest


def balanced(ce, g, y, alpha=None):
    return ce if alpha is None else torch.where(y > 0, alpha, 1 - alpha) * ce


def focal(ce, g, y, alpha=0.25, gamma=2.0):
    return balanced(g**gamma * ce, g, y, alpha)


def hardest(ce, g, y, ratio=3.0, top_k=None):
    always_kept = (y > 0) & (top_k is None)
    places = top_k or max(round(ratio * max(int(always_kept.sum()), 1)), 1)
    ranked = ce[~always_kept].sort(descending=True).values
    threshold = ranked[min(places, len(ranked)) - 1]
    tie_weight = (min(places, len(ranked)) - (ranked > threshold).sum()) / (ranked == threshold).sum()
    return torch.where(always_kept | (ce > threshold), ce, torch.where(ce == threshold, tie_weight * ce, 0))


def harmonized(ce, g, y, bins=30):
    region = (g * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(region.flatten(), minlength=bins)
    # formula() divides by num_pos = 3, which GHM-C ignores.
    return 3 * ce / (counts[region] * (counts > 0).sum())


# The loss, and its value for each cell from its cross entropy, its gradient norm |p - y| and its target y.
LOSSES = {
    "ce": (CrossEntropy(), balanced),
    "ce_balanced": (CrossEntropy(alpha=0.25), partial(balanced, alpha=0.25)),
    "focal": (Focal(), focal),
    "focal_1.5": (Focal(alpha=0.4, gamma=1.5), partial(focal, alpha=0.4, gamma=1.5)),
    "focal_0": (Focal(gamma=0.0), partial(focal, gamma=0.0)),
    "ohem": (OHEM(), hardest),
    "ohem_top_k": (OHEM(top_k=50), partial(hardest, top_k=50)),
    "ghm_c": (GHMC(), harmonized),
    "ghm_c_7": (GHMC(bins=7, momentum=0.0), partial(harmonized, bins=7)),
    "ghm_c_1": (GHMC(bins=1), partial(harmonized, bins=1)),
    "qfl": (QualityFocal(), lambda ce, g, y: g**2 * ce),
    "qfl_1": (QualityFocal(beta=1.0), lambda ce, g, y: g * ce),
    "qfl_1.5": (QualityFocal(beta=1.5), lambda ce, g, y: g**1.5 * ce),
    "varifocal": (Varifocal(), lambda ce, g, y: torch.where(y > 0, y, 0.75 * g**2) * ce),
    "varifocal_1": (Varifocal(gamma=1.0), lambda ce, g, y: torch.where(y > 0, y, 0.75 * g) * ce),
}
every = pytest.mark.parametrize("name", LOSSES)
ROOT = Path(__file__).resolve().parents[3]
HEADER = Path(sysconfig.get_path("include"), "Python.h")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not HEADER.exists(), reason="needs a C++ compiler and Python's header files"
)


def batch(rows=300, classes=20, seed=0, spread=2.0, dtype=torch.float32):
    """Logits, labels, valid, and the quality of each row's box."""
    rng = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=rng) * spread - 2).to(dtype)
    labels = torch.randint(0, 5 * classes, (rows,), generator=rng).clamp(max=classes)
    valid = torch.rand(rows, generator=rng) < 0.9
    labels[~valid] = -7  # anything
    return logits, labels, valid, (torch.rand(rows, generator=rng) * 1.2 - 0.1).clamp(0, 1)


def value_and_grad(function, logits, *rest):
    logits = logits.clone().requires_grad_()
    value = function(logits, *rest)
    (2.5 * value).backward()
    return value.detach(), logits.grad


def formula(name, logits, labels, valid, quality):
    """The paper's formula: the sum over cells, divided by num_pos = 3."""
    loss, cell = LOSSES[name]
    target = torch.zeros_like(logits[valid])
    rows = (labels[valid] < logits.shape[1]).nonzero()[:, 0]
    quality = quality[valid][rows].double() if hasattr(loss, "takes_quality") else 1.0
    target[rows, labels[valid][rows]] = quality
    x = logits[valid]
    ce = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    # Where y is 1, |p - y| is sigmoid(-x): 1 - p would lose digits.
    norm = torch.where(target == 1, torch.sigmoid(-x), (torch.sigmoid(x) - target).abs())
    return cell(ce, norm, target).sum() / 3


def run(name, logits, labels, valid, quality):
    loss = copy.deepcopy(LOSSES[name][0])
    extra_args = (quality,) if hasattr(loss, "takes_quality") else ()
    return value_and_grad(lambda x: loss(x, labels, valid, 3, *extra_args), logits)


def check(name, case, rtol=2e-6):
    """Compare value and gradient with the formula in float64, differentiated by autograd."""
    logits, *rest = case
    expected, expected_grad = value_and_grad(partial(formula, name), logits.double(), *rest)
    value, grad = run(name, *case)
    assert grad.dtype == logits.dtype
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=1e-12)
    rounding = float(torch.finfo(logits.dtype).eps)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=max(rtol, 2 * rounding), atol=1e-7)


@pytest.fixture(params=["pieces", pytest.param("compiled", marks=needs_compiler), "triton"])
def way(request, monkeypatch):
    monkeypatch.setattr(dispatch, "_broken", [])
    monkeypatch.setattr(dispatch, "_without_triton", set())
    if request.param == "compiled":
        monkeypatch.setattr(dispatch, "COMPILED_FROM", 1)
    elif request.param == "pieces":
        monkeypatch.setattr(dispatch, "PIECE", {"cpu": 500, "else": 500})
    else:
        use_triton(monkeypatch)
    yield request.param
    torch.compiler.reset()
    assert not dispatch._broken, "it fell back to the uncompiled form"
    assert not dispatch._without_triton, "it fell back to the form without Triton"


class OnGPU:
    """The kernels for tensors of the CPU: each call computes on a GPU."""

    def __init__(self, kernels, device="cuda"):
        self.kernels, self.device = kernels, device

    def __getattr__(self, name):
        def call(*arguments):
            moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device, copy=True), arguments)
            result = getattr(self.kernels, name)(*moved)
            if name == "scale_":  # it writes into its first argument
                arguments[0].copy_(moved[0])
            return tree_map_only(torch.Tensor, torch.Tensor.cpu, result)

        return call


def use_triton(monkeypatch):
    """Without a GPU, Triton's interpreter runs the kernels on the CPU (tests/conftest.py)."""
    interpreted = "TRITON_INTERPRET" in os.environ
    if interpreted:
        pytest.importorskip("triton", "3.7", reason="the interpreter of older ones fails with NumPy 2.4")
    kernels = pytest.importorskip("detector.losses.kernels")
    kernels = kernels if interpreted else OnGPU(kernels)
    monkeypatch.setattr(
        dispatch, "triton_for", lambda logits: kernels if logits.numel() and logits.dtype != torch.float64 else None
    )


@every
def test_equals_the_formula_on_random_cells(name, way):
    for seed in range(2):
        check(name, batch(rows=300 + seed, seed=seed))


@pytest.mark.parametrize("classes", [1, 6, 80, 300])  # a Triton kernel finds the row once for 1, 2, 8 and 4 cells
def test_equals_the_formula_with_other_numbers_of_classes(classes, way):
    for name in ("ghm_c", "qfl"):
        check(name, batch(rows=60, classes=classes))


@every
@pytest.mark.parametrize("triton", [False, True], ids=["plain", "triton"])
def test_equals_the_formula_at_extreme_logits(name, triton, monkeypatch):
    if triton:
        use_triton(monkeypatch)
    for size in (50.0, 200.0, 1e4):
        logits = torch.tensor([[size, -size, 0.0], [-size, size, 0.0], [0.0, size, -size]])
        check(name, (logits, torch.tensor([0, 0, 3]), torch.ones(3, dtype=torch.bool), torch.tensor([0.3, 0.9, 1])))


@every
@pytest.mark.parametrize("triton", [False, True], ids=["plain", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_equals_the_formula_in_half_precision(name, dtype, triton, monkeypatch):
    if triton:
        use_triton(monkeypatch)
    check(name, batch(dtype=dtype))


@every
def test_no_rows_and_all_ignored_rows_give_zero(name, way):
    for rows in (0, 5):
        logits, labels, valid, quality = batch(rows=rows)
        value, grad = run(name, logits.fill_(torch.nan), labels, torch.zeros_like(valid), quality)
        assert value == 0 and grad.shape == logits.shape and not grad.any()


@pytest.mark.parametrize("triton", [False, True], ids=["plain", "triton"])
def test_strides_do_not_matter(triton, monkeypatch):
    if triton:
        use_triton(monkeypatch)
    logits, labels, valid, quality = batch(rows=700, classes=6)
    transposed = logits.t().contiguous().t()
    assert transposed.stride() == (1, 700)
    for name in ("focal", "ghm_c", "varifocal"):
        (value, grad), (other, other_grad) = (
            run(name, logits, labels, valid, quality),
            run(name, transposed, labels, valid, quality),
        )
        torch.testing.assert_close(value, other)
        torch.testing.assert_close(grad, other_grad)


def test_autograd_gives_the_slope_of_a_curve_that_has_none(way):
    def value(z, is_positive, gamma):
        return torch.sigmoid(z) ** gamma * F.softplus(z)

    logits, labels, valid, _ = batch()
    curve = SlopeByAutograd(value)
    loss = partial(cell_sum, curve, num_pos=3, negative_weight=0.75, positive_weight=0.25)
    total, grad = value_and_grad(lambda x: loss(x, labels, valid, 2.0), logits)
    expected, expected_grad = value_and_grad(lambda x: Focal()(x, labels, valid, 3), logits)
    torch.testing.assert_close(total, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-7)


def raised(z, is_positive, exponent):
    p = torch.sigmoid(z)
    return p**exponent, exponent * p**exponent * (1 - p)


@needs_compiler
def test_each_call_uses_its_options(monkeypatch):
    """torch 2.14 compiles an exponent as a variable, and finds the kernel of another exponent in its disk cache."""
    monkeypatch.setattr(dispatch, "_broken", [])
    monkeypatch.setattr(dispatch, "COMPILED_FROM", 1)
    logits, labels, valid, _ = batch()
    for exponent in (0.0, 0.5, 2.0, 2.5):
        torch.compiler.reset()  # as in a new process
        value = cell_sum(raised, logits, labels, valid, exponent)
        z = torch.where(torch.arange(20) == labels[:, None], -logits, logits)[valid]
        assert value.item() == pytest.approx((z.sigmoid() ** exponent).sum().item(), rel=1e-5)
    torch.compiler.reset()


@needs_compiler
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a processor with AVX-512")
def test_avx2_never_runs_a_kernel_cached_for_avx512(tmp_path):
    """torch 2.14's disk cache gives a processor with AVX2 a kernel for AVX-512, which returns half of the sum."""
    script = (
        "import torch; from detector.losses import CrossEntropy, dispatch; dispatch.COMPILED_FROM = 1; "
        "z = torch.linspace(-4, 4, 4000).view(-1, 20); rows = torch.ones(200, dtype=torch.bool); "
        "print(CrossEntropy()(z, torch.full((200,), 20), rows, 1.0).item(), dispatch._broken)"
    )
    expected = torch.nn.functional.softplus(torch.linspace(-4, 4, 4000, dtype=torch.float64)).sum().item()
    for capability in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | capability
        result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        value, broken = result.stdout.split(maxsplit=1)
        assert float(value) == pytest.approx(expected, rel=1e-5) and broken.strip() == "[]"


def test_a_curve_without_its_slope_says_what_to_do():
    with pytest.raises(TypeError, match=r"SlopeByAutograd\(curve\)"):
        cell_sum(lambda z, is_positive: z, *batch()[:3])


def test_a_curve_that_triton_cannot_run_runs_without_it(monkeypatch):
    monkeypatch.setattr(dispatch, "_without_triton", set())
    use_triton(monkeypatch)
    logits, labels, valid, _ = batch(rows=20)
    expected = cell_sum(raised, logits.double(), labels, valid, 2.0)  # Triton never runs float64

    def sinh(z, is_positive):
        p = torch.special.expit(z)  # kernels.py does not know it
        return p**2, 2 * p**2 * (1 - p)

    with pytest.warns(UserWarning, match="sinh runs without Triton"):
        value = cell_sum(sinh, logits, labels, valid)
    torch.testing.assert_close(value.double(), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once, and Triton still runs the other losses
        cell_sum(sinh, logits, labels, valid)
        check("ce", batch())


@pytest.mark.parametrize("name", ["ce", "ohem", "focal", "ghm_c", "qfl"])
def test_a_second_backward_gives_the_same_gradient(name, way):
    logits, *rest, _ = batch()
    logits.requires_grad_()
    loss = LOSSES[name][0](logits, *rest, 3)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss, logits, grad_outputs=torch.tensor(2.0))
    torch.testing.assert_close(second, 2 * first)


def test_focal_gradient_is_closer_to_float64_than_autograds():
    # Confident negatives, where autograd through the power loses digits.
    logits, labels = torch.randn(2000, 20) * 2 - 8, torch.full((2000,), 20)
    case = labels, torch.ones(2000, dtype=torch.bool), torch.ones(2000)
    _, exact = value_and_grad(partial(formula, "focal"), logits.double(), *case)
    grads = (run("focal", logits, *case)[1], value_and_grad(partial(formula, "focal"), logits, *case)[1])
    fused_error, autograd_error = (((grad.double() - exact) / exact).abs().median().item() for grad in grads)
    assert fused_error < 1e-6 and fused_error <= autograd_error


def test_regions_are_counted_exactly_beyond_what_float32_counts():
    rows, classes = 2**18, 80  # 21 million cells
    logits = torch.full((1, classes), -9.0).expand(rows, classes)
    labels, valid = torch.full((rows,), classes), torch.ones(rows, dtype=torch.bool)
    labels[0] = 3  # g of its cell is nearly 1
    counts = regions.count_regions(logits, labels, valid, 30)
    assert counts.tolist() == [rows * classes - 1] + [0] * 28 + [1]


def test_regions_are_those_of_the_gradient_norm(way):
    logits, labels, valid, _ = batch(rows=500)
    targets = F.one_hot(labels.clamp(min=0), 21)[:, :20]
    norms = (logits.double().sigmoid() - targets).abs()[valid]
    for bins in (1, 30, 50, 1000):
        expected = torch.bincount((norms * bins).long().flatten(), minlength=bins)
        assert torch.equal(regions.count_regions(logits, labels, valid, bins), expected)


def test_one_region_may_hold_every_cell(way):
    rows, classes = 400, 3
    for region in range(30):
        logits = torch.full((rows, classes), (region + 0.5) / 30).logit()
        counts = regions.count_regions(logits, torch.full((rows,), classes), torch.ones(rows, dtype=torch.bool), 30)
        assert counts[region] == rows * classes == counts.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["topk", "digits", "triton"])
def test_the_kth_largest_equals_that_of_a_sort(how, dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "PIECE", {"cpu": 100, "else": 100})
    if how == "triton":
        use_triton(monkeypatch)
    find = kth_largest if how == "topk" else ohem._by_digits
    rng = torch.Generator().manual_seed(0)
    special = torch.tensor([[0.0, -0.0, 1e-40, -1e-40], [torch.inf, -3.3e38, 3e38, -3e38], [2.0, 2.0, 2.0, -2.0]])
    logits = torch.cat([special, torch.randn(60, 4, generator=rng), torch.randn(20, 4, generator=rng).round()])
    logits = logits.to(dtype)
    if how == "triton":  # its interpreter reads the smallest numbers of bfloat16 as 0
        logits[logits.abs() < 1e-38] = 0
    labels = torch.full((len(logits),), 4)
    labels[-10:] = 2
    valid = torch.ones(len(logits), dtype=torch.bool)
    valid[20:25] = False
    is_positive = torch.arange(4) == labels[:, None]
    z = torch.where(is_positive, -logits, logits).float()
    for negatives in (False, True):
        ranked = z[valid[:, None] & ~(is_positive & negatives)].sort(descending=True).values
        for k in (0, 1, 2, 3, 50, 120, 180, 290, len(ranked), 10**6):
            threshold, tie_weight = find(logits, labels, valid, torch.tensor(k), negatives=negatives)
            if k == 0:
                assert threshold == torch.inf and tie_weight == 0
                continue
            k = min(k, len(ranked))
            assert threshold == ranked[k - 1]
            num_above, num_tied = (ranked > threshold).sum(), (ranked == threshold).sum()
            assert tie_weight.item() == pytest.approx(((k - num_above) / num_tied).item())


def test_a_cell_on_the_edge_of_two_regions_keeps_its_weight():
    # A head with prior 0.1 starts with every logit at -log 9. There g is the edge 3 / 30, up to rounding.
    logits = torch.full((50, 4), -torch.tensor(9.0).log().item())
    value = GHMC(bins=30)(logits, torch.full((50,), 4), torch.ones(50, dtype=torch.bool), 1)
    assert value.item() == pytest.approx(F.softplus(logits).mean().item(), rel=1e-6)


def test_many_losses_and_types_in_one_process_all_stay_compiled(monkeypatch):
    # Dynamo counts variants and gives a function up past its limit, whatever the backend. The eager backend is fast.
    monkeypatch.setattr(dispatch, "_compiled", cache(partial(torch.compile, dynamic=True, backend="eager")))
    monkeypatch.setattr(dispatch, "_broken", [])
    monkeypatch.setattr(dispatch, "COMPILED_FROM", 1)
    torch.compiler.reset()
    user_settings = {"recompile_limit": 8, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(user_settings), warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for name in ("ce", "focal", "ohem"):
                check(name, batch(dtype=dtype))
        for bins in range(2, 7):
            logits, *rest, _ = batch()
            GHMC(bins=bins)(logits, *rest, 3)
        assert torch._dynamo.config.recompile_limit == 8  # the user's limit is unchanged
    assert not dispatch._broken
    torch.compiler.reset()


def test_without_a_compiler_the_losses_still_run(monkeypatch):
    def no_compiler(_):
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setattr(dispatch, "_broken", [])
    monkeypatch.setattr(dispatch, "_compiled", no_compiler)
    monkeypatch.setattr(dispatch, "COMPILED_FROM", 1)
    with pytest.warns(UserWarning, match="no C.. compiler found$"):
        check("focal", batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns only once
        check("ghm_c", batch())
