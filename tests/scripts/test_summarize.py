"""scripts/summarize.py: the table is sorted, its verdicts are compare.py's, and errors are one line."""

import pytest

from scripts import summarize
from scripts.comparison import result
from scripts.comparison.rows import gradient_shares, read_rows

LOSSES = {"class_loss": {"name": "ce"}, "box_loss": {"name": "smooth_l1"}}
SHARES = ({"step": 200, "class_easy": 0.2, "class_medium": 0.5, "class_outlier": 0.3}, {"step": 400, "box_easy": 0.1})


def write(folder, name, seed, ap, **changes):
    content = {"config": {"run": f"{name}-s{seed}", "seed": seed, **LOSSES}, "variant": name, "seed": seed}
    content |= {"metrics": {"AP": ap, "AP50": 0.9, "images": 100}, "gradient": list(SHARES)}
    content["resampled"] = {"AP": [ap - 0.001 * (draw % 2) for draw in range(500)]}
    path = folder / f"{name}-s{seed}.json"
    result.write(path, content | changes)
    return path


@pytest.fixture
def files(folder):
    """Three seeds a row; `focal` beats `ce` by far, `twin` equals it, one seed of `focal` has no AP50."""
    paths = [write(folder, name, seed, ap + 0.01 * seed) for name, ap in (("ce", 0.5), ("twin", 0.5), ("focal", 0.7))
            for seed in range(3)]  # fmt: skip
    write(folder, "focal", 1, 0.71, metrics={"AP": 0.71, "images": 100})
    return paths


def test_rows_are_sorted_best_first_and_have_verdicts(files, folder, command):
    code, out, err = command(summarize.main, *files, "--baseline", "ce", "--output", folder / "plot.png")
    assert code == 0, err
    # By hand: Student's t for 4 degrees of freedom, 2.776 sqrt(1/3 + 1/3).
    assert out.splitlines()[:5] == [
        "| run | AP | AP50 | AP75 | against ce |",
        "| --- | ---: | ---: | ---: | --- |",
        "| focal | 71.0±1.0 | 90.0±0.0 | - | better: +20.0 [+17.7, +22.3] |",
        "| ce | 51.0±1.0 | 90.0±0.0 | - | baseline |",
        "| twin | 51.0±1.0 | 90.0±0.0 | - | undecided: +0.0 [-2.3, +2.3] |",
    ]
    assert (folder / "plot.png").stat().st_size > 5000


def test_an_interval_without_seeds_says_so(files, folder, command):
    single = write(folder, "single", 0, 0.6)
    code, out, _ = command(summarize.main, *files, single, "--baseline", "ce", "--output", folder / "plot.png")
    assert code == 0 and "| single | 60.0 | 90.0 | - | no verdict: +9.0 [+9.0, +9.0] over images only |" in out


def test_the_legend_has_the_verdicts_of_the_rows_alone(files):
    rows = read_rows(list(map(str, files)))
    baseline = next(row for row in rows if row.name == "ce")
    figure = summarize.draw(rows, baseline, {d.name: d for d in summarize.differences(rows, "ce")})
    legend = figure.axes[0].get_legend()
    shown = {text.get_text(): dot.get_color() for text, dot in zip(legend.get_texts(), legend.get_lines())}
    assert shown == {key: summarize.VERDICT_COLOURS[key] for key in ("better", "undecided", "baseline")}


def test_a_failed_row_is_named_and_left_out(files, folder, command):
    failed_result = {"config": {"run": "ghm", "seed": 0, **LOSSES}, "failure": "loss inf", "variant": "ghm", "seed": 0}
    result.write(folder / "ghm.json", failed_result)
    code, out, err = command(summarize.main, *files, folder / "ghm.json", "--output", folder / "plot.png")
    assert code == 0 and "failed: ghm, seed 0: loss inf" in err and "ghm" not in out
    code, _, err = command(summarize.main, *files, folder / "ghm.json", "--baseline", "ghm")
    assert code == 2 and err.splitlines()[-1].startswith("error: ghm: no run of it has an AP")


def test_shares_are_the_mean_of_the_observed_ones(folder):
    write(folder, "ce", 0, 0.5)
    second = {"step": 200, "class_easy": 0.4, "class_medium": 0.5, "class_outlier": 0.1}
    write(folder, "ce", 1, 0.5, gradient=[second])
    write(folder, "none", 0, 0.5, gradient=[])
    by_name = {row.name: row for row in read_rows(sorted(map(str, folder.glob("*.json"))))}
    assert gradient_shares(by_name["ce"], "class") == pytest.approx({"easy": 0.3, "medium": 0.5, "outlier": 0.2})
    assert gradient_shares(by_name["none"], "class") is None


def test_runs_that_differ_in_more_than_the_losses_are_named(folder, command):
    paths = [write(folder, name, 0, 0.5, annotations={"data.train": digest}) for name, digest in zip("ab", "12")]
    code, _, err = command(summarize.main, *paths, "--output", folder / "plot.png")
    assert code == 0 and 'warning: not a fair comparison, a / b differ in SHA-256 of data.train ("1" / "2")' in err


def test_one_seed_gets_no_verdict(folder, command):
    files = [write(folder, "ce", 0, 0.5), write(folder, "focal", 0, 0.7)]
    code, out, err = command(summarize.main, *files, "--output", folder / "plot.png")
    assert code == 0 and "no verdict: +20.0" in out, err


def test_errors_are_one_line(files, command):
    for expected, arguments in {
        "no such row": (*files, "--baseline", "ghm"),
        "cannot be written": (*files, "--output", "/dev/null/x.png"),
        "no such file": ("nothing.json",),
    }.items():
        code, _, err = command(summarize.main, *arguments)
        assert code == 2 and expected in err and err.startswith("error: ") and err.count("\n") == 1
