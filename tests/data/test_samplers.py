import itertools
from collections import Counter

import numpy as np
import pytest

from data.samplers import EvalSampler, TrainSampler
from detector.errors import UserError

ASPECTS = np.random.default_rng(0).uniform(0.5, 1.8, 53).tolist()


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


def test_all_batches_but_those_of_left_overs_hold_one_orientation():
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
    assert len(set(seeds)) == 3 * 53  # an image gets a new seed in every epoch


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_see_the_batches_of_one_process(world_size):
    batches = list(TrainSampler(ASPECTS, 8, seed=1))
    batches_by_rank = [
        list(TrainSampler(ASPECTS, 8 // world_size, seed=1, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for batch, *shares in zip(batches, *batches_by_rank, strict=True):
        assert all(len(share) == 8 // world_size for share in shares)
        assert sorted(batch) == sorted(item for share in shares for item in share)


@pytest.mark.parametrize("batch", [0, 1, 6, 14])
def test_resuming_gives_the_rest_of_the_epoch(batch):
    sampler = TrainSampler(ASPECTS, 4, seed=1)
    sampler.set_position(5)
    epoch_batches = list(sampler)
    resumed_sampler = TrainSampler(ASPECTS, 4, seed=1)
    resumed_sampler.set_position(5, batch)
    assert list(resumed_sampler) == epoch_batches[batch:]
    resumed_sampler.set_position(5)
    assert list(resumed_sampler) == epoch_batches and len(resumed_sampler) == len(epoch_batches) == 14


@pytest.mark.parametrize("batch", [0, 5, 13])
def test_one_iteration_over_several_epochs_equals_one_for_each(batch):
    sampler = TrainSampler(ASPECTS, 4, seed=1)
    separate_batches = []
    for position in ((2, batch), (3,), (4,)):
        sampler.set_position(*position)
        separate_batches += list(sampler)
    sampler.set_position(2, batch, until=5)
    assert list(sampler) == separate_batches and len(separate_batches) == 3 * len(sampler) - batch


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
