import math

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist

from detector.losses import GHMC, GHMR
from detector.losses.cells import logits_against_truth
from detector.losses.density import _sort as sort
from detector.losses.regions import count


class Oracle:
    """Harmonized mean of (gradient norm, loss) pairs in float64, straight from the formulas, a loop per bin."""

    def __init__(self, bins, momentum, normalizer="valid_bins", corrected=True, max_weight=math.inf, prior_count=0):
        self.bins, self.momentum, self.normalizer, self.corrected = bins, momentum, normalizer, corrected
        self.max_weight, self.prior_count = max_weight, prior_count
        self.average, self.updates = [0.0] * bins, 0

    def __call__(self, norms, values):
        bin_indices = [min(int(g * self.bins), self.bins - 1) for g in norms]
        counts = [bin_indices.count(j) for j in range(self.bins)]
        if not norms:
            return 0.0
        self.updates += 1
        a = self.momentum
        moves = [self.corrected or r > 0 for r in counts]
        self.average = [a * s + (1 - a) * r if move else s for s, r, move in zip(self.average, counts, moves)]
        start = 1 - a**self.updates if self.corrected else 1
        divisor = sum(r > 0 for r in counts) if self.normalizer == "valid_bins" else self.bins
        total = 0.0
        for j, s in enumerate(self.average):
            members = [v for v, k in zip(values, bin_indices) if k == j]
            if members:
                beta = min(len(norms) / ((s / start + self.prior_count) * divisor), self.max_weight)
                total += beta * math.fsum(members)
        return total / len(norms)


def cell_pairs(logits, labels, valid, one_hot):
    targets = one_hot(labels, logits.shape[1])[valid]
    norms = (logits[valid].sigmoid() - targets).abs()
    values = F.binary_cross_entropy_with_logits(logits[valid], targets, reduction="none")
    return norms.flatten().tolist(), values.flatten().tolist()


def box_pairs(deltas, targets, mu=0.02):
    d = (deltas - targets).flatten()
    length = (d * d + mu * mu).sqrt()
    return (d.abs() / length).tolist(), (length - mu).tolist()


def uniform_cells(bins=10, each=4):
    """Background logits whose gradient norms fill every bin equally."""
    norms = (torch.arange(bins * each, dtype=torch.float64) + 0.5) / (bins * each)
    return norms.logit()[:, None], torch.ones(len(norms), dtype=torch.int64), torch.ones(len(norms), dtype=torch.bool)


SETTINGS = [
    {"bins": 30, "momentum": 0.0},
    {"bins": 30, "momentum": 0.75},
    {"bins": 7, "momentum": 0.9, "normalizer": "all_bins"},
    {"bins": 10, "momentum": 0.7, "corrected": False},
    {"bins": 1, "momentum": 0.5, "normalizer": "all_bins", "corrected": False},
    {"bins": 30, "momentum": 0.75, "max_weight": 1.5},
]


@pytest.mark.parametrize("options", [*SETTINGS, {"bins": 30, "momentum": 0.75, "prior_count": 2.5}], ids=str)
def test_ghm_c_equals_the_loop_over_bins(options, cells, one_hot):
    loss, oracle = GHMC(**options), Oracle(**options)
    for step in range(5):
        logits, labels, valid, num_pos = cells(rows=30 + 10 * step, seed=step, spread=1.0 + step)
        expected = oracle(*cell_pairs(logits, labels, valid, one_hot))
        assert loss(logits, labels, valid, num_pos).item() == pytest.approx(expected, rel=1e-6)
    assert loss.average.tolist() == pytest.approx(oracle.average, rel=1e-6)
    assert loss.updates == oracle.updates


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_ghm_r_equals_the_loop_over_bins(options, boxes):
    loss, oracle = GHMR(**options), Oracle(**options)
    for step, rows in enumerate([20, 5, 0, 40]):
        deltas, targets, num_pos = boxes(rows=rows, seed=step, spread=0.02 * (1 + step))
        expected = oracle(*box_pairs(deltas, targets))
        assert loss(deltas, targets, num_pos).item() == pytest.approx(expected, rel=1e-6)
    assert loss.average.tolist() == pytest.approx(oracle.average, rel=1e-6)
    assert loss.updates == 3  # the step without boxes does not count


def test_a_prior_count_takes_weight_from_sparse_regions():
    loss = GHMC(bins=4, momentum=0.0, prior_count=10.0)
    counts = torch.tensor([990, 10, 0, 1])
    share = loss.region_shares(counts)
    total = share * counts * 3  # three regions hold cells
    assert total.tolist() == pytest.approx([990 / 1000, 10 / 20, 0, 1 / 11])
    assert 0.9 / (10 * 3) < share.max() < 1 / (10 * 3)  # beta stays below N / (k n), and comes close to it


