"""The cells in each region of GHM-C for batches of several sizes, and the gradient from regions with few cells.

    python scripts/batch_regions.py --checkpoints runs/step100/last.pt runs/step564/last.pt [--batches 2 4 16 64]

GHM-C gives each region of the gradient norm the same weight, however few cells it holds. For each checkpoint this
measures the regions of --images training images, with the augmentation and BatchNorm of training, and draws batches
from these images at random. For each size of batch it prints how many regions hold few cells, and for several forms of
GHM-C the largest weight and the share of the class gradient that comes from regions with fewer than 10, 100 and 1,000
cells.

The moving average runs over 300 batches of one model, of which the first 100 are not shown. In a real training the
model changes meanwhile, so a long average is less accurate than here. Writes into --output batch_regions.png,
batch_regions.md with what it prints, and batch_regions.csv with a line for each region.
"""

import argparse
import csv
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

from data.assemble import build_datasets
from data.loader import train_loader
from detector import assemble, checkpoint
from detector.device import autocast, keep_freed_memory, pick_device, pick_precision, place
from detector.errors import UserError, run_main
from detector.gradients import Regions, by_region
from detector.losses.cells import logits_against_truth
from detector.losses.density import GradientDensity
from detector.randomness import seed_everything
from detector.solver import PRECISIONS
from scripts.comparison import page

BINS = 30  # a multiple of each form's
STEPS, FIRST = 300, 100  # batches that the average runs over, and the first that is shown
FEW = (10, 100, 1000)  # cells in a region of a batch
PUBLISHED = "momentum 0.75"
FORMS: dict[str, dict[str, Any]] = {  # the options of GHM-C in which each differs from the default
    PUBLISHED: {},
    "momentum 0": {"momentum": 0.0},
    "momentum 0.99": {"momentum": 0.99},
    "10 bins": {"bins": 10},
    "limit 30": {"max_weight": 30.0},
    "prior 100": {"prior_count": 100.0},
    "prior 1,000": {"prior_count": 1000.0},
}


class Measured(NamedTuple):
    """What one checkpoint does on I training images."""

    name: str
    counts: Tensor  # (I, BINS) int64, cells of each image in each region
    norms: Tensor  # (I, BINS) float64, sum of their gradient norms


