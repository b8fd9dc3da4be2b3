"""From samples to batches: the order of images, and padding.

Order and augmentation in training depend only on the seed, the epoch and the position in it, so that a run sees the
same images when it is resumed, has more workers, or is spread over processes.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import cv2
import numpy as np
import torch
from torch.utils.data import Sampler

from data.coco import CocoDataset, Sample
from data.images import Remarks
from data.workers import BatchLoader, start_worker
from detector.errors import UserError
from detector.resize import STRIDE
from detector.structures import Batch


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
) -> BatchLoader:
    """Batches of one process, shuffled; `loader.batch_sampler.set_position` chooses the epochs."""
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
) -> BatchLoader:
    """Batches of this process's share of the images, each image once."""
    return _loader(dataset, EvalSampler(dataset.aspects, batch_size, rank, world_size), workers, pad_to, pin_memory)


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, augmentation seed) for one process, landscape and portrait images apart.

    `batch_size` is that of one process. The sampler draws a global batch of batch_size * world_size images and deals it
    out, so that K processes together see what one process sees with a batch K times as large. All batches are full: the
    last is filled up from the start of the permutation, so an epoch may show some images twice.
    """

    def __init__(self, aspects: Sequence[float], batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1):
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}; give at least 1")
        self.landscape = np.asarray(aspects) >= 1
        self.global_batch = batch_size * world_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.set_position(0)

    def set_position(self, epoch: int, batch: int = 0, *, until: int | None = None) -> None:
        """Make the next iteration go from this batch of this epoch to its end, or on to the start of epoch `until`.

        An iteration over several epochs lets loading processes begin the next while training finishes this one.
        """
        self.epoch, self.batch = epoch, batch
        self.until = epoch + 1 if until is None else until

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return -(-len(self.landscape) // self.global_batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.batch
        for epoch in range(self.epoch, self.until):
            for batch in self._global_batches(epoch)[first:]:
                yield [(index, self._image_seed(epoch, index)) for index in batch[self.rank :: self.world_size]]
            first = 0

    def _global_batches(self, epoch: int) -> list[list[int]]:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.landscape))
        size = self.global_batch
        batches: list[list[int]] = []
        left: list[int] = []
        for group in (order[self.landscape[order]], order[~self.landscape[order]]):
            whole = len(group) // size * size
            batches += group[:whole].reshape(-1, size).tolist()
            left += group[whole:].tolist()
        missing = -len(left) % size
        left += np.resize(order, missing).tolist()  # repeats the permutation where it is too short
        batches += [left[start : start + size] for start in range(0, len(left), size)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def _image_seed(self, epoch: int, index: int) -> int:
        return int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0])


class EvalSampler(Sampler[list[int]]):
    """Batches of indices, sorted by aspect for little padding; over all processes, every image once."""

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


def collate(samples: Sequence[Sample], pad_to: int = STRIDE) -> Batch:
    """Pad images (3, h, w) with zeros at the right and bottom to one size and stack them; boxes stay valid.

    The padded sides are multiples of `pad_to`.
    """
    images, targets, image_ids, original_sizes = zip(*samples)
    sizes = [tuple(image.shape[1:]) for image in images]
    height, width = (-(-max(side) // pad_to) * pad_to for side in zip(*sizes))
    stacked = torch.empty(len(images), 3, height, width, dtype=torch.uint8)
    for planes, image, (h, w) in zip(stacked.numpy(), images, sizes):
        # Padded as (h, w, 3), the order in memory: torch's copy to planes takes four times as long.
        padded = cv2.copyMakeBorder(image.permute(1, 2, 0).numpy(), 0, height - h, 0, width - w, cv2.BORDER_CONSTANT)
        cv2.split(padded, list(planes))
    return Batch(stacked, list(targets), list(image_ids), sizes, list(original_sizes))


def _collate_with_remarks(dataset: CocoDataset, pad_to: int, samples: Sequence[Sample]) -> tuple[Batch, Remarks]:
    """A batch, and this process's remarks on its images, which are then cleared."""
    remarks, dataset.image_remarks = dataset.image_remarks, {}
    return collate(samples, pad_to), remarks


def _loader(dataset: CocoDataset, sampler: Sampler, workers: int, pad_to: int, pin_memory: bool) -> BatchLoader:
    return BatchLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=partial(_collate_with_remarks, dataset, pad_to),
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        persistent_workers=workers > 0,
        # DataLoader draws a number at each epoch: from this generator, not from the run's.
        generator=torch.Generator(),
    )
