"""scripts/compare.py: its tables, marks, verdicts and warnings, and the runs that it refuses."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from detector.errors import UserError
from scripts.compare import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare.py"


def make_run(folder: Path, name: str, *, config: dict | None = None, **metrics) -> str:
    path = folder / name
    path.mkdir()
    content = {
        "run": name,
        "output": f"runs/{name}",
        "class_loss": {"name": name, "weight": 1.0},
        "box_loss": {"name": "smooth_l1", "beta": 0.11},
        "seed": 0,
        "solver": {"lr": 0.01, "epochs": 12},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(content | (config or {})))
    values = {key: 0.25 for key in ("AP", "AP50", "AP75", "AP80", "AP90", "APs", "APm", "APl")}
    values |= {"step": 100, "epoch": 12, "images": 50, "engine": "pycocotools 2.0"}
    (path / "metrics.json").write_text(json.dumps(values | {"seconds_per_step": 0.1234} | metrics))
    return str(path)


@pytest.fixture
def two(tmp_path):
    return [
        make_run(tmp_path, "focal", AP=0.3576, AP50=0.55, APs=-1, APm=0.4, AP90=None),
        make_run(tmp_path, "ghm_c", AP=0.3584, AP50=0.54, APs=-1, APm=-1, AP90=0.1, seconds_per_step=None),
    ]


def test_an_option_of_older_versions_is_no_difference(tmp_path, capsys):
    main([make_run(tmp_path, "focal", config={"compile": False}), make_run(tmp_path, "ghm_c")])
    assert "compile" not in capsys.readouterr().out


NO_COSTS = (
    "- s/step and GB are not shown: the results do not say whether each run had the machine to itself; "
    "scripts/ablate.py --time measures the losses in turn"
)
NO_TUNING = "- no row was tuned, so the weights may favour some losses (scripts/ablate.py --tune)"
NO_DRAWS = "- ghm_c: +0.1; no verdict: AP of ghm_c on resampled images is not known"


def test_terminal_table(two, capsys):
    main(two)
    assert capsys.readouterr().out.splitlines() == [
        "run    class loss  box loss     AP  AP50  AP75  AP80  AP90  APs   APm   APl  ECE  s/step  GB",
        "focal  focal       smooth_l1  35.8  55.0  25.0  25.0     -    -  40.0  25.0    -       -   -",
        "ghm_c  ghm_c       smooth_l1  35.8  54.0  25.0  25.0  10.0    -     -  25.0    -       -   -",
        "",
        "AP minus that of focal, with its 95% interval:",
        "",
        NO_DRAWS,
        "",
        NO_COSTS,
        NO_TUNING,
    ]


def test_markdown_table(two, tmp_path):
    main([*two, "--markdown", str(tmp_path / "table.md")])
    assert (tmp_path / "table.md").read_text().splitlines() == [
        "| run | class loss | box loss | AP | AP50 | AP75 | AP80 | AP90 | APs | APm | APl | ECE | s/step | GB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| focal | focal | smooth_l1 | 35.8 | 55.0 | 25.0 | 25.0 | - | - | 40.0 | 25.0 | - | - | - |",
        "| ghm_c | ghm_c | smooth_l1 | 35.8 | 54.0 | 25.0 | 25.0 | 10.0 | - | - | 25.0 | - | - | - |",
        "",
        "AP minus that of focal, with its 95% interval:",
        "",
        NO_DRAWS,
        "",
        NO_COSTS,
        NO_TUNING,
    ]


LUCK = np.random.default_rng(0).normal(0, 0.05, (2, 500))  # on each draw of images: for all rows, and for one row


def kept(folder: Path, variant: str, seed: int, ap: float, luck: float = 0, **changes) -> str:
    """Writes a result file. The draws of its AP have the luck that all rows share, plus `luck` times other luck."""
    config = {"run": f"{variant}-s{seed}", "seed": seed, "class_loss": {"name": variant}, "box_loss": {"name": "l1"}}
    metrics = {"AP": ap, "images": 50, "seconds_per_step": 0.25, "peak_memory": 2e9}
    draws = (ap + LUCK[0] + luck * LUCK[1]).tolist()
    content = {"config": config, "metrics": metrics, "resampled": {"AP": draws}, "variant": variant} | changes
    path = folder / f"{variant}-{seed}.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_seeds_of_a_row_with_other_losses_are_named(tmp_path, capsys):
    other = {"run": "ce-s1", "seed": 1, "class_loss": {"name": "ce", "weight": 50}, "box_loss": {"name": "l1"}}
    main([kept(tmp_path, "ce", 0, 0.3), kept(tmp_path, "ce", 1, 0.3, config=other), kept(tmp_path, "ce", 2, 0.3)])
    assert "- warning: not a fair comparison, the seeds of ce differ in class_loss.weight" in capsys.readouterr().out


def test_seeds_of_a_variant_are_one_row(tmp_path, capsys):
    main([kept(tmp_path, "ce", seed, ap) for seed, ap in enumerate((0.30, 0.32, 0.34))])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ce")]
    assert line.split()[3] == "32.0±2.0"


@pytest.mark.parametrize(
    "aps, verdict",
    [((0.36, 0.37, 0.38), "+5.0 [+2.7, +7.3], p 0.004, better"), ((0.26, 0.27, 0.28), "-5.0 [-7.3, -2.7], p 0.004, "),
     ((0.33, 0.34, 0.35), "+2.0 [-0.3, +4.3], p 0.070, undecided")],
)  # fmt: skip
def test_a_row_is_better_or_worse_only_if_the_interval_excludes_zero(tmp_path, capsys, aps, verdict):
    """By hand: standard deviations of 1, so +-2.776 sqrt(1/3 + 1/3), Student's t for 4 degrees of freedom."""
    base = [kept(tmp_path, "ce", seed, ap) for seed, ap in enumerate((0.31, 0.32, 0.33))]
    main([*base, *(kept(tmp_path, "focal", seed, ap) for seed, ap in enumerate(aps))])
    assert f"- focal: {verdict}" in capsys.readouterr().out


