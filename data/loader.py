"""From samples to batches: padding, the order of images, worker processes.

The order and the augmentation of training depend on (seed, epoch) and the position in the epoch alone, so that a
run that is stopped and resumed, has other workers, or is spread over processes, sees the same images.
"""

import contextlib
import errno
import multiprocessing.queues
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType

import cv2
import numpy as np
import torch
from torch import Tensor
from torch._C import _error_if_any_worker_fails
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Sampler

from data.coco import CocoDataset
from data.images import Remarks, add_remarks
from detector.errors import SIGNALS, UserError
from detector.structures import Batch, Target

try:
    import resource
except ImportError:  # on Windows
    resource = None

STRIDE = 32  # of C5: the padded sides are multiples of it


def train_loader(
    dataset: CocoDataset,
    batch_size: int,
    *,
    seed: int,
    workers: int = 0,
    pad_to: int = STRIDE,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches of one process, shuffled; before each epoch call `loader.batch_sampler.set_position(epoch)`."""
    sampler = TrainSampler(dataset.aspects, batch_size, seed=seed, rank=rank, world_size=world_size)
    return _loader(dataset, sampler, workers, pad_to, pin_memory)


def eval_loader(
    dataset: CocoDataset,
    batch_size: int,
    *,
    workers: int = 0,
    pad_to: int = STRIDE,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """This process's share of the images, each once."""
    return _loader(dataset, EvalSampler(dataset.aspects, batch_size, rank, world_size), workers, pad_to, pin_memory)


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, augmentation seed) of one process, each batch of images of like shape.

    `batch_size` is that of one process. A global batch, of batch_size * world_size images, is drawn first and
    then dealt out, so that K processes together see what one sees with a batch K times as large. All batches are
    whole: the last is filled up from the start of the permutation, so that an epoch may show some images twice.
    """

    def __init__(self, aspects: Sequence[float], batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1):
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}; give at least 1")
        self.landscape = np.asarray(aspects) >= 1
        self.global_batch = batch_size * world_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.set_position(0)

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration be this epoch, from this batch on."""
        self.epoch, self.batch = epoch, batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return -(-len(self.landscape) // self.global_batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self._global_batches()[self.batch :]:
            yield [(index, self._image_seed(index)) for index in batch[self.rank :: self.world_size]]

    def _global_batches(self) -> list[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.landscape))
        size = self.global_batch
        batches, left = [], []
        for group in (order[self.landscape[order]], order[~self.landscape[order]]):
            whole = len(group) // size * size
            batches += group[:whole].reshape(-1, size).tolist()
            left += group[whole:].tolist()
        missing = -len(left) % size
        left += np.resize(order, missing).tolist()  # repeats the permutation where it is too short
        batches += [left[start : start + size] for start in range(0, len(left), size)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def _image_seed(self, index: int) -> int:
        return int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0])


