import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from data.coco import CocoDataset
from data.images import remark_lines
from data.loader import EvalSampler, TrainSampler, collate, eval_loader, train_loader
from data.transforms import EvalTransform, TrainTransform
from detector.errors import UserError
from detector.structures import Target

ASPECTS = np.random.default_rng(0).uniform(0.5, 1.8, 53).tolist()


@pytest.fixture
def folder(noisy_images):
    return noisy_images


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


@pytest.mark.parametrize("batch", [0, 5, 13])
def test_one_iteration_over_epochs_is_one_after_the_other(batch):
    sampler = TrainSampler(ASPECTS, 4, seed=1)
    apart = []
    for position in ((2, batch), (3,), (4,)):
        sampler.set_position(*position)
        apart += list(sampler)
    sampler.set_position(2, batch, until=5)
    assert list(sampler) == apart and len(apart) == 3 * len(sampler) - batch


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


def test_the_next_epoch_is_loaded_before_one_has_ended(folder, monkeypatch):
    loader = train_loader(dataset(folder, TrainTransform(32, 64)), 3, seed=4, workers=1)
    apart = []
    for epoch in (1, 2):
        loader.batch_sampler.set_position(epoch)
        apart += list(loader)
    begun, image_seed = [], TrainSampler._image_seed
    note = lambda sampler, epoch, index: begun.append(epoch) or image_seed(sampler, epoch, index)  # noqa: E731
    monkeypatch.setattr(TrainSampler, "_image_seed", note)
    loader.batch_sampler.set_position(1, until=3)
    stream = iter(loader)
    together = [next(stream) for _ in range(len(loader) - 1)]
    assert set(begun) == {1, 2}
    for one, other in zip(apart, [*together, *stream], strict=True):
        assert_same(one, other)


def test_eval_loader_covers_the_set_and_leaves_random_numbers_alone(folder):
    state = torch.get_rng_state()
    loader = eval_loader(dataset(folder, EvalTransform(32, 64)), 4)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert sorted(i for batch in batches for i in batch.image_ids) == list(range(100, 111))
    assert loader.dataset.category_ids == [2]
    assert torch.equal(torch.get_rng_state(), state)


def test_padded_sides_are_multiples_of_what_is_asked():
    samples = [(torch.full((3, 40, 70), 7, dtype=torch.uint8), None, 1, (40, 70))]
    batch = collate(samples, pad_to=128)
    assert batch.images.shape == (1, 3, 128, 128) and batch.sizes == [(40, 70)]
    assert batch.images.sum() == 3 * 40 * 70 * 7 and (batch.images[:, :, :40, :70] == 7).all()
