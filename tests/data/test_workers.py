"""Loading processes: a failure is reported in one line between two batches, and no process outlives its parent."""

import errno
import gc
import multiprocessing
import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from data import workers as processes
from data.coco import CocoDataset
from data.loader import eval_loader
from data.transforms import EvalTransform
from detector.errors import SIGNALS, Stopped, UserError


@pytest.fixture
def folder(noisy_images):
    return noisy_images


def dataset(folder, transform):
    return CocoDataset(folder / "annotations.json", folder, transform)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_in_a_worker_stays_one_line(folder, workers):
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
def test_a_dead_worker_is_reported_in_one_line(folder, workers, how):
    data = Dying(folder / "annotations.json", folder, EvalTransform(32, 64))
    data.how = how
    with pytest.raises(UserError) as excinfo:
        for _ in eval_loader(data, 2, workers=workers):
            time.sleep(0.3)
    message = str(excinfo.value)
    assert message.startswith("a process that loads images ") and "\n" not in message
    assert any(how in message for how in ("is killed by signal: Killed", "exited unexpectedly", "has ended"))
    assert "data.workers" in message


def test_a_workers_death_is_reported_between_two_batches(folder):
    loader = eval_loader(dataset(folder, EvalTransform(32, 64)), 1, workers=2)
    batches = iter(loader)
    next(batches)
    os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:  # a training step, which must not be interrupted
        torch.ones(10).sum()
    with pytest.raises(UserError, match="a process that loads images"):
        list(batches)
    assert len(list(eval_loader(dataset(folder, EvalTransform(32, 64)), 1, workers=1))) == 11  # other loaders work


class Unsendable(CocoDataset):
    """Fails at one image: not in the worker's code, but when its batch is sent."""

    def __getitem__(self, key):
        image, target, image_id, size = super().__getitem__(key)
        if image_id == 104:
            if self.how == "no room":  # no file may grow beyond this, not even in /dev/shm
                resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
            else:
                image_id = (unit for unit in ())  # cannot be pickled
        return image, target, image_id, size


def unsendable(folder, how, workers=2):
    data = Unsendable(folder / "annotations.json", folder, EvalTransform(32, 64))
    data.how = how
    return eval_loader(data, 1, workers=workers)


def test_full_shared_memory_is_reported_in_one_line(folder, within, capfd):
    with within(30), pytest.raises(UserError) as excinfo:
        list(unsendable(folder, "no room"))
    message = str(excinfo.value)
    expected = ("shared memory is full", "/dev/shm has ", " MB", "--shm-size", "--ipc=host", "data.workers=0")
    assert [part for part in expected if part not in message] == [] and "\n" not in message, message
    assert "Traceback" not in capfd.readouterr().err


def test_a_batch_takes_few_open_files_however_many_images_it_has(folder):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    loader = eval_loader(dataset(folder, EvalTransform(32, 64)), 11, workers=1)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 15, before[1]))
    try:
        (batch,) = loader  # of 11 images, boxes and labels
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(batch.targets) == 11 and any(len(target.labels) for target in batch.targets)


def test_a_worker_whose_parent_has_ended_prints_nothing(capsys):
    for error in (BrokenPipeError(), ConnectionResetError(), EOFError()):
        processes._quiet_if_parent_left(type(error), error, None)
    assert capsys.readouterr().err == ""
    processes._quiet_if_parent_left(ValueError, ValueError("a fault"), None)
    assert "ValueError: a fault" in capsys.readouterr().err


def test_a_bug_in_sending_keeps_its_traceback(folder, within):
    with within(30), pytest.raises(Exception, match="Original Traceback") as excinfo:
        list(unsendable(folder, "bug"))
    assert not isinstance(excinfo.value, UserError)


def test_a_bus_error_is_reported_as_full_shared_memory():
    error = RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit."
    )
    assert "shared memory is full" in processes._cause(error)


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
def test_causes_of_other_errors(error, expected):
    cause = processes._cause(error)
    assert cause is None if expected is None else expected in cause


@pytest.mark.parametrize("number", SIGNALS)
def test_workers_survive_a_signal_to_the_group(folder, number):
    loader = eval_loader(dataset(folder, EvalTransform(32, 64)), 1, workers=2)
    batches = iter(loader)
    next(batches), next(batches)  # one of each worker: both have started
    for worker in loader._iterator._workers:
        os.kill(worker.pid, number)
    assert len(list(batches)) == 9


def test_a_signal_while_workers_start_leaves_no_handler_of_torch(folder, monkeypatch):
    """At exit the workers are killed, and the handler of torch would raise an error."""
    start = DataLoader.__iter__

    def interrupted(self):
        start(self)
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(DataLoader, "__iter__", interrupted)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped):
            next(iter(eval_loader(dataset(folder, EvalTransform(32, 64)), 1, workers=1)))
        assert signal.getsignal(signal.SIGCHLD) is processes._child_ended
    finally:
        signal.signal(signal.SIGCHLD, before)


def signal_mask(pid: int) -> int:
    return int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="sees blocked signals as Linux shows them")
def test_stop_signals_are_blocked_in_a_worker_and_not_in_its_parent(folder):
    loader = eval_loader(dataset(folder, EvalTransform(32, 64)), 1, workers=1)
    before = signal_mask(os.getpid())
    next(iter(loader))
    stop_signals = sum(1 << (number - 1) for number in SIGNALS)
    assert signal_mask(loader._iterator._workers[0].pid) & stop_signals == stop_signals
    assert signal_mask(os.getpid()) == before and not before & stop_signals


class Waiting(CocoDataset):
    """Only the first image arrives, as if the disk had gone."""

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
    """They end even when busy, and although they ignore the SIGTERM that Python sends its children at exit."""
    reading, writing = os.pipe()
    data = Waiting(folder / "annotations.json", folder, EvalTransform(32, 64))

    def parent():
        loader = eval_loader(data, 1, workers=2)
        loader.batch_sampler.batches = [[0], [1], [2], [3]]
        next(iter(loader))
        os.write(writing, " ".join(str(child.pid) for child in multiprocessing.active_children()).encode())
        if how == "killed":
            time.sleep(1000)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    workers = []
    try:
        with within(8):  # torch would wait five seconds for each of the two, and five more after a SIGTERM
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


def test_a_failed_loader_ends_without_waiting_for_its_workers(folder, within):
    """The garbage collector closes their queues first, so that no message tells them to end."""
    data = dataset(folder, EvalTransform(32, 64))
    (folder / "4.png").write_bytes(b"broken")
    loader = eval_loader(data, 4, workers=2)
    gc.collect()  # the garbage of other tests
    with pytest.raises(UserError) as excinfo:
        list(loader)
    workers = loader._iterator._workers
    excinfo.value.holds = loader, excinfo.value  # a cycle, as a traceback makes it
    del loader, excinfo
    with within(8):
        gc.collect()
    assert not any(worker.is_alive() for worker in workers)