def test_beta_is_constant_for_the_backward_pass(cells):
    logits, labels, valid, num_pos = cells()
    logits.requires_grad_()
    loss = GHMC(bins=4, momentum=0.0)
    loss(logits, labels, valid, num_pos).backward()
    z = torch.where(F.one_hot(labels, 6)[:, :5].bool(), -logits, logits).detach()
    shares = loss.shares(z.sigmoid(), valid)
    torch.testing.assert_close(logits.grad.abs(), shares * z.sigmoid())


@pytest.mark.parametrize("normalizer", ["valid_bins", "all_bins"])
def test_one_bin_without_momentum_is_mean_cross_entropy(normalizer, cells, one_hot):
    logits, labels, valid, num_pos = cells()
    mean = F.binary_cross_entropy_with_logits(logits[valid], one_hot(labels, 5)[valid])
    value = GHMC(bins=1, momentum=0.0, normalizer=normalizer)(logits, labels, valid, num_pos)
    torch.testing.assert_close(value, mean, rtol=1e-6, atol=0)


def test_uniform_gradient_norms_have_weight_one():
    logits, labels, valid = uniform_cells()
    loss = GHMC(bins=10, momentum=0.0, normalizer="all_bins")
    beta = loss.shares(logits.sigmoid(), valid) * len(logits)
    torch.testing.assert_close(beta, torch.ones_like(beta))
    torch.testing.assert_close(loss(logits, labels, valid, 1), F.softplus(logits).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalizer", ["valid_bins", "all_bins"])
def test_each_bin_with_examples_has_the_same_weight(normalizer, cells):
    logits, _, valid, _ = cells(rows=100)
    norms = logits.sigmoid()
    share = GHMC(bins=12, momentum=0.0, normalizer=normalizer).shares(norms, valid)
    region = (norms * 12).long()
    totals = [float(share[(region == j) & valid[:, None]].sum()) for j in range(12)]
    totals = [total for total in totals if total > 0]
    assert totals == pytest.approx([1 / (len(totals) if normalizer == "valid_bins" else 12)] * len(totals))
    assert (share[~valid] == 0).all()


@pytest.mark.parametrize("momentum", [0.75, 0.99, 0.999999])
def test_first_step_has_no_memory(momentum, cells):
    torch.testing.assert_close(GHMC(momentum=momentum)(*cells()), GHMC(momentum=0.0)(*cells()), rtol=1e-6, atol=0)


def test_the_uncorrected_first_loss_is_divided_by_one_minus_momentum(cells):
    torch.testing.assert_close(GHMC(momentum=0.75, corrected=False)(*cells()), 4 * GHMC(momentum=0.0)(*cells()))


def test_high_momentum_stays_finite(cells):
    loss = GHMC(momentum=0.99)
    values = torch.stack([loss(*cells(seed=step, spread=0.5 + step)) for step in range(20)])
    assert values.isfinite().all() and (values < 100).all()


def test_evaluation_uses_the_batch_and_leaves_the_state_unchanged(cells):
    loss = GHMC()
    loss(*cells(seed=0))
    before = {name: buffer.clone() for name, buffer in loss.state_dict().items()}
    eval_loss = loss.eval()(*cells(seed=1))
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.state_dict().items())
    assert torch.equal(eval_loss, loss.train()(*cells(seed=1)))  # the loss that training would have seen
    assert loss.updates == 2


def test_evaluation_before_training_is_defined(cells, boxes):
    torch.testing.assert_close(GHMC().eval()(*cells()), GHMC(momentum=0.0)(*cells()))
    assert GHMR().eval()(*boxes(rows=0)) == 0


@pytest.mark.parametrize("make, batch", [(GHMC, "cells"), (GHMR, "boxes")])
def test_resumed_state_continues_bit_for_bit(make, batch, request, tmp_path):
    batch = request.getfixturevalue(batch)
    loss = make()
    for step in range(3):
        loss(*batch(seed=step))
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    for step in range(3, 6):
        assert torch.equal(loss(*batch(seed=step)), resumed(*batch(seed=step)))
    assert torch.equal(loss.average, resumed.average)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_state_has_the_same_names_whatever_the_settings(options):
    assert list(GHMC(**options).state_dict()) == list(GHMR(**options).state_dict()) == ["average", "updates"]


