import errno
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data import loader
from data.coco import CocoDataset
from data.images import remark_lines
from data.loader import EvalSampler, TrainSampler, collate, eval_loader, train_loader
from data.transforms import EvalTransform, TrainTransform
from detector.errors import SIGNALS, Stopped, UserError
from detector.structures import Target

ASPECTS = np.random.default_rng(0).uniform(0.5, 1.8, 53).tolist()


@pytest.fixture
def folder(tmp_path):
    """Eleven noisy images, one box in all but the first."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(11):
        height, width = generator.integers(20, 60, 2).tolist()
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
        if i:
            annotations.append({"id": i, "image_id": 100 + i, "category_id": 2, "bbox": [2, 3, 10, 12]})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 2, "name": "thing"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    return tmp_path


def dataset(folder, transform):
    return CocoDataset(folder / "annotations.json", folder, transform)


def assert_same(one, other):
    assert torch.equal(one.images, other.images)
    assert one.image_ids == other.image_ids
    assert one.sizes == other.sizes and one.original_sizes == other.original_sizes
    for a, b in zip(one.targets, other.targets):
        assert torch.equal(a.boxes, b.boxes) and torch.equal(a.labels, b.labels)


# ------------------------------------------------------------------------------------------------- collate


def test_collate_pads_at_right_and_bottom():
    images = [torch.full((3, h, w), 7, dtype=torch.uint8) for h, w in ((33, 20), (10, 64))]
    targets = [Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), Target(torch.ones(2, 4), torch.ones(2))]
    batch = collate([(images[0], targets[0], 5, (99, 60)), (images[1], targets[1], 3, (10, 64))])
    assert batch.images.shape == (2, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert batch.sizes == [(33, 20), (10, 64)] and batch.original_sizes == [(99, 60), (10, 64)]
    assert batch.image_ids == [5, 3] and batch.targets[1] is targets[1]
    for padded, image in zip(batch.images, images):
        h, w = image.shape[1:]
        assert torch.equal(padded[:, :h, :w], image)
        assert padded.sum() == image.sum()


def test_collate_keeps_every_pixel(folder):
    data = dataset(folder, TrainTransform(40, 90, vertical_flip=0.5, scale_jitter=(0.5, 1.5)))
    for seed in range(5):
        samples = [data[index, seed] for index in range(len(data))]
        images = collate(samples).images
        assert images.is_contiguous() and images.shape[2] % 32 == 0 and images.shape[3] % 32 == 0
        expected = torch.zeros_like(images)
        for padded, (image, *_) in zip(expected, samples):
            padded[:, : image.shape[1], : image.shape[2]] = image
        assert torch.equal(images, expected)


# ------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("aspects, size", [(ASPECTS, 4), (ASPECTS, 53), (ASPECTS[:3], 8), (ASPECTS[:1], 5)])
def test_an_epoch_shows_each_image_in_whole_batches(aspects, size):
    sampler = TrainSampler(aspects, size, seed=1)
    for epoch in range(3):
        sampler.set_position(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == -(-len(aspects) // size)
        assert all(len(batch) == size for batch in batches)
        seen = Counter(index for batch in batches for index, _ in batch)
        assert set(seen) == set(range(len(aspects)))
        assert sum(seen.values()) - len(aspects) < size


def test_batches_hold_like_shapes_but_for_the_left_overs():
    batches = [[ASPECTS[index] >= 1 for index, _ in batch] for batch in TrainSampler(ASPECTS, 4, seed=1)]
    assert sum(len(set(batch)) > 1 for batch in batches) <= 2  # fewer than 2 x 4 images are left over
    first = [batch[0] for batch in batches]
    assert sum(a != b for a, b in itertools.pairwise(first)) > 3  # landscape and portrait take turns at random


def test_epochs_and_seeds_differ_and_repeat():
    def epoch(seed, number):
        sampler = TrainSampler(ASPECTS, 4, seed=seed)
        sampler.set_position(number)
        return list(sampler)

    assert epoch(1, 2) == epoch(1, 2)
    assert epoch(1, 2) != epoch(1, 3) != epoch(2, 3)
    seeds = [seed for number in range(3) for batch in epoch(1, number) for _, seed in batch]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert len(set(seeds)) == 3 * 53  # an image has one seed an epoch, and another in the next


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_see_what_one_sees(world_size):
    alone = list(TrainSampler(ASPECTS, 8, seed=1))
    parts = [
        list(TrainSampler(ASPECTS, 8 // world_size, seed=1, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for whole, *shares in zip(alone, *parts, strict=True):
        assert all(len(share) == 8 // world_size for share in shares)
        assert sorted(whole) == sorted(item for share in shares for item in share)


@pytest.mark.parametrize("batch", [0, 1, 6, 14])
def test_resuming_gives_the_rest_of_the_epoch(batch):
    sampler = TrainSampler(ASPECTS, 4, seed=1)
    sampler.set_position(5)
    whole = list(sampler)
    resumed = TrainSampler(ASPECTS, 4, seed=1)
    resumed.set_position(5, batch)
    assert list(resumed) == whole[batch:]
    resumed.set_position(5)
    assert list(resumed) == whole and len(resumed) == len(whole) == 14


@pytest.mark.parametrize("world_size", [1, 3, 20])
def test_evaluation_sees_each_image_once_in_order_of_shape(world_size):
    samplers = [EvalSampler(ASPECTS, 4, rank, world_size) for rank in range(world_size)]
    assert sorted(i for sampler in samplers for batch in sampler for i in batch) == list(range(53))
    for sampler in samplers:
        aspects = [ASPECTS[index] for batch in sampler for index in batch]
        assert aspects == sorted(aspects) and len(list(sampler)) == len(sampler)


def test_batch_size_must_be_positive():
    for make in (lambda: TrainSampler(ASPECTS, 0, seed=1), lambda: EvalSampler(ASPECTS, 0)):
        with pytest.raises(UserError, match="batch size is 0"):
            make()


# -------------------------------------------------------------------------------------------------- loaders


def test_workers_do_not_change_the_batches(folder):
    data = dataset(folder, TrainTransform(32, 64, vertical_flip=0.5, scale_jitter=(0.7, 1.4), strong=True))
    epochs = {}
    for workers in (0, 1, 2):
        loader = train_loader(data, 3, seed=4, workers=workers)
        for epoch in (0, 1):  # the same workers twice
            loader.batch_sampler.set_position(epoch)
            epochs[workers, epoch] = list(loader)
    for epoch in (0, 1):
        assert len(epochs[0, epoch]) == 4
        for workers in (1, 2):
            for one, other in zip(epochs[0, epoch], epochs[workers, epoch], strict=True):
                assert_same(one, other)
    assert not torch.equal(epochs[0, 0][0].images, epochs[0, 1][0].images)


@pytest.mark.parametrize("workers", [0, 2])
def test_odd_images_are_counted_once_whoever_reads_them(folder, workers):
    for number in (1, 2, 7):
        (folder / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes()[:-12])
    data = dataset(folder, TrainTransform(32, 64))
    loader = train_loader(data, 3, seed=4, workers=workers)
    for epoch in range(2):
        loader.batch_sampler.set_position(epoch)
        assert len(list(loader)) == 4
    ((kind, files),) = data.image_remarks.items()
    assert kind.startswith("their last bytes missing") and files == {str(folder / f"{n}.png") for n in (1, 2, 7)}
    more = {kind: {"", *files}}
    assert remark_lines(data.image_remarks, more) == [f"images with {kind}: 4 (such as )"]


def test_resumed_batches_have_the_same_pixels(folder):
    data = dataset(folder, TrainTransform(32, 64, strong=True))
    loader = train_loader(data, 3, seed=4)
    loader.batch_sampler.set_position(3)
    whole = list(loader)
    resumed = train_loader(data, 3, seed=4, workers=1)
    resumed.batch_sampler.set_position(3, 2)
    for one, other in zip(whole[2:], resumed, strict=True):
        assert_same(one, other)


def test_eval_loader_covers_the_set_and_leaves_random_numbers_alone(folder):
    state = torch.get_rng_state()
    loader = eval_loader(dataset(folder, EvalTransform(32, 64)), 4)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert sorted(i for batch in batches for i in batch.image_ids) == list(range(100, 111))
    assert loader.dataset.category_ids == [2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_slip_in_a_worker_stays_one_line(folder, workers):
    data = dataset(folder, EvalTransform(32, 64))
    (folder / "4.png").write_bytes(b"broken")
    with pytest.raises(UserError) as excinfo:
        list(eval_loader(data, 4, workers=workers))
    message = str(excinfo.value)
    assert message.startswith(str(folder / "4.png")) and "\n" not in message and "Traceback" not in message


class Dying(CocoDataset):
    """Ends its process at one image: by a signal, or with an exit code."""

    def __getitem__(self, key):
        index = key[0] if isinstance(key, tuple) else key
        if self.image_ids[index] == 104:
            os.kill(os.getpid(), signal.SIGKILL) if self.how == "signal" else os._exit(1)
        return super().__getitem__(key)


@pytest.mark.parametrize(("workers", "how"), [(1, "exit"), (2, "signal")])
def test_a_dead_worker_is_one_line(folder, workers, how):
    data = Dying(folder / "annotations.json", folder, EvalTransform(32, 64))
    data.how = how
    with pytest.raises(UserError) as excinfo:
        for _ in eval_loader(data, 2, workers=workers):
            time.sleep(0.3)
    message = str(excinfo.value)
    assert message.startswith("a process that loads images ") and "\n" not in message
    assert any(how in message for how in ("is killed by signal: Killed", "exited unexpectedly", "has ended"))
    assert "data.workers" in message


def test_a_workers_death_is_told_between_two_batches(folder):
    loader = eval_loader(dataset(folder, EvalTransform(32, 64)), 1, workers=2)
    batches = iter(loader)
    next(batches)
    os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:  # a step, which is not to be broken off
        torch.ones(10).sum()
    with pytest.raises(UserError, match="a process that loads images"):
        list(batches)
    assert len(list(eval_loader(dataset(folder, EvalTransform(32, 64)), 1, workers=1))) == 11  # others are well


class Unsendable(CocoDataset):
    """Fails at one image not in the worker's code, but where its batch is sent."""

    def __getitem__(self, key):
        image, target, image_id, size = super().__getitem__(key)
        if image_id == 104:
            if self.how == "no room":  # a file, of /dev/shm too, may not grow beyond this
                resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
            else:
                image_id = (unit for unit in ())  # cannot be pickled
        return image, target, image_id, size