class Form(NamedTuple):
    """What a form of GHM-C does in T batches of one size."""

    counts: Tensor  # (T, bins) int64
    beta: Tensor  # (T, bins) float64, 0 for an empty region
    gradient: Tensor  # (T, bins) float64, share of the batch's class gradient

    def largest(self) -> float:
        """The largest weight of a batch, median over batches."""
        return float(self.beta.amax(dim=1).median())

    def weights(self) -> Tensor:
        """(bins,) mean weight of each region over the batches in which it holds cells, 0 where there is none."""
        return self.beta.sum(dim=0) / (self.counts > 0).sum(dim=0).clamp(min=1)

    def from_few(self, few: int) -> float:
        """Share of the gradient from regions with fewer than `few` cells, mean over batches."""
        return float((self.gradient * (self.counts < few)).sum(dim=1).mean())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="FILE", help="of runs on one data set")
    parser.add_argument(
        "--batches",
        nargs="+",
        type=int,
        default=[2, 4, 16, 64],
        metavar="N",
        help="images a batch (default: 2 4 16 64)",
    )
    parser.add_argument("--images", type=int, default=256, metavar="N", help="training images (default: 256)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: that of the last checkpoint")
    args = parser.parse_args(argv)
    if min(args.images, *args.batches) < 1:
        raise UserError("--images, --batches: give at least 1")
    folder = args.output or Path(args.checkpoints[-1]).parent

    results, tables = [], []
    for source in args.checkpoints:
        measured = measure(source, args.images)
        forms = {
            size: {name: simulate(measured, size, options) for name, options in FORMS.items()} for size in args.batches
        }
        tables.append("\n".join(table(measured, forms)))
        print(tables[-1])
        results.append((measured, forms))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page.save(draw(results), folder / "batch_regions.png", dpi=110)
        write(folder / "batch_regions.csv", results)
        (folder / "batch_regions.md").write_text("\n".join(tables).lstrip(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written ({error.strerror})") from None
    print(f"written: batch_regions.png, batch_regions.md and batch_regions.csv in {folder}")


def measure(source: str, count: int) -> Measured:
    """The regions of `count` training images, drawn as training draws them."""
    content = checkpoint.read(source)
    model, cfg = checkpoint.build_model(content, source)
    if run := content.get("run"):
        model.load_state_dict(run["model"])  # as trained, where the evaluated weights are averaged
    seed_everything(cfg.seed)
    train_set, _ = build_datasets(cfg)
    device = pick_device(cfg.device)
    keep_freed_memory(device)
    place(model.train(), device, channels_last=cfg.channels_last)
    precision = PRECISIONS[pick_precision(cfg.precision, device)[0]]
    criterion = assemble.build_criterion(cfg).to(device)
    at_once = cfg.solver.batch_size // cfg.solver.accumulate  # what BatchNorm saw
    loader = train_loader(train_set, at_once, **assemble.loader_options(cfg, device), seed=cfg.seed)
    images: list[Regions] = []
    epoch = 0
    with torch.no_grad(), tqdm(total=count, unit="image", desc=source) as progress:
        while len(images) < count:
            loader.batch_sampler.set_position(epoch)
            epoch += 1
            for batch in loader:
                batch = batch.to(device)
                with autocast(device, precision):
                    predictions = model(batch.images, batch.sizes)
                matches = criterion.match(predictions, batch.targets)
                every_label = matches.anchor_labels(predictions.logits.shape[-1])
                for logits, labels, valid in zip(predictions.logits.float(), every_label, matches.valid):
                    norms = logits_against_truth(logits, labels, valid).sigmoid()
                    images.append(Regions(*(value.cpu() for value in by_region(norms, norms, valid, BINS))))
                progress.update(min(len(batch.images), count - progress.n))
                if len(images) >= count:
                    break
    step = f"step {run['solver']['step']:,}" if run else Path(source).stem
    counts, norms = (torch.stack(values[:count]) for values in zip(*images))
    return Measured(f"{Path(source).parent.name}, {step}", counts, norms)


def simulate(measured: Measured, size: int, options: dict[str, Any]) -> Form:
    """GHM-C with these options on batches of `size` images, the same batches for all forms."""
    density = GradientDensity(**options).train()
    chosen = torch.randint(len(measured.counts), (STEPS, size), generator=torch.Generator().manual_seed(0))
    counts, norms = (
        values[chosen].sum(dim=1).view(STEPS, density.bins, -1).sum(dim=2)
        for values in (measured.counts, measured.norms)
    )
    shares = torch.stack([density.region_shares(of_batch) for of_batch in counts]).double()
    gradient = shares * norms
    gradient /= gradient.sum(dim=1, keepdim=True)
    beta = shares * counts.sum(dim=1, keepdim=True)
    return Form(counts[FIRST:], beta[FIRST:], gradient[FIRST:])


def table(measured: Measured, forms: dict[int, dict[str, Form]]) -> list[str]:
    cells = int(measured.counts.sum()) // len(measured.counts)
    ranges = [(0, 1), *zip((1, *FEW), (*FEW, 1 << 62))]
    heads = [
        "images a batch",
        "cells",
        "regions with none",
        *(f"{low:,} to {high - 1:,}" for low, high in ranges[1:-1]),
    ]
    heads += [f"{FEW[-1]:,} or more"]
    lines = ["", f"{measured.name}: {len(measured.counts)} images of {cells:,} cells", "", *header(heads)]
    for size, by_name in forms.items():
        counts = by_name[PUBLISHED].counts
        held = [((counts >= low) & (counts < high)).double().sum(dim=1).mean() for low, high in ranges]
        lines.append(row([size, f"{size * cells:,}", *(f"{number:.1f}" for number in held)]))
    lines += [
        "",
        *header(["form", "images a batch", "largest weight", *(f"gradient from below {few:,}" for few in FEW)]),
    ]
    for name in FORMS:
        for size, by_name in forms.items():
            form = by_name[name]
            shares = [f"{form.from_few(few):.1%}" for few in FEW]
            lines.append(row([name, size, f"{form.largest():,.0f}", *shares]))
    return [*lines, ""]


def header(heads: list[str]) -> list[str]:
    return [row(heads), "|" + " --- |" * len(heads)]


def row(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def write(path: Path, results: list[tuple[Measured, dict[int, dict[str, Form]]]]) -> None:
    """A line for each region of each size of batch and checkpoint; weights and gradient are the published form's."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        rare = [f"batches with fewer than {few} cells" for few in FEW]
        writer.writerow(["checkpoint", "images a batch", "from", "to", "mean cells", *rare, "mean weight", "gradient"])
        for measured, forms in results:
            for size, by_name in forms.items():
                counts, _, gradient = by_name[PUBLISHED]
                weights = by_name[PUBLISHED].weights()
                for region in range(BINS):
                    here = counts[:, region]
                    shares = [f"{(here < few).double().mean():.4f}" for few in FEW]
                    edges = f"{region / BINS:.4f}", f"{(region + 1) / BINS:.4f}"
                    means = f"{weights[region]:.6g}", f"{gradient[:, region].mean():.4f}"
                    line = [measured.name, size, *edges, f"{here.double().mean():.2f}", *shares, *means]
                    writer.writerow(line)


def draw(results: list[tuple[Measured, dict[int, dict[str, Form]]]]) -> plt.Figure:
    figure, axes = plt.subplots(
        3, len(results), figsize=(1.5 + 4 * len(results), 10), layout="constrained", squeeze=False, sharey="row"
    )
    middle = (torch.arange(BINS) + 0.5).numpy() / BINS
    for (of_counts, of_weights, of_shares), (measured, forms) in zip(axes.T, results):
        for size, by_name in forms.items():
            published = by_name[PUBLISHED]
            for axis, mean in ((of_counts, published.counts.double().mean(dim=0)), (of_weights, published.weights())):
                axis.plot(
                    middle, mean.where(mean > 0, torch.nan).numpy(), drawstyle="steps-mid", label=f"{size} images"
                )
        for name in FORMS:
            shares = [100 * by_name[name].from_few(FEW[1]) for by_name in forms.values()]
            of_shares.plot(range(len(forms)), shares, marker="o", label=name)
        for few in FEW:
            of_counts.axhline(few, color="black", linewidth=0.5, alpha=0.5)
        of_counts.set(title=measured.name, yscale="log", xlim=(0, 1), xlabel="gradient norm of a cell, |p - p*|")
        of_weights.set(yscale="log", xlim=(0, 1), xlabel="gradient norm of a cell, |p - p*|")
        page.logarithmic(of_counts.yaxis)
        page.logarithmic(of_weights.yaxis)
        of_shares.set(xlabel="images a batch", ylim=(0, 100))
        of_shares.set_xticks(range(len(forms)), list(forms))
    for axis, label in zip(
        axes[:, 0],
        (
            "cells in a region, mean",
            f"weight ({PUBLISHED}), mean",
            f"gradient from regions below {FEW[1]} cells, percent",
        ),
    ):
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run_main(main)
