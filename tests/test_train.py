"""Whole runs: the files in their folder, how they end and continue, and whether they learn."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from data.assemble import build_datasets
from data.coco import CocoDataset
from data.samplers import TrainSampler
from detector import checkpoint, distributed
from detector.configure import configure
from detector.errors import Stopped, UserError
from detector.solver import Solver

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
GHM = {"class_loss": {"name": "ghm_c"}, "box_loss": {"name": "ghm_r"}, "solver": {"ema": 0.9}}
METRICS = {"AP", "AP50", "AP75", "AP80", "AP90", "APs", "APm", "APl", "AR1", "AR10", "AR100", "per_class"}


def start(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    return subprocess.run(
        [sys.executable, "train.py", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def read(folder: Path, name: str = "last.pt") -> dict:
    """A checkpoint without the values that depend on the clock and on its folder."""
    content = checkpoint.read(folder / name)
    del content["run"]["seconds_per_step"], content["run"]["peak_memory"], content["config"]["output"]
    return content


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The folder of a run of two epochs with GHM and averaged weights, and what its training returned."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = configure(tiny(folder, **GHM))
    result = train.train(cfg, CPU)
    yield cfg.folder, result
    shutil.rmtree(folder)


def one_line(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


# ------------------------------------------------------------------------------------------ the folder


def test_the_run_folder_holds_all_promised_files(trained):
    folder, result = trained
    names = {"config.yaml", "last.pt", "best.pt", "metrics.json", "detections.png"}
    assert names <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    values = metrics(folder)
    assert values.keys() >= METRICS and values == result
    assert (values["step"], values["epoch"], values["images"], len(values["per_class"])) == (4, 2, 4, 10)
    assert (folder / "detections.png").read_bytes().startswith(b"\x89PNG")


def test_the_config_in_the_folder_is_the_one_that_was_run(trained):
    folder, _ = trained
    cfg = configure(str(folder / "config.yaml"))
    assert cfg.model_dump(mode="json") == checkpoint.read(folder / "last.pt")["config"]
    assert cfg.class_loss.options["bins"] == 30


def test_tensorboard_has_curves_pictures_and_settings(trained):
    events = EventAccumulator(str(trained[0]), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    diagnostics = ("true_class_probability", "positives_per_image", "gradient_norm")
    expected = {"loss/class", "loss/box", "loss/total", "lr", "eval/AP", *(f"diagnostics/{d}" for d in diagnostics)}
    assert set(tags["scalars"]) >= expected
    assert tags["images"] == ["validation/0"]
    assert "config/text_summary" in tags["tensors"] and "_hparams_/session_start_info" in events.summary_metadata
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval/AP")] == [2, 4]


# ------------------------------------------------------------------------------------------ how it ends


def test_train_py_runs_from_the_shell(tiny, folder):
    path = tiny(folder)
    result = start("--config", path, "--set", "solver.max_steps=1", "tensorboard.images=0")
    assert result.returncode == 0, result.stderr
    assert "AP50" in result.stdout and "Traceback" not in result.stderr
    assert (folder / "runs" / "tiny" / "last.pt").exists()
    refusal = start("--config", path, "--set", "slover.lr=1")
    assert refusal.returncode == 2 and refusal.stdout == ""
    assert refusal.stderr == "error: --set slover.lr=1: slover: unknown option; did you mean 'solver'?\n"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["data.train.annotations=missing.json"], "error: data.train.annotations: no such file: missing.json; name it"),
        (["data.val.annotations="], "data.val.annotations"),
        (["data.val={}"], None),
        (["data.val.images=nowhere"], "nowhere"),
        (["solver.batch_size=5", "solver.accumulate=2"], "accumulate"),
        (["model.weights=nothing.pt"], "model.weights: nothing.pt"),
        (["device=tpu"], "device"),
        (["device=cuda:99"], "device"),
        (["output=/dev/null/x"], "output"),
    ],
    ids=str,
)
def test_a_mistake_gives_one_line_and_exit_code_2(tiny, folder, command, settings, expected):
    if expected is None:
        settings, expected = ["data.val.annotations=", "data.val.images="], "data.val.annotations"
    code, _, err = command(train.main, "--config", tiny(folder), "--set", *settings)
    assert code == 2 and one_line(err), err
    assert expected in err


def test_training_without_a_box_is_refused(rectangles, tiny, folder, command):
    annotations, images = rectangles(folder, [[], []], classes=2)
    files = [f"data.train.annotations={annotations}", f"data.train.images={images}"]
    code, _, err = command(train.main, "--config", tiny(folder), "--set", *files)
    assert code == 2 and one_line(err), err
    assert f"{annotations}: no box to learn from: 0 boxes are crowds (iscrowd 1), 0 have no area" in err


def test_the_image_folder_may_be_left_out(tiny, folder):
    cfg = configure(tiny(folder), ["data.train.images=", "data.val.images="])
    cfg_with_images = configure(tiny(folder))
    for dataset, expected in zip(build_datasets(cfg), build_datasets(cfg_with_images)):
        assert dataset.folder == expected.folder and dataset.fingerprint() == expected.fingerprint()


def test_a_missing_data_set_is_reported(tmp_path, command):
    (tmp_path / "x.yaml").write_text("device: cpu")
    code, _, err = command(train.main, "--config", tmp_path / "x.yaml")
    assert code == 2 and one_line(err)
    assert "data.train.annotations: not set" in err


def test_validation_classes_must_be_those_of_training(tiny, demo, folder, command):
    document = json.loads((demo / "val.json").read_text())
    document["categories"][0]["name"] = "nought"
    (folder / "renamed.json").write_text(json.dumps(document))
    setting = f"data.val.annotations={folder / 'renamed.json'}"
    code, _, err = command(train.main, "--config", tiny(folder), "--set", setting)
    assert code == 2 and one_line(err)
    assert "category 1 is 'nought' here and '0' in training" in err


def test_a_diverging_run_ends_in_one_line_and_exit_code_1(tiny, folder, command):
    settings = ["solver.lr=1e30", "solver.warmup_steps=0", "solver.schedule=cosine", "class_loss.name=focal"]
    code, out, err = command(train.main, "--config", tiny(folder), "--set", *settings)
    assert code == 1 and "Traceback" not in err
    assert "data.workers 0" in out.splitlines()[0]
    last = err.splitlines()[-1]  # below the progress line
    assert last.startswith("error: ") and "at step 2, images [" in last and "solver.lr" in last


# ------------------------------------------------------------------------------------------ how it goes on


def test_an_existing_run_is_not_overwritten(tiny, trained, command):
    before = (trained[0] / "last.pt").stat().st_mtime_ns
    path = tiny(trained[0].parent.parent, **GHM)
    code, _, err = command(train.main, "--config", path)
    assert code == 2 and one_line(err) and "--resume" in err and "--set run=" in err
    assert (trained[0] / "last.pt").stat().st_mtime_ns == before


def test_a_run_does_not_resume_with_another_loss(tiny, trained, command):
    path = tiny(trained[0].parent.parent, **GHM)
    before = (trained[0] / "config.yaml").read_text()
    code, _, err = command(train.main, "--config", path, "--resume", "--set", "class_loss.name=focal")
    assert code == 2 and one_line(err) and "class_loss" in err
    assert (trained[0] / "config.yaml").read_text() == before


def test_a_run_does_not_resume_on_changed_annotations(tiny, trained, command, monkeypatch):
    path = tiny(trained[0].parent.parent, **GHM)
    monkeypatch.setattr(CocoDataset, "fingerprint", lambda dataset: "fewer boxes")
    code, _, err = command(train.main, "--config", path, "--resume")
    assert code == 2 and one_line(err) and "data.train: " in err and ", now fewer boxes; data.val: " in err
    # With several processes they are compared first: one alone must not refuse while the others wait for it.
    monkeypatch.setattr(distributed, "gather", lambda values: [values, {**values, "data.train": "more boxes"}])
    code, _, err = command(train.main, "--config", path, "--resume")
    assert code == 2 and one_line(err) and "data.train differs between processes" in err


@pytest.mark.parametrize("interrupted_at", ["last.pt", "best.pt"])
def test_an_interrupted_and_resumed_run_equals_a_whole_one(tiny, trained, folder, monkeypatch, same, interrupted_at):
    whole_run, _ = trained
    cfg = configure(tiny(folder, **GHM))
    save = checkpoint.save

    def save_and_die(path, *arguments, **named):
        save(path, *arguments, **named)
        if path.name == interrupted_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train.train(cfg, CPU)
    if interrupted_at == "last.pt":
        assert checkpoint.read(cfg.folder / "last.pt")["run"]["solver"]["step"] == 2
    train.train(cfg, CPU, resume=True)  # without a last.pt it starts again

    for name in ("last.pt", "best.pt"):
        expected, resumed = read(whole_run, name), read(cfg.folder, name)
        assert same(expected["run"]["criterion"], resumed["run"]["criterion"])
        assert expected["run"]["criterion"]["class_loss.updates"] == expected["run"]["solver"]["step"] > 0
        assert same(expected, resumed)
    expected, resumed = metrics(whole_run), metrics(cfg.folder)
    cost = {"seconds_per_step": 0, "peak_memory": 0}
    assert expected | cost == resumed | cost


def test_a_run_resumed_within_an_epoch_sees_the_images_it_had_not_seen(tiny, folder, monkeypatch):
    seen_ids = []

    def look(model, criterion, batches, solver, logger, until_step):
        for batch in batches:
            seen_ids.append(batch.image_ids)
            solver.step_count += 1
            if solver.done or solver.step_count == until_step:
                break

    monkeypatch.setattr(train, "train_until", look)
    path = tiny(folder, solver={"batch_size": 2})
    train.train(configure(path, ["run=whole"]), CPU)
    expected_ids, seen_ids[:] = list(seen_ids), []
    for steps in (1, 6, 8):
        train.train(configure(path, [f"solver.max_steps={steps}"]), CPU, resume=True)
        assert len(seen_ids) == steps
    assert seen_ids == expected_ids
    first, second = ([i for ids in expected_ids[start : start + 4] for i in ids] for start in (0, 4))
    assert sorted(first) == sorted(second) == list(range(1, 9)) and first != second


def test_a_run_reads_one_stream_of_batches(tiny, folder, monkeypatch):
    epochs, iterate = [], TrainSampler.__iter__
    monkeypatch.setattr(TrainSampler, "__iter__", lambda sampler: epochs.append(sampler.epoch) or iterate(sampler))
    pauses, train_until = [], train.train_until

    def counted(*arguments, until_step):
        assert pauses[-1:] != [until_step]  # if the stream ended early, this would repeat forever
        pauses.append(until_step)
        train_until(*arguments, until_step=until_step)

    monkeypatch.setattr(train, "train_until", counted)
    cfg = configure(tiny(folder, checkpoint={"every": 1}), ["solver.epochs=2"])
    train.train(cfg, CPU)
    assert epochs == [0] and pauses == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_loses_nothing(tiny, trained, folder, monkeypatch, same, number):
    whole_run, _ = trained
    cfg = configure(tiny(folder, **GHM))
    backward = Solver.backward

    def ask(solver, loss):
        if solver.step_count == 2:
            os.kill(os.getpid(), number)
        backward(solver, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Solver, "backward", ask)
        with pytest.raises(Stopped) as excinfo:
            train.train(cfg, CPU)
    assert excinfo.value.number == number
    assert checkpoint.read(cfg.folder / "last.pt")["run"]["solver"]["step"] == 3  # within the second epoch
    train.train(cfg, CPU, resume=True)
    for name in ("last.pt", "best.pt"):
        assert same(read(whole_run, name), read(cfg.folder, name))


def test_a_stopped_process_says_how_to_continue(tiny, folder):
    path = tiny(folder, solver={"epochs": 500})
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    words = [sys.executable, "train.py", "--config", str(path), "--set", "data.workers=2"]
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    last = folder / "runs" / "tiny" / "last.pt"
    while not last.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # and its loading processes, as scancel and timeout do
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert err.splitlines()[-1] == "stopped by SIGTERM; continue with the same command and --resume"
    assert "Traceback" not in err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_evaluation_at_once(tiny, folder, monkeypatch, workers):
    """It comes during the wait for a batch, or, without workers, in a call that takes errors for a broken image."""
    cfg = configure(tiny(folder, data={"workers": workers}, evaluation={"batch_size": 1}))
    predict = train.predict

    def asked(model, batches, *rest):
        def some():
            for batch in batches:
                yield batch
                os.kill(os.getpid(), signal.SIGTERM)

        return predict(model, some(), *rest)

    monkeypatch.setattr(train, "predict", asked)
    with pytest.raises(Stopped):
        train.train(cfg, CPU)
    assert checkpoint.read(cfg.folder / "last.pt")["run"]["solver"]["step"] == 2
    assert not (cfg.folder / "metrics.json").exists()


def test_a_loading_process_killed_in_evaluation_is_reported_in_one_line(tiny, folder, monkeypatch, command):
    predict, killed = train.predict, []

    def cut(model, batches, *rest):
        def some():
            for batch in batches:
                yield batch
                killed.extend(child.kill() for child in multiprocessing.active_children())

        return predict(model, some(), *rest)

    monkeypatch.setattr(train, "predict", cut)
    path = tiny(folder, data={"workers": 1}, evaluation={"batch_size": 1})
    code, _, err = command(train.main, "--config", path)
    assert killed and code == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: a process that loads images "), err
    assert checkpoint.read(folder / "runs/tiny/last.pt")["run"]["solver"]["step"] == 2


def test_full_shared_memory_ends_the_run_and_loses_no_step(tiny, folder, monkeypatch, command):
    read_sample = CocoDataset.__getitem__
    num_samples = torch.multiprocessing.Value("i", 0)

    def fill(dataset, key):
        with num_samples.get_lock():
            num_samples.value += isinstance(key, tuple)  # a key of training
            if num_samples.value == 13:  # after an epoch and a step, no file may grow beyond this
                resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
        return read_sample(dataset, key)

    step, finished_steps = Solver.step, []
    monkeypatch.setattr(Solver, "step", lambda solver: finished_steps.append(step(solver)))
    monkeypatch.setattr(CocoDataset, "__getitem__", fill)
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)  # the loading process inherits `fill`
    try:
        code, _, err = command(train.main, "--config", tiny(folder, data={"workers": 1}))
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert code == 2 and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: shared memory is full") and "--shm-size" in last and "--resume" in last
    # The batch before may still be on its way and fail, too.
    assert checkpoint.read(folder / "runs/tiny/last.pt")["run"]["solver"]["step"] == len(finished_steps) in (2, 3)


def test_an_image_that_fails_in_the_second_epoch_loses_no_step(tiny, trained, folder, monkeypatch, same):
    cfg = configure(tiny(folder, **GHM))
    read_sample, seen = CocoDataset.__getitem__, []

    def fail(dataset, key):
        seen.extend([key] * isinstance(key, tuple))  # keys of training
        if len(seen) == 8 + 4 + 1:  # after an epoch and a step of the next
            raise UserError("x.jpg: cannot be decoded")
        return read_sample(dataset, key)

    with monkeypatch.context() as patch:
        patch.setattr(CocoDataset, "__getitem__", fail)
        with pytest.raises(UserError, match=r"x.jpg"):
            train.train(cfg, CPU)
    assert checkpoint.read(cfg.folder / "last.pt")["run"]["solver"]["step"] == 3
    train.train(cfg, CPU, resume=True)
    assert same(read(trained[0]), read(cfg.folder))


def test_saving_between_epochs_changes_nothing(tiny, trained, folder, same):
    cfg = configure(tiny(folder, checkpoint={"every": 1}, **GHM))
    train.train(cfg, CPU)
    expected, content = read(trained[0]), read(cfg.folder)
    del expected["config"]["checkpoint"], content["config"]["checkpoint"]
    assert same(expected, content)
    assert checkpoint.read(cfg.folder / "previous.pt")["run"]["solver"]["step"] == 4  # before its evaluation


def test_a_batch_that_is_not_finite_is_saved(tiny, folder, command):
    settings = ["solver.lr=1e30", "solver.warmup_steps=0", "solver.schedule=cosine"]
    code, _, err = command(train.main, "--config", tiny(folder), "--set", *settings)
    dump = torch.load(folder / "runs" / "tiny" / "nonfinite_0.pt", weights_only=True)
    assert code == 1 and "nonfinite_0.pt" in err.splitlines()[-1]
    assert dump["images"].dtype == torch.uint8 and len(dump["targets"]) == len(dump["image_ids"]) == len(dump["images"])


def test_a_run_that_diverged_in_its_last_step_is_an_error_and_has_no_ap(tiny, folder, command):
    settings = ["solver.lr=1e30", "solver.warmup_steps=0", "solver.schedule=cosine", "solver.max_steps=1"]
    for more in ([], ["--resume"]):
        code, _, err = command(train.main, "--config", tiny(folder), "--set", *settings, *more)
        assert code == 1 and "Traceback" not in err
        assert err.splitlines()[-1].startswith("error: images [") and "output is not finite" in err.splitlines()[-1]
    run = folder / "runs" / "tiny"
    assert not (run / "metrics.json").exists() and not (run / "best.pt").exists()
    assert checkpoint.read(run / "last.pt")["run"]["solver"]["step"] == 1


def test_resuming_a_finished_run_evaluates_and_changes_nothing(trained, tiny, command, same):
    folder, _ = trained
    before = {name: checkpoint.read(folder / name) for name in ("last.pt", "best.pt")}, metrics(folder)
    (folder / "metrics.json").unlink()
    code, out, _ = command(train.main, "--config", folder / "config.yaml", "--resume")
    assert code == 0 and "from step 4" in out
    assert out.count("finished at step 4, so only evaluated again; a larger solver.epochs trains longer\n") == 1
    after = {name: checkpoint.read(folder / name) for name in ("last.pt", "best.pt")}, metrics(folder)
    assert same(before, after)


# ------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("classes", [1, 2])  # and 3 in test_eval.py
def test_two_images_are_learnt_by_heart(overfit, folder, classes):
    run, run_metrics = overfit(folder, classes)
    assert run_metrics["AP50"] > 0.9
    assert len(run_metrics["per_class"]) == classes
    assert checkpoint.read(run / "last.pt")["category_ids"] == [3, 7][:classes]


LOSSES = [("focal", "smooth_l1"), ("ghm_c", "ghm_r"), ("ohem", "l1")]


@pytest.mark.parametrize(("class_loss", "box_loss"), LOSSES)
@pytest.mark.parametrize("with_boxes", [0, 1])
def test_images_without_boxes_are_trained_on(
    rectangles, tiny, folder, capsys, monkeypatch, class_loss, box_loss, with_boxes
):
    content = [(0, [10, 10, 30, 40])]
    annotations, images = rectangles(folder, [content] * with_boxes + [[]] * (2 - with_boxes), classes=2)
    files = {"annotations": annotations, "images": images}
    losses = {"class_loss": {"name": class_loss}, "box_loss": {"name": box_loss}}
    solver = {"batch_size": 2, "epochs": 1}
    data = {"train": files, "val": files, "trust": not with_boxes}
    cfg = configure(tiny(folder, data=data, solver=solver, **losses))
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: None)  # not needed here, and large
    run_metrics = train.train(cfg, CPU)
    assert run_metrics["step"] == 1
    printed = capsys.readouterr().out
    if with_boxes:
        assert run_metrics["AP"] >= 0
    else:
        assert run_metrics["AP"] == -1 and "the validation set has no boxes" in printed
