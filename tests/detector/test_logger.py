"""The curves, images and lines of the log, where they go, and when there are none."""

from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector import distributed
from detector.gradients import Observation, Regions
from detector.logger import Logger

VALUES = {"class": 0.5, "box": 0.25, "gradient_norm": 2.0}


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def scalars(folder, tag):
    return {event.step: event.value for event in read(folder).Scalars(tag)}


def log(logger, steps):
    for step in steps:
        logger.step(VALUES, ("class", "box"), 0.01, 4, step)


def test_curves_have_the_first_step_and_every_nth(tmp_path):
    logger = Logger(tmp_path, every=4)
    log(logger, range(1, 10))
    logger.close()
    assert scalars(tmp_path, "loss/total") == {1: 0.75, 4: 0.75, 8: 0.75}
    assert set(read(tmp_path).Tags()["scalars"]) == {
        "loss/class", "loss/box", "loss/total", "lr", "diagnostics/gradient_norm", "speed/images_per_second",
        "speed/data_wait",
    }  # fmt: skip


def test_undefined_metrics_are_left_out(tmp_path):
    logger = Logger(tmp_path, every=1)
    metrics = {"AP": 0.25, "APs": -1.0, "AR100": 0.5, "images": 4, "engine": "x", "step": 3}
    logger.tensorboard.metrics({**metrics, "per_class": {"cat": {"AP": 0.25}, "dog": {"AP": -1.0}}}, 3)
    logger.close()
    assert set(read(tmp_path).Tags()["scalars"]) == {"eval/AP", "eval/AR100", "eval_per_class/cat"}
    assert scalars(tmp_path, "eval/AP") == {3: 0.25}


def test_a_resumed_run_hides_earlier_points_past_its_start(tmp_path):
    first = Logger(tmp_path, every=1)
    log(first, range(1, 6))
    first.close()
    resumed = Logger(tmp_path, every=1, first_step=3)
    for step in (4, 5):
        resumed.step({**VALUES, "class": 8.0}, ("class", "box"), 0.01, 4, step)
    resumed.close()
    points = read(tmp_path).Scalars("loss/class")
    assert [(event.step, event.value) for event in points] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 8.0), (5, 8.0)]


def test_images_config_and_hyperparameters_are_written(tmp_path):
    logger = Logger(tmp_path, every=1)
    logger.tensorboard.images("validation", [torch.zeros(3, 8, 6, dtype=torch.uint8)], 1)
    logger.tensorboard.config("run: x", {"solver.lr": 0.1, "run": "x", "flag": True})
    logger.close()
    tags = read(tmp_path).Tags()
    assert tags["images"] == ["validation/0"]
    assert "config/text_summary" in tags["tensors"]
    hparams = read(tmp_path).summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= hparams.keys()


def test_the_other_processes_are_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    logger = Logger(tmp_path, every=1)
    log(logger, [1])
    logger.say("hello")
    logger.tensorboard.scalars({"x": 1.0}, 1)
    logger.tensorboard.images("x", [torch.zeros(3, 2, 2, dtype=torch.uint8)], 1)
    logger.tensorboard.config("", {})
    logger.tensorboard.metrics({"AP": 1.0, "per_class": {}}, 1)
    logger.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_progress_line_shows_and_times_all_but_the_first_steps(tmp_path, capsys):
    logger = Logger(tmp_path, every=100, seconds_per_step=9.0)
    assert logger.clock.seconds_per_step == 9.0  # from before the resume, until it has timed enough steps
    logger.start(step=2, total_steps=10)
    for step in range(3, 11):
        logger.step(VALUES, ("class", "box"), 0.01, 2, step)
        logger.clock.step_done()
        assert (logger.clock.seconds_per_step == 9.0) == (step - 2 <= 5)
    logger.close()
    assert 0 < logger.clock.seconds_per_step < 1
    printed = capsys.readouterr()
    assert printed.out == "" and "10/10" in printed.err and "loss 0.7500" in printed.err


