"""scripts/ablate.py: the options that a variant may set, the mistakes that are refused, one result for each run."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from detector import config
from detector.errors import UserError
from scripts import ablate, compare
from scripts.comparison import result, supervise, timing
from scripts.comparison.study import Study
from scripts.comparison.variants import read_variant

pytestmark = pytest.mark.usefixtures("warm_starts")


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
    changes = read_variant(base, "focal+ghm_r")
    assert changes["class_loss"] == {"name": "focal"}
    assert changes["box_loss"]["name"] == "ghm_r" and changes["box_loss"]["mu"] == 0.1


def test_a_variant_that_changes_more_than_the_loss_is_refused(base):
    (base.parent / "cheat.yaml").write_text("base: base.yaml\nclass_loss: {name: ce}\nsolver: {epochs: 99}\n")
    with pytest.raises(UserError, match=r"cheat\.yaml: solver\.epochs: a variant may set only"):
        read_variant(base, "cheat")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--variants", "focal", "focal+focal"), r"focal\+focal: has the losses of focal"),
        (("--variants", "focal+ghm_r+focal"), "name one file, or two"),
        (("--variants", "focl"), r"^error: --variants focl: no file .*/focl\.yaml; did you mean 'focal'\?$"),
        (("--variants", "focal+none"), r"no file .*/none\.yaml; it may be one of focal, ghm_r$"),
        (("--variants", "focal", "--seeds", "0"), "give at least 1"),
        (("--variants", "focal", "--set", "class_loss.name=ce"), "--variants names the losses"),
        (("--variants", "focal", "--grid", "class_loss.gamma"), "write it as KEY=A,B,C"),
        (("--variants", "focal", "--tune", "1"), "give at least 2"),
        (("--variants", "focal", "--tune", "8", "--tune-set", "box_loss.weight=1"), "leave it out here or in --tune-k"),
        (("--variants", "focal", "--tune", "8", "--tune-set", "solver.epoch=1"), "solver.epoch: unknown option"),
        (("--variants", "focal", "--tune", "8", "--tune-set", "class_loss.name=ce"), "--variants names the losses"),
        (("--variants", "focal", "--tune", "8", "--grid", "class_loss.weight=1,2"), "is what --tune searches"),
        (("--variants", "focal", "--tune-each-seed"), "--tune-each-seed: give --tune N too"),
        (("--variants", "focal", "--set", "seed=7"), "--seeds sets it"),
        (("--variants", "focal", "--grid", "seed=7,8"), "--seeds sets it"),
        (("--variants", "focal", "--tune", "8", "--tune-set", "output=x"), "--output sets it"),
    ],
)
def test_mistakes_are_one_line(base, command, arguments, message):
    code, _, err = command(ablate.main, "--config", base, *arguments, "--dry-run")
    assert code == 2 and re.search(message, err) and err.count("\n") == 1


def test_a_device_that_is_not_there_is_refused_before_the_runs(base, command, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["--config", base, "--variants", "focal", "--set", "device=cuda:99"]
    for dry_run in (["--dry-run"], []):
        code, _, err = command(ablate.main, *arguments, *dry_run)
        assert code == 2 and err.startswith("error: device: 'cuda:99' cannot be used here") and err.count("\n") == 1


def test_a_study_without_any_finished_run_has_failed(scored, tmp_path):
    code, out, err, _ = scored(lambda values: None, "--output", tmp_path / "all")
    assert code == 1 and "compare.py" not in out and f"all runs failed; {tmp_path}" in err
    one = scored(lambda values: 0.3 if values["box_loss.name"] == "ghm_r" else None, "--output", tmp_path / "one")
    assert one[0] == 0 and "compare.py" in one[1]


def test_counts_of_one_are_singular(scored, base, tmp_path, command):
    _, out, _ = command(ablate.main, "--config", base, "--variants", "focal", "--seeds", 1, "--dry-run")
    assert out.startswith("1 run of 1 variant\n")
    assert scored(lambda values: 0.3, "--output", tmp_path)[1].startswith("2 runs of 2 variants; they differ in run, ")


def test_a_dry_run_writes_nothing_and_a_refused_study_neither(base, tmp_path, command):
    arguments = ["--config", base, "--variants", "focal", "--output", tmp_path / "out"]
    assert command(ablate.main, *arguments, "--dry-run")[0] == 0
    code, _, err = command(ablate.main, *arguments, "--set", "class_loss.gama=1")
    assert code == 2 and err.startswith("error: variant focal: class_loss.gama: unknown option")
    assert not (tmp_path / "out").exists()


def test_a_variant_may_be_based_on_another_one(base):
    (base.parent / "twice.yaml").write_text("base: focal.yaml\nbox_loss: {weight: 4}\n")
    changes = read_variant(base, "twice")
    assert changes == {"class_loss": {"name": "focal"}, "box_loss": {"name": "smooth_l1", "weight": 4}}
    (base.parent / "other.yaml").write_text("solver: {epochs: 9}\n")
    (base.parent / "stray.yaml").write_text("base: other.yaml\nclass_loss: {name: ce}\n")
    with pytest.raises(
        UserError, match=r"stray\.yaml starts from \S+other\.yaml, not from \S+base\.yaml: give --config \S+other"
    ):
        read_variant(base, "stray")
    with pytest.raises(
        UserError, match=r"ghm_r\.yaml starts from \S+base\.yaml, not from \S+focal\.yaml: give --config"
    ):
        read_variant(base.with_name("focal.yaml"), "ghm_r")


def test_a_stopped_run_of_another_length_is_not_continued(base, tmp_path, command):
    arguments = ["--config", base, "--variants", "focal", "--seeds", 1, "--output", tmp_path / "out", "--set"]
    assert command(ablate.main, *arguments, "solver.epochs=2")[0] == 0
    (tmp_path / "out" / "results" / "focal-s0.json").unlink()
    (tmp_path / "out" / "focal-s0" / "last.pt").touch()  # as if it had been stopped
    for dry_run in (["--dry-run"], []):
        code, _, err = command(ablate.main, *arguments, "solver.epochs=1", *dry_run)
        assert code == 2 and "focal-s0: was trained with solver.epochs 2, now 1: delete the folder" in err


def test_tuning_finds_images_that_are_beside_the_whole_file(base, tmp_path, command, scored):
    values = yaml.safe_load(base.read_text())
    for part in ("train", "val"):
        source = values["data"][part]
        shutil.copytree(source["images"], tmp_path / "data" / "images", dirs_exist_ok=True)
        shutil.copy(source["annotations"], tmp_path / "data")
        values["data"][part] = {"annotations": str(tmp_path / "data" / f"{part}.json")}
    base.write_text(yaml.safe_dump(values))
    code, _, err, _ = scored(lambda values: 0.5, "--tune", 2, "--output", tmp_path / "out")
    assert code == 0, err
    data = result.read(tmp_path / "out" / "results" / "tune-focal-1.json")["config"]["data"]
    assert data["train"]["images"] == data["val"]["images"] == str(tmp_path / "data" / "images")


def test_a_second_start_keeps_the_results_of_tuned_runs(base, tmp_path, command):
    arguments = ["--config", base, "--variants", "focal", "--seeds", 1, "--output", tmp_path / "out", "--tune", 2]
    code, out, err = command(ablate.main, *arguments)
    assert code == 0, err
    assert re.search(
        r"^focal: class_loss\.weight \S+ \(range 0\.1 to 10\), box_loss\.weight \S+ \(range 0\.2 to 20\)", out, re.M
    )
    assert re.search(r"focal, trial 2/2 \(class_loss\.weight .*; best so far 0\.\d+\): AP 0\.\d+", err + out)
    results = tmp_path / "out" / "results"
    assert sorted(path.stem for path in results.iterdir()) == ["focal-s0", "tune-focal-1", "tune-focal-2"]
    final, first, second = (
        result.read(results / f"{name}.json") for name in ("focal-s0", "tune-focal-1", "tune-focal-2")
    )
    variant_values = {"class_loss.weight": 1, "box_loss.weight": 2}
    assert first["tried"] == variant_values
    trials = [{"values": record["tried"], "AP": record["metrics"]["AP"]} for record in (first, second)]
    assert final["tuning"]["trials"] == trials and final["tuning"]["chosen"] in [record["values"] for record in trials]
    for record, values in ((final, final["tuning"]["chosen"]), (first, variant_values), (second, second["tried"])):
        assert {key: config.flat(record["config"])[key] for key in variant_values} == values

    parts = [json.loads((tmp_path / "out" / f"tune_{split}.json").read_text())["images"] for split in ("train", "val")]
    names = [{image["id"] for image in part} for part in parts]
    assert names[0] and names[1] and not names[0] & names[1]  # no image is in both parts
    assert second["config"]["data"]["val"]["images"] == second["config"]["data"]["train"]["images"]

    assert [path.parent.name for path in (tmp_path / "out").rglob("*.pt")] == ["focal-s0"]  # no weights of tuning runs

    times = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    code, out, err = command(ablate.main, *arguments)
    assert code == 0 and "2 of 2 runs are already finished" in out and "1 of 1 runs are already finished" in out, err
    assert {path: path.stat().st_mtime_ns for path in results.iterdir()} == times
    code, _, err = command(ablate.main, *arguments, "--tune-keys", "box_loss.weight", "solver.lr")
    assert code == 2 and re.search(r"tune-focal-2\.json: has not tried box_loss\.weight, solver\.lr: delete it", err)


@pytest.fixture
def scored(base, tmp_path, command, monkeypatch):
    """Runs ablate.py where a training takes no time and its AP is a function of its config."""

    class Ended:
        returncode = 0

        def poll(self):
            return 0

    run_names = []

    def ablated(score, *arguments, stop_after=None):
        def start(run, rest, slot, jobs):
            if len(run_names) == stop_after:
                raise UserError("stopped")
            run_names.append(run.name)
            run.log.parent.mkdir(parents=True, exist_ok=True)
            return supervise.Child(run, Ended(), run.log.open("a"), 0, rest)

        def ended(child, *_):
            run, ap = child.run, score(config.flat(child.run.cfg.model_dump(mode="json")))
            outcome = {"failure": "the loss is nan"} if ap is None else {"metrics": {"AP": ap}}
            result.write(run.kept, {"config": run.cfg.model_dump(mode="json"), **outcome, **run.notes})

        monkeypatch.setattr(supervise, "start", start)
        monkeypatch.setattr(supervise, "ended", ended)
        monkeypatch.setattr(supervise, "POLL", 0)
        run_names.clear()
        options = ["--config", base, "--variants", "focal", "focal+ghm_r", "--seeds", 1, *arguments]
        code, out, err = command(ablate.main, *options)
        return code, out, err, list(run_names)

    return ablated


def test_tuning_gives_the_same_trials_in_parallel_and_after_stops(scored, tmp_path, command):
    def score(values):
        best = {"class_loss.weight": 3, "solver.lr": 0.01 if values["box_loss.name"] == "ghm_r" else 0.001}
        return 0.5 - 0.1 * sum(abs(math.log10(values[key] / best[key])) for key in best)

    def kept(name):
        return {path.stem: result.read(path).get("tried") for path in (tmp_path / name / "results").iterdir()}

    tune = ["--tune", 5, "--tune-keys", "solver.lr", "class_loss.weight"]
    code, out, err, run_names = scored(score, *tune, "--output", tmp_path / "one")
    assert code == 0, err
    names = ("focal", "focal+ghm_r")
    assert run_names == [f"tune-{name}-{n}" for n in range(1, 6) for name in names] + [f"{name}-s0" for name in names]
    assert scored(score, *tune, "--jobs", 2, "--output", tmp_path / "two")[0] == 0
    for finished in (3, 8):
        code, _, err, _ = scored(score, *tune, "--output", tmp_path / "three", stop_after=finished)
        assert code == 2 and "stopped" in err
    assert scored(score, *tune, "--output", tmp_path / "three")[0] == 0
    assert kept("one") == kept("two") == kept("three")
    assert list(kept("one")["tune-focal-2"]) == ["class_loss.weight", "solver.lr"]
    code, out, err = command(compare.main, *sorted(map(str, (tmp_path / "one" / "results").iterdir())))
    assert "- solver.lr was tuned: " in out and "not a fair comparison" not in out, out


def test_more_trials_continue_the_earlier_search(scored, tmp_path):
    out = ["--output", tmp_path / "out"]
    assert scored(lambda values: 0.3, "--tune", 2, *out)[0] == 0
    code, _, err, run_names = scored(lambda values: 0.2, "--tune", 3, *out)  # so the third trials are not better
    assert code == 0 and run_names == ["tune-focal-3", "tune-focal+ghm_r-3"], err
    final = result.read(tmp_path / "out" / "results" / "focal-s0.json")
    assert [trial["AP"] for trial in final["tuning"]["trials"]] == [0.3, 0.3, 0.2] and final["metrics"]["AP"] == 0.3


def test_each_seed_can_have_a_search_of_its_own(scored, tmp_path, command):
    """It has its own images to tune on and its own proposals. Seed 0 has those of a study that tunes once."""

    def score(values):
        best = 0.5 * 3 ** values["seed"]
        return 0.5 - 0.1 * abs(math.log10(values["class_loss.weight"] / best))

    out, names = tmp_path / "out", ("focal", "focal+ghm_r")
    assert scored(score, "--tune", 3, "--output", out)[0] == 0
    arguments = ["--seeds", 3, "--tune", 3, "--tune-each-seed", "--output", out]
    code, text, err, run_names = scored(score, *arguments)
    assert code == 0 and "6 runs of 2 variants, 3 tuning runs of each with each seed; they differ in" in text, err
    assert run_names[:12] == [f"tune-{name}-s{seed}-{n}" for n in (1, 2, 3) for seed in (1, 2) for name in names]
    assert run_names[12:] == [f"{name}-s{seed}" for seed in (1, 2) for name in names]

    tried, images = {}, {}
    for seed in range(3):
        of_seed = f"-s{seed}" if seed else ""
        trials = [result.read(out / "results" / f"tune-focal{of_seed}-{n}.json") for n in (1, 2, 3)]
        whole = result.read(out / "results" / f"focal-s{seed}.json")
        assert {trial["config"]["seed"] for trial in trials} == {seed} and "seed" not in trials[0]
        assert [trial["values"] for trial in whole["tuning"]["trials"]] == [trial["tried"] for trial in trials]
        best = max(trials, key=lambda trial: trial["metrics"]["AP"])
        assert whole["tuning"]["chosen"] == best["tried"]
        assert whole["config"]["class_loss"]["weight"] == best["tried"]["class_loss.weight"]
        tried[seed] = [list(trial["tried"].values()) for trial in trials]
        file = trials[0]["config"]["data"]["val"]["annotations"]
        images[seed] = {image["id"] for image in json.loads(Path(file).read_text())["images"]}
    assert tried[0][0] == tried[1][0] == tried[2][0]  # the file's values
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert tried[one][1:] != tried[other][1:] and images[one] != images[other]

    code, text, _ = command(compare.main, out)
    assert code == 0 and "- focal was tuned for each seed: class_loss.weight " in text, text
    assert "not a fair comparison" not in text


def test_a_variant_whose_trials_all_fail_is_reported_in_one_line(scored, tmp_path):
    def score(values):
        return None if values["box_loss.name"] == "ghm_r" else 0.3

    code, out, err, run_names = scored(score, "--tune", 2, "--output", tmp_path / "out")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("focal+ghm_r: ")]
    assert "2 of 2 trials failed, no trial scored above 0" in line and run_names[-2:] == ["focal-s0", "focal+ghm_r-s0"]


def test_time_measures_the_variants_in_turn(base, tmp_path, command):
    arguments = ["--config", base, "--variants", "focal", "focal+ghm_r", "--seeds", 2, "--output", tmp_path / "out"]
    code, out, err = command(ablate.main, *arguments, "--time", "--jobs", 2)
    assert code == 0, err
    results = {path.stem: result.read(path) for path in (tmp_path / "out" / "results").iterdir()}
    timings = {name: content["timing"] for name, content in results.items()}
    assert timings["focal-s0"] == timings["focal-s1"] != timings["focal+ghm_r-s0"] == timings["focal+ghm_r-s1"]
    assert len({timing["started"] for timing in timings.values()}) == 1
    for name in ("focal", "focal+ghm_r"):
        assert f"{name}: {timings[f'{name}-s0']['seconds']:.3f} s/step" in out
    assert {content["jobs"] for content in results.values()} == {2}
    code, out, err = command(compare.main, *sorted(map(str, (tmp_path / "out" / "results").iterdir())))
    assert "the losses took turns" in out and "GB is not shown: runs shared the machine (--jobs 2)" in out
    assert f" {timings['focal-s0']['seconds']:.3f} " in out


def test_timed_steps_take_turns_and_each_uses_the_losses_of_its_variant(base, monkeypatch):
    order = []
    training_step = timing.training_step

    def noted(model, criterion, solver):
        step = training_step(model, criterion, solver)
        return lambda batch: (order.append(type(criterion.box_loss).__name__), step(batch))

    monkeypatch.setattr(timing, "training_step", noted)
    study = Study(str(base), [], base.parent / "out", None)
    variants = {name: read_variant(base, name) for name in ("focal", "focal+ghm_r")}
    configs = {run.notes["variant"]: run.cfg for run in study.runs(variants, 1)}
    times = timing.time_steps(configs, rounds=3)
    assert order == ["SmoothL1", "GHMR"] * 5  # two rounds warm up
    assert (
        all(row["steps"] == 3 and 0 < row["seconds"] < 60 for row in times.values()) and times.keys() == configs.keys()
    )


def test_a_continued_run_does_not_claim_the_machine_to_itself(base, tmp_path, command):
    arguments = ["--config", base, "--variants", "focal", "--seeds", 1, "--output", tmp_path / "out"]
    result_file = tmp_path / "out" / "results" / "focal-s0.json"
    assert command(ablate.main, *arguments)[0] == 0 and result.read(result_file)["jobs"] == 1
    assert "torch" in result.read(result_file)["machine"]
    assert "machine" not in result.collect(tmp_path / "out" / "focal-s0")  # a folder may come from elsewhere
    result_file.unlink()  # as after a stop, since its log still exists
    code, _, err = command(ablate.main, *arguments)
    assert code == 0 and "jobs" not in result.read(result_file), err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_diverges_is_a_row_with_its_reason(base, tmp_path, command, processes):
    huge = {"base": "base.yaml", "class_loss": {"name": "focal", "weight": 1e39}, "box_loss": {"name": "smooth_l1"}}
    (base.parent / "huge.yaml").write_text(yaml.safe_dump(huge))
    arguments = ["--config", base, "--variants", "huge", "focal", "--seeds", 1, "--output", tmp_path / "out"]
    arguments += ["--processes", processes]
    code, out, err = command(ablate.main, *arguments)
    assert code == 0 and "huge-s0: failed" in err + out, err
    diverged, finished = (result.read(tmp_path / "out" / "results" / f"{name}-s0.json") for name in ("huge", "focal"))
    assert "class = inf" in diverged["failure"] and "metrics" not in diverged and finished["metrics"]["step"] == 2
    assert finished["processes"] == processes
    code, out, err = command(ablate.main, *arguments)
    assert code == 0 and "2 of 2 runs are already finished" in out  # a failure is a result too
    code, out, _ = command(compare.main, *sorted(map(str, (tmp_path / "out" / "results").iterdir())))
    assert code == 0 and "failed: huge, seed 0: " in out


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_found_in_training_ends_the_study_in_one_line(base, tmp_path, command, processes):
    (tmp_path / "none.pt").write_text("hello")
    arguments = ["--config", base, "--variants", "focal", "--seeds", 1, "--output", tmp_path / "out"]
    arguments += ["--processes", processes, "--set", f"model.weights={tmp_path / 'none.pt'}"]
    code, _, err = command(ablate.main, *arguments)
    assert code == 2 and re.search(r"^error: focal-s0: .*none\.pt.* \(log: .*\)$", err.splitlines()[-1]), err
    assert not list((tmp_path / "out" / "results").glob("*"))  # once it is fixed, the run is tried again


def test_another_number_of_processes_is_a_different_run(base, tmp_path, command):
    result_file = tmp_path / "out" / "results" / "focal-s0.json"
    study = Study(str(base), [], tmp_path / "out", None)
    (run,) = study.runs({"focal": read_variant(base, "focal")}, 1)
    values = run.cfg.model_dump(mode="json")
    del values["class_loss"]["gamma"]  # an option that is newer than the run counts as its default
    result.write(result_file, {"config": values, "failure": "none", **run.notes})
    arguments = ["--config", base, "--variants", "focal", "--seeds", 1, "--output", tmp_path / "out"]
    code, out, _ = command(ablate.main, *arguments)
    assert code == 1 and "1 of 1 runs are already finished" in out  # but it failed
    code, _, err = command(ablate.main, *arguments, "--processes", 2)
    assert code == 2 and "processes 1, now 2" in err


def test_results_with_other_data_or_precision_do_not_count_as_finished(base, tmp_path, command):
    arguments = ["--config", base, "--variants", "focal", "--seeds", 1, "--output", tmp_path / "out"]
    assert command(ablate.main, *arguments, "--set", "precision=float32")[0] == 0
    assert "1 of 1 runs are already finished" in command(ablate.main, *arguments)[1]  # auto accepts every precision
    code, _, err = command(ablate.main, *arguments, "--set", "precision=bfloat16")
    assert code == 2 and "precision float32, now bfloat16" in err
    result_file = tmp_path / "out" / "results" / "focal-s0.json"
    file = Path(result.read(result_file)["config"]["data"]["train"]["annotations"])
    moved_file = file.with_name("moved.json")
    moved_file.write_bytes(file.read_bytes())
    setting = f"data.train.annotations={moved_file}"
    assert "1 of 1 runs are already finished" in command(ablate.main, *arguments, "--set", setting)[1]
    moved_file.write_bytes(file.read_bytes() + b" ")
    code, _, err = command(ablate.main, *arguments, "--set", setting)
    assert code == 2 and f"with other annotations: {file}, now {moved_file}, whose content differs: delete it" in err
    moved_file.unlink()  # a finished run needs no data
    assert "1 of 1 runs are already finished" in command(ablate.main, *arguments, "--set", setting)[1]


@pytest.mark.parametrize(
    ("log", "failure"),
    [
        ("error: loss = nan at step 3\n", "error: loss = nan at step 3"),
        ("error: loss = nan at step 3\nerror: process 1 has lost another one\n", "error: loss = nan at step 3"),
        ("error: process 1 has lost another one, whose message says why\n", None),
        ("Traceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory.\n", None),
    ],
)
def test_only_an_expected_failure_is_a_result(base, tmp_path, log, failure):
    (run,) = Study(str(base), [], tmp_path / "out", None).runs({"focal": {}}, 1)
    run.log.parent.mkdir(parents=True)
    run.log.write_text(log)
    lost_runs = []
    process = SimpleNamespace(returncode=1)
    supervise.ended(supervise.Child(run, process, run.log.open("a"), 0, iter(())), 1, lambda full: full, lost_runs)
    assert run.kept.exists() == (failure is not None) and len(lost_runs) == (failure is None)
    if failure is None:
        assert f"ended by {log.splitlines()[-1]}; the same command continues it" in lost_runs[0]
    else:
        assert result.read(run.kept)["failure"] == failure


@pytest.mark.parametrize(
    ("device", "processes", "expected"), [("cpu", 1, 1), ("cuda:1", 1, 1), ("cuda", 1, 4), ("cuda", 2, 2)]
)
def test_by_default_each_gpu_has_a_run_and_a_cpu_has_one(
    base, tmp_path, command, monkeypatch, device, processes, expected
):
    started = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(ablate, "train_all", lambda sequences, total, jobs: started.append(jobs))
    command(ablate.main, "--config", base, "--variants", "focal", "--set", f"device={device}", "--processes", processes,
            "--output", tmp_path / "out")  # fmt: skip
    assert started == [expected]


def test_parallel_runs_get_different_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [supervise.cards(slot, 1) for slot in range(6)] == [["0"], ["1"], ["2"], ["3"], ["4"], ["0"]]
    assert [supervise.cards(slot, 2) for slot in range(3)] == [["0", "1"], ["2", "3"], ["0", "1"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3,GPU-5f")
    assert [supervise.cards(slot, 1) for slot in range(3)] == [["7"], ["3"], ["GPU-5f"]]


def test_parallel_runs_share_the_cores(base, tmp_path, monkeypatch):
    (run,) = Study(str(base), [], tmp_path / "out", None).runs({"focal": {}}, 1)
    monkeypatch.setenv("PYTHON_CPU_COUNT", "12")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environments = []
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: environments.append(env))
    for jobs, processes in ((1, 1), (3, 1), (3, 2), (20, 1)):
        run.processes = processes
        supervise.start(run, iter(()), 0, jobs).log.close()
    assert [env["PYTHON_CPU_COUNT"] for env in environments] == ["12", "4", "4", "1"]
    assert [env.get("OMP_NUM_THREADS") for env in environments] == [None, "4", "2", "1"]


def test_a_grid_makes_a_variant_for_each_value(base, tmp_path, command):
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


def test_a_set_option_holds_for_every_variant(base, tmp_path, scored):
    """Whatever the base file and the variants' own files say."""
    with (base.parent / "ghm_r.yaml").open("a") as file:
        file.write("model: {head: {prior: 0.5}}\n")
    options = ["--set", "class_loss.weight=3", "box_loss.weight=5", "model.head.prior=0.02", "solver.lr=0.001"]
    code, _, err, _ = scored(lambda values: 0.3, "--variants", "focal", "ghm_r", *options, "--output", tmp_path / "out")
    assert code == 0, err
    for name in ("focal", "ghm_r"):
        values = config.flat(result.read(tmp_path / "out" / "results" / f"{name}-s0.json")["config"])
        known = [values[key] for key in ("class_loss.weight", "box_loss.weight", "model.head.prior", "solver.lr")]
        assert known == [3, 5, 0.02, 0.001]


def test_a_study_stopped_by_a_signal_saves_and_continues(base, tmp_path):
    argv = [sys.executable, str(Path(ablate.__file__)), "--config", str(base), "--variants", "focal", "--seeds", "1"]
    argv += ["--output", str(tmp_path / "out"), "--set"]
    argv += ["solver.epochs=20", "evaluation.every=20", "checkpoint.every=1"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoint = tmp_path / "out" / "focal-s0" / "last.pt"  # of the first epoch
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "the same command continues" in err, err
    assert checkpoint.exists() and not list((tmp_path / "out").glob("results/*.json"))
    rerun = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert rerun.returncode == 0, rerun.stderr
    assert result.read(tmp_path / "out" / "results" / "focal-s0.json")["metrics"]["step"] == 40
    assert "from step" in (tmp_path / "out" / "configs" / "focal-s0.log").read_text()