CONVERSIONS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "double": lambda module: module.double(),
    "back again": lambda module: module.half().float(),
    "to like a tensor": lambda module: module.to(torch.zeros(1, dtype=torch.float16)),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize("make, batch", [(GHMC, "cells"), (GHMR, "boxes")])
def test_statistics_stay_float32_whatever_the_module_is_converted_to(make, batch, convert, request):
    batch = request.getfixturevalue(batch)
    loss, plain = make(bins=2, momentum=0.5), make(bins=2, momentum=0.5)
    for module in (loss, plain):
        module(*batch(rows=200))
    convert(torch.nn.Sequential(torch.nn.Linear(2, 2), loss))
    assert loss.average.dtype == torch.float32 and torch.equal(loss.average, plain.average)
    large_batch = batch(rows=80_000)
    assert torch.equal(loss(*large_batch), plain(*large_batch)) and torch.equal(loss.average, plain.average)
    assert loss.average.max() > torch.finfo(torch.float16).max


def test_statistics_move_with_the_module():
    loss = GHMC().to("meta", torch.float16)
    assert loss.average.device.type == loss.updates.device.type == "meta" and loss.average.dtype == torch.float32


def test_counts_are_exact_beyond_float32():
    rows, columns = 2381, 7141  # 17,002,721 cells, odd and past 2^24
    region = torch.zeros((), dtype=torch.int32).expand(rows, columns)
    assert count(region, torch.ones(rows, dtype=torch.bool), 2).tolist() == [rows * columns, 0]


def test_gradient_norm_one_falls_in_the_last_bin():
    loss = GHMC(bins=10, momentum=0.0)
    loss(torch.tensor([[100.0], [-100.0]]), torch.tensor([1, 1]), torch.tensor([True, True]), 1)
    assert loss.average.tolist() == [1.0] + [0.0] * 8 + [1.0]


def test_nan_logits_give_a_nan_loss_and_a_finite_state():
    loss = GHMC()
    logits, valid = torch.tensor([[torch.nan], [1.0]]), torch.tensor([True, True])
    assert loss(logits, torch.tensor([1, 1]), valid, 1).isnan()  # so that training can detect it
    assert loss.average.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"bins": 0},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"momentum": float("nan")},
        {"normalizer": "bins"},
        {"max_weight": 0.0},
        {"max_weight": float("nan")},
    ],
    ids=str,
)
def test_refuses_impossible_settings(options):
    for make in (GHMC, GHMR):
        with pytest.raises(ValueError, match=rf"{make.__name__}: {next(iter(options))}"):
            make(**options)
    for mu in (0.0, float("inf")):
        with pytest.raises(ValueError, match=r"mu is .*must be positive and finite"):
            GHMR(mu=mu)
    for bad_options in ({"prior_count": -1.0}, {"prior_count": float("nan")}, {"prior_count": 1.0, "density": "exact"}):
        with pytest.raises(ValueError, match="GHMC: prior_count"):
            GHMC(**bad_options)


def exact_shares(norms, bins):
    """beta / N of each gradient norm by the paper's formula, every pair compared: float64, O(N^2)."""
    e, shares = 1 / bins, []
    for g in norms:
        length = min(g + e / 2, 1) - max(g - e / 2, 0)
        shares.append(length / sum(g - e / 2 <= other < g + e / 2 for other in norms))
    return shares


@pytest.mark.parametrize("bins", [1, 10, 30])
def test_exact_ghm_c_equals_the_formula(bins, cells, one_hot):
    logits, labels, valid, num_pos = cells(rows=60)
    norms, values = cell_pairs(logits, labels, valid, one_hot)
    expected = math.fsum(map(lambda share, value: share * value, exact_shares(norms, bins), values))
    loss = GHMC(bins, density="exact")
    assert loss(logits, labels, valid, num_pos).item() == pytest.approx(expected, rel=1e-9)
    assert loss(logits.float(), labels, valid, num_pos).item() == pytest.approx(expected, rel=1e-5)
    assert loss.updates == 0  # no memory


def test_exact_ghm_r_equals_the_formula(boxes):
    deltas, targets, num_pos = boxes(spread=0.03)
    norms, values = box_pairs(deltas, targets)
    expected = math.fsum(map(lambda share, value: share * value, exact_shares(norms, 10), values))
    assert GHMR(density="exact")(deltas, targets, num_pos).item() == pytest.approx(expected, rel=1e-9)