class EvalSampler(Sampler[list[int]]):
    """Batches of indices, sorted by aspect to have little padding; over all processes, every image once."""

    def __init__(self, aspects: Sequence[float], batch_size: int, rank: int = 0, world_size: int = 1):
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}; give at least 1")
        order = np.argsort(aspects, kind="stable").tolist()
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def collate(samples: Sequence[tuple[Tensor, Target, int, tuple[int, int]]], pad_to: int = STRIDE) -> Batch:
    """Pad images (3, h, w) with zeros at the right and bottom to one size and stack them; boxes stay valid.

    The padded sides are multiples of `pad_to`.
    """
    images, targets, image_ids, original_sizes = zip(*samples)
    sizes = [tuple(image.shape[1:]) for image in images]
    height, width = (-(-max(side) // pad_to) * pad_to for side in zip(*sizes))
    stacked = torch.empty(len(images), 3, height, width, dtype=torch.uint8)
    for planes, image, (h, w) in zip(stacked.numpy(), images, sizes):
        # Padded as (h, w, 3), which is how the pixels lie in memory: torch's copy to planes takes four times as long.
        padded = cv2.copyMakeBorder(image.permute(1, 2, 0).numpy(), 0, height - h, 0, width - w, cv2.BORDER_CONSTANT)
        cv2.split(padded, list(planes))
    return Batch(stacked, list(targets), list(image_ids), sizes, list(original_sizes))


def _collate(dataset: CocoDataset, pad_to: int, samples: Sequence) -> tuple[Batch, Remarks]:
    """A batch, and what this process has to say of its images, which it then forgets."""
    remarks, dataset.image_remarks = dataset.image_remarks, {}
    return collate(samples, pad_to), remarks


class _Loader(DataLoader):
    """A DataLoader that never falls silent: all that goes wrong with its processes comes between two batches.

    It is one line where it is a UserError, a process that has died, or what its batches are sent through.
    """

    def __iter__(self) -> Iterator[Batch]:
        batches = None
        while True:
            try:
                with _deaths_told():
                    if batches is None:
                        batches = self._start()
                    batch, remarks = next(batches)
            except StopIteration:
                return
            except UserError as error:
                # From a worker it comes as a whole traceback, whose last line has the message behind the class name.
                raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None
            except (RuntimeError, OSError, EOFError) as error:
                cause = _cause(error) if self.num_workers else None
                if cause is None:
                    raise
                raise UserError(cause) from None
            add_remarks(self.dataset.image_remarks, remarks)
            yield batch

    def _start(self) -> Iterator[Batch]:
        """Start the worker processes, or have those of the epoch before go on."""
        if self._iterator is not None:
            return super().__iter__()
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)
        if resource is not None:  # each tensor that is sent is a file: many workers pass the usual limit of 1024
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        # What is blocked here is blocked in them, too: no signal may meet one before it ignores them.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if hasattr(signal, "pthread_sigmask") else None
        try:
            return super().__iter__()
        finally:
            if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
                # torch's handler raises wherever the main thread is: in the middle of an optimizer step, or at exit.
                signal.signal(signal.SIGCHLD, _child_ended)
            if blocked is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


_waiting = False


@contextlib.contextmanager
def _deaths_told() -> Iterator[None]:
    """Raises RuntimeError where a worker dies in this block, or has died before it."""
    global _waiting
    _waiting = True
    try:
        _error_if_any_worker_fails()
        yield
    finally:
        _waiting = False


def _child_ended(_number: int, _frame: object) -> None:
    if _waiting:
        _error_if_any_worker_fails()


def _cause(error: Exception) -> str | None:
    """Why the workers' batches do not come, and what to do about it; None where the error is another's."""
    text = str(error)
    if "Too many open files" in text or "ancdata" in text:  # the file descriptors that a message should bring
        return "too many open files: raise the limit (ulimit -n 65536), or lower data.workers"
    if "shared memory" in text or "</torch_" in text:
        with contextlib.suppress(OSError):
            size = shutil.disk_usage("/dev/shm").total / 1e6
            text = f" (/dev/shm has {size:,.0f} MB)"
        return (
            f"shared memory is full{text}, through which loading processes send their images; in Docker give it more "
            "(--shm-size=8g, or --ipc=host), or set data.workers=0"
        )
    if text.startswith("Caught "):  # in a worker, by what it called
        return None
    if text.startswith("DataLoader worker (pid"):
        how = text.rpartition(") ")[2].partition(". ")[0].rstrip(".")
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EAGAIN):
        how = f"cannot be started ({error.strerror})"
    elif isinstance(error, (ConnectionError, FileNotFoundError, EOFError)) or text.startswith("Pin memory thread"):
        how = "has ended"  # while its batch was on the way
    else:
        return None
    return f"a process that loads images {how}, most often for lack of memory; lower data.workers or data.short_side"


def _end_workers() -> None:
    """At exit, before Python sends its children SIGTERM and waits for them: ours ignore it."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _loader(dataset: CocoDataset, sampler: Sampler, workers: int, pad_to: int, pin_memory: bool) -> DataLoader:
    return _Loader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=partial(_collate, dataset, pad_to),
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        # The loader draws a number per epoch; from a generator of its own, it leaves the run's own draws alone.
        generator=torch.Generator(),
    )


def _start_worker(worker: int) -> None:
    # A signal to the whole group is for the training process, which finishes its step and saves.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error
    sys.excepthook = _unless_parent_left
    # The processes are the parallelism: threads inside them would only contend.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _unless_parent_left(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """For sys.excepthook in a worker: the thread that hands out what was sent need not tell that nobody takes it."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _send_error(queue: multiprocessing.queues.Queue, error: Exception, message: object) -> None:
    """In a worker: instead of a batch that cannot be sent, for which the parent would wait for ever, say why."""
    if not isinstance(message, tuple):  # it was on the way already
        os._exit(1)
    queue.put((message[0], ExceptionWrapper(where="in a process that loads images")))
