"""The content of a checkpoint, how it is written, and the messages for other files."""

import os
import pickle
import random

import pytest
import torch

from detector import checkpoint
from detector.errors import UserError


def test_a_checkpoint_is_plain_and_complete(saved, same):
    path, run = saved
    content = torch.load(path, weights_only=True)
    assert (content["category_ids"], content["class_names"]) == (run.category_ids, run.class_names)
    assert content["config"] == run.cfg.model_dump(mode="json")
    assert same(dict(content["run"]["criterion"]), dict(run.criterion.state_dict()))
    rebuilt_model, rebuilt_cfg = checkpoint.build_model(checkpoint.read(path), path)
    assert rebuilt_cfg == run.cfg and not rebuilt_model.training
    assert same(dict(rebuilt_model.state_dict()), dict(run.solver.model.state_dict()))
    assert os.listdir(path.parent) == ["last.pt"]


def test_the_averaged_weights_are_the_model_of_the_checkpoint(make_run, folder):
    run = make_run(solver={"ema": 0.9})
    with torch.no_grad():
        run.solver.model.head.logits.bias += 1
    checkpoint.save(folder / "x.pt", run.content())
    content = checkpoint.read(folder / "x.pt")
    assert torch.allclose(content["run"]["model"]["head.logits.bias"], content["model"]["head.logits.bias"] + 1)


def test_a_full_disk_leaves_the_old_files_and_says_what_is_needed(saved, folder, full_disk):
    _, run = saved
    path = folder / "last.pt"
    path.write_bytes(b"the old one")
    raises_user_error = pytest.raises(UserError, match=r"last.pt: cannot be written .* it takes \d\d+ MB, .* --resume")
    with full_disk(2**20), raises_user_error as error:
        checkpoint.save(path, run.content())
    assert "\n" not in str(error.value)
    assert path.read_bytes() == b"the old one" and os.listdir(folder) == ["last.pt"]


@pytest.fixture(scope="module")
def two(saved, tmp_path_factory):
    """A folder where last.pt has best 0.6 and previous.pt has best 0.5."""
    folder = tmp_path_factory.mktemp("two")
    content = saved[1].content()
    for best in (0.5, 0.6):
        checkpoint.save(folder / "last.pt", {**content, "run": {**content["run"], "best": best}})
    return folder


def test_the_newest_intact_checkpoint_is_taken(two, folder):
    assert checkpoint.newest(folder) is None
    path, content, damaged = checkpoint.newest(two)
    assert (path.name, content["run"]["best"], damaged) == ("last.pt", 0.6, [])
    last_bytes = (two / "last.pt").read_bytes()
    (folder / "previous.pt").write_bytes((two / "previous.pt").read_bytes())
    flipped_bytes = bytearray(last_bytes)
    flipped_bytes[len(last_bytes) // 2] ^= 4
    for damaged in (last_bytes[: len(last_bytes) // 2], last_bytes[:-1], b"", bytes(flipped_bytes)):
        (folder / "last.pt").write_bytes(damaged)
        path, content, damaged = checkpoint.newest(folder)
        assert (path.name, content["run"]["best"]) == ("previous.pt", 0.5)
        assert len(damaged) == 1 and damaged[0].startswith(str(folder / "last.pt")) and "\n" not in damaged[0]
    (folder / "previous.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no earlier checkpoint"):
        checkpoint.newest(folder)


def test_a_flipped_bit_is_detected_or_changes_nothing(two, folder, same):
    expected = checkpoint.read(two / "last.pt")
    original_bytes = (two / "last.pt").read_bytes()
    rng, num_detected, path = random.Random(0), 0, folder / "x.pt"
    # The archive's names and tables lie at its ends.
    end_offsets = [*range(0, 2000, 97), *range(len(original_bytes) - 20000, len(original_bytes), 997)]
    for offset in end_offsets + [rng.randrange(len(original_bytes)) for _ in range(15)]:
        damaged_bytes = bytearray(original_bytes)
        damaged_bytes[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged_bytes)
        try:
            assert same(checkpoint.read(path), expected)
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            num_detected += 1
    assert num_detected > 20


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
    assert (f"is a folder; give a file, such as {path / 'best.pt'}" in str(error.value)) == (kind == "folder")
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
        {"category_ids": [3, 7]},
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


@pytest.mark.parametrize("key", ["class_names", "score_thresholds"])
def test_classes_that_do_not_agree_are_refused(two, folder, key):
    content = checkpoint.read(two / "last.pt")
    torch.save({**content, key: []}, folder / "unknown.pt")
    assert checkpoint.read(folder / "unknown.pt")[key] == []
    torch.save({**content, key: content[key][:-1] or [0.1, 0.2]}, folder / "fewer.pt")
    with pytest.raises(UserError, match=f"fewer.pt: its classes do not agree .*{key} of"):
        checkpoint.read(folder / "fewer.pt")


def test_thresholds_and_names_have_defaults(saved):
    content = checkpoint.read(saved[0])
    assert checkpoint.score_thresholds(content) == [0.5, -1.0, 0.25]
    assert checkpoint.score_thresholds(content, unknown=0.3) == [0.5, 0.3, 0.25]
    assert checkpoint.class_names(content) == ["cat", "dog", "cow"]
    del content["score_thresholds"]
    content["class_names"] = []
    assert checkpoint.score_thresholds(content, unknown=0.3) == [0.3] * 3
    assert checkpoint.class_names(content) == ["category 3", "category 7", "category 11"]
