"""What a checkpoint holds, how it is written, and what is said of files that are none."""

import os
import pickle
import random

import numpy as np
import pytest
import torch
import torchvision

from detector import assemble, checkpoint
from detector.config import Config
from detector.errors import UserError

IDS, NAMES = [3, 7, 11], ["cat", "dog", "cow"]
THRESHOLDS = [0.5, -1.0, 0.25]


def make(classes=3, head_width=32, **sections):
    model = {"backbone": "resnet18", "weights": "none", "norm": "bn", "fpn_channels": 32, "head": {"width": head_width,
             "depth": 1}}  # fmt: skip
    cfg = Config(model={**model, **sections.pop("model", {})}, **sections)
    cfg = assemble.complete(cfg, "test")
    net = assemble.build_model(cfg, classes)
    return cfg, net, assemble.build_criterion(cfg), assemble.build_solver(cfg, net, steps_per_epoch=5)


def save(path, cfg, solver, criterion, best=0.5):
    about = {"category_ids": IDS, "class_names": NAMES, "score_thresholds": THRESHOLDS, "peak_memory": 0}
    about |= {"epoch": 1, "evaluated": 4, "best": best, "seconds_per_step": None}
    checkpoint.save(path, cfg, solver, criterion, **about)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    cfg, model, criterion, solver = make(class_loss={"name": "ghm_c"})
    criterion.class_loss.average += torch.arange(30.0)
    save(folder / "last.pt", cfg, solver, criterion)
    yield folder / "last.pt", cfg, model, criterion
    (folder / "last.pt").unlink()


def test_a_checkpoint_is_plain_and_complete(saved, same):
    path, cfg, model, criterion = saved
    content = torch.load(path, weights_only=True)
    assert (content["category_ids"], content["class_names"]) == (IDS, NAMES)
    assert content["config"] == cfg.model_dump(mode="json")
    assert same(dict(content["run"]["criterion"]), dict(criterion.state_dict()))
    rebuilt, rebuilt_cfg = checkpoint.build_model(checkpoint.read(path), path)
    assert rebuilt_cfg == cfg and not rebuilt.training
    assert same(dict(rebuilt.state_dict()), dict(model.state_dict()))
    assert os.listdir(path.parent) == ["last.pt"]


def test_the_averaged_weights_are_the_model_of_the_checkpoint(folder, same):
    cfg, model, criterion, solver = make(solver={"ema": 0.9})
    with torch.no_grad():
        model.head.logits.bias += 1
    save(folder / "x.pt", cfg, solver, criterion)
    content = checkpoint.read(folder / "x.pt")
    assert torch.allclose(content["run"]["model"]["head.logits.bias"], content["model"]["head.logits.bias"] + 1)


def test_a_full_disk_leaves_the_old_files_and_says_what_is_needed(saved, folder, full_disk):
    _, cfg, _, criterion = saved
    solver = make(class_loss={"name": "ghm_c"})[3]
    path = folder / "last.pt"
    path.write_bytes(b"the old one")
    refused = pytest.raises(UserError, match=r"last.pt: cannot be written .* it takes \d\d+ MB, .* --resume")
    with full_disk(2**20), refused as error:
        save(path, cfg, solver, criterion)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == b"the old one" and os.listdir(folder) == ["last.pt"]


@pytest.fixture(scope="module")
def two(saved, tmp_path_factory):
    """A folder with last.pt of best 0.6 and previous.pt of best 0.5."""
    folder = tmp_path_factory.mktemp("two")
    _, cfg, _, criterion = saved
    solver = make(class_loss={"name": "ghm_c"})[3]
    for best in (0.5, 0.6):
        save(folder / "last.pt", cfg, solver, criterion, best=best)
    return folder


def test_the_newest_whole_checkpoint_is_taken(two, folder):
    assert checkpoint.newest(folder) is None
    path, content, broken = checkpoint.newest(two)
    assert (path.name, content["run"]["best"], broken) == ("last.pt", 0.6, [])
    whole = (two / "last.pt").read_bytes()
    (folder / "previous.pt").write_bytes((two / "previous.pt").read_bytes())
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 4
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", bytes(middle)):
        (folder / "last.pt").write_bytes(damaged)
        path, content, broken = checkpoint.newest(folder)
        assert (path.name, content["run"]["best"]) == ("previous.pt", 0.5)
        assert len(broken) == 1 and broken[0].startswith(str(folder / "last.pt")) and "\n" not in broken[0]
    (folder / "previous.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no earlier checkpoint"):
        checkpoint.newest(folder)


