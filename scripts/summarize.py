"""A comparison in brief: one table of five columns, best first, and one picture.

    python scripts/summarize.py results/laptop/*.json --baseline ce --output docs/losses.png

The table has AP, AP50 and AP75 in percent, mean and standard deviation over seeds, and the verdict: the difference in
AP from the baseline with its 95% interval, as scripts/compare.py computes it.

The picture has the same intervals, drawn around the baseline's AP, and beside them the share of each loss's
classification gradient that comes from easy (gradient norm |p - p*| below 0.1), medium and outlier cells (above 0.9),
as training observed it every `tensorboard.gradients` steps.
"""

import argparse
import statistics
import sys
from pathlib import Path

from matplotlib import pyplot as plt

from detector.errors import UserError, run_main
from scripts.comparison import page
from scripts.comparison.differences import Difference, differences, in_brackets, named
from scripts.comparison.fairness import differing
from scripts.comparison.rows import Row, gradient_shares, known_values, mean_and_spread, read_rows

METRICS = ("AP", "AP50", "AP75")
GREY = "#6e7781"
VERDICT_COLOURS = {"better": "#1a7f37", "undecided": GREY, "no verdict": GREY, "worse": "#cf222e", "baseline": "black"}
BANDS = {"easy": "#cfe1f2", "medium": "#5b9bd5", "outlier": "#f28e2b"}  # as result files name them
LABELS = {"easy": "easy, below 0.1", "medium": "medium", "outlier": "outliers, above 0.9"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a result file of scripts/ablate.py")
    parser.add_argument("--baseline", metavar="NAME", help="the row to compare with (the first)")
    parser.add_argument("--output", type=Path, default=Path("losses.png"), metavar="FILE", help="the picture")
    args = parser.parse_args(argv)
    rows = read_rows(args.runs)
    for row in rows:
        for failure in row.failures:
            print(f"failed: {row.name}, {failure}", file=sys.stderr)
    for line in differing(rows)[1]:
        print(f"warning: {line}", file=sys.stderr)
    baseline = named(rows, args.baseline)
    known = sorted((row for row in rows if known_values(row)), key=mean_ap, reverse=True)
    if baseline not in known:
        raise UserError(f"{baseline.name}: no run of it has an AP; name another row by --baseline")
    by_name = {difference.name: difference for difference in differences(rows, baseline.name)}
    figure = draw(known, baseline, by_name)
    try:
        page.save(figure, args.output, dpi=160)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {args.output}: cannot be written ({error})") from None
    print("\n".join(table(known, baseline, by_name)))
    print(f"written: {args.output}")


def mean_ap(row: Row) -> float:
    return statistics.fmean(known_values(row))


def table(rows: list[Row], baseline: Row, by_name: dict[str, Difference]) -> list[str]:
    lines = [f"| run | AP | AP50 | AP75 | against {escaped(baseline.name)} |", "| --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        cells = [escaped(row.name), *(mean_and_spread(known_values(row, metric)) for metric in METRICS)]
        cells.append("baseline" if row is baseline else in_brief(by_name[row.name]))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def in_brief(difference: Difference) -> str:
    return f"{difference.verdict}: {difference.mean:+.1f}{in_brackets(difference)}"


def escaped(text: str) -> str:
    return text.replace("|", r"\|")


def draw(rows: list[Row], baseline: Row, by_name: dict[str, Difference]) -> plt.Figure:
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(8, 1.35 + 0.27 * len(rows)), width_ratios=(1.25, 1), layout="constrained"
    )
    center = mean_ap(baseline)
    left.axvline(center, color="black", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    dots: dict[str, plt.Line2D] = {}  # one of each verdict, for the legend
    for place, row in enumerate(rows):
        difference = by_name.get(row.name)
        verdict = difference.verdict if difference else "baseline"
        colour = VERDICT_COLOURS[verdict]
        if difference and difference.interval:
            ends = [center + end for end in difference.interval]
            left.plot(ends, [place, place], color=colour, linewidth=2.5)
        (dots[verdict],) = left.plot([mean_ap(row)], [place], "o", color=colour, markersize=6.5)
        start = 0.0
        for band, share in (gradient_shares(row, "class") or {}).items():
            right.barh(place, share, left=start, color=BANDS[band], height=0.72)
            start += share
    left.set_yticks(range(len(rows)), [row.name for row in rows])
    left.invert_yaxis()
    left.set_xlabel("AP, percent")
    left.set_title(f"AP, and 95% interval of the\ndifference from {baseline.name}", fontsize=10, loc="left")
    left.grid(axis="x", color="#eaeef2")
    present = [verdict for verdict in VERDICT_COLOURS if verdict in dots]
    left.legend([dots[verdict] for verdict in present], present, fontsize=8, loc="best", frameon=False)
    right.set_xlim(0, 1)
    right.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    right.set_title("Class gradient:\nthe cells it comes from", fontsize=10, loc="left")
    bars = [plt.Rectangle((0, 0), 1, 1, color=colour, label=LABELS[band]) for band, colour in BANDS.items()]
    right.legend(handles=bars, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.07), frameon=False,
                 handlelength=1, columnspacing=0.8, handletextpad=0.4)  # fmt: skip
    for axis in (left, right):
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


if __name__ == "__main__":
    run_main(main)