def unsendable(folder, how, workers=2):
    data = Unsendable(folder / "annotations.json", folder, EvalTransform(32, 64))
    data.how = how
    return eval_loader(data, 1, workers=workers)


def test_a_full_shared_memory_is_one_line(folder, within, capfd):
    with within(30), pytest.raises(UserError) as caught:
        list(unsendable(folder, "no room"))
    message = str(caught.value)
    expected = ("shared memory is full", "/dev/shm has ", " MB", "--shm-size", "--ipc=host", "data.workers=0")
    assert [part for part in expected if part not in message] == [] and "\n" not in message, message
    assert "Traceback" not in capfd.readouterr().err


def test_the_limit_of_open_files_is_raised(folder):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1, before[1]))
    try:
        assert len(list(eval_loader(dataset(folder, EvalTransform(32, 64)), 4, workers=1))) == 3
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_worker_whose_parent_left_in_the_middle_says_nothing(capsys):
    for error in (BrokenPipeError(), ConnectionResetError(), EOFError()):
        loader._unless_parent_left(type(error), error, None)
    assert capsys.readouterr().err == ""
    loader._unless_parent_left(ValueError, ValueError("a fault"), None)
    assert "ValueError: a fault" in capsys.readouterr().err


def test_a_fault_of_ours_in_sending_keeps_its_traceback(folder, within):
    with within(30), pytest.raises(Exception, match="Original Traceback") as caught:
        list(unsendable(folder, "bug"))
    assert not isinstance(caught.value, UserError)