def test_a_flipped_bit_is_found_or_changes_nothing(two, folder, same):
    truth = checkpoint.read(two / "last.pt")
    whole = (two / "last.pt").read_bytes()
    rng, found, path = random.Random(0), 0, folder / "x.pt"
    ends = [*range(0, 2000, 97), *range(len(whole) - 20000, len(whole), 997)]  # names and tables of the archive
    for place in ends + [rng.randrange(len(whole)) for _ in range(15)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(checkpoint.read(path), truth)
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            found += 1
    assert found > 20


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "bytes", "pickle", "torch-pickle", "list", "dict",
                                  "state", "numbers", "folder"])  # fmt: skip
def test_strangers_files_are_refused_in_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "stranger.pt"
    generator = torch.Generator().manual_seed(0)
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "text", "bytes", "pickle"):
        noise = bytes(torch.randint(0, 256, (5000,), generator=generator).tolist())
        path.write_bytes(
            {"empty": b"", "text": b"hello\nworld\n", "bytes": noise, "pickle": pickle.dumps(Evil())}[kind]
        )
    elif kind != "missing":
        content = {"torch-pickle": Evil(), "list": [1], "dict": {"weights": 1}, "state": {"fc.bias": torch.zeros(2)},
                   "numbers": {1: 2}}  # fmt: skip
        torch.save(content[kind], path)
    with pytest.raises(UserError) as error:
        checkpoint.read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert not (tmp_path / "evil-was-here").exists()


