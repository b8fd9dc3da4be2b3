"""scripts/compare.py: what is shown, what is marked, what is warned of, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from detector.errors import UserError
from scripts.compare import interval, main

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


def test_terminal_table(two, capsys):
    main(two)
    assert capsys.readouterr().out.splitlines() == [
        "run    class loss  box loss     AP  AP50  AP75  AP80  AP90  APs   APm   APl  ECE  s/step  GB",
        "focal  focal       smooth_l1  35.8* 55.0* 25.0* 25.0*    -    -  40.0* 25.0*   -   0.123   -",
        "ghm_c  ghm_c       smooth_l1  35.8* 54.0  25.0* 25.0* 10.0*   -     -  25.0*   -       -   -",
    ]


def test_markdown_table(two, tmp_path):
    main([*two, "--markdown", str(tmp_path / "table.md")])
    assert (tmp_path / "table.md").read_text().splitlines() == [
        "| run | class loss | box loss | AP | AP50 | AP75 | AP80 | AP90 | APs | APm | APl | ECE | s/step | GB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| focal | focal | smooth_l1 | **35.8** | **55.0** | **25.0** | **25.0** | - | - | **40.0** | "
        "**25.0** | - | 0.123 | - |",
        "| ghm_c | ghm_c | smooth_l1 | **35.8** | 54.0 | **25.0** | **25.0** | **10.0** | - | - | **25.0** "
        "| - | - | - |",
    ]


def kept(folder: Path, variant: str, seed: int, ap: float, **more) -> str:
    """A result file, of a run whose AP on each draw of images is `ap` and the draw's own luck."""
    config = {"run": f"{variant}-s{seed}", "seed": seed, "class_loss": {"name": variant}, "box_loss": {"name": "l1"}}
    luck = np.random.default_rng(0).normal(0, 0.05, 500)  # the same for all: what pairing takes out
    content = {"config": config, "metrics": {"AP": ap}, "resampled": (ap + luck).tolist(), "variant": variant} | more
    path = folder / f"{variant}-{seed}.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_seeds_of_a_variant_are_one_row(tmp_path, capsys):
    main([kept(tmp_path, "ce", seed, ap) for seed, ap in enumerate((0.30, 0.32, 0.34))])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ce")]
    assert line.split()[3] == "32.0±2.0"


@pytest.mark.parametrize(
    "aps, verdict",
    [((0.33, 0.34, 0.35), "+2.0 [+2.0, +2.0], better"), ((0.29, 0.30, 0.31), "-2.0 [-2.0, -2.0], worse"),
     ((0.34, 0.30, 0.34), "+0.7 [-2.0, ")],
)  # fmt: skip
def test_better_is_said_only_where_the_interval_leaves_out_zero(tmp_path, capsys, aps, verdict):
    base = [kept(tmp_path, "ce", seed, ap) for seed, ap in enumerate((0.31, 0.32, 0.33))]
    main([*base, *(kept(tmp_path, "focal", seed, ap) for seed, ap in enumerate(aps))])
    out = capsys.readouterr().out
    assert f"- focal: AP {verdict}" in out and ("undecided" in out) == verdict.endswith(" ")


def test_intervals_against_a_plain_loop():
    one, other = np.random.default_rng(1).random((3, 4000)), np.random.default_rng(2).random((3, 4000)) + 0.3
    rng, gaps = np.random.default_rng(3), []
    for draw in range(4000):
        seeds = [rng.integers(3) for _ in range(3)]
        gaps.append(sum(one[s, draw] - other[s, draw] for s in seeds) / 3)
    assert np.allclose(interval(one, other), np.percentile(gaps, [2.5, 97.5]), atol=0.04)


def test_baseline_of_another_name(tmp_path, capsys):
    runs = [kept(tmp_path, name, 0, ap) for name, ap in (("ce", 0.3), ("focal", 0.4))]
    main([*runs, "--baseline", "focal"])
    assert "- ce: AP -10.0 " in capsys.readouterr().out
    with pytest.raises(UserError, match="--baseline ghm: there is no such row; there are ce, focal"):
        main([*runs, "--baseline", "ghm"])


def test_seeds_that_one_row_lacks_are_warned_of(tmp_path, capsys):
    main([kept(tmp_path, "ce", 0, 0.3), kept(tmp_path, "ce", 1, 0.3), kept(tmp_path, "focal", 0, 0.3)])
    assert "not a fair comparison, seeds differs" in capsys.readouterr().out


