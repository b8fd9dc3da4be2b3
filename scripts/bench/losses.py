"""Class and box losses beside their peers: milliseconds of forward + backward, and memory beyond the logits.

    python scripts/bench/losses.py [--rows 98208 380000] [--classes 80] [--logits -4 1.5] [--repeats 9]
        [--slow] [--step]

Peers: GHM-C and GHM-R as a loop over bins, the arithmetic of the released code written anew; torchvision's focal loss,
alone and as its RetinaNet head calls it; cross entropy on dense targets; a sort with two searches for exact density.
All alternate in one process, so that a slow moment of the machine meets all of them. Times are medians, with freed
memory kept by the process; memory is the highest resident size of one call beyond that before it, in logits.
"Gradient error": Focal's, relative, against float64 where background is confident, beside torchvision's.
"Step": a whole training step, ResNet-18 at 512 px, 2 images, GHM-C + GHM-R against CE + smooth L1, in pairs.
"""

import argparse
import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's packages, wherever this is started

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from detector import assemble
from detector.criterion import Criterion
from detector.device import keep_freed_memory
from detector.losses import ASL1, GHMC, GHMR, OHEM, CrossEntropy, Focal
from detector.model import RetinaNet
from detector.solver import Solver
from detector.structures import Target

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
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--slow", action="store_true", help="also OHEM and exact GHM-C, which sorts all cells")
    parser.add_argument("--step", action="store_true", help="also a whole training step, which takes some minutes")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}")
    memory = {}
    for rows in args.rows:  # all of it before memory is kept: then freed memory would be taken for used
        logits, *rest = cells(rows, args.classes, *args.logits)
        calls = class_losses(logits, *rest, args.slow)
        memory[rows] = {name: peak(call, logits) for name, call in calls.items()}
    keep_freed_memory()
    for rows in args.rows:
        logits, *rest = cells(rows, args.classes, *args.logits)
        share = (logits.sigmoid() >= 1 / 30).any(1).float().mean()
        print(f"\n{rows:,} x {args.classes} cells, {share:.0%} of rows with a cell past the first of 30 regions")
        table(class_losses(logits, *rest, args.slow), logits, args.repeats, memory[rows])
    print(f"\nboxes, {POSITIVES} positives")
    table(box_losses(), torch.zeros(POSITIVES, 4), args.repeats * 10)
    gradient_error()
    if args.step:
        whole_step(args.repeats)


def cells(rows: int, classes: int, mean: float, std: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normal logits, POSITIVES positives, 2% of rows ignored."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=rng) * std + mean
    labels = torch.full((rows,), classes)
    labels[torch.randperm(rows, generator=rng)[:POSITIVES]] = torch.randint(0, classes, (POSITIVES,), generator=rng)
    return logits, labels, torch.rand(rows, generator=rng) > 0.02


def class_losses(logits: Tensor, labels: Tensor, valid: Tensor, slow: bool) -> dict[str, Callable[[], Tensor]]:
    classes = logits.shape[1]
    targets = F.one_hot(labels, classes + 1)[:, :classes].to(logits.dtype)
    weights = valid[:, None].expand_as(targets)
    x = logits.requires_grad_()
    sums = [0.0] * 30
    ours = {"CE": CrossEntropy(), "Focal": Focal(), "GHM-C": GHMC(), "GHM-C near-exact": GHMC(density="near_exact")}
    if slow:
        ours |= {"OHEM": OHEM(), "GHM-C exact": GHMC(density="exact")}
    calls = {name: lambda loss=loss: loss(x, labels, valid, POSITIVES) for name, loss in ours.items()}

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


def box_losses() -> dict[str, Callable[[], Tensor]]:
    rng = torch.Generator().manual_seed(0)
    deltas, targets = torch.randn(2, POSITIVES, 4, generator=rng) * 0.1
    deltas.requires_grad_()
    ghm_r, asl1, sums = GHMR(), ASL1(), [0.0] * 10
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
    """One masked pass for each bin, and a wait for its count: what most people run."""
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
        x.requires_grad_().grad = None
        form(x).backward()
        slope[name] = x.grad.double()
    print("\nGradient error of Focal, median and worst")
    for name in list(forms)[1:]:
        error = ((slope[name] - slope["truth"]) / slope["truth"]).abs()
        print(f"{name:28}{error.median():9.1e}{error.max():9.1e}")


def whole_step(repeats: int, size: int = 512, images: int = 2) -> None:
    rng = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (images, 3, size, size), generator=rng, dtype=torch.uint8)
    corners = torch.rand(images, 10, 2, generator=rng) * (size - 200)
    boxes = torch.cat([corners, corners + 20 + torch.rand(images, 10, 2, generator=rng) * 180], -1)
    targets = [Target(b, torch.randint(0, 80, (10,), generator=rng)) for b in boxes]
    base = Path(__file__).resolve().parents[2] / "configs/coco/base.yaml"
    steps = []
    for pair in (("ce", "smooth_l1"), ("ghm_c", "ghm_r")):
        choice = dict(zip(("run", "class_loss.name", "box_loss.name"), ("bench", *pair)))
        choice |= {
            "model.backbone": "resnet18",
            "model.weights": "none",
            "model.norm": "bn",
            "solver.batch_size": images,
        }
        cfg = assemble.configure(str(base), [f"{key}={value}" for key, value in choice.items()])
        torch.manual_seed(0)
        model, criterion = assemble.build_model(cfg, num_classes=80).train(), assemble.build_criterion(cfg).train()
        steps.append((model, criterion, assemble.build_solver(cfg, model, steps_per_epoch=1000)))

    def seconds(model: RetinaNet, criterion: Criterion, solver: Solver) -> float:
        start = time.perf_counter()
        solver.backward(criterion(model(batch, [(size, size)] * images), targets).total)
        solver.step()
        return time.perf_counter() - start

    for one in steps * 2:
        seconds(*one)
    pairs = [[seconds(*one) for one in steps] for _ in range(2 * repeats)]
    plain, harmonized = map(statistics.median, zip(*pairs))
    ratio = statistics.median(b / a for a, b in pairs)
    print(
        f"\nStep, median of {len(pairs)} pairs: {plain:.2f} s, with GHM-C + GHM-R {harmonized:.2f} s, ratio {ratio:.3f}"
    )


def table(
    calls: dict[str, Callable[[], Tensor]], logits: Tensor, repeats: int, memory: dict[str, float] | None = None
) -> None:
    for call in calls.values():
        step(call, logits)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            step(call, logits)
            times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'':28}{'ms':>9}{'x CE':>8}{'memory':>8}" if memory else f"{'':28}{'ms':>9}")
    for name, median in medians.items():
        tail = f"{median / medians['CE']:8.2f}{memory[name]:8.2f}" if memory else ""
        print(f"{name:28}{median:9.2f}{tail}")
    for peer, median in medians.items():
        ours = peer.partition(",")[0]
        if peer != ours:
            print(f"{ours}: {median / medians[ours]:.1f}x faster than {peer.partition(', ')[2]}")


def step(call: Callable[[], Tensor], logits: Tensor) -> None:
    logits.grad = None
    call().backward()


def peak(call: Callable[[], Tensor], logits: Tensor) -> float:
    """Memory of the second call beyond what was held before it, in sizes of the logits; nan where Linux is not."""
    step(call, logits)
    logits.grad = None
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        step(call, logits)
        return (resident("VmHWM") - before) / (logits.numel() * logits.element_size())
    except OSError:
        return float("nan")


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
