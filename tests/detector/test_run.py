"""When a run evaluates and saves. Resuming restores its complete state or refuses."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from detector import checkpoint
from detector.checkpoint import Saved
from detector.configure import configure
from detector.errors import UserError
from detector.pretrained import load_initial_weights
from detector.randomness import random_states, set_random_states
from detector.run import checkpoint_to_resume


def read(path) -> Saved:
    return Saved(path, checkpoint.read(path), [])


def at(run, step, **state):
    run.solver.step_count = step
    for name, value in state.items():
        setattr(run, name, value)
    return run


@pytest.fixture(scope="module")
def every_second_epoch(make_run):
    """A run of four epochs of five steps: it evaluates after every second epoch and saves every third step."""
    return make_run(solver={"epochs": 4}, evaluation={"every": 2}, checkpoint={"every": 3})


def test_a_run_pauses_at_the_end_of_each_epoch_and_before_each_save(every_second_epoch):
    pauses = [at(every_second_epoch, step).next_pause for step in range(12)]
    assert pauses == [3, 3, 3, 5, 5, 6, 9, 9, 9, 10, 12, 12]
    assert at(every_second_epoch, 7).position == (1, 2)
    assert [at(every_second_epoch, step).epoch for step in (0, 1, 5, 6)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("step", "evaluated", "due"),
    [(0, 0, False), (5, 0, False), (9, 0, False), (10, 0, True), (10, 10, False), (20, 10, True), (20, 20, True)],
)
def test_evaluation_is_due_after_its_epochs_and_always_at_the_end(every_second_epoch, step, evaluated, due):
    assert at(every_second_epoch, step, evaluated_step=evaluated).evaluation_due is due


def test_the_best_evaluation_is_saved_as_best(make_run, monkeypatch):
    run, saves = make_run(), []
    monkeypatch.setattr(checkpoint, "save", lambda path, content: saves.append((path.name, content["run"]["best"])))
    for step, ap in ((5, 0.2), (10, 0.1), (15, 0.3)):
        per_class = {"cat": {"threshold": ap}, "cow": {"threshold": 0.9}}
        at(run, step).record_and_save({"AP": ap, "per_class": per_class})
        assert run.evaluated_step == step and run.score_thresholds == [ap, -1.0, 0.9]
    assert saves == [("best.pt", 0.2), ("last.pt", 0.2), ("last.pt", 0.2), ("best.pt", 0.3), ("last.pt", 0.3)]


def test_a_checkpoint_has_the_keys_of_format_3(saved):
    content = checkpoint.read(saved[0])
    assert content["format"] == 3
    assert set(content) == {"format", "config", "category_ids", "class_names", "score_thresholds", "model", "run"}
    assert set(content["run"]) == {
        "model", "solver", "criterion", "rng", "epoch", "evaluated", "best", "seconds_per_step", "peak_memory",
        "data",
    }  # fmt: skip


def test_a_new_run_overwrites_no_other_run(make_run, folder, saved):
    cfg = make_run(output=str(folder), run="x").cfg
    assert checkpoint_to_resume(cfg, resume=False) is None and checkpoint_to_resume(cfg, resume=True) is None
    cfg.folder.mkdir()
    (cfg.folder / "previous.pt").write_bytes(saved[0].read_bytes())
    with pytest.raises(UserError, match="already holds a run: continue with --resume"):
        checkpoint_to_resume(cfg, resume=False)
    assert checkpoint_to_resume(cfg, resume=True).path == cfg.folder / "previous.pt"


def test_a_finished_run_is_not_overwritten(make_run, folder, saved):
    cfg = make_run(output=str(folder), run="x").cfg
    cfg.folder.mkdir()
    (cfg.folder / "best.pt").write_bytes(saved[0].read_bytes())  # scripts/ablate.py removes last.pt
    with pytest.raises(UserError, match="already holds a run"):
        checkpoint_to_resume(cfg, resume=False)


def test_resume_restores_the_state(make_run, saved, same):
    path, run = saved
    other = make_run(class_loss={"name": "ghm_c"})
    assert not same(dict(other.solver.model.state_dict()), dict(run.solver.model.state_dict()))
    earlier_draw = torch.rand(1)
    assert other.resume(read(path)) == []
    assert same(other.content() | {"run": None}, run.content() | {"run": None})
    for key in ("model", "solver", "criterion", "epoch", "evaluated", "best", "seconds_per_step", "peak_memory"):
        assert same(other.content()["run"][key], run.content()["run"][key]), key
    assert torch.rand(1) != earlier_draw
    random_numbers = []
    for _ in range(2):
        other.resume(read(path))
        random_numbers.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
    assert random_numbers[0] == random_numbers[1]


def test_states_of_gpus_belong_to_trainings_on_gpus(make_run, monkeypatch):
    """To ask for them would take memory of a GPU. A checkpoint of any training has some if it is older."""
    restored, on_gpus = [], [torch.zeros(16), torch.ones(16)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: on_gpus)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    states = make_run().content()["run"]["rng"]
    assert states["cuda"] == []
    for device in ("cpu", "cuda"):
        set_random_states(states | {"cuda": on_gpus}, torch.device(device))
    assert restored == [on_gpus] and random_states(torch.device("cuda:1"))["cuda"] == on_gpus
    set_random_states(states, torch.device("cuda"))  # from a training on the CPU
    assert len(restored) == 1


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"class_loss": {"name": "focal"}}, "was trained with class_loss"),
        ({"class_loss": {"name": "ghm_c", "bins": 10}}, "was trained with class_loss"),
        ({"class_loss": {"name": "ghm_c"}, "box_loss": {"name": "l1"}}, "was trained with box_loss"),
        ({"class_loss": {"name": "ghm_c"}, "solver": {"optimizer": "adamw"}}, "was trained with solver.optimizer"),
        (
            {"class_loss": {"name": "ghm_c"}, "model": {"head": {"width": 64, "depth": 1}}},
            "was trained with model.head.width 32",
        ),
        ({"class_loss": {"name": "ghm_c"}, "solver": {"weight_decay": 0.5}}, "was trained with solver.weight_decay"),
        (
            {"class_loss": {"name": "ghm_c"}, "anchors": {"name": "grid", "octaves": 1, "ratios": [1, 2, 3]}},
            "with anchors",
        ),
    ],
    ids=str,
)
def test_resuming_another_kind_of_run_is_refused(make_run, saved, sections, expected):
    with pytest.raises(UserError, match=expected) as error:
        make_run(**sections).resume(read(saved[0]))
    assert "\n" not in str(error.value)


def test_all_changes_are_named_and_may_be_accepted(make_run, saved):
    sections = {"class_loss": {"name": "ghm_c", "weight": 2.0}, "solver": {"weight_decay": 0.5}}
    run, old_checkpoint = make_run(**sections), read(saved[0])
    with pytest.raises(
        UserError,
        match=r"(class_loss.weight|solver.weight_decay) .*; (class_loss.weight|solver.weight_decay) .*--accept-changes",
    ):
        run.resume(old_checkpoint)
    changes = run.resume(old_checkpoint, accept_changes=True)
    assert sorted(changes) == [
        "changed: class_loss.weight 1.0, now 2.0",
        "changed: solver.weight_decay 0.0001, now 0.5",
    ]


def test_accepted_changes_reach_the_optimizer_and_its_state_stays(make_run, saved, same):
    run = make_run(class_loss={"name": "ghm_c"}, solver={"weight_decay": 0.5, "momentum": 0.1})
    run.resume(read(saved[0]), accept_changes=True)
    groups = run.solver.optimizer.param_groups
    assert {group["momentum"] for group in groups} == {0.1} and {group["weight_decay"] for group in groups} == {0.5, 0}
    states = [each.solver.optimizer.state_dict()["state"] for each in (run, saved[1])]
    assert same(*states)


def test_a_folder_in_which_another_process_trains_is_refused(make_run, folder):
    run = make_run(output=str(folder), run="x")
    run.open_folder()
    config_file, open_again = (
        run.cfg.folder / "config.yaml",
        f"""