def test_verdicts_are_corrected_for_the_number_of_rows(tmp_path, capsys):
    runs = {"ce": (0.31, 0.32, 0.33), "a": (0.345, 0.355, 0.365), "b": (0.31, 0.32, 0.34), "c": (0.30, 0.32, 0.33)}
    files = {name: [kept(tmp_path, name, seed, ap) for seed, ap in enumerate(aps)] for name, aps in runs.items()}
    main([*files["ce"], *files["a"]])
    assert "- a: +3.5 [+1.2, +5.8], p 0.013, better" in capsys.readouterr().out
    main([path for row_files in files.values() for path in row_files])
    out = capsys.readouterr().out
    assert "- a: +3.5 [+1.2, +5.8], p 0.038, better" in out  # three times as much
    assert "p and verdict are corrected for 3 comparisons" in out


def test_single_runs_get_advice_instead_of_a_verdict(tmp_path, capsys):
    runs = {"ce": 0.3, "focal": 0.5, "ghm_c": 0.25}
    main([kept(tmp_path, name, 0, ap, luck=place / 10) for place, (name, ap) in enumerate(runs.items())])
    out = capsys.readouterr().out
    assert not re.search("better|worse|undecided", out)
    assert "- focal: +20.0 [+19.1, +20.9] over images only; no verdict: ce has one seed; train" in out
    assert out.count("train at least 3 (--seeds 3)") == 2 and "4 of 5 studies" not in out


def test_a_row_of_one_seed_is_named(tmp_path, capsys):
    main([*(kept(tmp_path, "ce", seed, 0.3 + seed / 100) for seed in range(3)), kept(tmp_path, "focal", 0, 0.5)])
    assert "no verdict: focal has one seed" in capsys.readouterr().out


def test_rows_scored_on_different_images_get_no_verdict(tmp_path, capsys):
    files = [kept(tmp_path, "ce", seed, 0.3 + seed / 100) for seed in range(2)]
    other_metrics = {"AP": 0.5, "images": 60}
    files += [kept(tmp_path, "focal", seed, 0.5 + seed / 100, metrics=other_metrics) for seed in range(2)]
    main(files)
    assert "- focal: +19.5; no verdict: focal and ce were scored on different images" in capsys.readouterr().out


def test_another_metric_is_judged_by_its_own_draws(tmp_path, capsys):
    for name, ap90 in (("ce", 0.3), ("focal", 0.5)):
        for seed in range(3):
            values = {"AP": 0.4, "AP90": ap90 + seed / 100, "images": 50}
            draws = {metric: (value + LUCK[0]).tolist() for metric, value in values.items() if metric != "images"}
            kept(tmp_path, name, seed, 0.4, metrics=values, resampled=draws)
    main([*map(str, sorted(tmp_path.glob("*.json"))), "--metric", "AP90"])
    out = capsys.readouterr().out
    assert "AP90 minus that of ce" in out and "- focal: +20.0 [+17.7, +22.3], p < 0.001, better" in out
    assert re.search(r"^focal .* 40\.0±0\.0  .* 51\.0±1\.0\* ", out, re.M)  # marked there, and not in AP


