"""One picture and one line for each difference from CE that docs/results.md and docs/results_demo.md report.

    python scripts/studies/overview.py [--output docs/overview.png]

All verdicts are corrected together, so they can be "undecided" where the table of one study has "better".
"""

import argparse
import statistics
from pathlib import Path

from matplotlib import pyplot as plt

from detector.errors import run_main
from scripts.comparison import page
from scripts.comparison.differences import Difference, differences_by_condition, in_brackets, in_digits
from scripts.comparison.rows import Row, known_values, read_rows

RESULTS = Path(__file__).resolve().parents[2] / "results"
LOSSES = {  # the names of a loss's rows in the studies, which differ where a study varied an option
    "Focal": ("focal",),
    "GHM-C, limit of 30": ("ghm_c_limited", "ghm_c[max_weight=30]"),
    "GHM-C, prior count of 1,000": ("ghm_c[prior_count=1000]", "ghm_c[max_weight=null][prior_count=1000]"),
    "GHM-C without either": ("ghm_c", "ghm_c[max_weight=null]"),
}
STUDIES = {
    "BCCD, pretrained": ("laptop", "prior_count/laptop"),
    "playing cards, pretrained": ("cards", "prior_count/cards"),
    "BCCD, from scratch": ("scratch", "prior_count/scratch"),
    **{
        f"{ratio:,} negatives for each positive": (f"imbalance/{ratio}", f"prior_count/imbalance/{ratio}")
        for ratio in (70, 350, 1600, 11000, 46000)
    },
    "750 scenes": ("wrong_labels/0",),
    "750 scenes, 20% wrong labels": ("wrong_labels/20",),
    "750 scenes, 40% wrong labels": ("wrong_labels/40",),
}
PHOTOS = 3  # the first of them; the others are demo scenes
COLOURS = {"better": "#1a7f37", "worse": "#cf222e", "undecided": "#6e7781"}
MARKERS = {"better": "^", "worse": "v", "undecided": "o"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/overview.png"), metavar="FILE", help="the picture")
    args = parser.parse_args()
    studies = [rows_of(folders) for folders in STUDIES.values()]
    results = differences_by_condition(studies, "CE")
    labels = [f"{name} (CE: {statistics.fmean(known_values(rows[0])):.1f} AP)" for name, rows in zip(STUDIES, studies)]
    for label, of_study in zip(labels, results):
        for of in of_study:
            assert of.mean is not None and of.p is not None  # each row has several seeds
            print(f"- {label}: {of.name} {of.mean:+.1f}{in_brackets(of)}, p {in_digits(of.p)}, {of.verdict}")
    page.save(draw(labels, results), args.output, dpi=130)
    print(f"written: {args.output}")


def rows_of(folders: tuple[str, ...]) -> list[Row]:
    """CE and LOSSES in a study, by their common names and in this order."""
    # By name, because the folders of prior counts link to the runs with a limit.
    files = {path.name: str(path) for folder in folders for path in sorted((RESULTS / folder).glob("*-s*.json"))}
    rows = {row.name: row for row in read_rows(list(files.values()))}
    return [
        rows[name]._replace(name=loss)
        for loss, names in [("CE", ("ce",)), *LOSSES.items()]
        for name in names
        if name in rows
    ]


def draw(labels: list[str], results: list[list[Difference]]) -> plt.Figure:
    """A panel for each loss. They differ in width and not in scale: an AP is as long in each."""
    drawn = {
        loss: [(y, of) for y, of_study in enumerate(results) for of in of_study if of.name == loss] for loss in LOSSES
    }
    ends = {loss: [end for _, of in points for end in (*(of.interval or ()), 0)] for loss, points in drawn.items()}
    limits = {loss: (min(of_loss) - 2, max(of_loss) + 2) for loss, of_loss in ends.items()}
    figure, axes = plt.subplots(
        1, len(LOSSES), sharey=True, figsize=(11, 4.4), width_ratios=[b - a for a, b in limits.values()],
        layout="constrained",
    )  # fmt: skip
    for axis, (loss, points) in zip(axes, drawn.items()):
        for y, of in points:
            axis.plot(of.interval, [y, y], color=COLOURS[of.verdict], linewidth=2.5)
            axis.plot([of.mean], [y], MARKERS[of.verdict], color=COLOURS[of.verdict], markersize=6)
        for y in set(range(len(labels))) - {y for y, _ in points}:
            axis.text(0.5, y, "not trained", transform=axis.get_yaxis_transform(), color="#8c959f", fontsize=8,
                      ha="center", va="center")  # fmt: skip
        axis.axvline(0, color="black", linewidth=1)
        axis.axhline(PHOTOS - 0.5, color="#d0d7de", linewidth=1)
        axis.set_title(loss.replace(", ", ",\n").replace(" without", "\nwithout"), fontsize=10)
        low, high = limits[loss]
        axis.set(xlim=(low, high), xticks=[tick for tick in range(-60, 61, 10) if low < tick < high])
        axis.grid(axis="x", color="#eaeef2")
        axis.tick_params(length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    figure.supxlabel("AP minus that of CE. Bars: 95% intervals, not corrected", fontsize=10)
    words = {"better": "better than CE", "worse": "worse than CE", "undecided": "undecided"}
    dots = [plt.Line2D([], [], marker=MARKERS[of], color=COLOURS[of], label=word) for of, word in words.items()]
    figure.legend(handles=dots, loc="outside upper right", ncols=3, frameon=False)
    return figure


if __name__ == "__main__":
    run_main(main)
