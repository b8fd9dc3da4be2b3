"""Two processes with half of each batch train as one with all of it, whatever the losses; and they must agree."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch import nn

from data.loader import collate
from detector import assemble, distributed, losses
from detector.anchors import Anchors
from detector.backbone import Backbone
from detector.config import Config
from detector.configure import complete
from detector.engine import compute_gradients
from detector.errors import Stopped, UserError
from detector.fpn import FPN
from detector.head import Head
from detector.model import RetinaNet
from detector.solver import Solver
from detector.structures import Target

STEPS, BATCH, SIDE, CLASSES = 4, 4, 128, 3
CASES = {name: {"class_loss": {"name": name}} for name in losses.CLASS_LOSSES}
CASES |= {name: {"box_loss": {"name": name}} for name in losses.BOX_LOSSES}
CASES |= {
    "atss": {"assigner": {"name": "atss"}},
    "atss, ghm": {"assigner": {"name": "atss"}, "class_loss": {"name": "ghm_c"}, "box_loss": {"name": "ghm_r"}},
    "ghm by level": {
        "class_loss": {"name": "ghm_c", "scope": "level"},
        "box_loss": {"name": "ghm_r", "scope": "level", "max_weight": 30},
    },
    "ghm, exact": {
        "class_loss": {"name": "ghm_c", "density": "exact"},
        "box_loss": {"name": "ghm_r", "density": "exact"},
    },
    "ghm, near exact": {
        "class_loss": {"name": "ghm_c", "density": "near_exact"},
        "box_loss": {"name": "ghm_r", "density": "near_exact"},
    },
}
# These losses choose or count only among the cells of one process.
LOCAL = {"ohem", "ghm_c_released", "ghm_r_released"}
# Relative: float32 adds up in another order. For weights, relative to how far their tensor has moved; the rounding of
# the weights is up to some 1e-4 of that.
TOLERANCES = {"loss": 1e-4, "state": 1e-4, "weights": 1e-3}


class SmallBackbone(nn.Module):
    """Three stages that compute each image separately, so a share of a batch gives the same as the whole batch."""

    def __init__(self):
        super().__init__()
        self.channels = (16, 32, 64)
        shapes = ((3, 16, 8, 8, 0), (16, 32, 3, 2, 1), (32, 64, 3, 2, 1))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(*shape), nn.GroupNorm(4, shape[1]), nn.ReLU()) for shape in shapes
        )

    def forward(self, images):
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        return features


def small_model():
    torch.manual_seed(0)
    backbone, anchors = SmallBackbone(), Anchors()
    head = Head(16, anchors.per_position, CLASSES, depth=1, width=32, prior=0.1)
    return RetinaNet(backbone, FPN(backbone.channels, 16, "p5"), head, anchors)


def batches():
    """Images of noise with 0 to 3 boxes. In the second step, the second of two processes has no boxes."""
    rng = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        targets = []
        for index in range(BATCH):
            count = 0 if step == 1 and index % 2 else int(torch.randint(0 if index else 1, 4, (), generator=rng))
            corner, size = (torch.rand(count, 2, generator=rng) * 60 for _ in range(2))
            boxes = torch.cat([corner, corner + size + 8], dim=1)
            targets.append(Target(boxes, torch.randint(0, CLASSES, (count,), generator=rng)))
        yield torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), generator=rng, dtype=torch.uint8), targets


def run(case, shares, num_shares):
    """Split each batch into `num_shares` shares and train on some of them, each with a separate criterion.

    Returns the loss terms and gradient norm of each step, the criteria's states and how far the weights have moved.
    """
    cfg = complete(Config(**CASES[case]), case)
    model = small_model()
    start = copy.deepcopy(model.state_dict())
    criteria = [assemble.build_criterion(cfg) for _ in shares]
    solver = Solver(model, total_steps=STEPS, lr=0.2, lr_batch_size=None, warmup_steps=0, clip_norm=1.0, ema=0.9)
    replica = distributed.replicate(model, torch.device("cpu"))
    records = []
    for images, targets in batches():
        if len(shares) > 1:  # stands in for as many processes
            with torch.no_grad():
                num_pos = criteria[0].match(model(images), targets).num_pos
            parts = [as_process(criterion, num_pos, num_shares) for criterion in criteria]
        else:
            parts = criteria
        losses = [part(replica(images[i::num_shares]), targets[i::num_shares]) for i, part in zip(shares, parts)]
        terms = {
            name: distributed.all_sum(sum(loss.terms[name].detach() for loss in losses)) for name in losses[0].terms
        }
        solver.backward(sum(loss.total for loss in losses) * distributed.world_size())
        records.append({**terms, "gradient_norm": solver.clip_gradients()})
        solver.step()
    weight_changes = {name: value - start[name] for name, value in model.state_dict().items()}
    ema_changes = {
        f"averaged {name}": value - start[name] for name, value in solver.evaluated_model.state_dict().items()
    }
    return records, [criterion.state_dict() for criterion in criteria], weight_changes | ema_changes


def as_process(criterion, num_pos, num_shares):
    """A shallow copy with the positives of all processes. Losses with local counts weigh 1 / `num_shares`."""
    copied = copy.copy(criterion)

    def match(*batch):
        matches = criterion.match(*batch)
        matches.num_pos = num_pos
        return matches

    copied.match = match
    for loss in ("class", "box"):
        if getattr(getattr(copied, f"{loss}_loss"), "local_counts", False):
            setattr(copied, f"{loss}_weight", getattr(copied, f"{loss}_weight") / num_shares)
    return copied


def error_of(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def process(rank, folder):
    torch.set_num_threads(1)
    single_results = {}  # before they meet, each computes half of the cases as a single process
    for case in list(CASES)[rank::2]:
        single_results[case] = {"batch": run(case, [0], 1), "shares": run(case, [0, 1], 2) if case in LOCAL else None}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    distributed.same_everywhere({"classes": [1, 3], "solver.lr": 0.1, "nothing": None})
    errors = {
        "value": error_of(distributed.same_everywhere, {"classes": 3, "solver.lr": 0.1 * (1 + rank)}),
        "long": error_of(distributed.same_everywhere, {"config": "x" * 500 + f"lr: {rank}" + "y" * 500}),
        "missing": error_of(distributed.same_everywhere, {"images": 3} if rank else {}),
        "sync_bn": error_of(distributed.replicate, Backbone("resnet18", "sync_bn", 0), torch.device("cpu")),
    }
    errors |= ended_together(rank)
    joint_results = {case: run(case, [rank], 2) for case in CASES}
    torch.save((errors, joint_results, single_results, statistics_of(rank), in_parts(rank)), folder / f"out{rank}.pt")
    dist.destroy_process_group()


def statistics_of(rank):
    """BatchNorm's mean after two training passes of this process's images, and after `share_buffers`."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, momentum=0.5))
    nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
    replica, means = distributed.replicate(model, torch.device("cpu")), []
    for _ in range(2):
        replica(torch.full((2, 1, 4, 4), 8.0 + 8 * rank)).sum().backward()
        means.append(model[1].running_mean.item())
    distributed.share_buffers(model)
    return [*means, model[1].running_mean.item()]


