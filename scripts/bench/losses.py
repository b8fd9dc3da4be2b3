"""Class and box losses beside their peers: milliseconds of forward + backward, and memory beyond the logits.

    python scripts/bench/losses.py [--rows 98208 380000] [--classes 80] [--logits -4 1.5] [--dtype float32]
        [--repeats 9] [--slow] [--step]

Peers: GHM-C and GHM-R as a loop over bins, with the arithmetic of the released code; torchvision's focal loss, alone
and as its RetinaNet head calls it; cross entropy on dense targets; a sort with two searches for exact density. They run
on the GPU where there is one. All alternate in one process, so a slow moment of the machine affects all of them.
Times are medians, with freed memory kept by the process. On a GPU each is the GPU's mean time for five calls, each
queued behind other work, because in a training Python starts the losses while the GPU still runs the model. Memory is
the peak of one call beyond the memory in use before it, as a multiple of the logits' size.
"Focal's gradient against float64": its relative error where background is confident, beside torchvision's.
--step: a whole training step, ResNet-18 at 512 px, 2 images, GHM-C + GHM-R beside CE + smooth L1.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from detector.device import keep_freed_memory, pick_device
from detector.errors import run_main
from detector.losses import ASL1, GHMC, GHMR, OHEM, CrossEntropy, Focal, QualityFocal, RankSort, Varifocal
from scripts.bench import measure
from scripts.bench import step as training

POSITIVES = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[98_208, 380_000], help="anchors of a batch")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument(
        "--logits",
        type=float,
        nargs=2,
        default=[-4.0, 1.5],
        metavar=("MEAN", "STD"),
        help="default -4 1.5, hard for GHM-C: all rows have cells past the first region; trained models are near -6 1",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the logits")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--slow", action="store_true", help="also exact GHM-C, which sorts all cells")
    parser.add_argument("--step", action="store_true", help="also a whole training step, which takes some minutes")
    args = parser.parse_args()
    print(measure.environment())
    device, dtype = pick_device("auto"), getattr(torch, args.dtype)
    mean, std = args.logits
    memory = {}
    for rows in args.rows:  # measured before freed memory is kept, which would count as used
        logits, labels, valid = cells(rows, args.classes, mean, std, device, dtype)
        calls = class_losses(logits, labels, valid, args.slow)
        memory[rows] = {name: peak(call, logits) for name, call in calls.items()}
    keep_freed_memory(device)
    for rows in args.rows:
        logits, labels, valid = cells(rows, args.classes, mean, std, device, dtype)
        share = (logits.sigmoid() >= 1 / 30).any(1).float().mean()
        print(f"\n{rows:,} x {args.classes} cells, {share:.0%} of rows with a cell past the first of 30 regions\n")
        report(class_losses(logits, labels, valid, args.slow), logits, args.repeats, memory[rows])
    print(f"\nBoxes, {POSITIVES} positives\n")
    report(box_losses(device), torch.zeros(POSITIVES, 4, device=device), args.repeats * 10, None)
    gradient_error()
    if args.step:
        whole_step(args.repeats)


def cells(
    rows: int,
    classes: int,
    mean: float,
    std: float,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal logits, POSITIVES positives, 2% of rows ignored."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=rng) * std + mean
    labels = torch.full((rows,), classes)
    labels[torch.randperm(rows, generator=rng)[:POSITIVES]] = torch.randint(0, classes, (POSITIVES,), generator=rng)
    valid = torch.rand(rows, generator=rng) > 0.02
    return logits.to(device, dtype), labels.to(device), valid.to(device)


def class_losses(logits: Tensor, labels: Tensor, valid: Tensor, slow: bool) -> dict[str, Callable[[], Tensor]]:
    classes = logits.shape[1]
    targets = F.one_hot(labels, classes + 1)[:, :classes].to(logits.dtype)
    weights = valid[:, None].expand_as(targets)
    x = logits.requires_grad_()
    sums = [0.0] * 30
    ours = {"CE": CrossEntropy(), "Focal": Focal(), "GHM-C": GHMC(), "GHM-C near-exact": GHMC(density="near_exact")}
    ours |= {"QFL": QualityFocal(), "varifocal": Varifocal(), "OHEM": OHEM(), "rank & sort": RankSort()}
    if slow:
        ours |= {"GHM-C exact": GHMC(density="exact")}
    ours = {name: loss.to(logits.device) for name, loss in ours.items()}
    calls: dict[str, Callable[[], Tensor]] = {
        name: partial(loss, x, labels, valid, POSITIVES) for name, loss in ours.items()
    }

    def cross_entropy() -> Tensor:
        losses = F.binary_cross_entropy_with_logits(x, targets, reduction="none")
        return losses[valid].sum() / POSITIVES

    def head() -> Tensor:  # as torchvision's RetinaNet head does: dense targets and a selection in each step
        dense = torch.zeros_like(x)
        positive = labels < classes
        dense[positive, labels[positive]] = 1.0
        return sigmoid_focal_loss(x[valid], dense[valid], reduction="sum") / POSITIVES

    calls["GHM-C, loop over bins"] = lambda: ghm_c_loop(x, targets, weights, sums)
    calls["Focal, torchvision.ops"] = lambda: sigmoid_focal_loss(x, targets, reduction="sum") / POSITIVES
    calls["Focal, torchvision's head"] = head
    calls["CE, dense targets"] = cross_entropy
    if slow:
        calls["GHM-C exact, sort + search"] = lambda: ghm_c_sorted(x, targets)
    return calls


def box_losses(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    rng = torch.Generator().manual_seed(0)
    deltas, targets = (torch.randn(2, POSITIVES, 4, generator=rng) * 0.1).to(device)
    deltas.requires_grad_()
    ghm_r, asl1, sums = GHMR().to(device), ASL1(), [0.0] * 10
    return {
        "GHM-R": lambda: ghm_r(deltas, targets, POSITIVES),
        "ASL1": lambda: asl1(deltas, targets, POSITIVES),
        "GHM-R, loop over bins": lambda: ghm_r_loop(deltas, targets, sums),
    }


def ghm_c_loop(x: Tensor, targets: Tensor, weights: Tensor, sums: list[float], momentum: float = 0.75) -> Tensor:
    with torch.no_grad():
        beta, total = loop_weights((x.sigmoid() - targets).abs(), weights, sums, momentum)
    return F.binary_cross_entropy_with_logits(x, targets, beta, reduction="sum") / total


def ghm_r_loop(deltas: Tensor, targets: Tensor, sums: list[float], mu: float = 0.02, momentum: float = 0.7) -> Tensor:
    d = deltas - targets
    length = torch.sqrt(d * d + mu * mu)
    with torch.no_grad():
        beta, total = loop_weights((d / length).abs(), torch.ones_like(d, dtype=torch.bool), sums, momentum)
    return ((length - mu) * beta).sum() / total


def loop_weights(norms: Tensor, counted: Tensor, sums: list[float], momentum: float) -> tuple[Tensor, float]:
    """One masked pass for each bin, and a wait for its count, as in the code that most people run."""
    beta, filled, total = torch.zeros_like(norms), 0, max(counted.float().sum().item(), 1.0)
    for j in range(len(sums)):
        top = (j + 1) / len(sums) if j + 1 < len(sums) else 2.0
        inside = (norms >= j / len(sums)) & (norms < top) & counted
        count = inside.sum().item()
        if count:
            sums[j] = momentum * sums[j] + (1 - momentum) * count
            beta[inside] = total / sums[j]
            filled += 1
    return beta / max(filled, 1), total


def ghm_c_sorted(x: Tensor, targets: Tensor, half: float = 1 / 60) -> Tensor:
    with torch.no_grad():
        norms = (x.sigmoid() - targets).abs().flatten()
        ordered = norms.sort().values
        count = torch.searchsorted(ordered, norms + half) - torch.searchsorted(ordered, norms - half)
        length = (norms + half).clamp(max=1) - (norms - half).clamp(min=0)
    return F.binary_cross_entropy_with_logits(x, targets, (length / count).view_as(x), reduction="sum")


def gradient_error(rows: int = 20_000, classes: int = 80) -> None:
    logits, labels, _ = cells(rows, classes, -8.0, 2.0)
    targets = F.one_hot(labels, classes + 1)[:, :classes]
    valid = torch.ones(rows, dtype=torch.bool)
    forms = {
        "truth": (logits.double(), lambda x: Focal()(x, labels, valid, 1)),
        "ours": (logits, lambda x: Focal()(x, labels, valid, 1)),
        "torchvision.ops": (logits, lambda x: sigmoid_focal_loss(x, targets.to(x.dtype), reduction="sum")),
    }
    slope = {}
    for name, (x, form) in forms.items():
        slope[name] = torch.autograd.grad(form(x.requires_grad_()), x)[0].double()
    lines = []
    for name in list(forms)[1:]:
        error = ((slope[name] - slope["truth"]) / slope["truth"]).abs()
        lines.append([name, f"{error.median():.1e}", f"{error.max():.1e}"])
    print("\nFocal's gradient against float64\n")
    print(measure.table(["relative error", "median", "worst"], lines))


def whole_step(repeats: int, side: int = 512, images: int = 2) -> None:
    given = ("resnet18", training.backbone_weights("resnet18"), *training.work(side, images, 10, pick_device("auto")))
    pairs = {"CE + smooth L1": ("ce", "smooth_l1"), "GHM-C + GHM-R": ("ghm_c", "ghm_r")}
    steps = {
        label: training.our_step(*given, [f"class_loss.name={class_loss}", f"box_loss.name={box_loss}"])[0]
        for label, (class_loss, box_loss) in pairs.items()
    }
    times = measure.alternate(steps, 4 * repeats, warmup=4)
    ratio = 1 / measure.ratio(times, *pairs)
    rows = [[label, f"{ms:,.0f}"] for label, ms in measure.medians(times).items()]
    print(f"\nTraining step, resnet18, {images} x {side} x {side} px; ratio {ratio:.3f}\n")
    print(measure.table(["", "ms"], rows))


def report(
    calls: dict[str, Callable[[], Tensor]], logits: Tensor, repeats: int, peaks: dict[str, float] | None
) -> None:
    """A row for each call: milliseconds of forward and backward, ratio to our CE, memory in logits, ours to peer."""
    steps = {name: partial(step, call, logits) for name, call in calls.items()}
    times = measure.alternate(steps, repeats, clock=measure.gpu_milliseconds if logits.is_cuda else None)
    medians, rows = measure.medians(times), []
    for name, median in medians.items():
        ours = name.partition(",")[0]
        row = [name, f"{median:.2f}", f"ours {measure.ratio(times, name, ours):.1f}x faster" if name != ours else ""]
        rows.append(row + ([f"{median / medians['CE']:.2f}", f"{peaks[name]:.2f}"] if peaks else []))
    print(measure.table(["", "ms", "", *(["x CE", "memory"] if peaks else [])], rows))


def step(call: Callable[[], Tensor], logits: Tensor) -> None:
    logits.grad = None
    call().backward()


def peak(call: Callable[[], Tensor], logits: Tensor) -> float:
    """Memory of the second call beyond the memory in use before it, as a multiple of the logits' size."""
    step(call, logits)
    logits.grad = None
    return measure.peak(lambda: step(call, logits)) / (logits.numel() * logits.element_size())


if __name__ == "__main__":
    run_main(main)