def test_the_best_row_is_marked_only_if_it_beats_every_other_beyond_chance(tmp_path, capsys):
    def marked(**rows):
        main([kept(tmp_path, name, seed, ap) for name, aps in rows.items() for seed, ap in enumerate(aps)])
        return re.findall(r"^(\w+) .*\*", capsys.readouterr().out, re.M)

    low_aps, high_aps = (0.30, 0.31, 0.32), (0.40, 0.41, 0.42)
    assert marked(ce=low_aps, focal=high_aps) == ["focal"] and marked(focal=high_aps, ce=low_aps) == ["focal"]
    assert marked(ce=low_aps, focal=high_aps, ghm_c=(0.41, 0.42, 0.43)) == []
    assert marked(ce=low_aps, focal=(0.1, 0.9, 0.5)) == []
    assert marked(ce=low_aps, focal=high_aps[:1]) == []


def test_the_detectable_difference_is_reported(tmp_path, capsys):
    files = [kept(tmp_path, name, seed, 0.3 + seed / 100) for name in ("ce", "focal") for seed in range(3)]
    main(files)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("With 3 seeds a row"))
    # Standard deviation 1, no luck with images: the usual 17 seeds for 1 point, by t tests of two groups.
    assert "these 50 images" in line and "Detecting 1.0 takes 17 seeds a row." in line
    assert re.search(r"4 of 5 studies detect a difference of 3\.\d AP between two rows, at", line)
    main([*files, *(kept(tmp_path, "qfl", seed, 0.3 + seed / 100) for seed in range(3))])
    # Two comparisons: each at 2.5%. For this, t tests of two groups take (2.24 + 0.84)^2 x 2 = 19, and 2 more for t.
    assert "Detecting 1.0 takes 17 seeds a row (21 if only one row differs)." in capsys.readouterr().out


def test_memory_is_shown_only_for_runs_that_had_the_machine_to_themselves(tmp_path, capsys):
    here, there = {"machine": {"device": "2 cores"}}, {"machine": {"device": "4 cores"}}

    def shown(*files):
        main(files)
        return capsys.readouterr().out

    out = shown(kept(tmp_path, "ce", 0, 0.3, jobs=1, **here), kept(tmp_path, "focal", 0, 0.3, jobs=1, **here))
    assert out.count("   -  2.00") == 2 and "s/step is not shown; scripts/ablate.py --time" in out
    out = shown(kept(tmp_path, "ce", 0, 0.3, jobs=1, **here), kept(tmp_path, "focal", 0, 0.3, jobs=1, **there))
    assert "2.00" not in out and "s/step and GB are not shown: the runs are from different machines" in out
    out = shown(kept(tmp_path, "ce", 0, 0.3, jobs=1, **here), kept(tmp_path, "focal", 0, 0.3, jobs=2, **here))
    assert "2.00" not in out and "not shown: runs shared the machine (--jobs 2)" in out


def test_seconds_measured_in_turn_are_shown_even_if_the_runs_shared_a_machine(tmp_path, capsys):
    timing = {"seconds": 0.125, "steps": 20, "started": "2026-01-01T00:00:00", "machine": "m"}
    files = [kept(tmp_path, name, 0, 0.3, jobs=2, timing=timing) for name in ("ce", "focal")]
    main(files)
    out = capsys.readouterr().out
    assert out.count(" 0.125   -") == 2
    assert "s/step: the losses took turns in one process, median of 20 steps. GB is not shown: runs shared" in out
    kept(tmp_path, "focal", 0, 0.3, jobs=2, timing=timing | {"started": "2026-01-02T00:00:00"})
    main(files)
    assert "0.125" not in capsys.readouterr().out  # not measured in the same process as the other


def test_any_row_can_be_the_baseline(tmp_path, capsys):
    runs = [kept(tmp_path, name, 0, ap) for name, ap in (("ce", 0.3), ("focal", 0.4))]
    main([*runs, "--baseline", "focal"])
    assert "AP minus that of focal" in (out := capsys.readouterr().out) and "- ce: -10.0 " in out
    with pytest.raises(UserError, match="--baseline ghm: no such row; the rows are ce, focal"):
        main([*runs, "--baseline", "ghm"])


