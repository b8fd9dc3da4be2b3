"""The order of images. In training, order and augmentation depend only on the seed, the epoch and the position in it.

So a run sees the same images when it is resumed, has more workers, or is spread over processes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from detector.errors import UserError


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
