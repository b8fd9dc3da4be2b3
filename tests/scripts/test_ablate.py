"""scripts/ablate.py: what a variant may set, what is refused, and that every run gets a result once."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from detector import config
from detector.errors import UserError
from scripts import ablate, compare
from scripts.comparison import result, supervise, timing


@pytest.fixture
def base(tmp_path, tiny):
    """A config that trains in seconds, with variants beside it."""
    path = tmp_path / "configs" / "base.yaml"
    path.parent.mkdir()
    config_file = tiny(tmp_path, solver={"batch_size": 4, "lr_batch_size": None, "epochs": 1})
    path.write_bytes(Path(config_file).read_bytes())
    for name, losses in {
        "focal": {"class_loss": {"name": "focal"}, "box_loss": {"name": "smooth_l1", "weight": 2}},
        "ghm_r": {"class_loss": {"name": "ce"}, "box_loss": {"name": "ghm_r", "mu": 0.1}},
    }.items():
        (path.parent / f"{name}.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "run": name, **losses}))
    return path


def test_a_plus_takes_the_second_file_s_box_loss(base):
    changes = ablate.read_variant(base, "focal+ghm_r")
    assert changes["class_loss"] == {"name": "focal"}
    assert changes["box_loss"]["name"] == "ghm_r" and changes["box_loss"]["mu"] == 0.1


def test_a_variant_that_changes_more_than_the_loss_is_refused(base):
    (base.parent / "cheat.yaml").write_text("base: base.yaml\nclass_loss: {name: ce}\nsolver: {epochs: 99}\n")
    with pytest.raises(UserError, match=r"cheat\.yaml: solver\.epochs: a variant may set only"):
        ablate.read_variant(base, "cheat")


def test_values_may_be_multiples_of_the_variant_s_own(base):
    changes = ablate.read_variant(base, "focal")
    assert ablate.choose(changes, "box_loss.weight", "x1.5")["box_loss"]["weight"] == 3
    assert ablate.choose({}, "box_loss.weight", "x4")["box_loss"]["weight"] == 4
    assert ablate.choose(changes, "class_loss.gamma", "1")["class_loss"]["gamma"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--variants", "none"), r"none\.yaml: no such file"),
        (("--variants", "focal", "--seeds", "0"), "give at least 1"),
        (("--variants", "focal", "--grid", "class_loss.gamma"), "write it as KEY=A,B,C"),
    ],
)
def test_mistakes(base, command, arguments, message):
    code, _, err = command(ablate.main, "--config", base, *arguments, "--dry-run")
    assert code == 2 and re.search(message, err) and err.count("\n") == 1


def test_tuned_runs_end_as_results_which_a_second_start_keeps(base, tmp_path, command):
    arguments = ["--config", base, "--variants", "focal", "--seeds", 1, "--output", tmp_path / "out"]
    arguments += ["--tune", "box_loss.weight=x1,x2"]
    code, out, err = command(ablate.main, *arguments)
    assert code == 0, err
    assert re.search(r"^focal: box_loss.weight x[12], at an end of the range", out, re.M)
    results = tmp_path / "out" / "results"
    assert sorted(path.stem for path in results.iterdir()) == ["focal-s0", "tune-focal-x1", "tune-focal-x2"]
    whole, tried = result.read(results / "focal-s0.json"), result.read(results / "tune-focal-x2.json")
    assert set(whole["tuning"]["AP"]) == {"x1", "x2"} and tried["tried"] == "x2"
    chosen = {"x1": 2, "x2": 4}[whole["tuning"]["chosen"]]
    assert config.flat(whole["config"])["box_loss.weight"] == chosen

    parts = [json.loads((tmp_path / "out" / f"tune_{split}.json").read_text())["images"] for split in ("train", "val")]
    names = [{image["id"] for image in part} for part in parts]
    assert names[0] and names[1] and not names[0] & names[1]  # never scored on what it was trained on
    assert tried["config"]["data"]["val"]["images"] == tried["config"]["data"]["train"]["images"]

    times = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    code, out, err = command(ablate.main, *arguments)
    assert code == 0 and "1 of 1 runs are already finished" in out, err
    assert {path: path.stat().st_mtime_ns for path in results.iterdir()} == times


def test_time_is_of_every_variant_in_turn(base, tmp_path, command):
    arguments = ["--config", base, "--variants", "focal", "focal+ghm_r", "--seeds", 2, "--output", tmp_path / "out"]
    code, out, err = command(ablate.main, *arguments, "--time", "--jobs", 2)
    assert code == 0, err
    kept = {path.stem: result.read(path) for path in (tmp_path / "out" / "results").iterdir()}
    timings = {name: content["timing"] for name, content in kept.items()}
    assert timings["focal-s0"] == timings["focal-s1"] != timings["focal+ghm_r-s0"] == timings["focal+ghm_r-s1"]
    assert len({timing["started"] for timing in timings.values()}) == 1
    for name in ("focal", "focal+ghm_r"):
        assert f"{name}: {timings[f'{name}-s0']['seconds']:.3f} s/step" in out
    assert {content["jobs"] for content in kept.values()} == {2}
    code, out, err = command(compare.main, *sorted(map(str, (tmp_path / "out" / "results").iterdir())))
    assert "the losses took turns" in out and "GB is not shown: runs shared the machine (--jobs 2)" in out
    assert f" {timings['focal-s0']['seconds']:.3f} " in out


def test_steps_take_turns_and_each_has_its_own_losses(base, monkeypatch):
    order = []
    real = timing.training_step

    def noted(model, criterion, solver):
        step = real(model, criterion, solver)
        return lambda *batch: (order.append(type(criterion.box_loss).__name__), step(*batch))

    monkeypatch.setattr(timing, "training_step", noted)
    study = ablate.Study(str(base), [], base.parent / "out", None)
    variants = {name: ablate.read_variant(base, name) for name in ("focal", "focal+ghm_r")}
    configs = {run.notes["variant"]: run.cfg for run in study.runs(variants, 1)}
    found = timing.time_steps(configs, rounds=3)
    assert order == ["SmoothL1", "GHMR"] * 5  # two to warm up
    assert (
        all(one["steps"] == 3 and 0 < one["seconds"] < 60 for one in found.values()) and found.keys() == configs.keys()
    )


def test_a_run_that_went_on_is_not_said_to_have_had_the_machine_alone(base, tmp_path, command):
    arguments = ["--config", base, "--variants", "focal", "--seeds", 1, "--output", tmp_path / "out"]
    kept = tmp_path / "out" / "results" / "focal-s0.json"
    assert command(ablate.main, *arguments)[0] == 0 and result.read(kept)["jobs"] == 1
    kept.unlink()  # as after a stop: its log is there
    code, _, err = command(ablate.main, *arguments)
    assert code == 0 and "jobs" not in result.read(kept), err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_diverges_is_a_row_with_its_reason(base, tmp_path, command, processes):
    huge = {"base": "base.yaml", "class_loss": {"name": "focal", "weight": 1e39}, "box_loss": {"name": "smooth_l1"}}
    (base.parent / "huge.yaml").write_text(yaml.safe_dump(huge))
    arguments = ["--config", base, "--variants", "huge", "focal", "--seeds", 1, "--output", tmp_path / "out"]
    arguments += ["--processes", processes]
    code, out, err = command(ablate.main, *arguments)
    assert code == 0 and "huge-s0: failed" in err + out, err
    failed, whole = (result.read(tmp_path / "out" / "results" / f"{name}-s0.json") for name in ("huge", "focal"))
    assert "class = inf" in failed["failure"] and "metrics" not in failed and whole["metrics"]["step"] == 2
    assert whole["processes"] == processes
    code, out, err = command(ablate.main, *arguments)
    assert code == 0 and "2 of 2 runs are already finished" in out  # a failure is a result too
    code, out, _ = command(compare.main, *sorted(map(str, (tmp_path / "out" / "results").iterdir())))
    assert code == 0 and "failed: huge, seed 0: " in out


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_that_training_finds_ends_it_in_one_line(base, tmp_path, command, processes):
    (tmp_path / "none.pt").write_text("hello")
    arguments = ["--config", base, "--variants", "focal", "--seeds", 1, "--output", tmp_path / "out"]
    arguments += ["--processes", processes, "--set", f"model.weights={tmp_path / 'none.pt'}"]
    code, _, err = command(ablate.main, *arguments)
    assert code == 2 and re.search(r"^error: focal-s0: .*none\.pt.* \(log: .*\)$", err.splitlines()[-1]), err
    assert not list((tmp_path / "out" / "results").glob("*"))  # once it is mended, the run is tried again


def test_other_numbers_of_processes_are_another_run(base, tmp_path, command):
    kept = tmp_path / "out" / "results" / "focal-s0.json"
    study = ablate.Study(str(base), [], tmp_path / "out", None)
    (run,) = study.runs({"focal": ablate.read_variant(base, "focal")}, 1)
    result.write(kept, {"config": run.cfg.model_dump(mode="json"), "failure": "none", **run.notes})
    arguments = ["--config", base, "--variants", "focal", "--seeds", 1, "--output", tmp_path / "out"]
    code, out, _ = command(ablate.main, *arguments)
    assert code == 0 and "1 of 1 runs are already finished" in out
    code, _, err = command(ablate.main, *arguments, "--processes", 2)
    assert code == 2 and "processes 1, now 2" in err


def test_each_run_has_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [supervise.cards(slot, 1) for slot in range(6)] == [["0"], ["1"], ["2"], ["3"], ["4"], ["0"]]
    assert [supervise.cards(slot, 2) for slot in range(3)] == [["0", "1"], ["2", "3"], ["0", "1"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3,GPU-5f")
    assert [supervise.cards(slot, 1) for slot in range(3)] == [["7"], ["3"], ["GPU-5f"]]


def test_a_grid_is_a_variant_for_each_value(base, tmp_path, command):
    arguments = ["--config", base, "--variants", "focal", "--grid", "class_loss.gamma=0,1,2", "--seeds", 2]
    code, out, err = command(ablate.main, *arguments, "--output", tmp_path / "out", "--dry-run")
    assert code == 0, err
    assert "6 runs of 3 variants" in out and "class_loss.gamma" in out
    names = [Path(line).name for line in out.splitlines()[1:]]
    assert names == [f"focal[gamma={gamma}]-s{seed}" for seed in range(2) for gamma in (0, 1, 2)]
    code, out, err = command(
        ablate.main, *arguments, "--grid", "class_loss.weight=1,4", "--output", tmp_path, "--dry-run"
    )
    assert code == 0 and "12 runs of 6 variants" in out and "focal[gamma=2][weight=4]-s1" in out, err


def test_stopped_by_a_signal_it_saves_and_goes_on(base, tmp_path):
    text = [sys.executable, str(Path(ablate.__file__)), "--config", str(base), "--variants", "focal", "--seeds", "1"]
    text += ["--output", str(tmp_path / "out"), "--set", "solver.epochs=15"]
    process = subprocess.Popen(text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun = tmp_path / "out" / "focal-s0" / "last.pt"  # of the first epoch
    until = time.monotonic() + 120
    while not begun.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "the same command continues" in err, err
    assert begun.exists() and not list((tmp_path / "out").glob("results/*.json"))
    done = subprocess.run(text, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert result.read(tmp_path / "out" / "results" / "focal-s0.json")["metrics"]["step"] == 30
    assert "from step" in (tmp_path / "out" / "configs" / "focal-s0.log").read_text()
