"""Draw the three figures of the GHM paper for a trained model on real images.

    python scripts/gradients.py --checkpoint runs/coco_ce/best.pt [--data annotations.json images/]

Writes into the checkpoint's folder, or --output:

    gradient_norms.png  histogram of the gradient norms of cells, also of the positive ones, and of box coordinates
    gradient_class.png  gradient norm of a cell under CE, Focal and GHM-C, against that under CE
    gradient_box.png    the same for smooth L1, ASL1 and GHM-R, against ASL1

Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, arXiv 1811.05181, figures 2, 3 and 5. The
curves of a figure are scaled to the same total gradient over the examples shown, because loss weights are arbitrary.

Prints how well the model tells positive cells from background: the median probability of the positive ones, and of as
many of the most probable background cells.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files and needs no display

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

from data.assemble import open_dataset
from data.loader import eval_loader
from detector import assemble, checkpoint
from detector.config import LossPart
from detector.configure import complete
from detector.device import keep_freed_memory, pick_device, place
from detector.errors import UserError, run_main
from detector.gradients import MU, Regions, observe

FINE = 300  # regions in the figures: a multiple of both numbers below
CELL_BINS, BOX_BINS = 30, 10  # of GHM-C and GHM-R
COLOURS = {"CE": "#7f7f7f", "Focal": "#1f77b4", "GHM-C": "#d62728"}
COLOURS |= {"smooth L1": "#7f7f7f", "ASL1": "#1f77b4", "GHM-R": "#d62728"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument(
        "--data", nargs=2, metavar=("ANNOTATIONS", "IMAGES"), help="use this data instead of the run's validation set"
    )
    parser.add_argument("--images", type=int, default=100, metavar="N", help="use the first N images (default: 100)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: that of the checkpoint")
    args = parser.parse_args()
    if args.images < 1:
        raise UserError(f"--images {args.images}: give at least 1")

    cells, boxes, positives = measure(args.checkpoint, args.data, args.images)
    folder = args.output or Path(args.checkpoint).parent
    figures = {
        "gradient_norms.png": draw_norms(cells, boxes, positives),
        "gradient_class.png": draw_curves(cells, class_curves(cells), "gradient norm of a cell, |p - p*|"),
        "gradient_box.png": draw_curves(boxes, box_curves(boxes), f"gradient norm of ASL1, |d| / sqrt(d² + {MU}²)"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=150)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written ({error.strerror})") from None
    print(separation(cells, positives))
    print("written: " + ", ".join(str(folder / name) for name in figures))


def measure(source: str, data: list[str] | None, count: int) -> tuple[Regions, Regions, Tensor]:
    """Gradient norms of the checkpoint's model over the first `count` images of a data set, in FINE regions.

    Of all cells and all box coordinates, and the number of positive cells (FINE,) in each region.
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
    positives = torch.zeros(FINE, device=device)
    loader = eval_loader(dataset, assemble.eval_batch_size(cfg), **assemble.loader_options(cfg, device))
    seen = 0
    with torch.no_grad(), tqdm(total=min(count, len(dataset)), unit="image") as progress:
        for batch in loader:
            batch = batch.to(device)
            predictions = model(batch.images, batch.sizes)
            matches = criterion.match(predictions, batch.targets)
            observed = observe(criterion, predictions, batch.targets, FINE, FINE, matches)
            true_class = predictions.logits.flatten(0, 1)[matches.rows, matches.labels].float()
            positives += torch.histc(torch.sigmoid(-true_class), FINE, 0, 1)  # their norm is 1 - p
            total = [Regions(*map(torch.add, a, b)) for a, b in zip(total, observed)] if total else list(observed)
            seen += len(batch.images)
            progress.update(len(batch.images))
            if seen >= count:
                break
    cells, boxes = (Regions(*(value.cpu() for value in regions)) for regions in total)
    return cells, boxes, positives.cpu().long()


def separation(cells: Regions, positives: Tensor) -> str:
    """The median probability of the positive cells, and of as many of the most probable background cells."""
    count = int(positives.sum())
    if not count:
        return "no positive cells in these images"
    probability = norms(cells)  # of background; a positive cell's is 1 - norm
    background = (cells.counts - positives).flip(0).cumsum(0)  # from the most probable on
    highest = probability.flip(0)[int((background < count / 2).sum())]
    median = 1 - probability[int((positives.cumsum(0) < count / 2).sum())]
    return (
        f"median probability of the {count:,} positive cells: {median:.2f}, of the {count:,} most probable background "
        f"cells: {highest:.2f}"
    )


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
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    labels = ("gradient norm of a cell, |p - p*|", f"gradient norm of a coordinate, |d| / sqrt(d² + {MU}²)")
    for axis, regions, label in zip(axes, (cells, boxes), labels):
        axis.bar(norms(regions).numpy(), regions.counts.numpy(), width=1 / FINE, color="#1f77b4")
        axis.set(xlabel=label, ylabel="examples", yscale="log", xlim=(0, 1))
        axis.set_title(f"{int(regions.counts.sum()):,} examples")
    step = dict(where="mid", color="#ff7f0e", label=f"{int(positives.sum()):,} positive cells")
    axes[0].step(norms(cells).numpy(), positives.numpy(), **step)
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
    axis.legend()
    return figure


if __name__ == "__main__":
    run_main(main)