def test_an_old_kernel_that_kills_instead_is_the_same_line():
    error = RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit."
    )
    assert "shared memory is full" in loader._cause(error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be started (No space left on device)"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "cannot be started (Resource temp"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "has ended"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"), None),
        (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."), None),
        (RuntimeError("shape '[2]' is invalid for input of size 1"), None),
    ],
)
def test_other_causes(error, expected):
    cause = loader._cause(error)
    assert cause is None if expected is None else expected in cause


@pytest.mark.parametrize("number", SIGNALS)
def test_workers_live_through_a_signal_to_the_group(folder, number):
    loader = eval_loader(dataset(folder, EvalTransform(32, 64)), 1, workers=2)
    batches = iter(loader)
    next(batches), next(batches)  # one of each worker: both have started
    for worker in loader._iterator._workers:
        os.kill(worker.pid, number)
    assert len(list(batches)) == 9


def test_a_signal_while_workers_start_leaves_no_handler_of_torch(folder, monkeypatch):
    """At exit they are killed, and torch's would raise there."""
    start = DataLoader.__iter__

    def interrupted(self):
        start(self)
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(DataLoader, "__iter__", interrupted)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped):
            next(iter(eval_loader(dataset(folder, EvalTransform(32, 64)), 1, workers=1)))
        assert signal.getsignal(signal.SIGCHLD) is loader._child_ended
    finally:
        signal.signal(signal.SIGCHLD, before)