def test_random_bytes_never_give_a_traceback(tmp_path):
    path = tmp_path / "noise.pt"
    generator = torch.Generator().manual_seed(1)
    for prefix in (b"", b"\x80\x02", b"PK\x03\x04", b"\x80\x04\x95", b"(", b"]"):
        for _ in range(10):
            path.write_bytes(prefix + bytes(torch.randint(0, 256, (60,), generator=generator).tolist()))
            with pytest.raises(UserError, match="not a readable weights file") as error:
                checkpoint.read(path)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"config": 3},
        {"config": {"solver": {"lr": -1}}},
        {"config": {}},
        {"category_ids": 3},
        {"category_ids": IDS[:2]},
        {"model": None},
        {"model": {}},
        {"model": [1]},
    ],
    ids=str,
)
def test_a_checkpoint_whose_parts_do_not_fit_is_refused_in_one_line(saved, folder, change):
    path = folder / "x.pt"
    torch.save({**checkpoint.read(saved[0]), "run": None, **change}, path)
    with pytest.raises(UserError) as error:
        checkpoint.build_model(checkpoint.read(path), path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_resume_gives_back_the_state(saved, same):
    path, cfg, model, criterion = saved
    _, other, other_criterion, solver = make(class_loss={"name": "ghm_c"})
    assert not same(dict(other.state_dict()), dict(model.state_dict()))
    drawn = torch.rand(1)
    kept = checkpoint.resume(checkpoint.read(path), path, cfg, solver, other_criterion, IDS)
    rest = {"score_thresholds": THRESHOLDS, "changes": []}
    assert kept == {"evaluated": 4, "best": 0.5, "seconds_per_step": None, "peak_memory": 0} | rest
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(dict(other_criterion.state_dict()), dict(criterion.state_dict()))
    assert torch.rand(1) != drawn
    numbers = []
    for _ in range(2):
        checkpoint.resume(checkpoint.read(path), path, cfg, solver, other_criterion, IDS)
        numbers.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("key", ["class_names", "score_thresholds"])
def test_classes_that_do_not_agree_are_refused(two, folder, key):
    content = checkpoint.read(two / "last.pt")
    torch.save({**content, key: []}, folder / "unknown.pt")
    assert checkpoint.read(folder / "unknown.pt")[key] == []
    torch.save({**content, key: content[key][:-1] or [0.1, 0.2]}, folder / "fewer.pt")
    with pytest.raises(UserError, match=f"fewer.pt: its classes do not agree .*{key} of"):
        checkpoint.read(folder / "fewer.pt")


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
def test_resuming_another_kind_of_run_is_refused(saved, sections, expected):
    path = saved[0]
    cfg, _, criterion, solver = make(**sections)
    with pytest.raises(UserError, match=expected) as error:
        checkpoint.resume(checkpoint.read(path), path, cfg, solver, criterion, IDS)
    assert "\n" not in str(error.value)


def test_all_changes_are_told_and_may_be_accepted(saved):
    path, *_ = saved
    sections = {"class_loss": {"name": "ghm_c", "weight": 2.0}, "solver": {"weight_decay": 0.5}}
    cfg, _, criterion, solver = make(**sections)
    content = checkpoint.read(path)
    with pytest.raises(
        UserError,
        match=r"(class_loss.weight|solver.weight_decay) .*; (class_loss.weight|solver.weight_decay) .*--accept-changes",
    ):
        checkpoint.resume(content, path, cfg, solver, criterion, IDS)
    kept = checkpoint.resume(content, path, cfg, solver, criterion, IDS, accept_changes=True)
    assert sorted(kept["changes"]) == ["class_loss.weight 1.0, now 2.0", "solver.weight_decay 0.0001, now 0.5"]


def test_a_run_of_another_version_is_not_resumed_and_its_weights_are_of_use(saved, folder, same):
    _, cfg, model, criterion = saved
    solver = make(class_loss={"name": "ghm_c"})[3]
    before = {key: value.clone() for key, value in solver.model.state_dict().items()}
    path = folder / "older.pt"
    one_group = {"state": {}, "param_groups": [{**solver.optimizer.state_dict()["param_groups"][0]}]}
    content = checkpoint.read(saved[0])
    for number in (1, 2):  # 2 had one group of parameters
        torch.save({**content, "format": number}, path)
        content["run"]["solver"]["optimizer"] = one_group
        with pytest.raises(UserError, match=rf"older.pt: .* norms and biases .*--set run=NAME model.weights={path}$"):
            checkpoint.resume(checkpoint.read(path), path, cfg, solver, criterion, IDS)
        assert same(before, dict(solver.model.state_dict()))
        rebuilt, _ = checkpoint.build_model(checkpoint.read(path), path)
        filled, _ = initial(path, norm="bn")
        assert same(dict(rebuilt.state_dict()), dict(model.state_dict()))
        assert same(dict(filled.state_dict()), dict(model.state_dict()))


def test_other_classes_are_refused_and_a_longer_run_is_not(saved):
    path = saved[0]
    cfg, _, criterion, solver = make(class_loss={"name": "ghm_c"}, solver={"epochs": 40})
    with pytest.raises(UserError, match="was trained with the classes"):
        checkpoint.resume(checkpoint.read(path), path, cfg, solver, criterion, [*IDS[:-1], 999])
    checkpoint.resume(checkpoint.read(path), path, cfg, solver, criterion, IDS)


def test_weights_alone_cannot_be_resumed(saved):
    path = saved[0]
    cfg, _, criterion, solver = make()
    content = {key: value for key, value in checkpoint.read(path).items() if key != "run"}
    with pytest.raises(UserError, match=r"no state to resume .* model.weights"):
        checkpoint.resume(content, path, cfg, solver, criterion, IDS)


def initial(weights, classes=3, **changes):
    """A fresh model filled from a file, and what is said of it."""
    cfg, model, _, _ = make(classes, model={"weights": str(weights), **changes})
    return model, checkpoint.load_initial_weights(model, cfg)


def test_no_weights_leave_the_random_ones(same):
    cfg, model, _, _ = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert checkpoint.load_initial_weights(model, cfg) == "random weights"
    assert same(before, dict(model.state_dict()))


def test_a_backbones_file_fills_the_backbone(folder):
    torch.manual_seed(5)
    resnet = torchvision.models.resnet18(weights=None)
    torch.save(resnet.state_dict(), folder / "resnet18.pt")
    model, told = initial(folder / "resnet18.pt")
    assert torch.equal(model.backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
    assert torch.equal(model.backbone.bn1.running_var, resnet.bn1.running_var)
    assert str(folder / "resnet18.pt") in told and "backbone" in told
    with pytest.raises(UserError, match="is no resnet34") as error:
        initial(folder / "resnet18.pt", backbone="resnet34")
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_other_classes_fills_all_but_the_class_outputs(saved):
    path, _, trained, _ = saved
    model, told = initial(path, classes=5)
    outputs = {"head.logits.weight", "head.logits.bias"}
    given = trained.state_dict()
    for key, value in model.state_dict().items():
        assert (key in outputs) != (value.shape == given[key].shape and torch.equal(value, given[key])), key
    assert all(key in told for key in outputs) and str(path) in told
    assert "random" not in initial(path, classes=3)[1]


@pytest.mark.parametrize("change", [{"backbone": "resnet34"}, {"norm": "gn"}], ids=str)
def test_a_checkpoint_of_another_backbone_or_norm_is_refused(saved, change):
    # ResNet-18 and -34 share most names and shapes: taking what fits would leave half the network random.
    with pytest.raises(UserError, match=r"is of another backbone or norm") as error:
        initial(saved[0], **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, {"category_ids": [1]}, {}])
def test_weights_of_something_else_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt") as error:
        initial(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_a_typing_error_in_weights_names_the_key():
    with pytest.raises(UserError, match=r"model\.weights: imagnet: no such file"):
        initial("imagnet")
