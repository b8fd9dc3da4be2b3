import contextlib
import json
import multiprocessing
import os
import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from data import cache
from data.assemble import build_datasets
from data.coco import CocoDataset
from data.loader import eval_loader, train_loader
from data.transforms import EvalTransform, TrainTransform
from detector.configure import configure
from detector.errors import UserError
from tests.data.helpers import one_line

PLAIN = {
    "eval": EvalTransform(48, 80),
    "train": TrainTransform(48, 80, horizontal_flip=0.5, vertical_flip=0.5),
}


@pytest.fixture
def folder(tmp_path):
    """A data set: annotations.json and images/. Resizing enlarges some of the images and shrinks the others."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(9):
        height, width = generator.integers(20, 150, 2).tolist()
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
        annotations.append({"id": i, "image_id": 100 + i, "category_id": 2, "bbox": [2.5, 3, 10.25, 12]})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 2, "name": "thing"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    return tmp_path


def dataset(folder, transform=PLAIN["train"], cache=""):
    return CocoDataset(folder / "annotations.json", folder / "images", transform, cache=cache)


def cached(folder, transform=PLAIN["train"]):
    return dataset(folder, transform, folder / "cache")


def files(folder):
    return sorted(path.name for path in (folder / "cache").glob("[!.]*"))


def assert_same(sample, expected):
    (image, target, *rest), (image2, target2, *rest2) = sample, expected
    assert torch.equal(image, image2) and rest == rest2
    assert torch.equal(target.boxes, target2.boxes) and torch.equal(target.labels, target2.labels)


# ------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("kind", PLAIN)
def test_cached_samples_are_the_same_to_the_bit(folder, kind):
    plain_dataset, cached_dataset = dataset(folder, PLAIN[kind]), cached(folder, PLAIN[kind])
    cached_dataset[0]
    pickled = pickle.dumps(cached_dataset)  # as for a process that is not forked
    assert len(pickled) < cached_dataset.cache.path.stat().st_size / 4
    unpickled_dataset = pickle.loads(pickled)
    for index in range(len(plain_dataset)):
        for seed in range(8):
            assert_same(cached_dataset[index, seed], plain_dataset[index, seed])
            assert_same(unpickled_dataset[index, seed], plain_dataset[index, seed])


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_batches_are_the_same_to_the_bit(folder, workers):
    for make in (lambda data: train_loader(data, 4, seed=3, workers=workers), lambda data: eval_loader(data, 4)):
        for batch, other in zip(make(dataset(folder)), make(cached(folder)), strict=True):
            assert torch.equal(batch.images, other.images) and batch.original_sizes == other.original_sizes
            for target, other_target in zip(batch.targets, other.targets):
                assert torch.equal(target.boxes, other_target.boxes) and torch.equal(target.labels, other_target.labels)


def test_writing_to_a_sample_does_not_change_the_cache(folder):
    data = cached(folder, PLAIN["eval"])
    before = data[0][0].clone()
    data[0][0].zero_()
    assert torch.equal(data[0][0], before) and torch.equal(cached(folder, PLAIN["eval"])[0][0], before)


def test_jittered_samples_are_nearly_the_same(folder):
    height, width = 90, 120
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.dstack([y * 2, x * 2, y + x]).astype(np.uint8)).save(folder / "images" / "0.png")
    document = json.loads((folder / "annotations.json").read_text())
    document["images"][0] |= {"width": width, "height": height}
    (folder / "annotations.json").write_text(json.dumps(document))
    transform = TrainTransform(48, 80, horizontal_flip=0.5, scale_jitter=(0.6, 1.3))
    plain_dataset, cached_dataset = dataset(folder, transform), cached(folder, transform)
    assert cached_dataset.cache.kept[0] == (62, 83)  # a short side of 1.3 x 48, which is smaller than the image
    for seed in range(20):
        image, target, *_ = plain_dataset[0, seed]
        cached_image, cached_target, *_ = cached_dataset[0, seed]
        assert max(abs(a - b) for a, b in zip(image.shape, cached_image.shape)) <= 1
        assert (target.boxes - cached_target.boxes).abs().max() <= 1
        h, w = np.minimum(image.shape[1:], cached_image.shape[1:])
        assert (image[:, :h, :w].int() - cached_image[:, :h, :w].int()).abs().max() <= 6


def test_both_splits_and_the_evaluation_of_a_checkpoint_use_the_cache(tiny, tmp_path):
    cfg = configure(tiny(tmp_path, data={"cache": str(tmp_path / "cache")}))
    train_set, val_set = build_datasets(cfg)
    assert len(files(tmp_path)) == 2 and train_set.cache.path != val_set.cache.path
    content = {"category_ids": val_set.category_ids, "class_names": val_set.class_names}
    eval_set = evaluation.open_dataset("x.pt", content, cfg, None)
    assert eval_set.cache.found and eval_set.cache.path == val_set.cache.path
    other_set = evaluation.open_dataset("x.pt", content, cfg, [cfg.data.val.annotations, cfg.data.val.images])
    assert other_set.cache is None


# --------------------------------------------------------------------------------------------- found or rebuilt


def test_a_later_start_finds_the_cache_and_decodes_nothing(folder, monkeypatch):
    first = cached(folder)
    expected = [first[index, 5] for index in range(9)]
    assert not first.cache.found and first.summary().endswith(" new.") and "\n" not in first.summary()
    monkeypatch.setattr(cache, "read_image", lambda *_: pytest.fail("decoded again"))
    second = cached(folder)
    assert second.cache.found and str(folder / "cache") in second.summary() and second.summary().endswith(" found.")
    for index, sample in enumerate(expected):
        assert_same(second[index, 5], sample)
    assert dataset(folder).summary() == second.summary()[: len(dataset(folder).summary())]


def test_transforms_that_differ_only_in_flips_share_a_cache(folder):
    cached(folder, TrainTransform(48, 80, horizontal_flip=0.0))
    assert cached(folder, TrainTransform(48, 80, vertical_flip=1.0)).cache.found
    assert cached(folder, EvalTransform(48, 80)).cache.found


def touch(folder, seconds):
    path = folder / "images" / "3.png"
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + int(seconds * 1e9)))


def grow(folder):
    """Append one byte and keep the modification time."""
    path = folder / "images" / "3.png"
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rename(folder):
    (folder / "images" / "3.png").rename(folder / "images" / "other.png")
    text = (folder / "annotations.json").read_text()
    (folder / "annotations.json").write_text(text.replace("3.png", "other.png"))


def shorten(folder):
    document = json.loads((folder / "annotations.json").read_text())
    gone = document["images"].pop()["id"]
    document["annotations"] = [record for record in document["annotations"] if record["image_id"] != gone]
    (folder / "annotations.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "change",
    [lambda folder: touch(folder, 0.001), lambda folder: touch(folder, -60), grow, rename, shorten],
    ids=["newer", "older", "longer", "renamed", "one less"],
)
def test_changed_images_make_another_cache(folder, change):
    cached(folder)
    change(folder)
    plain_dataset, cached_dataset = dataset(folder), cached(folder)
    assert not cached_dataset.cache.found and len(files(folder)) == 2
    for index in range(len(plain_dataset)):
        assert_same(cached_dataset[index, 1], plain_dataset[index, 1])


@pytest.mark.parametrize(
    "transform",
    [EvalTransform(47, 80), EvalTransform(48, 79), TrainTransform(48, 80, scale_jitter=(0.5, 1.5))],
    ids=["short side", "long side", "jitter"],
)
def test_another_size_makes_another_cache(folder, transform):
    cached(folder)
    assert not cached(folder, transform).cache.found and len(files(folder)) == 2


def test_another_format_makes_another_cache(folder, monkeypatch):
    cached(folder)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert not cached(folder).cache.found


def test_files_of_one_name_in_two_folders_have_different_caches(folder):
    """The files are also equal in size and age, as an archive may unpack them."""
    cache_paths = []
    for place, shade in (("images", 50), ("others", 200)):
        (folder / place).mkdir(exist_ok=True)
        path = folder / place / "0.bmp"
        Image.fromarray(np.full((30, 40, 3), shade, np.uint8)).save(path)
        os.utime(path, (0, 0))
        data = cache.Cache(folder / "cache", [path], [(30, 40)], [(30, 40)])
        assert data[0].max() == shade
        cache_paths.append(data.path)
    assert cache_paths[0] != cache_paths[1]


@pytest.mark.parametrize("damage", ["cut", "empty", "longer"])
def test_a_damaged_cache_is_rebuilt(folder, damage):
    path = cached(folder).cache.path
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1], "empty": b"", "longer": content + b"\0"}[damage])
    cached_dataset = cached(folder)
    assert not cached_dataset.cache.found and path.read_bytes() == content and files(folder) == [path.name]


def test_the_unfinished_file_of_a_killed_process_is_ignored(folder):
    path = cached(folder).cache.path
    path.rename(path.with_suffix(".0123.tmp"))
    assert not cached(folder).cache.found and path.exists()


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", ["a file", "inside a file", "a folder in place of the cache"])
def test_a_folder_that_cannot_be_written_is_reported_in_one_line(folder, kind):
    place = folder / "cache"
    if kind == "a folder in place of the cache":
        path = cached(folder).cache.path
        path.unlink()
        path.mkdir()
    else:
        place.write_text("")
    with pytest.raises(UserError) as excinfo:
        dataset(folder, cache=place / "deeper" if kind == "inside a file" else place)
    one_line(excinfo, "data.cache", str(place), "name a folder that can be written")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_reported_in_one_line(folder):
    (folder / "cache").mkdir(mode=0o500)
    with pytest.raises(UserError) as excinfo:
        cached(folder)
    one_line(excinfo, "data.cache", "Permission denied")


def test_a_full_disk_is_reported_before_anything_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 50_000})())
    monkeypatch.setattr(cache, "read_image", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError) as excinfo:
        cached(folder)
    one_line(excinfo, "data.cache", "the images take 0 MB", str(folder / "cache"), "0 MB are free")
    assert files(folder) == []


def test_a_disk_that_fills_up_is_reported_in_one_line_and_leaves_no_file(folder, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", fail)
    with pytest.raises(UserError) as excinfo:
        cached(folder)
    one_line(excinfo, "data.cache", str(folder / "cache"), "No space left on device")
    assert files(folder) == []


@pytest.mark.parametrize("flaw", ["broken", "another size"])
def test_an_unreadable_image_is_reported_as_without_a_cache(folder, flaw):
    if flaw == "broken":
        (folder / "images" / "4.png").write_bytes(b"broken")
    else:
        Image.new("RGB", (7, 7)).save(folder / "images" / "4.png")
    with pytest.raises(UserError) as excinfo:
        dataset(folder)[4]
    with pytest.raises(UserError) as cached_error:
        cached(folder)
    assert str(cached_error.value) == str(excinfo.value) and str(folder / "images" / "4.png") in str(cached_error.value)
    assert files(folder) == []


# --------------------------------------------------------------------------------------- several processes


def build(folder, with_lock, results, delay):
    """Open the cached data set, in one of several processes, and compare its samples."""
    if not with_lock:
        cache._alone = lambda folder: contextlib.nullcontext()
    read = cache.read_image
    cache.read_image = lambda *arguments: time.sleep(delay) or read(*arguments)
    cached_set = cached(folder)
    plain_set = dataset(folder)
    samples_agree = all(torch.equal(cached_set[index, 2][0], plain_set[index, 2][0]) for index in range(len(plain_set)))
    results.put((cached_set.cache.found, samples_agree))


@pytest.mark.parametrize("alone", [True, False], ids=["in turn", "at once"])
def test_several_processes_at_the_same_time_make_one_cache(folder, alone):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=build, args=(folder, alone, results, 0.1)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(samples_agree for _, samples_agree in answers) and len(files(folder)) == 1
    if alone:
        assert sum(cache_found for cache_found, _ in answers) == 2  # the others waited for the first
