"""From samples to batches: padding, the order of images, worker processes.

The order and the augmentation of training depend on (seed, epoch) and the position in the epoch alone, so that a
run that is stopped and resumed, has other workers, or is spread over processes, sees the same images.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from data.coco import CocoDataset
from detector.errors import UserError
from detector.structures import Batch, Target

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


class _Loader(DataLoader):
    """A DataLoader out of which a worker's UserError, or its death, comes between two batches and in one line."""

    def __iter__(self) -> Iterator[Batch]:
        batches = None
        while True:
            try:
                with _deaths:
                    if batches is None:
                        batches = super().__iter__()  # starts the workers
                        _deaths.watch()
                    batch = next(batches)
            except StopIteration:
                return
            except UserError as error:
                # From a worker it comes as a whole traceback, whose last line has the message behind the class name.
                raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker (pid"):
                    raise
                how = str(error).rpartition(") ")[2].partition(". ")[0].rstrip(".")
                raise UserError(
                    f"a process that loads images {how}, most often for lack of memory or of /dev/shm; lower "
                    "data.workers or data.short_side, and go on with --resume"
                ) from None
            yield batch


class _Deaths:
    """Lets the death of a worker be raised only while a batch is waited for: `with _deaths: next(batches)`.

    torch raises it from a signal handler, wherever the main thread is: in the middle of an optimizer step, too.
    """

    def __init__(self):
        self._waiting, self._noted = False, None

    def __enter__(self) -> None:
        self._waiting = True
        if self._noted:
            error, self._noted, self._waiting = self._noted, None, False
            raise error

    def __exit__(self, *error: object) -> None:
        self._waiting = False

    def watch(self) -> None:
        """Stand before the handler that torch sets with its first workers."""
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            return
        theirs = signal.getsignal(signal.SIGCHLD)
        if callable(theirs) and getattr(theirs, "__self__", None) is not self:
            self._theirs = theirs
            signal.signal(signal.SIGCHLD, self._child_ended)

    def _child_ended(self, number: int, frame: object) -> None:
        try:
            self._theirs(number, frame)
        except RuntimeError as error:
            if self._waiting:
                raise
            self._noted = error


_deaths = _Deaths()


def _loader(dataset: CocoDataset, sampler: Sampler, workers: int, pad_to: int, pin_memory: bool) -> DataLoader:
    return _Loader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=partial(collate, pad_to=pad_to),
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        # The loader draws a number per epoch; from a generator of its own, it leaves the run's own draws alone.
        generator=torch.Generator(),
    )


def _start_worker(worker: int) -> None:
    # Ctrl-C goes to the whole group; the training process ends its step with the batches that it has asked for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are the parallelism: threads inside them would only contend.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
