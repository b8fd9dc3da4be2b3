import contextlib
import time

import pytest
import torch

from data.loader import collate
from detector.errors import UserError
from detector.structures import Batch, Target
from detector.transfer import PendingCopy, copied_ahead

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def batch(number, boxes=(2, 0, 1)):
    rng = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (len(boxes), 3, 60, 90), generator=rng, dtype=torch.uint8)
    targets = [Target(torch.rand(count, 4, generator=rng), torch.arange(count)) for count in boxes]
    return collate(list(zip(images, targets, [number] * len(boxes), [(120, 180)] * len(boxes))))


def same(first, second):
    pairs = [(first.images, second.images), (first.sizes, second.sizes)]
    pairs += zip(sum(first.targets, ()), sum(second.targets, ()), strict=True)
    return first[1:] == second[1:] and all(torch.equal(a.cpu(), b.cpu()) and a.dtype == b.dtype for a, b in pairs)


def failing(batches):
    yield from batches
    raise UserError("broken.png")


class Streams:
    """Stands in for CUDA's streams: records their work in order."""

    def __init__(self, monkeypatch):
        self.asked = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        monkeypatch.setattr(Batch, "to", lambda batch, device: self.asked.append(f"copy {batch.image_ids[0]}") or batch)

    def wait_stream(self, other):
        self.asked.append("wait")


def test_on_a_cpu_batches_pass_unchanged_one_at_a_time():
    batches, loaded = [batch(1), batch(2)], []
    stream = copied_ahead((loaded.append(loaded_batch) or loaded_batch for loaded_batch in batches), CPU)
    assert next(stream) is batches[0] and len(loaded) == 1
    assert next(stream) is batches[1] and next(stream, None) is None


def test_a_batch_is_copied_while_the_one_before_is_in_use(monkeypatch):
    streams = Streams(monkeypatch)
    for copied_batch in copied_ahead([batch(number) for number in (1, 2, 3)], CUDA):
        streams.asked.append(f"use {copied_batch.image_ids[0]}")
    # A wait comes between a copy and its use. It would be longer if it came after the next copy.
    first_calls = ["wait", "copy 1", "wait", "copy 2", "use 1"]
    assert streams.asked == [*first_calls, "wait", "copy 3", "use 2", "wait", "use 3"]
    assert list(copied_ahead([], CUDA)) == []


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_batch_that_cannot_be_loaded_loses_none_before_it(device, count, monkeypatch):
    if device.type == "cuda":
        Streams(monkeypatch)
    batches, received = [batch(number) for number in range(count)], []
    with pytest.raises(UserError, match="broken"):
        for copied_batch in copied_ahead(failing(batches), device):
            received.append(copied_batch)
    assert all(a is b for a, b in zip(received, batches, strict=True))


@NEEDS_GPU
def test_copies_to_a_gpu_on_a_separate_stream_are_complete():
    device = torch.device("cuda")
    originals = [batch(number, boxes=(number % 3, 0, 40)) for number in range(20)]
    work = torch.rand(2000, 2000, device=device)
    for item, original in zip(copied_ahead((item.pin_memory() for item in originals), device), originals, strict=True):
        assert item.data.is_cuda
        for _ in range(5):
            work = work @ work / work.norm()  # so the next copy is requested long before this one is read
        copied = item._replace(data=item.data.clone())
        del item
        assert same(copied, original)


def test_a_batch_moves_with_all_its_targets():
    meta_batch = batch(1).to(torch.device("meta"))
    assert meta_batch.images.is_meta and meta_batch.sizes.is_meta and meta_batch[1:] == batch(1)[1:]
    assert [tuple(value.shape for value in target) for target in meta_batch.targets] == [
        ((count, 4), (count,)) for count in (2, 0, 1)
    ]
    assert all(value.is_meta for target in meta_batch.targets for value in target)


def test_all_tensors_of_a_batch_are_in_the_memory_of_one():
    joined = batch(1)
    first, last = joined.data.data_ptr(), joined.data.data_ptr() + joined.data.nbytes
    parts = [joined.images, joined.sizes, *(value for target in joined.targets for value in target)]
    assert all(first <= part.data_ptr() and part.data_ptr() + part.nbytes <= last for part in parts if part.numel())
    assert sum(part.nbytes for part in parts) == joined.data.nbytes


def test_a_batch_keeps_sizes_of_any_dtype_and_refuses_incomplete_values():
    shape, no_box, whole = (2, 3, 32, 32), Target(torch.zeros(0, 4), torch.zeros(0)), [(32, 32)] * 2
    kept = Batch.allocate(shape, [no_box] * 2, [1, 2], torch.tensor([[30.0, 31], [32, 9]]), whole)
    assert kept.sizes.tolist() == [[30, 31], [32, 9]] and [len(target.boxes) for target in kept.targets] == [0, 0]
    for values in ([no_box], [1, 2], whole), ([no_box] * 2, [1], whole), ([no_box] * 2, [1, 2], whole[:1]):
        with pytest.raises(ValueError, match="for 2 images"):
            Batch.allocate(shape, *values, whole)
    with pytest.raises(ValueError, match="multiples of 32"):
        Batch.allocate((2, 3, 31, 31), [no_box] * 2, [1, 2], whole, whole)


def test_without_a_gpu_a_pending_copy_is_ready_at_once():
    number = torch.tensor([3.0, 4.0])
    assert PendingCopy(number).get() is number and PendingCopy(number).idle() is None


@NEEDS_GPU
def test_a_gpu_is_idle_from_the_end_of_its_work_until_now():
    x = torch.randn(4096, 4096, device="cuda")
    (x @ x).sum().item()
    copy = PendingCopy((x @ x).sum())
    busy = copy.idle()
    copy.get()
    time.sleep(0.2)
    idle = copy.idle()
    assert busy() < 0.15 and 0.19 < idle() < 5  # other processes may use the GPU too