def test_a_missing_seed_causes_a_warning(tmp_path, capsys):
    main([kept(tmp_path, "ce", 0, 0.3), kept(tmp_path, "ce", 1, 0.3), kept(tmp_path, "focal", 0, 0.3)])
    assert (
        "not a fair comparison, ce seed 0, ce seed 1 / focal differ in seeds ([0, 1] / [0])" in capsys.readouterr().out
    )


def test_a_run_that_failed_is_a_row_with_its_reason(tmp_path, capsys):
    failed_file = kept(tmp_path, "ce", 0, 0.3)
    content = json.loads(Path(failed_file).read_text())
    Path(failed_file).write_text(json.dumps({"config": content["config"], "variant": "ce", "failure": "loss = nan"}))
    main([failed_file, kept(tmp_path, "focal", 0, 0.3), "--csv", str(tmp_path / "runs.csv")])
    out = capsys.readouterr().out
    assert "- failed: ce, seed 0: loss = nan" in out and out.splitlines()[1].endswith("failed")
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    assert any(line.startswith("focal,0,focal,l1,30.0") for line in lines[1:])
    assert any(line.startswith("ce,0,") and line.endswith("loss = nan") for line in lines)


def test_tuning_trials_are_left_out(tmp_path, capsys):
    main([kept(tmp_path, "ce", 0, 0.3), kept(tmp_path, "ce", 1, 0.9, tried="x2")])
    assert " 30.0 " in capsys.readouterr().out


def test_runs_that_differ_only_in_the_losses_cause_no_warning(two, capsys):
    main(two)
    assert "warning" not in capsys.readouterr().out


def test_every_other_difference_causes_a_warning(tmp_path, capsys):
    runs = [
        make_run(tmp_path, "a"),
        make_run(tmp_path, "b", config={"solver": {"lr": 0.02, "epochs": 12}, "seed": 1}),
        make_run(tmp_path, "c", config={"crop": True}, epoch=3),
    ]
    main([*runs, "--markdown", str(tmp_path / "table.md")])
    out = capsys.readouterr().out.splitlines()
    warnings = [
        "- warning: not a fair comparison, a, c / b differ in solver.lr (0.01 / 0.02), seeds ([0] / [1])",
        "- warning: not a fair comparison, a, b / c differ in metrics.epoch (12 / 3), crop (absent / true)",
    ]
    for lines in (out, (tmp_path / "table.md").read_text().splitlines()):  # below the table, above the verdicts
        place = lines.index(warnings[0])
        assert lines[place - 1 : place + 4] == ["", *warnings, "", "AP minus that of a, with its 95% interval:"]
        assert sum("warning" in line for line in lines) == 2


def test_steps_that_follow_from_the_epochs_cause_no_warning_of_their_own(tmp_path, capsys):
    longer = {"solver": {"lr": 0.01, "epochs": 24}}
    main([make_run(tmp_path, "a"), make_run(tmp_path, "b", config=longer, epoch=24, step=200)])
    assert "a / b differ in solver.epochs (12 / 24)\n" in (out := capsys.readouterr().out) and "metrics." not in out


