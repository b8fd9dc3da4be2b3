"""Compare losses under label noise: how AP falls with the share of wrong training labels, one line for each loss.

    python scripts/compare_label_noise.py results/noise --output docs/noise.png

FOLDER holds a folder of result files (scripts/ablate.py) for each share, named by the share in percent:
results/noise/0, 10, 20. The validation set is clean. Prints the mean and standard deviation over seeds, and the loss of
AP from the first share to the last, with its 95% interval (scripts/comparison/verdict.py) and as a part of the AP at
the first share. The plot shows mean and standard deviation.
"""

import argparse
import statistics
import sys
from pathlib import Path

from matplotlib import pyplot as plt

from detector.errors import UserError, run_main
from scripts.comparison import page
from scripts.comparison.differences import differences, known_value
from scripts.comparison.rows import Row, read_rows

Curve = dict[int, Row]  # by the share of wrong labels in percent


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=Path("noise.png"), metavar="FILE")
    args = parser.parse_args(argv)
    curves = read(args.folder)
    shares = sorted({share for curve in curves.values() for share in curve})
    if len(shares) < 2:
        raise UserError(f"{args.folder}: needs folders of at least two shares, and has {shares or 'none'}")
    try:
        page.save(draw(curves), args.output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {args.output}: cannot be written ({error})") from None
    print("| run | " + " | ".join(f"{share}%" for share in shares) + f" | lost at {shares[-1]}% |")
    print("| --- |" + " ---: |" * (len(shares) + 1))
    for name, curve in curves.items():
        cells = [mean_and_spread(aps(curve[share])) if share in curve else "-" for share in shares]
        lost = loss_of_ap(curve[shares[0]], curve[shares[-1]]) if {shares[0], shares[-1]} <= curve.keys() else "-"
        print(f"| {name} | " + " | ".join(cells) + f" | {lost} |")
    print(f"written: {args.output}")


def read(folder: Path) -> dict[str, Curve]:
    """The rows by name and share of wrong labels, without rows that have no AP."""
    shares = sorted(int(path.name) for path in folder.glob("*") if path.is_dir() and path.name.isdigit())
    if not shares:
        raise UserError(f"{folder}: has no folders named by a share in percent, such as 0, 10 and 20")
    curves: dict[str, Curve] = {}
    for share in shares:
        files = sorted(map(str, (folder / str(share)).glob("*.json")))
        if not files:
            raise UserError(f"{folder / str(share)}: has no result files")
        for row in read_rows(files):
            for failure in row.failures:
                print(f"failed: {row.name} at {share}%, {failure}", file=sys.stderr)
            if aps(row):  # else all have failed
                curves.setdefault(row.name, {})[share] = row
    return curves


def aps(row: Row) -> list[float]:
    """AP of each seed, in percent."""
    return [known for run in row.runs if (known := known_value(run, "AP")) is not None]


def loss_of_ap(first: Row, last: Row) -> str:
    (result,) = differences([first._replace(name="first"), last._replace(name="last")])
    if result.low is None:
        return f"{-result.mean:.1f}, no interval"
    images_only = " over images only" if result.p is None else ""  # one seed
    interval = f"[{-result.high:.1f}, {-result.low:.1f}]{images_only}"
    return f"{-result.mean:.1f} {interval}, {-result.mean / statistics.fmean(aps(first)):.0%}"


def mean_and_spread(values: list[float]) -> str:
    spread = f"±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def draw(curves: dict[str, Curve]) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for name, curve in curves.items():
        values = [aps(row) for row in curve.values()]
        means = [statistics.fmean(of_seeds) for of_seeds in values]
        spread = [statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0 for of_seeds in values]
        axis.errorbar(list(curve), means, spread, marker="o", capsize=3, label=page.label(name))
    axis.set(xlabel="wrong training labels, percent", ylabel="AP on clean labels, percent")
    axis.set_xticks(sorted({share for curve in curves.values() for share in curve}))
    axis.legend()
    return figure


if __name__ == "__main__":
    run_main(main)