def test_the_progress_line_counts_skipped_steps_too(tmp_path, capsys):
    logger = Logger(tmp_path, every=1)
    logger.start(0, 3)
    for step in (1, 3):  # the second was skipped: its loss was not finite
        logger.step(VALUES, ("class", "box"), 0.01, 4, step)
    logger.close()
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(("idle", "share"), [(None, 1 / 3), (0.3, 0.1)], ids=["cpu", "gpu"])
def test_waiting_for_data_is_part_of_a_step_and_shown(idle, share, tmp_path, monkeypatch):
    ticks = iter(range(1000))  # each reading of the clock is a second later
    monkeypatch.setattr("detector.step_clock.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    logger = Logger(tmp_path, every=1)
    batches = iter(["a batch"] * 8)
    for step in range(1, 9):
        if step in (1, 5):  # where an epoch starts
            logger.start(step=step - 1, total_steps=8)
        assert logger.clock.next_batch(batches, SimpleNamespace(idle=lambda: idle and (lambda: idle))) == "a batch"
        logger.step(VALUES, ("class", "box"), 0.01, 3, step)
        logger.clock.step_done()
    assert logger.clock.next_batch(batches) is None
    logger.close()
    assert logger.clock.seconds_per_step == 3
    assert scalars(tmp_path, "speed/data_wait")[8] == pytest.approx(share)
    assert scalars(tmp_path, "speed/images_per_second")[8] == 1


def test_say_goes_to_standard_output(tmp_path, capsys):
    logger = Logger(tmp_path, every=1)
    logger.say("hello")
    logger.close()
    assert capsys.readouterr() == ("hello\n", "")


@pytest.mark.parametrize("name", ["a/b", "ü b", "x (id 3)"])
def test_class_names_of_any_kind_are_accepted(tmp_path, name):
    logger = Logger(tmp_path, every=1)
    logger.tensorboard.metrics({"AP": 0.5, "per_class": {name: {"AP": 0.5}}}, 1)
    logger.close()
    assert len(read(tmp_path).Tags()["scalars"]) == 2


def test_gradients_are_logged_as_shares_and_histograms_at_their_interval(tmp_path):
    logger = Logger(tmp_path, every=1, gradients_every=50)
    assert [step for step in range(1, 151) if logger.wants_gradients(step)] == [50, 100, 150]
    logger.start(0, 120)
    assert [step for step in range(1, 121) if logger.wants_gradients(step)] == [50, 100, 120]
    regions = Regions(torch.tensor([90, 0, 0, 0, 0, 0, 0, 0, 0, 10]), torch.tensor([1.0] + [0] * 8 + [3]).double())
    logger.gradients(Observation(regions, regions), 50)
    logger.close()
    assert scalars(tmp_path, "gradient/class_easy") == {50: 0.25}
    assert scalars(tmp_path, "gradient/box_outlier") == {50: 0.75}
    events = read(tmp_path)
    assert set(events.Tags()["histograms"]) == {
        f"gradient_{name}/{curve}"
        for name in ("class", "box")
        for curve in ("count_log10", "density_log10_plus_6", "beta_log10_plus_3", "gradient")
    }
    histogram = events.Histograms("gradient_class/gradient")[0].histogram_value
    assert histogram.bucket[0] == 1 and histogram.bucket[-1] == 3 and histogram.bucket_limit[-1] == 1


def test_without_a_folder_no_gradients_are_wanted():
    logger = Logger(None, every=1, gradients_every=1)
    logger.start(0, 2)
    assert not logger.wants_gradients(1) and not logger.wants_gradients(2)
    logger.close()


def test_curves_that_cannot_be_written_are_reported_and_left_out(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file where the folder should be")
    logger = Logger(tmp_path / "taken", every=1)
    log(logger, range(1, 3))
    logger.close()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("TensorBoard: its files cannot be written")


def test_a_disk_that_fills_up_ends_the_curves_and_not_the_run(tmp_path, capsys, monkeypatch):
    logger = Logger(tmp_path, every=1)
    log(logger, [1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logger.tensorboard._writer, "add_scalar", full)
    log(logger, range(2, 5))
    logger.close()
    assert capsys.readouterr().out.count("No space left on device") == 1