def test_a_run_that_failed_is_a_row_with_its_reason(tmp_path, capsys):
    failed = kept(tmp_path, "ce", 0, 0.3)
    content = json.loads(Path(failed).read_text())
    Path(failed).write_text(json.dumps({"config": content["config"], "variant": "ce", "failure": "loss = nan"}))
    main([failed, kept(tmp_path, "focal", 0, 0.3), "--csv", str(tmp_path / "runs.csv")])
    out = capsys.readouterr().out
    assert "- failed: ce, seed 0: loss = nan" in out and out.splitlines()[1].endswith("failed")
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    assert lines[1].startswith("focal,0,focal,l1,30.0") or lines[2].startswith("focal,0,focal,l1,30.0")
    assert any(line.startswith("ce,0,") and line.endswith("loss = nan") for line in lines)


def test_runs_that_tuned_are_left_out(tmp_path, capsys):
    main([kept(tmp_path, "ce", 0, 0.3), kept(tmp_path, "ce", 1, 0.9, tried="x2")])
    assert " 30.0 " in capsys.readouterr().out


def test_runs_that_differ_in_the_losses_alone_are_not_warned_of(two, capsys):
    main(two)
    assert "warning" not in capsys.readouterr().out


def test_every_other_difference_is_warned_of(tmp_path, capsys):
    runs = [
        make_run(tmp_path, "a"),
        make_run(tmp_path, "b", config={"solver": {"lr": 0.02, "epochs": 12}, "seed": 1}),
        make_run(tmp_path, "c", config={"crop": True}, epoch=3),
    ]
    main([*runs, "--markdown", str(tmp_path / "table.md")])
    warnings = capsys.readouterr().out.splitlines()[4:]
    assert sorted(warnings) == [
        "",
        "- warning: not a fair comparison, crop differs: absent in a, b / true in c",
        "- warning: not a fair comparison, metrics.epoch differs: 12 in a, b / 3 in c",
        "- warning: not a fair comparison, seeds differs: [0] in a, c / [1] in b",
        "- warning: not a fair comparison, solver.lr differs: 0.01 in a, c / 0.02 in b",
    ]
    assert (tmp_path / "table.md").read_text().splitlines()[5:] == warnings


def test_runs_of_one_name_are_told_apart_by_folder(tmp_path, capsys):
    runs = [make_run(tmp_path, name, config={"run": "ghm_c"}) for name in ("seed0", "seed1")]
    main(runs)
    out = capsys.readouterr().out
    assert all(f"ghm_c ({run})" in out for run in runs)


def test_a_lone_run_is_not_best(tmp_path, capsys):
    main([make_run(tmp_path, "focal")])
    assert "*" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("metrics.json", None, r"focal/metrics.json: no such file; this run is not evaluated yet"),
        ("config.yaml", None, r"focal/config.yaml: no such file; this is not a run folder"),
        ("metrics.json", "{", r"focal/metrics.json: broken"),
        ("metrics.json", "[1]", r"focal/metrics.json: broken: a dict is expected, found list"),
        ("config.yaml", "a: [1\nb: {", r"focal/config.yaml: broken"),
        ("config.yaml", "a: !!python/object:os.system {}", r"focal/config.yaml: broken"),
        ("config.yaml", b"\xff\xfe\xff", r"focal/config.yaml: broken"),
        ("config.yaml", "class_loss: focal", r"focal/config.yaml: no class_loss.name"),
    ],
)
def test_bad_run_folder(tmp_path, file, content, message):
    run = Path(make_run(tmp_path, "focal"))
    (run / file).unlink()
    if content is not None:
        (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        main([str(run)])
    assert "\n" not in str(error.value)


def test_out_that_cannot_be_written(two, tmp_path):
    with pytest.raises(UserError, match="--markdown"):
        main([*two, "--markdown", str(tmp_path / "none" / "table.md")])


def test_as_a_program_from_any_folder(two, tmp_path):
    def start(*arguments):
        command = [sys.executable, SCRIPT, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    good, bad, usage = start(*two), start("nowhere"), start("--help")
    assert good.returncode == 0 and "ghm_c" in good.stdout and good.stderr == ""
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: nowhere: no such file or folder; give run folders or result files\n"
    assert usage.returncode == 0 and "python scripts/compare.py runs/ce" in usage.stdout