def test_a_folder_of_results_stands_for_its_files(tmp_path, capsys):
    (tmp_path / "out" / "results").mkdir(parents=True)
    (tmp_path / "out" / "tune_train.json").write_text("{}")  # no result
    files = [kept(tmp_path / "out" / "results", name, 0, ap) for name, ap in (("ce", 0.3), ("focal", 0.4))]
    main(files)
    expected = capsys.readouterr().out
    for folder in (tmp_path / "out", tmp_path / "out" / "results"):
        main([str(folder)])
        assert capsys.readouterr().out == expected
    (tmp_path / "published.yaml").touch()
    with pytest.raises(UserError, match=r"published\.yaml: not a result file \(\.json\); give"):
        main([*files, str(tmp_path / "published.yaml")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/config\.yaml: no such file; this is not a run folder"):
        main([str(tmp_path / "empty")])


def test_runs_of_other_annotations_under_the_same_path_cause_a_warning(tmp_path, capsys):
    runs = [kept(tmp_path, name, 0, 0.3, annotations={"data.train": digest}) for name, digest in zip("ab", "12")]
    main(runs)
    assert 'a / b differ in SHA-256 of data.train ("1" / "2")' in capsys.readouterr().out


def test_each_line_of_the_csv_has_the_verdict_of_its_row(tmp_path):
    files = [
        kept(tmp_path, name, seed, ap + seed / 100) for name, ap in (("ce", 0.3), ("focal", 0.5)) for seed in (0, 1)
    ]
    main([*files, "--csv", str(tmp_path / "runs.csv")])
    with (tmp_path / "runs.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["variant"] for line in lines] == ["ce", "ce", "focal", "focal"]
    assert [line["verdict"] for line in lines] == ["", "", "better", "better"]
    assert all(line["difference"] == "" for line in lines[:2]) and float(lines[2]["difference"]) == pytest.approx(20)
    assert float(lines[3]["low"]) < 20 < float(lines[3]["high"]) and float(lines[3]["p, corrected"]) < 0.05


def test_runs_of_one_name_are_distinguished_by_folder(tmp_path, capsys):
    runs = [make_run(tmp_path, name, config={"run": "ghm_c"}) for name in ("seed0", "seed1")]
    main(runs)
    out = capsys.readouterr().out
    assert all(f"ghm_c ({run})" in out for run in runs)


def test_a_single_run_is_not_marked_as_best(tmp_path, capsys):
    main([make_run(tmp_path, "focal")])
    assert "*" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("metrics.json", None, r"focal/metrics.json: no such file; this run has not been evaluated"),
        ("config.yaml", None, r"focal/config.yaml: no such file; this is not a run folder"),
        ("metrics.json", "{", r"focal/metrics.json: broken"),
        ("metrics.json", "[1]", r"focal/metrics.json: broken: expected a dict, found a list"),
        ("config.yaml", "a: [1\nb: {", r"focal/config.yaml: broken"),
        ("config.yaml", "a: !!python/object:os.system {}", r"focal/config.yaml: broken"),
        ("config.yaml", b"\xff\xfe\xff", r"focal/config.yaml: broken"),
        ("config.yaml", "class_loss: focal", r"focal/config.yaml: no class_loss.name"),
    ],
)
def test_a_bad_run_folder_is_one_line(tmp_path, file, content, message):
    run = Path(make_run(tmp_path, "focal"))
    (run / file).unlink()
    if content is not None:
        (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        main([str(run)])
    assert "\n" not in str(error.value)


def test_an_unwritable_output_is_refused(two, tmp_path):
    with pytest.raises(UserError, match="--markdown"):
        main([*two, "--markdown", str(tmp_path / "none" / "table.md")])


@pytest.mark.usefixtures("warm_starts")
def test_the_program_runs_from_any_folder(two, tmp_path):
    def start(*arguments):
        command = [sys.executable, SCRIPT, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    success, failure, help_text = start(*two), start("nowhere"), start("--help")
    assert success.returncode == 0 and "ghm_c" in success.stdout and success.stderr == ""
    assert (failure.returncode, failure.stdout) == (2, "")
    assert failure.stderr == "error: nowhere: no such file or folder; give run folders or result files\n"
    assert help_text.returncode == 0 and "python scripts/compare.py runs/ce" in help_text.stdout


def test_a_seed_given_twice_is_refused(tmp_path):
    """Otherwise two equal numbers would look like seeds that agree."""
    first = kept(tmp_path, "ce", 0, 0.3)
    (tmp_path / "copy").mkdir()
    second = kept(tmp_path / "copy", "ce", 0, 0.3)
    with pytest.raises(UserError, match=r"copy/ce-0\.json: is seed 0 of ce, like .*ce-0\.json; give each run once"):
        main([first, second])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"metrics": {"AP": -1, "images": 50}}, "AP of focal is not known for each run"),
        ({"metrics": {"AP": None, "images": 50}}, "AP of focal is not known for each run"),
        ({"metrics": {"AP": float("nan"), "images": 50}}, "AP of focal is not known for each run"),
        ({"metrics": {"images": 50}}, "AP of focal is not known for each run"),
        ({"metrics": {"AP": 0.3, "images": 1}}, "focal was not scored on several images"),
        ({"metrics": {"AP": 0.3}}, "focal was not scored on several images"),
        ({"resampled": {"AP": [0.3, None]}}, "AP of focal is not known on each draw of images"),
        ({"resampled": {"AP": [0.3, -1]}}, "AP of focal is not known on each draw of images"),
        ({"resampled": {"AP": [0.3]}}, "AP of focal is not known on each draw of images"),
        ({"resampled": {}}, "AP of focal on resampled images is not known"),
    ],
)
def test_unknown_values_allow_no_verdict(tmp_path, capsys, change, reason):
    files = [kept(tmp_path, "ce", seed, 0.3 + seed / 100) for seed in range(3)]
    files += [kept(tmp_path, "focal", seed, 0.5, **change) for seed in range(3)]
    main([*files, "--html", str(tmp_path / "page.html"), "--csv", str(tmp_path / "runs.csv")])
    out = capsys.readouterr().out
    assert f"no verdict: {reason}" in out and "better" not in out and "studies" not in out


