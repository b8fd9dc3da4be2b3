"""CUDA graphs of training steps: they do what the model does without them."""

import gc
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from detector import graphs
from detector.device import autocast, place
from detector.graphs import speed_up
from tests.detector.test_engine import batch, make

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def gradients_of_steps(graphed, norm, precision, sizes=((64, 96), (96, 64)), rounds=4):
    model, criterion, _ = make(norm=norm, steps=100)
    place(model, CUDA, channels_last=True)
    criterion.to(CUDA)
    model.train()
    if graphed:
        speed_up(model)
    gradients = []
    for number in range(rounds):
        for size in sizes:
            device_batch = batch(seed=number, size=size).to(CUDA)
            image_sizes = [(size[0] - 10, size[1]), (size[0], size[1] - 20)]
            matches = criterion.match(model.grid(device_batch.images), device_batch.targets)
            with autocast(CUDA, precision):
                predictions = model(device_batch.images, image_sizes)
            criterion(predictions, device_batch.targets, matches).total.backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
    state = [value.clone() for value in model.state_dict().values()]
    return gradients, state, model.graphs


@needs_gpu
@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "gn"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_graphs_do_not_change_gradients_and_statistics(norm, precision):
    expected, expected_state, _ = gradients_of_steps(False, norm, precision)
    gradients, state, model_graphs = gradients_of_steps(True, norm, precision)
    assert len(model_graphs.recorded) == 2  # one graph for each size, after two batches without
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)


@needs_gpu
def test_large_batches_and_passes_without_gradient_use_no_graph(monkeypatch):
    model, *_ = make(norm="gn")
    place(model, CUDA, channels_last=True)
    model.train()
    speed_up(model)
    images = batch().to(CUDA).images
    with torch.no_grad():
        for _ in range(4):
            model(images, [(64, 64)] * 2)
    assert not model.graphs.recorded and not model.graphs.seen
    monkeypatch.setattr(graphs, "MAX_PIXELS", 64 * 64)
    for _ in range(4):
        model(images, [(64, 64)] * 2)
    assert not model.graphs.recorded


@needs_gpu
def test_graphs_of_several_sizes_share_their_memory():
    model, *_ = make(norm="gn")
    place(model, CUDA, channels_last=True)
    model.train()
    model_graphs = graphs.Graphs(model)
    gc.collect()
    torch.cuda.empty_cache()  # what earlier tests left
    reserved = [torch.cuda.memory_reserved()]
    for size in ((512, 768), (768, 512), (640, 576)):
        outputs = model_graphs(torch.rand(2, 3, *size, device=CUDA), torch.tensor([size] * 2, device=CUDA))
        sum(output.float().sum() for output in outputs).backward()
        del outputs
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert len(model_graphs.recorded) == 3
    assert reserved[3] - reserved[1] < (reserved[1] - reserved[0]) / 2


@needs_gpu
def test_no_step_waits_for_the_device():
    """Except for the number of positives, which was requested before the model ran."""
    for class_loss, box_loss in (("focal", "giou"), ("ghm_c", "ghm_r"), ("ohem", "smooth_l1"), ("qfl", "ciou")):
        model, criterion, _ = make(norm="gn", class_loss={"name": class_loss}, box_loss={"name": box_loss})
        place(model, CUDA, channels_last=True)
        criterion.to(CUDA).train()
        model.train()
        device_batch = batch().to(CUDA)
        for step in range(2):
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step compiles
            try:
                matches = criterion.match(model.grid(device_batch.images), device_batch.targets)
                with autocast(CUDA, torch.bfloat16):
                    predictions = model(device_batch.images, device_batch.sizes)
                criterion(predictions, device_batch.targets, matches).total.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


class Graph:
    """Stands in for a CUDA graph: its replay runs a function again on the same memory."""

    def __init__(self, replay):
        self.replay = replay


