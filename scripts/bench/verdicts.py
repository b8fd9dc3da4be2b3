"""How often the verdicts of a comparison err, from simulated results with a known difference.

    python scripts/bench/verdicts.py [--results results/laptop_short results/cards ...] [--simulations 2000]

The variances of AP (seeds, images, and how differently seeds and losses react to images) are fitted to the runs in a
folder of results. Two more settings: "COCO-like" scales BCCD's image variances to 5,000 images, with a standard
deviation of 0.2 AP between runs. "own spreads" gives each simulated loss the seed variance of one loss of the folder,
drawn at random, so that the variances differ widely.

For each number of seeds, in percent:

    false           equal losses that are called better or worse by compare.py
    covered         intervals that contain the true difference (with one seed: over images only)
    sees            the difference in AP that 4 of 5 studies should detect, as compare.py prints it
    seen            how often it is detected
    family          studies of five equal losses and a baseline with any false verdict after the correction
    family, one t   the same with Holm's correction and one Satterthwaite t for seeds and images together
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

from detector.errors import UserError, run_main
from scripts.bench import measure
from scripts.comparison import verdict
from scripts.comparison.differences import runs_of
from scripts.comparison.rows import read_rows

RESULTS = ["results/laptop_short", "results/cards", "results/switches", "results/wrong_labels/40"]
SEEDS = (1, 2, 3, 5, 10)
FAMILY = 5  # comparisons with one baseline
LEGEND = """\
false: equal losses called different. covered: intervals that contain the true difference. sees, seen: the difference in
AP that 4 of 5 studies should detect, and how many do. family: any false verdict among five equal losses and a baseline.
Seeds and images have separate t values: with one t for both ("family, one t"), two seeds that agree by chance make the
variance look well known. The price is that two seeds detect only large differences. Verdicts use Hochberg's correction,
which has Holm's limits but starts from the largest p; it misses fewer differences if several rows differ.
"""
DRAWS = 100  # of images; results have 500, which takes five times as long here and changes nothing
COLUMNS = ("false", "covered", "sees", "seen", "family", "family, one t")
COCO_IMAGES, COCO_SPREAD = 5000, 0.2  # AP


class Setting(NamedTuple):
    """Variances of the AP of one run; the pure seed variance of each loss is drawn from `of_seeds`."""

    name: str
    known: verdict.Variances
    of_seeds: Sequence[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", nargs="+", default=RESULTS, metavar="FOLDER", help="results to fit the variances to"
    )
    parser.add_argument(
        "--simulations", type=int, default=2000, metavar="N", help="simulations for each number (default: 2000)"
    )
    args = parser.parse_args()
    if args.simulations < 1:
        raise UserError("--simulations: give at least 1")
    settings = [fit(folder) for folder in args.results]
    settings += [like_coco(settings[0]), own_spreads(args.results[min(1, len(args.results) - 1)])]
    lines, random = [], np.random.default_rng(0)
    for setting in settings:
        for seeds in SEEDS:
            numbers = simulate(setting, seeds, args.simulations, random)
            lines.append([setting.name, seeds, *numbers.values()])
            print(f"{setting.name}, {seeds} seeds: {numbers}", file=sys.stderr)
    error = 100 * (0.05 * 0.95 / args.simulations) ** 0.5
    print(f"{args.simulations:,} simulations of each number; 5% is known to +-{error:.1f} (one standard error)\n")
    print(LEGEND)
    print(measure.table(["variances as in", "seeds", *COLUMNS], lines))


def fit(folder: str) -> Setting:
    rows = _rows(folder)
    known = verdict.variances(rows)
    if known is None:
        raise UserError(f"{folder}: variances need two losses with two seeds each")
    return Setting(folder, known, [known.seed])


def like_coco(setting: Setting) -> Setting:
    known = setting.known
    share = known.images / COCO_IMAGES
    interaction = min(known.interaction * share, COCO_SPREAD**2)
    known = verdict.Variances(COCO_SPREAD**2 - interaction, known.image * share, interaction, COCO_IMAGES)
    return Setting("COCO-like", known, [known.seed])


def own_spreads(folder: str) -> Setting:
    setting = fit(folder)
    spreads = [max(float(row.aps.var(ddof=1)) - setting.known.interaction, 0.0) for row in _rows(folder)]
    return Setting(f"{folder}, own spreads", setting.known, spreads)


def _rows(folder: str) -> list[verdict.Runs]:
    files = sorted(map(str, Path(folder).glob("*.json")))
    if not files:
        raise UserError(f"{folder}: has no result files")
    try:
        return [runs_of(row, "AP") for row in read_rows(files) if len(row.runs) > 1]
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None


def simulate(setting: Setting, seeds: int, simulations: int, random: np.random.Generator) -> dict[str, str]:
    """The columns of the table."""
    gap = verdict.detectable(setting.known, seeds) if seeds > 1 else 0.0
    counts = dict.fromkeys(COLUMNS, 0)
    for _ in range(simulations):
        base, *others = draw(setting, seeds, 1 + FAMILY, random)
        estimates = [verdict.difference(row, base) for row in others]
        counts["covered"] += estimates[0].low <= 0 <= estimates[0].high
        if seeds > 1:
            ps = [estimate.p for estimate in estimates if estimate.p is not None]
            counts["false"] += ps[0] <= verdict.LEVEL
            counts["family"] += min(verdict.hochberg(ps)) <= verdict.LEVEL
            counts["family, one t"] += min(satterthwaite(row, base) for row in others) <= verdict.LEVEL / FAMILY
            better = others[0]._replace(aps=others[0].aps + gap, draws=others[0].draws + gap)
            p = verdict.difference(better, base).p
            counts["seen"] += p is not None and p <= verdict.LEVEL
    numbers = {name: f"{100 * count / simulations:.1f}" for name, count in counts.items()}
    numbers["sees"] = f"{gap:.1f}" if gap else "-"
    if seeds == 1:
        numbers |= dict.fromkeys(("false", "seen", "family", "family, one t"), "no verdict")
    return numbers


def draw(setting: Setting, seeds: int, rows: int, random: np.random.Generator) -> list[verdict.Runs]:
    """The runs of `rows` equal losses on one draw of images, without what all losses share, which cancels."""
    known = setting.known
    spread = np.sqrt(random.choice(setting.of_seeds, size=(rows, 1)) + known.interaction)
    aps = random.normal(0, known.image**0.5, (rows, 1)) + random.normal(0, 1, (rows, seeds)) * spread
    # The variance estimated from these images has the error of an estimate from so many images.
    trust = (random.chisquare(known.images - 1) / (known.images - 1)) ** 0.5
    of_loss = random.normal(0, known.image**0.5, (rows, 1, DRAWS))
    of_seed = random.normal(0, known.interaction**0.5, (rows, seeds, DRAWS))
    draws = aps[:, :, None] + trust * (of_loss + of_seed)
    return [verdict.Runs(*pair, known.images) for pair in zip(aps, draws)]


def satterthwaite(row: verdict.Runs, base: verdict.Runs) -> float:
    """p from one t for the sum of all variances."""
    of_images = (row.draws.mean(axis=0) - base.draws.mean(axis=0)).var(ddof=1)
    parts = np.array([*(side.aps.var(ddof=1) / len(side.aps) for side in (row, base)), of_images])
    df = parts.sum() ** 2 / (parts**2 / [len(row.aps) - 1, len(base.aps) - 1, row.images - 1]).sum()
    return 2 * special.stdtr(df, -abs(row.aps.mean() - base.aps.mean()) / parts.sum() ** 0.5)


if __name__ == "__main__":
    run_main(main)