def test_sets_of_the_same_size_but_different_names_are_not_compared(tmp_path, capsys):
    files = []
    for name, file in (("ce", "a/val.json"), ("focal", "b/other.json")):
        for seed in range(2):
            path = Path(kept(tmp_path, name, seed, 0.3 + seed / 100))
            content = json.loads(path.read_text())
            content["config"]["data"] = {"val": {"annotations": file}}
            path.write_text(json.dumps(content))
            files.append(str(path))
    main(files)
    assert "no verdict: focal and ce were scored on different images" in capsys.readouterr().out


def test_failed_runs_and_tuned_values_at_an_end_of_their_range_are_reported(tmp_path, capsys):
    files = [kept(tmp_path, name, seed, ap) for name, ap in (("ce", 0.3), ("focal", 0.5)) for seed in range(3)]
    run = json.loads(Path(files[-1]).read_text())
    Path(files[-1]).write_text(json.dumps({"config": run["config"], "variant": "focal", "failure": "loss = nan"}))
    content = json.loads(Path(files[0]).read_text())
    search = {"keys": ["box_loss.weight"], "trials": [{"values": {}, "AP": 0.1}], "extended": []}
    search |= {"at_an_end": ["box_loss.weight"], "chosen": {"box_loss.weight": 9.5}}
    search |= {"range": {"box_loss.weight": [0.1, 10]}}
    Path(files[0]).write_text(json.dumps(content | {"tuning": search}))
    main(files)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("- focal: ")]
    assert line.endswith("; 1 of its runs failed")
    assert "- ce was tuned: box_loss.weight 9.5 (range 0.1 to 10, at an end of it), best trial 10.0 AP\n" in out
    assert "- ce: no trial reached two thirds of the runs' AP; longer trials (--tune-set) or cleaner labels" in out
    search["trials"].append({"values": {}, "AP": 0.201})  # of 0.3
    Path(files[0]).write_text(json.dumps(content | {"tuning": search}))
    main(files)
    assert "no trial reached" not in capsys.readouterr().out


def test_each_seed_of_a_row_may_have_tuned_weights_of_its_own(tmp_path, capsys):
    def tuned(variant, seed, weight, found, best=0.3):
        config = {"run": f"{variant}-s{seed}", "seed": seed, "class_loss": {"name": variant, "weight": weight}}
        search = {"keys": ["class_loss.weight"], "trials": [{"values": {"class_loss.weight": found}, "AP": best}]}
        search |= {"chosen": {"class_loss.weight": found}, "range": {"class_loss.weight": [0.1 * found, 10]}}
        search |= {"extended": [], "at_an_end": []}
        return kept(tmp_path, variant, seed, 0.3, config=config | {"box_loss": {"name": "l1"}}, tuning=search)

    each = [tuned("ce", seed, weight, weight) for seed, weight in enumerate((1, 2, 4))]
    main([*each, *(tuned("focal", seed, weight, weight) for seed, weight in enumerate((3, 3.1, 1)))])
    out = capsys.readouterr().out
    assert "- ce was tuned for each seed: class_loss.weight 1 / 2 / 4 (range 0.1 to 10), best trial 30.0 / 30.0" in out
    assert "not a fair comparison" not in out
    main([*each, *(tuned("focal", seed, 3, 3) for seed in range(3))])
    out = capsys.readouterr().out
    assert "- focal was tuned: class_loss.weight 3 (" in out and "1 trials for each seed" in out
    assert "- warning: not a fair comparison, ce seed 0, ce seed 1, ce seed 2 / focal seed 0" in out
    main([*each[:2], tuned("ce", 2, 4, 2), tuned("focal", 0, 1, 1)])  # 4 is not from a search of its own
    assert "not a fair comparison, the seeds of ce differ in class_loss.weight" in capsys.readouterr().out
    main([tuned("ce", 0, 1, 1, best=0.1), tuned("ce", 1, 2, 2, best=0.29)])  # 19.5 and 30 AP
    assert "no trial reached two thirds of the runs' AP" in capsys.readouterr().out