def in_parts(rank):
    """The gradients of a step in one part and in two, and how often the processes exchanged them."""
    cfg = complete(Config(class_loss={"name": "focal"}), "parts")
    images, targets = next(batches())
    share = collate(list(zip(images[rank::2], targets[rank::2], [0, 1], [(SIDE, SIDE)] * 2)))
    gradients, exchanges = [], []

    def exchange(_, bucket):
        exchanges.append(bucket.index())
        total = distributed.all_sum(bucket.buffer()) / 2
        future = torch.futures.Future()
        future.set_result(total)
        return future

    for parts in (1, 2):
        model, criterion = small_model(), assemble.build_criterion(cfg)
        solver = Solver(model, total_steps=1, accumulate=parts)
        replica = distributed.replicate(model, torch.device("cpu"))
        replica.register_comm_hook(None, exchange)
        matches = criterion.match(model.grid(share.images), share.targets)
        compute_gradients(replica, criterion, share, matches, solver)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return gradients, exchanges


def ended_together(rank):
    """The errors of both processes if one of them, or each, has its own error."""

    def block(error):
        with distributed.together():
            if error is not None:
                raise error

    def batches(error):
        for height in range(32, 128, 32):
            if error is not None and height == 96:
                raise error
            image = torch.full((3, height, 64 - 32 * rank), 7, dtype=torch.uint8)
            target = Target(torch.full((2, 4), 5.0), torch.tensor([1, 2]))
            yield collate([(image, target, rank, (9, 9))])

    def seen(error):
        shapes = []
        try:
            for batch in distributed.padded_alike(batches(error)):
                shapes.append(batch.images.shape)
        except Stopped as stopped:
            shapes.append(stopped.number)
        return shapes

    return {
        "block": error_of(block, UserError("x.png: broken") if rank == 1 else None),
        "each": error_of(block, UserError(f"of {rank}")),
        "stopped": seen(Stopped(15) if rank == 1 else None),
        "whole": seen(None),
        "contents": distributed.gather(
            [
                (
                    batch.images.sum().item(),
                    batch.sizes.tolist(),
                    batch.image_ids,
                    [v.tolist() for v in batch.targets[0]],
                )
                for batch in distributed.padded_alike(batches(None))
            ]
        ),
    }


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Of each process the errors and results by case, results by case of a single process, and the other outputs."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(process, args=(folder,), nprocs=2)
    outputs = [torch.load(folder / f"out{rank}.pt") for rank in range(2)]
    errors, joint_results, single_results, *others = zip(*outputs)
    return errors, joint_results, single_results[0] | single_results[1], *others