def test_exact_density_holds_beta_constant_for_the_backward_pass(cells, one_hot):
    logits, labels, valid, num_pos = cells()
    logits.requires_grad_()
    loss = GHMC(bins=10, density="exact")
    loss(logits, labels, valid, num_pos).backward()
    norms = (logits.detach().sigmoid() - one_hot(labels, 5)).abs()
    shares = torch.tensor(exact_shares(norms[valid].flatten().tolist(), 10)).view(-1, 5)
    torch.testing.assert_close(logits.grad[valid].abs(), shares * norms[valid])


def test_exact_density_where_all_examples_tie():
    # g = 0.5 in all 12 cells: all share one window, of full length.
    shares = GHMC(bins=10, density="exact").shares(torch.full((4, 3), 0.5), torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(shares, torch.full((4, 3), 0.1 / 12))


def test_exact_density_of_uniform_gradient_norms_is_one_also_at_the_ends():
    logits, _, valid = uniform_cells(bins=10, each=400)
    beta = GHMC(bins=10, density="exact").shares(logits.sigmoid(), valid) * len(logits)
    torch.testing.assert_close(beta, torch.ones_like(beta), rtol=5e-3, atol=0)


@pytest.mark.parametrize("make, batch", [(GHMC, "cells"), (GHMR, "boxes")])
def test_exact_density_works_in_a_users_compile(make, batch, request):
    x, *rest = request.getfixturevalue(batch)()
    x = x.float().requires_grad_()
    loss = make(density="exact")
    compiled = torch.compile(lambda values: loss(values, *rest), backend="eager", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(x), x)
    (expected,) = torch.autograd.grad(loss(x, *rest), x)
    torch.testing.assert_close(grad, expected)
    torch.compiler.reset()


def norm_sets():
    """Gradient norms by name: smooth, on few points, on the grid's edges, at both ends, and a single one."""
    rng = torch.Generator().manual_seed(0)
    smooth = torch.rand(600, generator=rng, dtype=torch.float64) ** 4
    few_values = torch.randint(0, 9, (600,), generator=rng).double() / 8
    edges = torch.randint(0, 1281, (600,), generator=rng).double() / 1280
    ends = torch.cat([torch.zeros(50), torch.ones(50), torch.rand(20, generator=rng)]).double()
    return {"smooth": smooth, "few": few_values, "edges": edges, "ends": ends, "one": torch.tensor([0.3]).double()}


@pytest.mark.parametrize("name", norm_sets())
@pytest.mark.parametrize("bins", [1, 10])
def test_near_exact_density_is_within_its_bound(name, bins):
    g = norm_sets()[name]
    e = 1 / bins
    h = e / 128
    distance = (g[:, None] - g).abs()
    min_count, max_count = (distance <= e / 2 - h).sum(1), (distance <= e / 2 + h).sum(1)
    length = (g + e / 2).clamp(max=1) - (g - e / 2).clamp(min=0)
    share = GHMC(bins, density="near_exact").shares(g[:, None])[:, 0]
    slack = 1 + 1e-6
    assert (share <= (length + h / 2) / min_count * slack).all()
    assert (share * slack >= (length - h / 2) / max_count).all()


@pytest.mark.parametrize("make", [GHMC, GHMR])
def test_near_exact_is_close_to_exact(make, cells, boxes):
    case = cells(rows=2000) if make is GHMC else boxes(rows=2000, spread=0.03)
    exact, near = make(density="exact"), make(density="near_exact")
    assert near(*case).item() == pytest.approx(exact(*case).item(), rel=5e-3)
    assert near.updates == 0  # no memory


def test_near_exact_ghm_c_sums_its_shares(cells):
    logits, labels, valid, num_pos = cells(rows=500)
    loss = GHMC(density="near_exact")
    z = logits_against_truth(logits, labels, valid)
    expected = (loss.shares(z.sigmoid(), valid) * F.softplus(z))[valid].sum()
    torch.testing.assert_close(loss(logits, labels, valid, num_pos), expected)


def released_loop(bins, momentum):
    """The arithmetic of the released code, rewritten: a loop over bins, sums that start at 0, one call per level."""
    sums = [0.0] * bins

    def call(norms, values):
        edges = [j / bins for j in range(bins + 1)]
        edges[-1] = 1e3  # the last bin has no upper edge
        weights, non_empty = [0.0] * len(norms), 0
        for j in range(bins):
            inside = [i for i, g in enumerate(norms) if edges[j] <= g < edges[j + 1]]
            if inside:
                sums[j] = momentum * sums[j] + (1 - momentum) * len(inside)
                for i in inside:
                    weights[i] = len(norms) / sums[j]
                non_empty += 1
        total = math.fsum(w / max(non_empty, 1) * v for w, v in zip(weights, values))
        return total / max(len(norms), 1)

    return call


def test_released_equals_the_arithmetic_of_the_released_code(cells, boxes, one_hot):
    class_loss, box_loss = GHMC.released(), GHMR.released()
    assert class_loss.scope == box_loss.scope == "level"
    class_loop, box_loop = released_loop(30, 0.75), released_loop(10, 0.7)
    for step in range(3):
        for level, rows in enumerate([60, 20, 7]):
            case = cells(rows=rows, seed=10 * step + level, spread=1.0 + step)
            expected = class_loop(*cell_pairs(*case[:3], one_hot))
            assert class_loss(*case).item() == pytest.approx(expected, rel=1e-6)
            case = boxes(rows=rows % 20, seed=10 * step + level, spread=0.05)
            expected = box_loop(*box_pairs(*case[:2]))
            assert box_loss(*case).item() == pytest.approx(expected, rel=1e-6)


MODES = {
    "default": {},
    "exact": {"density": "exact"},
    "near_exact": {"density": "near_exact"},
    "limited": {"max_weight": 1.5},
    "local": {"local_counts": True},
}


def three_steps(batches, options):
    """Losses, gradients of the first input, and final state of GHMC and GHMR over (cells, boxes) batches."""
    class_loss, box_loss = GHMC(**options), GHMR(**options)
    results = []
    for cell_batch, box_batch in batches:
        for loss, (x, *rest) in ((class_loss, cell_batch), (box_loss, box_batch)):
            x = x.clone().requires_grad_()
            value = loss(x, *rest)
            value.backward()
            results.append((value.detach(), x.grad))
    return results, [class_loss.state_dict(), box_loss.state_dict()]


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    batches = torch.load(folder / f"batches{rank}.pt")
    torch.save({mode: three_steps(batches, options) for mode, options in MODES.items()}, folder / f"out{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(cells, boxes, tmp_path_factory):
    """The batches: joined, of process 0 and of process 1; and the results by mode of process 0 and of process 1."""
    folder = tmp_path_factory.mktemp("two")
    joined_batches = [(cells(seed=s), boxes(rows=20, seed=s)) for s in range(3)]
    batches = [joined_batches]
    for rank, rows in enumerate([slice(None, 12), slice(12, None)]):
        # Process 0 has no box at all in the second step.
        box_slices = [slice(None, 7), slice(None, 0), slice(None, 7)]
        box_slices = box_slices if rank == 0 else [slice(s.stop, None) for s in box_slices]
        rank_batches = [
            ((*(t[rows] for t in c[:3]), c[3]), (*(t[box_slice] for t in b[:2]), b[2]))
            for (c, b), box_slice in zip(joined_batches, box_slices)
        ]
        torch.save(rank_batches, folder / f"batches{rank}.pt")
        batches.append(rank_batches)
    torch.multiprocessing.spawn(process, args=(folder,), nprocs=2)
    return batches, [torch.load(folder / f"out{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("mode", sorted(MODES.keys() - {"local"}))
def test_two_processes_equal_one_on_the_joined_batch(mode, two_processes):
    (joined_batches, *_), results = two_processes
    expected, state = three_steps(joined_batches, MODES[mode])
    (first, first_state), (second, second_state) = (result[mode] for result in results)
    for (value, grad), (value0, grad0), (value1, grad1) in zip(expected, first, second):
        torch.testing.assert_close(value0 + value1, value)
        torch.testing.assert_close(torch.cat([grad0, grad1]), grad)
    for state0, state1, expected_state in zip(first_state, second_state, state):
        for name in expected_state:
            assert torch.equal(state0[name], state1[name]) and torch.equal(state0[name], expected_state[name])


def test_with_local_counts_two_processes_give_the_mean_of_two_separate_ones(two_processes):
    (_, *batches), results = two_processes
    for rank_batches, result in zip(batches, results):
        expected, state = three_steps(rank_batches, MODES["local"])
        for (value, grad), (reference, reference_grad) in zip(result["local"][0], expected):
            torch.testing.assert_close(2 * value, reference)
            torch.testing.assert_close(2 * grad, reference_grad)
        for loss_state, reference in zip(result["local"][1], state):
            assert all(torch.equal(loss_state[name], reference[name]) for name in reference)


def test_sort_equals_torchs():
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)).round(decimals=3)
    values[:3] = torch.tensor([0.0, 1e-40, 2.0])
    sorted_values, order = sort(values)
    assert torch.equal(sorted_values, values.sort().values)
    assert torch.equal(values[order], sorted_values) and torch.equal(order.sort().values, torch.arange(5000))
