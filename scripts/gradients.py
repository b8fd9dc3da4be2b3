"""Draw the three figures of the GHM paper for a trained model on real images.

    python scripts/gradients.py --checkpoint runs/coco_ce/best.pt [--data annotations.json images/]

Writes into the checkpoint's folder, or --output:

    gradient_norms.png  histogram of the gradient norms of cells, also of the positive ones, and of box coordinates
    gradient_class.png  gradient norm of a cell under CE, Focal and GHM-C, against that under CE
    gradient_box.png    the same for smooth L1, ASL1 and GHM-R, against ASL1

Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, arXiv 1811.05181, figures 2, 3 and 5. The
curves of a figure are scaled to the same total gradient over the examples shown, because loss weights are arbitrary.

Prints how well the model tells cells apart, as medians: at positive anchors the probability of the true class and that
of the most probable other class, and the highest probability of as many background anchors, the most probable ones.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

from data.assemble import open_dataset
from data.loader import eval_loader
from detector import assemble, checkpoint
from detector.config import LossPart
from detector.configure import complete
from detector.criterion import Matches
from detector.device import keep_freed_memory, pick_device, place
from detector.errors import UserError, run_main
from detector.gradients import MU, Regions, observe
from scripts.comparison import page

FINE = 300  # regions in the figures: a multiple of the numbers below
BARS = 50  # of the histograms: with more, few images leave gaps
CELL_BINS, BOX_BINS = 30, 10  # of GHM-C and GHM-R
COLOURS = {"CE": "#7f7f7f", "Focal": "#1f77b4", "GHM-C": "#d62728"}
COLOURS |= {"smooth L1": "#7f7f7f", "ASL1": "#1f77b4", "GHM-R": "#d62728"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument(
        "--data", nargs=2, metavar=("ANNOTATIONS", "IMAGES"), help="use this data instead of the run's validation set"
    )
    parser.add_argument(
        "--images", type=int, default=100, metavar="N", help="use N images, of all shapes (default: 100)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: that of the checkpoint")
    args = parser.parse_args()
    if args.images < 1:
        raise UserError(f"--images {args.images}: give at least 1")

    cells, boxes, probabilities = measure(args.checkpoint, args.data, args.images)
    folder = args.output or Path(args.checkpoint).parent
    figures = {
        "gradient_norms.png": draw_norms(cells, boxes, 1 - probabilities.true),
        "gradient_class.png": draw_curves(cells, class_curves(cells), "gradient norm of a cell, |p - p*|"),
        "gradient_box.png": draw_curves(boxes, box_curves(boxes), f"gradient norm of ASL1, |d| / sqrt(d² + {MU}²)"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            page.save(figure, folder / name, dpi=150)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written ({error.strerror})") from None
    print(probabilities.medians())
    print("written: " + ", ".join(str(folder / name) for name in figures))


class Probabilities(NamedTuple):
    """What the model gives to P positive and N background anchors."""

    true: Tensor  # (P,) the true class
    other: Tensor  # (P,) the most probable other class, 0 if there is one class alone
    background: Tensor  # (N,) the most probable class

    def medians(self) -> str:
        count = len(self.true)
        if not count:
            return "no positive anchors in these images"
        highest = self.background.topk(min(count, len(self.background))).values
        return (
            f"{count:,} positive anchors, median probability: true class {self.true.median():.2f}, "
            f"other class {self.other.median():.2f}, "
            f"true class first in {(self.true > self.other).float().mean():.0%}; background {highest.median():.2f}"
        )


def measure(source: str, data: list[str] | None, count: int) -> tuple[Regions, Regions, Probabilities]:
    """Over `count` images of a data set, rounded up to whole batches and spread over their shapes: gradient norms in
    FINE regions, of cells and of box coordinates, and the probabilities of the checkpoint's model.
    """
    content = checkpoint.read(source)
    model, cfg = checkpoint.build_model(content, source)
    dataset = open_dataset(source, content, cfg, data)
    device = pick_device(cfg.device)
    keep_freed_memory(device)
    place(model, device, channels_last=cfg.channels_last)
    # With these losses the slope is the norm itself, so the sums of gradients are sums of norms.
    plain = {"class_loss": LossPart(name="ce"), "box_loss": LossPart(name="asl1", mu=MU)}
    criterion = assemble.build_criterion(complete(cfg.model_copy(update=plain), source)).to(device)
    total: list[Regions] = []
    probabilities: list[Probabilities] = []
    loader = eval_loader(dataset, assemble.eval_batch_size(cfg), **assemble.loader_options(cfg, device))
    batches = loader.batch_sampler.batches  # sorted by shape, so the first ones would all be narrow
    wanted = min(-(-count // len(batches[0])), len(batches))
    full = batches if wanted == len(batches) else [batch for batch in batches if len(batch) == len(batches[0])]
    chosen = [full[(2 * number + 1) * len(full) // (2 * wanted)] for number in range(wanted)]
    loader.batch_sampler.batches = chosen
    with torch.no_grad(), tqdm(total=sum(map(len, chosen)), unit="image") as progress:
        for batch in loader:
            batch = batch.to(device)
            predictions = model(batch.images, batch.sizes)
            matches = criterion.match(predictions, batch.targets)
            observed = observe(criterion, predictions, batch.targets, FINE, FINE, matches)
            probabilities.append(probabilities_of(predictions.logits, matches))
            total = [Regions(*map(torch.add, a, b)) for a, b in zip(total, observed)] if total else list(observed)
            progress.update(len(batch.images))
    cells, boxes = (Regions(*(value.cpu() for value in regions)) for regions in total)
    return cells, boxes, Probabilities(*map(torch.cat, zip(*probabilities)))


def probabilities_of(logits: Tensor, matches: Matches) -> Probabilities:
    p = logits.float().sigmoid()
    positive = p.flatten(0, 1)[matches.rows]  # (P, C)
    labels = matches.labels[:, None]
    background = p[matches.valid & ~matches.positive].amax(dim=1)
    parts = positive.gather(1, labels).squeeze(1), positive.scatter(1, labels, 0).amax(dim=1), background
    return Probabilities(*(part.cpu() for part in parts))


def norms(regions: Regions) -> Tensor:
    """The middle of each region."""
    return (torch.arange(len(regions.counts)) + 0.5).double() / len(regions.counts)


def harmonized(regions: Regions, bins: int) -> Tensor:
    """beta g, with the density from `bins` regions."""
    coarse = Regions(regions.counts.view(bins, -1).sum(1), regions.gradient.view(bins, -1).sum(1))
    return coarse.beta.repeat_interleave(len(regions.counts) // bins) * norms(regions)


def class_curves(regions: Regions) -> dict[str, Tensor]:
    p = norms(regions)  # for a negative cell; a positive cell has the same curve times alpha / (1 - alpha)
    focal = p**2 * (2 * (1 - p) * -torch.log1p(-p) + p)
    return {"CE": p, "Focal": focal, "GHM-C": harmonized(regions, CELL_BINS)}


def box_curves(regions: Regions) -> dict[str, Tensor]:
    g = norms(regions)
    d = MU * g / (1 - g * g).sqrt()
    return {"smooth L1": (9 * d).clamp(max=1), "ASL1": g, "GHM-R": harmonized(regions, BOX_BINS)}


def draw_norms(cells: Regions, boxes: Regions, positives: Tensor) -> plt.Figure:
    """`positives`: the gradient norms of the positive cells."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    edges = torch.linspace(0, 1, BARS + 1).numpy()
    words = (
        ("class cells", "gradient norm of a cell, |p - p*|"),
        ("box coordinates", f"gradient norm of a coordinate, |d| / sqrt(d² + {MU}²)"),
    )
    for axis, regions, (title, label) in zip(axes, (cells, boxes), words):
        counts = regions.counts.view(BARS, -1).sum(1)
        axis.stairs(counts.numpy(), edges, fill=True, color="#9ecae1", label="all")
        axis.set(xlabel=label, ylabel="count", yscale="log", xlim=(0, 1), title=f"{int(counts.sum()):,} {title}")
        page.logarithmic(axis.yaxis)
    of_positives = torch.histc(positives, BARS, 0, 1).numpy()
    axes[0].stairs(of_positives, edges, color="#d62728", linewidth=1.5, label=f"{len(positives):,} positive")
    axes[0].legend()
    return figure


def draw_curves(regions: Regions, curves: dict[str, Tensor], label: str) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    total = (regions.counts * norms(regions)).sum()
    for name, curve in curves.items():
        curve_total = (regions.counts * curve).sum()
        drawn = (curve * total / curve_total).where(curve > 0, torch.nan) if curve_total > 0 else curve * torch.nan
        axis.plot(norms(regions).numpy(), drawn.numpy(), label=name, color=COLOURS[name], drawstyle="steps-mid")
    axis.set(xlabel=label, ylabel="gradient norm under each loss, same total", yscale="log", xlim=(0, 1))
    page.logarithmic(axis.yaxis)
    axis.legend()
    return figure


if __name__ == "__main__":
    run_main(main)