def test_rows_whose_ap_still_rises_are_named(tmp_path, capsys):
    def curve(*aps):
        return {"curve": [{"step": step, "AP": ap} for step, ap in enumerate(aps)]}

    files = [kept(tmp_path, "ce", seed, 0.3, **curve(0.1, 0.27 + seed / 100, 0.3)) for seed in range(2)]  # by 3 and 2
    files += [kept(tmp_path, "focal", 0, 0.3, **curve(0.1, 0.281, 0.3)), kept(tmp_path, "ghm_c", 0, 0.3, **curve(0.3))]
    files += [kept(tmp_path, "qfl", 0, 0.3, **curve(0.1, 0.3)), kept(tmp_path, "ohem", 0, 0.3, **curve(None, 0.3))]
    main(files)
    out = capsys.readouterr().out
    assert "\n- AP still rose between the last two evaluations (ce 2.5, qfl 20.0), so longer trainings may" in out
    main(files[:3])
    assert "\n- AP still rose between the last two evaluations (ce 2.5), so" in capsys.readouterr().out


def test_pairs_that_differ_are_listed_with_the_better_row_first(tmp_path, capsys):
    means = {"ce": 0.3, "focal": 0.5, "ghm_c": 0.301}
    files = [kept(tmp_path, name, seed, mean + 0.001 * seed) for name, mean in means.items() for seed in range(3)]
    main([*files, "--pairs"])
    lines = capsys.readouterr().out.partition("Of all 3 pairs of rows, corrected together, these differ in AP:")[2]
    pairs = [line.rpartition(":")[0] if ":" in line else line for line in lines.split("\n\n")[1].splitlines()]
    assert sorted(line.partition(":")[0] for line in pairs) == ["- focal over ce", "- focal over ghm_c"]
    assert re.search(r"- focal over ce: \+20\.0 \[\+1\d\.\d, \+2\d\.\d\], p ", lines)
    main([*[file for file in files if "focal" not in file], "--pairs"])
    assert "Of all" not in capsys.readouterr().out  # the table already shows the only pair


def test_runs_that_all_failed_are_listed(tmp_path, capsys):
    path = Path(kept(tmp_path, "ce", 0, 0.3))
    config = json.loads(path.read_text())["config"]
    path.write_text(json.dumps({"config": config, "variant": "ce", "failure": "loss = nan"}))
    main([str(path)])
    assert "- failed: ce, seed 0: loss = nan" in (out := capsys.readouterr().out) and "No verdict" not in out
    main([str(path), kept(tmp_path, "focal", 0, 0.3)])
    assert "all runs of ce failed; name another row by --baseline" in capsys.readouterr().out


def of_sets(folder, rows, gamma=2.0):
    """Writes result files of the rows {name: (mean AP in each of two sets, in percent)}, three seeds each."""
    files = []
    for place, (set_name, images) in enumerate((("cells", 50), ("cards", 70))):
        (folder / set_name).mkdir(exist_ok=True)
        for name, aps in rows.items():
            for seed in range(3) if aps[place] is not None else ():
                ap = (aps[place] + seed - 1) / 100
                metrics = {"AP": ap, "images": images, "per_class": {set_name: {"AP": ap}}}
                path = Path(kept(folder / set_name, name, seed, ap, metrics=metrics))
                content = json.loads(path.read_text())
                content["config"]["data"] = {"val": {"annotations": f"datasets/{set_name}/val.json"}}
                content["config"]["class_loss"]["gamma"] = gamma if place else 2.0
                path.write_text(json.dumps(content))
                files.append(str(path))
    return files