def signal_mask(pid: int) -> int:
    return int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="sees blocked signals as Linux shows them")
def test_no_signal_meets_a_worker_before_it_ignores_them(folder):
    loader = eval_loader(dataset(folder, EvalTransform(32, 64)), 1, workers=1)
    before = signal_mask(os.getpid())
    next(iter(loader))
    ours = sum(1 << (number - 1) for number in SIGNALS)
    assert signal_mask(loader._iterator._workers[0].pid) & ours == ours
    assert signal_mask(os.getpid()) == before and not before & ours


class Waiting(CocoDataset):
    """Its images but the first come never, as from a disk that is gone."""

    def __getitem__(self, key):
        if key != 0:
            time.sleep(1000)
        return super().__getitem__(key)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="sees processes as Linux shows them")
@pytest.mark.parametrize("how", ["killed", "exits"])
def test_workers_end_with_their_parent(folder, within, how):
    """However busy they are, and though they ignore SIGTERM, by which Python ends its children at exit."""
    reading, writing = os.pipe()
    data = Waiting(folder / "annotations.json", folder, EvalTransform(32, 64))

    def parent():
        waiting = eval_loader(data, 1, workers=2)
        waiting.batch_sampler.batches = [[0], [1], [2], [3]]
        next(iter(waiting))
        os.write(writing, " ".join(str(child.pid) for child in multiprocessing.active_children()).encode())
        if how == "killed":
            time.sleep(1000)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    workers = []
    try:
        with within(60):
            workers = [int(pid) for pid in os.read(reading, 100).split()]
            assert len(workers) == 2
            if how == "killed":
                process.kill()
            process.join()
            while any(map(running, workers)):
                time.sleep(0.02)
    finally:
        process.kill()
        for worker in filter(running, workers):
            os.kill(worker, signal.SIGKILL)


def test_padded_sides_are_multiples_of_what_is_asked():
    samples = [(torch.full((3, 40, 70), 7, dtype=torch.uint8), None, 1, (40, 70))]
    batch = collate(samples, pad_to=128)
    assert batch.images.shape == (1, 3, 128, 128) and batch.sizes == [(40, 70)]
    assert batch.images.sum() == 3 * 40 * 70 * 7 and (batch.images[:, :, :40, :70] == 7).all()
