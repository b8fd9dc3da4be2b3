"""From samples to batches."""

from collections.abc import Sequence
from functools import partial

import cv2
import torch
from torch.utils.data import Sampler

from data.coco import CocoDataset, Sample
from data.samplers import EvalSampler, TrainSampler
from data.workers import BatchLoader, start_worker
from detector.images import Remarks
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


def collate(samples: Sequence[Sample], pad_to: int = STRIDE) -> Batch:
    """Pad images (3, h, w) with zeros at the right and bottom to one size and stack them; boxes stay valid.

    The padded sides are multiples of `pad_to`.
    """
    images, targets, image_ids, original_sizes = zip(*samples)
    sizes = [tuple(image.shape[1:]) for image in images]
    height, width = (-(-max(side) // pad_to) * pad_to for side in zip(*sizes))
    shape = len(images), 3, height, width
    batch = Batch.allocate(shape, list(targets), list(image_ids), sizes, list(original_sizes))
    for planes, image, (h, w) in zip(batch.images.numpy(), images, sizes):
        # Padded as (h, w, 3), the order in memory: torch's copy to planes takes four times as long.
        padded = cv2.copyMakeBorder(image.permute(1, 2, 0).numpy(), 0, height - h, 0, width - w, cv2.BORDER_CONSTANT)
        cv2.split(padded, list(planes))
    return batch


def _collate_with_remarks(dataset: CocoDataset, pad_to: int, samples: Sequence[Sample]) -> tuple[Batch, Remarks]:
    """A batch and the remarks this process has on its images; clears the remarks."""
    remarks, dataset.image_remarks = dataset.image_remarks, {}
    return collate(samples, pad_to), remarks


def _loader(dataset: CocoDataset, batch_sampler: Sampler, workers: int, pad_to: int, pin_memory: bool) -> BatchLoader:
    return BatchLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=partial(_collate_with_remarks, dataset, pad_to),
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        persistent_workers=workers > 0,
        # DataLoader draws a number at each epoch: from this generator, not from the run's.
        generator=torch.Generator(),
    )