def test_runs_of_two_sets_get_a_table_each_and_a_verdict_on_both(tmp_path, capsys):
    files = of_sets(tmp_path, {"ce": (30, 50), "focal": (34, 52), "qfl": (30, None), "ghm_c": (28, 52)})
    main([*files, "--markdown", str(tmp_path / "sets.md"), "--csv", str(tmp_path / "runs.csv")])
    out = capsys.readouterr().out
    first, second, both = re.split(r"^datasets/cards/val.json, 70 images$|^All 2 sets$", out, flags=re.M)
    assert first.startswith("datasets/cells/val.json, 50 images\n") and "qfl" in first and "qfl" not in second
    assert "- focal: +4.0 [+1.7, +6.3]" in first and "- focal: +2.0 [-0.3, +4.3]" in second
    assert "AP minus that of ce, the mean over 2 sets, with its 95% interval; p and verdict are corrected for 2" in both
    # By hand: standard deviations of 1 in four rows of three seeds, 2.306 sqrt(4 / 3) / 2 for 8 degrees of freedom.
    assert "- focal: +3.0 [+1.7, +4.3], p 0.002, better; by set +4.0, +2.0" in both
    assert "- ghm_c: +0.0 [-1.3, +1.3], p 1.00, undecided; by set -2.0, +2.0" in both
    assert "do not have runs in each set: qfl." in both and "warning" not in both
    assert (tmp_path / "sets.md").read_text().count("\n## ") == 2
    with (tmp_path / "runs.csv").open(encoding="utf-8", newline="") as file:
        assert {line["set"] for line in csv.DictReader(file)} == {
            f"datasets/{s}" for s in ("cells/val.json, 50 images", "cards/val.json, 70 images")
        }


def test_sets_with_one_file_name_and_as_many_images_differ_by_their_boxes(tmp_path, capsys):
    files = []
    for file in of_sets(tmp_path, {"ce": (30, 50), "focal": (34, 52)}):
        content = json.loads(Path(file).read_text())
        boxes = {"cell": {"boxes": 100 if "cells" in file else 900}}
        content["metrics"] |= {"images": 50, "per_class": boxes}
        content["config"]["data"] = {"val": {"annotations": f"{Path(file).parent}/val.json"}}
        Path(file).write_text(json.dumps(content))
        files.append(file)
    main(files)
    assert "All 2 sets" in capsys.readouterr().out


@pytest.mark.parametrize(("digests", "sides"), [("12", (320, 640)), ("11", (320, 640)), ("12", (320, 320))])
def test_sets_that_look_alike_need_other_annotations_and_another_size_of_images(tmp_path, digests, sides, capsys):
    """Otherwise they may have the same images, and their differences are not independent."""
    files = of_sets(tmp_path, {"ce": (30, 50), "focal": (34, 52)})
    for file in files:
        place = "cards" in file
        content = json.loads(Path(file).read_text())
        content["metrics"] |= {"images": 50, "per_class": {"cell": {"boxes": 100}}}
        content["config"]["data"] = {"val": {"annotations": f"{place}/val.json"}, "short_side": sides[place]}
        content["annotations"] = {"data.val": digests[place]}
        Path(file).write_text(json.dumps(content))
    if len(set(digests)) == len(set(sides)) == 2:
        main(files)
        assert "All 2 sets" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="give each run once"):
            main(files)


def test_the_page_shows_each_set_and_the_verdict_on_both(tmp_path):
    main([*of_sets(tmp_path, {"ce": (30, 50), "focal": (34, 52)}), "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[:2] == ["All 2 sets", "datasets/cells/val.json, 50 images"]
    assert "datasets/cards/val.json, 70 images: Better, or chance?" in headings and "by set +4.0, +2.0" in page


def test_several_sets_must_share_the_baseline_and_the_losses(tmp_path, capsys):
    files = of_sets(tmp_path, {"ce": (30, 50), "focal": (34, None), "ghm_c": (None, 52)}, gamma=1.0)
    main(files)
    assert "No verdict: this takes ce and another row with runs in each set." in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"--baseline focal: not in datasets/cards/val\.json, 70 images; there the rows are"
    ):
        main([*files, "--baseline", "focal"])
    main(of_sets(tmp_path, {"ce": (30, 50), "focal": (34, 52)}, gamma=1.0))
    assert (
        "- warning: focal is not the same loss in each set, class_loss.gamma differs: 2.0 / 1.0"
        in capsys.readouterr().out
    )


def test_a_failed_run_is_listed_in_the_set_of_its_data(tmp_path, capsys):
    files = of_sets(tmp_path, {"ce": (30, 50), "focal": (34, 52)})
    content = json.loads(Path(files[-1]).read_text())
    del content["metrics"]
    Path(files[-1]).write_text(json.dumps(content | {"failure": "loss = nan"}))
    main(files)
    first, second = capsys.readouterr().out.split("datasets/cards/val.json")
    assert "failed: focal, seed 2" in second and "failed" not in first and "All 2 sets" in second
