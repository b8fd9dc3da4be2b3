"""scripts/compare_conditions.py: the table has the means, each condition has verdicts, errors are one line."""

import math
import re

import numpy as np
from scipy import stats

from scripts import compare_conditions
from scripts.comparison import result

LOSSES = {"class_loss": {"name": "ce"}, "box_loss": {"name": "smooth_l1"}}


def write(folder, value, name, seed, ap, boxes=300, draws=None):
    content = {"config": {"run": f"{name}-s{seed}", "seed": seed, **LOSSES}, "variant": name, "seed": seed}
    metrics = {"AP": ap, "images": 100, "per_class": {"cell": {"boxes": boxes}}}
    draws = [ap - 0.001 * (draw % 2) for draw in range(500)] if draws is None else list(draws)
    content |= {"metrics": metrics, "resampled": {"AP": draws}}
    result.write(folder / str(value) / f"{name}-s{seed}.json", content)


def test_the_table_has_the_mean_of_each_condition_and_the_lost_ap(folder, command):
    for seed, shift in ((0, 0.0), (1, 0.01), (2, 0.02)):
        for share, ap in ((0, 0.5), (10, 0.45), (20, 0.3)):
            write(folder, share, "ce", seed, ap + shift)
        write(folder, 0, "focal", seed, 0.6)
    for share, ap in ((0, 0.5), (20, 0.3)):
        write(folder, share, "single", 0, ap)
    failed_result = {"config": {"run": "ghm", "seed": 0, **LOSSES}, "failure": "loss inf", "variant": "ghm", "seed": 0}
    result.write(folder / "0" / "ghm-s0.json", failed_result)
    code, out, err = command(compare_conditions.main, folder, "--output", folder / "plot.png")
    assert code == 0, err
    # By hand: Student's t for 4 degrees of freedom, 2.776 sqrt(1/3 + 1/3).
    assert "| ce | 51.0±1.0 | 46.0±1.0 | 31.0±1.0 | 20.0 [17.7, 22.3], 39% |" in out
    assert "| single | 50.0 | - | 30.0 | 20.0 [20.0, 20.0] over images only, 40% |" in out  # one seed
    assert "failed: ghm at 0, seed 0: loss inf" in err
    assert "| focal | 60.0±0.0 | - | - | - |" in out
    # At 0 the difference is 9. Only one row varies, so there are 2 degrees of freedom: 4.303 sqrt(1/3).
    assert "- focal at 0: +9.0 [+6.5, +11.5], p 0.004, better" in out
    assert "no verdict on the change of focal: it takes the same seeds, each with an AP, at 0 and at 20" in out
    assert "ghm" not in out
    assert (folder / "plot.png").stat().st_size > 5000


def test_a_row_with_one_seed_has_no_verdict_and_stops_nothing(folder, command):
    for value in (0, 20):
        for seed, shift in enumerate((-0.01, 0.0, 0.01)):
            write(folder, value, "ce", seed, 0.5 + shift)
            write(folder, value, "qfl", seed, 0.52 + shift * (1 + value))
        write(folder, value, "focal", 0, 0.55)
    code, out, err = command(compare_conditions.main, folder, "--output", folder / "plot.png")
    assert code == 0, err
    changes = out.partition("Change of AP")[2]
    assert "- focal: " in changes and "no verdict" in changes and "in the change of AP between two rows" in changes


def test_all_conditions_are_corrected_together(folder, command):
    for value, gain in ((3, 0.04), (70, 0.01)):
        for seed, shift in enumerate((-0.01, 0.0, 0.01)):
            write(folder, value, "ce", seed, 0.5 + shift)
            write(folder, value, "focal", seed, 0.5 + gain + shift)
    code, out, err = command(compare_conditions.main, folder, "--log", "--output", folder / "plot.png")
    assert code == 0, err
    # Welch's test without spread over images. Hochberg's factor is 2 for the smaller p and 1 for the larger.
    p = [2 * stats.t.sf(gap / (2 / 3) ** 0.5, 4) for gap in (4, 1)]
    assert "corrected for 2 comparisons" in out
    assert f"- focal at 3: +4.0 [+1.7, +6.3], p {2 * p[0]:.3f}, better" in out
    assert f"- focal at 70: +1.0 [-1.3, +3.3], p {p[1]:.2f}, undecided" in out


