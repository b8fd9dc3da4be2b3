"""How AP falls as labels of the training set are made wrong: one line for each loss.

    python scripts/noise.py results/noise --output docs/noise.png

The folder holds one folder of result files (scripts/ablate.py) for each share of wrong labels, named by the share in
percent: results/noise/0, 10, 20. The validation set is clean. Prints the table, and draws it with the standard
deviation over seeds.
"""

import argparse
import statistics
import sys
from pathlib import Path

# Started as a file, Python puts scripts/ on the path and not the repository that holds `detector`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")  # files only: no window, wherever this runs

from matplotlib import pyplot as plt

from detector.errors import UserError, run_main
from scripts import compare

Curve = dict[int, list[float]]  # share of wrong labels in percent -> AP of each seed, in percent


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=Path("noise.png"), metavar="FILE")
    args = parser.parse_args(argv)
    curves = read(args.folder)
    shares = sorted({share for curve in curves.values() for share in curve})
    print("| run | " + " | ".join(f"{share}%" for share in shares) + f" | lost at {shares[-1]}% |")
    print("| --- |" + " ---: |" * (len(shares) + 1))
    for name, curve in curves.items():
        cells = [told(curve[share]) if share in curve else "-" for share in shares]
        whole = {shares[0], shares[-1]} <= curve.keys()
        lost = "-"
        if whole:
            first, last = statistics.fmean(curve[shares[0]]), statistics.fmean(curve[shares[-1]])
            lost = f"{first - last:.1f} ({(first - last) / first:.0%})"
        print(f"| {name} | " + " | ".join(cells) + f" | {lost} |")
    try:
        draw(curves).savefig(args.output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {args.output}: cannot be written ({error})") from None
    print(f"written: {args.output}")


def read(folder: Path) -> dict[str, Curve]:
    """AP of each run's seeds, by name and share of wrong labels."""
    shares = sorted(int(path.name) for path in folder.glob("*") if path.is_dir() and path.name.isdigit())
    if not shares:
        raise UserError(f"{folder}: holds no folders named by a share in percent, such as 0, 10 and 20")
    curves: dict[str, Curve] = {}
    for share in shares:
        files = sorted(map(str, (folder / str(share)).glob("*.json")))
        if not files:
            raise UserError(f"{folder / str(share)}: no result files in it")
        for row in compare.read_rows(files):
            if row.runs:  # else all have failed
                curves.setdefault(row.name, {})[share] = [100 * run["metrics"]["AP"] for run in row.runs]
    return curves


def told(values: list[float]) -> str:
    spread = f"±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def draw(curves: dict[str, Curve]) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for name, curve in curves.items():
        means = [statistics.fmean(values) for values in curve.values()]
        spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in curve.values()]
        axis.errorbar(list(curve), means, spread, marker="o", capsize=3, label=name)
    axis.set(xlabel="training labels that are wrong, percent", ylabel="AP on clean labels, percent")
    axis.set_xticks(sorted({share for curve in curves.values() for share in curve}))
    axis.legend()
    return figure


if __name__ == "__main__":
    run_main(main)