def difference(values, expected):
    """The largest difference, relative to the largest value of its tensor."""
    pairs = [(values[name].double(), value.double()) for name, value in expected.items()]
    return max((((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() for a, b in pairs), default=0.0)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, two_processes):
    """With a local loss, they equal one process that calls it on each share with a separate state."""
    _, (first, second), single_results, *_ = two_processes
    first, second = first[case], second[case]
    records, states, weight_changes = single_results[case]["shares" if case in LOCAL else "batch"]
    assert sum(bool(value.any()) for value in weight_changes.values()) > 0.9 * len(weight_changes)
    differences = {
        "loss": max(map(difference, first[0], records)),
        "state": max(map(difference, (*first[1], *second[1]), states if len(states) == 2 else states * 2)),
        "weights": difference(first[2], weight_changes),
    }
    print(f"{case:16}", *(f"{name} {value:.1e}" for name, value in differences.items()))
    assert all(value < TOLERANCES[name] for name, value in differences.items()), differences
    assert all(torch.equal(first[2][name], second[2][name]) for name in weight_changes)


@pytest.mark.parametrize("case", sorted(LOCAL))
def test_two_processes_differ_from_one_with_local_losses(case, two_processes):
    _, (first, _), single_results, *_ = two_processes
    (records, _, weight_changes), first = single_results[case]["batch"], first[case]
    assert max(map(difference, first[0], records)) > 0.01 and difference(first[2], weight_changes) > 0.01


def test_a_difference_between_processes_is_named_on_each(two_processes):
    errors = two_processes[0]
    assert errors[0] == errors[1]
    assert errors[0]["value"].startswith("solver.lr differs between processes: '0.1' on rank 0, '0.2' on rank 1;")
    assert "lr: 0yyy" in errors[0]["long"] and "lr: 1yyy" in errors[0]["long"] and len(errors[0]["long"]) < 300
    assert errors[0]["missing"].startswith("images differs between processes: 'None' on rank 0, '3' on rank 1")
    assert errors[0]["sync_bn"].startswith("model.norm: sync_bn needs a GPU for each process, these 2 are on cpu; use")


def test_an_error_in_one_process_ends_both_after_the_same_batch(two_processes):
    errors = two_processes[0]
    assert errors[0] == errors[1]
    assert errors[0]["block"] == "x.png: broken" and errors[0]["each"] == "of 0"
    assert errors[0]["whole"] == [(1, 3, height, 64) for height in (32, 64, 96)]
    assert errors[0]["stopped"] == [*errors[0]["whole"][:2], 15]
    for rank, width in enumerate((64, 32)):  # padded with zeros, and nothing else has changed
        pixels = [7 * 3 * height * width for height in (32, 64, 96)]
        expected = zip(pixels, [[[height, width]] for height in (32, 64, 96)], [[rank]] * 3)
        assert errors[0]["contents"][rank] == [(*values, [[[5.0] * 4] * 2, [1, 2]]) for values in expected]


def test_a_step_in_parts_has_the_same_gradients_and_exchanges_them_once(two_processes):
    for (whole, in_parts), exchanges in two_processes[4]:
        assert difference(in_parts, whole) < 1e-4 and exchanges == [0, 0]
    first, second = (gradients[1] for gradients, _ in two_processes[4])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_process_has_its_own_statistics_until_they_share_the_first_ones(two_processes):
    """To send them in each step would cost time, and only the first process's are evaluated and saved."""
    assert two_processes[3] == ([4.0, 6.0, 6.0], [8.0, 12.0, 6.0])


@pytest.mark.parametrize("message", ["[..pair.cc:544] Connection closed by peer [127.0.0.1]:1", "Broken pipe"])
def test_the_end_of_another_process_is_reported_in_one_line(monkeypatch, command, message):
    def main():
        with distributed.group(torch.device("cpu")):
            raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=r"peer|pipe"):  # a single process gets the error itself
        command(main)
    monkeypatch.setattr(distributed, "setup", lambda device: device)
    monkeypatch.setenv("RANK", "3")
    assert command(main) == (1, "", "error: process 3 has lost another one, whose message says why\n")