def test_luck_with_images_cancels_in_the_change_between_conditions(folder, command):
    luck = np.random.default_rng(0).normal(0, 0.05, 500)
    for seed, shift in enumerate((-0.01, 0.0, 0.01)):
        for value, ce, focal in ((0, 0.5, 0.5), (40, 0.3, 0.4)):
            write(folder, value, "ce", seed, ce + shift, draws=np.clip(ce + shift + luck, 0, 1))
            # The shift of a seed is the same in both conditions for ce, but has opposite signs for focal.
            write(folder, value, "focal", seed, focal - shift * (1 if value else -1), draws=np.clip(focal - luck, 0, 1))
    code, out, err = command(compare_conditions.main, folder, "--output", folder / "plot.png")
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("- focal: "))
    # Focal's seeds change by +2, 0 and -2 points more than its mean: 4.303 x 2 / sqrt(3) for 2 degrees of freedom.
    assert line == "- focal: +10.0 [+5.0, +15.0], p 0.013, better"
    assert "Change of AP from 0 to 40 minus that of ce" in out
    assert "in the change of AP between two rows" in out and "Detecting 1.0 takes" in out
    # In one condition the luck of the images counts.
    (interval,) = re.findall(r"- focal at 40: \+10.0 \[([-+.\d]+), ([-+.\d]+)\]", out)
    assert float(interval[1]) - float(interval[0]) > 30


def test_the_change_between_conditions_with_different_images_has_the_spread_of_all_four_rows(folder, command):
    for seed in range(3):
        for value, boxes, gain in ((70, 900, 0.1), (2000, 200, 0.15)):
            for name, ap in (("ce", 0.4), ("focal", 0.4 + gain)):
                write(folder, value, name, seed, ap + 0.01 * seed, draws=[ap] * 500, boxes=boxes)
    code, out, err = command(compare_conditions.main, folder, "--log", "--output", folder / "plot.png")
    assert code == 0, err
    assert "lost" not in out.split("\n\n")[0] and "Change of AP from 70 to 2000 minus that of ce" in out
    assert "- focal at 70: +10.0" in out and "- focal at 2000: +15.0" in out
    # Four rows with a deviation of 1 over 3 seeds each: t for 8 degrees of freedom times sqrt(4 / 3).
    reach, p = stats.t.ppf(0.975, 8) * math.sqrt(4 / 3), 2 * stats.t.sf(5 / math.sqrt(4 / 3), 8)
    assert out.splitlines()[-3] == f"- focal: +5.0 [{5 - reach:+.1f}, {5 + reach:+.1f}], p {p:.3f}, better"


def test_a_condition_that_is_still_tuned_is_left_out(folder, command):
    for value in (0, 20):
        for seed in range(2):
            write(folder, value, "ce", seed, 0.5)
    write(folder, 40, "tune-ce-1", 0, 0.4)
    (folder / "40" / "tune-ce-1-s0.json").rename(folder / "40" / "tune-ce-1.json")
    code, out, err = command(compare_conditions.main, folder, "--output", folder / "plot.png")
    assert code == 0 and "| run | 0 | 20 |" in out
    assert err == f"left out: {folder / '40'}: only tuning runs so far\n"


def test_results_in_a_folder_without_a_number_are_named(folder, command):
    for value in (0, 20, "40%"):
        write(folder, value, "ce", 0, 0.5)
    (folder / "notes").mkdir()
    code, _, err = command(compare_conditions.main, folder, "--output", folder / "plot.png")
    assert code == 0 and err == f"left out: {folder / '40%'}: its name is no number\n"


def test_runs_of_a_condition_that_differ_in_more_than_the_losses_are_named(folder, command):
    for value in (0, 10):
        for name in ("ce", "focal"):
            write(folder, value, name, 0, 0.5)
    file = folder / "10" / "focal-s0.json"
    content = result.read(file)
    content["config"]["solver"] = {"epochs": 99}
    result.write(file, content)
    code, _, err = command(compare_conditions.main, folder, "--output", folder / "plot.png")
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("warning: at 10 not a fair comparison, ce / focal differ in solver.epochs (12 / 99)")


def test_nothing_can_be_lost_from_an_ap_of_0(folder, command):
    for seed in range(2):
        for value in (0, 20):
            write(folder, value, "ce", seed, 0.0, draws=[0.0, 0.001] * 250)
    code, out, err = command(compare_conditions.main, folder, "--output", folder / "plot.png")
    assert code == 0, err
    assert re.search(r"^\| ce \| 0\.0±0\.0 \| 0\.0±0\.0 \| 0\.0 \[[^]]*\] \|$", out, re.M)


def test_errors_are_one_line(folder, command):
    for name in ("20", "20.0"):
        write(folder / "twice", name, "ce", 0, 0.5)
    (folder / "empty").mkdir()
    (folder / "10").mkdir()
    write(folder / "good", 0, "ce", 0, 0.5)
    write(folder / "good", 10, "ce", 0, 0.4)
    write(folder / "one", 0, "ce", 0, 0.5)
    for expected, arguments in {
        "has no folders": (folder / "empty",),
        "has no result files": (folder,),
        "another folder has the number 20 too": (folder / "twice",),
        "at least two conditions": (folder / "one",),
        "no place for the condition 0": (folder / "good", "--log"),
        "no such row; the rows are ce": (folder / "good", "--baseline", "focal"),
        "cannot be written": (folder / "good", "--output", "/dev/null/x.png"),
    }.items():
        code, _, err = command(compare_conditions.main, *arguments)
        assert code == 2 and expected in err and err.startswith("error: ") and err.count("\n") == 1
