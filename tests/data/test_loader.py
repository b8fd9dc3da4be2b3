import pytest
import torch

from data.coco import CocoDataset
from data.loader import collate, eval_loader, train_loader
from data.samplers import TrainSampler
from data.transforms import EvalTransform, TrainTransform
from detector.images import remark_lines
from detector.structures import Target


@pytest.fixture
def folder(noisy_images):
    return noisy_images


def dataset(folder, transform):
    return CocoDataset(folder / "annotations.json", folder, transform)


def assert_same(batch, expected):
    assert torch.equal(batch.images, expected.images)
    assert batch.image_ids == expected.image_ids and torch.equal(batch.sizes, expected.sizes)
    assert batch.original_sizes == expected.original_sizes
    for target, expected_target in zip(batch.targets, expected.targets):
        assert torch.equal(target.boxes, expected_target.boxes) and torch.equal(target.labels, expected_target.labels)


# ------------------------------------------------------------------------------------------------- collate


def test_collate_pads_at_right_and_bottom():
    images = [torch.full((3, h, w), 7, dtype=torch.uint8) for h, w in ((33, 20), (10, 64))]
    targets = [Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), Target(torch.ones(2, 4), torch.ones(2))]
    batch = collate([(images[0], targets[0], 5, (99, 60)), (images[1], targets[1], 3, (10, 64))])
    assert batch.images.shape == (2, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[33, 20], [10, 64]] and batch.original_sizes == [(99, 60), (10, 64)]
    assert batch.image_ids == [5, 3]
    for target, given in zip(batch.targets, targets, strict=True):
        assert torch.equal(target.boxes, given.boxes) and target.labels.tolist() == given.labels.tolist()
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


# -------------------------------------------------------------------------------------------------- loaders


def test_workers_do_not_change_the_batches(folder):
    data = dataset(folder, TrainTransform(32, 64, vertical_flip=0.5, scale_jitter=(0.7, 1.4), strong=True))
    epochs = {}
    for workers in (0, 1, 2):
        loader = train_loader(data, 3, seed=4, workers=workers)
        for epoch in (0, 1):  # both epochs with the same workers
            loader.batch_sampler.set_position(epoch)
            epochs[workers, epoch] = list(loader)
    for epoch in (0, 1):
        assert len(epochs[0, epoch]) == 4
        for workers in (1, 2):
            for batch, worker_batch in zip(epochs[0, epoch], epochs[workers, epoch], strict=True):
                assert_same(batch, worker_batch)
    assert not torch.equal(epochs[0, 0][0].images, epochs[0, 1][0].images)


@pytest.mark.parametrize("workers", [0, 2])
def test_odd_images_are_counted_once_whichever_process_reads_them(folder, workers):
    for number in (1, 2, 7):
        (folder / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes()[:-12])
    data = dataset(folder, TrainTransform(32, 64))
    loader = train_loader(data, 3, seed=4, workers=workers)
    for epoch in range(2):
        loader.batch_sampler.set_position(epoch)
        assert len(list(loader)) == 4
    ((kind, files),) = data.image_remarks.items()
    assert kind.startswith("their last bytes missing") and files == {str(folder / f"{n}.png") for n in (1, 2, 7)}
    other_remarks = {kind: {"", *files}}
    assert remark_lines(data.image_remarks, other_remarks) == [f"images with {kind}: 4 (such as )"]


def test_resumed_batches_have_the_same_pixels(folder):
    data = dataset(folder, TrainTransform(32, 64, strong=True))
    loader = train_loader(data, 3, seed=4)
    loader.batch_sampler.set_position(3)
    batches = list(loader)
    resumed_loader = train_loader(data, 3, seed=4, workers=1)
    resumed_loader.batch_sampler.set_position(3, 2)
    for batch, resumed_batch in zip(batches[2:], resumed_loader, strict=True):
        assert_same(batch, resumed_batch)


def test_the_next_epoch_starts_to_load_before_the_current_one_ends(folder, monkeypatch):
    loader = train_loader(dataset(folder, TrainTransform(32, 64)), 3, seed=4, workers=1)
    separate_batches = []
    for epoch in (1, 2):
        loader.batch_sampler.set_position(epoch)
        separate_batches += list(loader)
    loaded_epochs, image_seed = [], TrainSampler._image_seed
    note = lambda sampler, epoch, index: loaded_epochs.append(epoch) or image_seed(sampler, epoch, index)  # noqa: E731
    monkeypatch.setattr(TrainSampler, "_image_seed", note)
    loader.batch_sampler.set_position(1, until=3)
    stream = iter(loader)
    stream_batches = [next(stream) for _ in range(len(loader) - 1)]
    assert set(loaded_epochs) == {1, 2}
    for separate_batch, stream_batch in zip(separate_batches, [*stream_batches, *stream], strict=True):
        assert_same(separate_batch, stream_batch)


def test_eval_loader_covers_the_set_and_leaves_random_numbers_alone(folder):
    state = torch.get_rng_state()
    loader = eval_loader(dataset(folder, EvalTransform(32, 64)), 4)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert sorted(i for batch in batches for i in batch.image_ids) == list(range(100, 111))
    assert loader.dataset.category_ids == [2]
    assert torch.equal(torch.get_rng_state(), state)


def test_padded_sides_are_multiples_of_pad_to():
    no_box = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    samples = [(torch.full((3, 40, 70), 7, dtype=torch.uint8), no_box, 1, (40, 70))]
    batch = collate(samples, pad_to=128)
    assert batch.images.shape == (1, 3, 128, 128) and batch.sizes.tolist() == [[40, 70]]
    assert batch.images.sum() == 3 * 40 * 70 * 7 and (batch.images[:, :, :40, :70] == 7).all()