from pathlib import Path
from detector.run import locked
print(locked(Path({str(run.cfg.folder / "config.yaml")!r}).open("a")))
""",
    )
    answers = []
    for _ in range(2):
        other = subprocess.run([sys.executable, "-c", open_again], capture_output=True, text=True, timeout=300)
        answers.append(other.stdout.strip() or other.stderr)
        run.lock.close()  # as at its end
    assert answers == ["False", "True"] and configure(str(config_file)) == run.cfg


def test_a_run_of_another_version_is_not_resumed_but_its_weights_can_be_used(make_run, saved, folder, same):
    model = saved[1].solver.model
    run = make_run(class_loss={"name": "ghm_c"})
    before = {key: value.clone() for key, value in run.solver.model.state_dict().items()}
    path = folder / "older.pt"
    one_group = {"state": {}, "param_groups": [{**run.solver.optimizer.state_dict()["param_groups"][0]}]}
    content = checkpoint.read(saved[0])
    for number in (1, 2):  # format 2 had one group of parameters
        torch.save({**content, "format": number}, path)
        content["run"]["solver"]["optimizer"] = one_group
        with pytest.raises(UserError, match=rf"older.pt: .* norms and biases .*--set run=NAME model.weights={path}$"):
            run.resume(read(path))
        assert same(before, dict(run.solver.model.state_dict()))
        rebuilt_model, _ = checkpoint.build_model(checkpoint.read(path), path)
        new_run = make_run(model={"weights": str(path)})
        load_initial_weights(new_run.solver.model, new_run.cfg, new_run.class_names)
        assert same(dict(rebuilt_model.state_dict()), dict(model.state_dict()))
        assert same(dict(new_run.solver.model.state_dict()), dict(model.state_dict()))


def test_other_classes_are_refused_and_a_longer_run_is_not(make_run, saved):
    run = make_run(class_loss={"name": "ghm_c"}, solver={"epochs": 40})
    run.resume(read(saved[0]))
    run.category_ids = [*run.category_ids[:-1], 999]
    with pytest.raises(UserError, match="was trained with the classes"):
        run.resume(read(saved[0]))


def test_other_annotations_under_the_same_path_are_refused(make_run, saved):
    run = make_run(class_loss={"name": "ghm_c"})
    run.data = {**run.data, "data.train": "more boxes"}
    with pytest.raises(UserError, match=r"was trained with data\.train: some boxes, now more boxes: continue"):
        run.resume(read(saved[0]))
    assert run.resume(read(saved[0]), accept_changes=True) == ["changed: data.train: some boxes, now more boxes"]
    assert (run.evaluated_step, run.best_ap) == (4, 0.5)
    older = read(saved[0])
    del older.content["run"]["data"]  # a checkpoint from before this was saved
    assert run.resume(older) == []


def test_the_best_ap_on_other_validation_images_is_forgotten(make_run, saved):
    run = make_run(class_loss={"name": "ghm_c"})
    run.data = {**run.data, "data.val": "harder ones"}
    run.resume(read(saved[0]), accept_changes=True)
    assert (run.evaluated_step, run.best_ap) == (0, float("-inf"))


def test_averaging_that_begins_on_resuming_begins_with_the_trained_weights(make_run, saved, same):
    run = make_run(class_loss={"name": "ghm_c"}, solver={"ema": 0.9})
    run.resume(read(saved[0]), accept_changes=True)
    assert same(dict(run.solver.evaluated_model.state_dict()), dict(saved[1].solver.model.state_dict()))


def test_only_files_that_exist_are_named(make_run, folder):
    run = make_run(output=str(folder), run="x", tensorboard={"images": 0})
    run.cfg.folder.mkdir()
    for name in ("last.pt", "detections.png"):  # the pictures are of an earlier training, which drew some
        (run.cfg.folder / name).touch()
    assert run.describe_files() == f"in {folder}/x: last.pt"
    run = make_run(output=str(folder), run="x")
    (run.cfg.folder / "events.out.tfevents.1").touch()
    assert run.describe_files() == f"in {folder}/x: last.pt, detections.png; tensorboard --logdir {folder}"


def test_an_option_that_is_newer_than_the_run_has_its_default(make_run, saved):
    old_checkpoint = read(saved[0])
    del old_checkpoint.content["config"]["class_loss"]["max_weight"]
    assert make_run(class_loss={"name": "ghm_c"}).resume(old_checkpoint) == []
    old_checkpoint = read(saved[0])
    del old_checkpoint.content["config"]["class_loss"]["max_weight"]
    with pytest.raises(UserError, match=r"was trained with class_loss\.max_weight None, now 30"):
        make_run(class_loss={"name": "ghm_c", "max_weight": 30}).resume(old_checkpoint)


def test_weights_alone_cannot_be_resumed(make_run, saved):
    old_checkpoint = read(saved[0])
    del old_checkpoint.content["run"]
    with pytest.raises(UserError, match=r"no state to resume .* model.weights"):
        make_run().resume(old_checkpoint)