def test_all_sizes_are_recorded_on_one_stream_in_one_pool_and_change_no_statistics(monkeypatch):
    """CUDA shares memory between graphs of one pool only if one stream recorded them. A CPU emulates the recording."""
    recordings, pools = [], iter(["first pool", "another", "a third", "a fourth"])

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    class CUDAGraph(Graph):
        def __init__(self):
            super().__init__(lambda: None)
            self.own_pool = next(pools)

        def pool(self):
            return self.own_pool

    @contextmanager
    def record(graph, pool, stream, capture_error_mode):
        recordings.append((pool, stream))
        graph.own_pool = pool or graph.own_pool
        yield

    for name, stand_in in (("Stream", Stream), ("CUDAGraph", CUDAGraph), ("graph", record),
                           ("current_stream", Stream), ("stream", nullcontext)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    model, *_ = make(norm="bn")
    model.train()
    before = [buffer.clone() for buffer in model.buffers()]
    model_graphs = graphs.Graphs(model)
    for size in ((64, 96), (96, 64)):
        images, sizes = torch.rand(2, 3, *size), torch.tensor([size] * 2)
        outputs = [output.detach().clone() for output in model_graphs(images, sizes)]
        torch.testing.assert_close(list(model.buffers()), before, rtol=0, atol=0)
        torch.testing.assert_close(outputs, [output.detach() for output in model.outputs(images, sizes)])
        for buffer, value in zip(model.buffers(), before):
            buffer.copy_(value)
    assert [pool for pool, _ in recordings] == [None, *["first pool"] * 3]
    assert len({stream for _, stream in recordings}) == 1


def test_without_a_recording_training_goes_on(monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "Stream", fail)
    model, *_ = make(norm="bn")
    images, sizes = torch.rand(2, 3, 64, 96), torch.tensor([(64, 96)] * 2)
    model_graphs = graphs.Graphs(model)
    with pytest.warns(UserWarning, match=r"slower: operation not permitted; .* set DETECTOR_CUDA_GRAPHS=0 in the env"):
        outputs = model_graphs(images, sizes)
    assert outputs[0].requires_grad and not model_graphs.take(images)


def test_the_environment_can_turn_graphs_off(monkeypatch):
    monkeypatch.setattr(graphs, "Graphs", lambda model: "graphs")
    model = SimpleNamespace(modules=lambda: [], mean=SimpleNamespace(device=torch.device("cuda")))
    for value, expected in (("", "graphs"), ("1", "graphs"), ("0", None)):
        monkeypatch.setenv("DETECTOR_CUDA_GRAPHS", value)
        speed_up(model)
        assert model.graphs == expected


def test_it_warns_of_more_sizes_than_get_a_graph(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_SIZES", 1)
    model_graphs = graphs.Graphs(make(norm="gn")[0])
    model_graphs.recorded[model_graphs._key(torch.zeros(1, 3, 32, 32))] = None
    assert model_graphs.take(torch.zeros(1, 3, 32, 32))
    with pytest.warns(UserWarning, match="data.pad_to=128"):
        assert not model_graphs.take(torch.zeros(1, 3, 32, 64))


def test_gradients_of_several_parts_add_up():
    """Each replay writes the gradients to the same memory."""
    weight = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    x, output, gradient, to_weight = (torch.zeros(2) for _ in range(4))
    recorded = SimpleNamespace(
        parameters=[weight],
        images=x,
        sizes=torch.zeros(1),
        outputs=[output],
        gradients=[gradient],
        to_parameters=[to_weight],
        used=[True],
        forward=Graph(lambda: output.copy_(weight.detach() * x)),
        backward=Graph(lambda: to_weight.copy_(gradient * x)),
    )
    for part in (torch.tensor([1.0, 10.0]), torch.tensor([4.0, 5.0])):
        (result,) = graphs._Replay.apply(recorded, part, torch.zeros(1), weight)
        assert torch.equal(result, weight * part)
        result.sum().backward()
    assert torch.equal(weight.grad, torch.tensor([5.0, 15.0]))


def test_graphs_share_memory_for_each_type():
    model, *_ = make(norm="gn")
    owner = graphs.Graphs(model)
    (small,) = owner.shared("outputs", [torch.ones(2, 3)])
    (large,) = owner.shared("outputs", [torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last)])
    (reused,) = owner.shared("outputs", [torch.ones(3, 3)])
    (half,) = owner.shared("outputs", [torch.ones(2, 3, dtype=torch.bfloat16)])
    assert large.is_contiguous(memory_format=torch.channels_last) and half.dtype == torch.bfloat16
    assert reused.shape == (3, 3) and reused.data_ptr() == large.data_ptr() != small.data_ptr()