def test_equal_values_are_reported_together(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, {"images": 5}, value, value])
    message = error_of(distributed.same_everywhere, {"images": 7})
    assert "'7' on rank 0 and 2 more, '5' on rank 1" in message


def test_a_single_process_compares_nothing_and_sync_bn_is_bn():
    distributed.same_everywhere({"anything": object()})
    outputs, states = [], []
    for norm in ("bn", "sync_bn"):
        torch.manual_seed(0)
        backbone = Backbone("resnet18", norm, 1).train()
        assert distributed.replicate(backbone, torch.device("cpu")) is backbone
        features = backbone(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
        sum(feature.square().sum() for feature in features).backward()
        outputs.append([*features, *(p.grad for p in backbone.parameters() if p.requires_grad)])
        states.append(backbone.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


def test_one_process_of_torchrun_needs_no_group(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.setup(torch.device("cpu")) == torch.device("cpu")
    assert not dist.is_initialized()


def test_keys_of_an_earlier_start_in_the_store_are_not_used():
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    # From a start in which process 1 had asked and got an answer, and process 2 had only asked.
    stale_keys = {"question/1": "old", "answer/old": "earlier", "earlier/1": "taken", "question/2": "older"}
    for key, value in stale_keys.items():
        server.set(key, value)

    def join(rank: int) -> str:
        store = dist.TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=20))
        prefix_store = distributed._unused(store, rank, 3)
        prefix_store.set(f"address/{rank}", str(rank))
        return [prefix_store.get(f"address/{other}") for other in range(3)], store

    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            results = list(pool.map(join, range(3)))
            assert all(addresses == [b"0", b"1", b"2"] for addresses, _ in results)
    names = {key.split("/")[0] for key in server.list_keys()} - {"question", "answer", "earlier", "init"}
    assert len(names) == 2, names


@pytest.mark.parametrize("error", [None, UserError("of all"), Stopped(15), FloatingPointError("NaN"), OSError("full"),
                                   RuntimeError("CUDA error"), RuntimeError("Broken pipe")], ids=repr)  # fmt: skip
def test_a_process_that_fails_alone_does_not_wait_for_the_others(monkeypatch, error):
    """NCCL's shutdown waits for all processes, up to half an hour: longer than the error may stay hidden."""
    shutdowns = []
    monkeypatch.setattr(distributed, "setup", lambda device: device)
    monkeypatch.setattr(distributed, "shutdown", lambda: shutdowns.append(1))
    monkeypatch.setenv("RANK", "0")
    raised = distributed.LostProcess if str(error) == "Broken pipe" else type(error)
    with pytest.raises(raised) if error else nullcontext(), distributed.group(torch.device("cpu")):
        if error is not None:
            raise error
    assert bool(shutdowns) == (error is None or isinstance(error, (UserError, Stopped)))


def test_a_single_process_makes_the_gpu_of_its_number_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("RANK", raising=False)
    for name in ("cpu", "cuda", "cuda:1"):
        assert distributed.setup(torch.device(name)) == torch.device(name)
    assert chosen == [torch.device("cuda:1")]
