"""Warm-up and schedule, scaling with the batch, clipping, averaged weights, and the restored state."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detector import assemble
from detector.config import Config
from detector.configure import complete
from detector.solver import Solver


def small_model(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()


def train(model, solver, steps, seed=0):
    """Train on batches that depend only on the step."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(seed + solver.step_count)
        solver.backward(model(torch.randn(6, 4, generator=generator, dtype=torch.float64)).square().sum())
        solver.clip_gradients()
        solver.step()


def plain(total_steps=100, **options) -> Solver:
    """A solver without learning rate scaling and without warm-up, unless `options` set them."""
    return Solver(nn.Linear(1, 1), total_steps=total_steps, **{"lr_batch_size": None, "warmup_steps": 0, **options})


def test_step_schedule_by_hand():
    solver = plain(lr=0.4, schedule="step", decay_at=[8 / 12, 11 / 12], decay_factor=0.1, total_steps=120)
    values = {0: 0.4, 79: 0.4, 80: 0.04, 109: 0.04, 110: 0.004, 119: 0.004}
    for step, lr in values.items():
        assert solver.lr_at(step) == pytest.approx(lr)


def test_cosine_by_hand():
    solver = plain(lr=0.4, schedule="cosine", total_steps=100)
    for step, lr in {0: 0.4, 25: 0.2 * (1 + math.sqrt(0.5)), 50: 0.2, 75: 0.2 * (1 - math.sqrt(0.5)), 100: 0.0}.items():
        assert solver.lr_at(step) == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_warm_up_is_linear_from_its_factor(schedule):
    solver = plain(lr=2.0, schedule=schedule, warmup_steps=10, warmup_factor=0.1, decay_at=[0.5])
    assert [solver.lr_at(step) for step in (0, 5, 10)] == pytest.approx([0.2, 1.1, 2.0])


def test_cosine_starts_where_warm_up_ends():
    solver = plain(lr=1.0, schedule="cosine", warmup_steps=20, total_steps=100)
    assert solver.lr_at(60) == pytest.approx(0.5)


def test_a_drop_within_the_warm_up_counts():
    solver = plain(lr=1.0, warmup_steps=50, warmup_factor=0.5, decay_at=[0.1], total_steps=100)
    assert solver.lr_at(9) == pytest.approx(0.5 + 0.5 * 9 / 50)
    assert solver.lr_at(10) == pytest.approx(0.1 * (0.5 + 0.5 * 10 / 50))


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.4 / 4), ("adamw", 0.4 / 2)])
def test_lr_and_warm_up_scale_with_the_batch(optimizer, lr):
    solver = plain(9000, optimizer=optimizer, lr=0.4, lr_batch_size=16, batch_size=4, warmup_steps=500)
    assert solver.lr == pytest.approx(lr)
    assert solver.warmup_steps == 2000  # the same number of images
    description = solver.describe()
    for number in (f"lr {lr:g}", "0.4 at batch 16", "batch 4", "warm-up 2000 steps", "from 500"):
        assert number in description
    assert "\n" not in description


def test_lr_batch_size_null_takes_lr_as_it_is():
    solver = plain(9000, lr=0.4, batch_size=4, warmup_steps=500)
    assert (solver.lr, solver.warmup_steps) == (0.4, 500)
    assert "scaled" not in solver.describe()


def test_a_short_training_is_not_all_warm_up():
    solver = plain(total_steps=10, warmup_steps=500, lr=1.0)
    assert solver.warmup_steps == 5
    assert solver.lr_at(5) == 1.0


def test_the_lr_of_the_schedule_is_the_one_used():
    model = nn.Linear(1, 1, bias=False)
    solver = Solver(model, total_steps=4, lr=1.0, lr_batch_size=None, warmup_steps=2, warmup_factor=0.5, momentum=0,
                    weight_decay=0)  # fmt: skip
    moves = []
    for _ in range(4):
        before = model.weight.item()
        solver.backward(model.weight.sum())
        solver.clip_gradients()
        solver.step()
        moves.append(before - model.weight.item())
    assert moves == pytest.approx([0.5, 0.75, 1.0, 1.0], abs=1e-6)
    assert solver.done


def test_clipping_bounds_the_update_and_the_norm_is_reported_unclipped():
    for clip_norm, update_norm in ((0.5, 0.5), (None, 50.0), (100.0, 50.0)):
        model = nn.Linear(2, 1, bias=False).double()
        solver = Solver(model, total_steps=1, lr=1.0, lr_batch_size=None, warmup_steps=0, momentum=0, weight_decay=0,
                        clip_norm=clip_norm)  # fmt: skip
        before = model.weight.detach().clone()
        solver.backward((model.weight * torch.tensor([[30.0, 40.0]])).sum())
        assert solver.clip_gradients().item() == pytest.approx(50)
        solver.step()
        assert (model.weight - before).norm().item() == pytest.approx(update_norm, rel=1e-5)


MODELS = [
    ("resnet18", "frozen_bn", "none"),
    ("resnet18", "gn", "gn"),
    ("resnet50", "bn", "gn"),
    ("resnext50_32x4d", "sync_bn", "none"),
    ("mobilenet_v2", "frozen_bn", "none"),
    ("mobilenet_v3_large", "bn", "none"),
]


@pytest.mark.parametrize(("backbone", "norm", "head_norm"), MODELS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_applies_only_to_the_weights_of_convolutions(backbone, norm, head_norm, optimizer):
    options = {"backbone": backbone, "norm": norm, "weights": "none" if norm == "gn" else "imagenet"}
    cfg = Config(model={**options, "head": {"norm": head_norm}}, class_loss={"name": "ce"}, box_loss={"name": "l1"})
    model = assemble.build_model(complete(cfg, "test"), num_classes=3)
    expected = {"decayed": set(), "not": set()}  # by the modules' types
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                kind = "decayed" if isinstance(module, nn.Conv2d) and name == "weight" else "not"
                expected[kind].add(f"{path}.{name}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    solver = Solver(model, total_steps=9, optimizer=optimizer, weight_decay=0.3)
    decayed, not_decayed = ({names[id(p)] for p in group["params"]} for group in solver.optimizer.param_groups)
    assert (decayed, not_decayed) == (expected["decayed"], expected["not"])
    assert len(decayed) > 20 and len(not_decayed) > 10 and len(decayed) + len(not_decayed) == len(solver.parameters)
    assert [group["weight_decay"] for group in solver.optimizer.param_groups] == [0.3, 0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_without_gradient_shrinks_weights_by_the_lr_of_that_step(optimizer):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 1), nn.GroupNorm(2, 8)).double()
    solver = Solver(model, total_steps=4, optimizer=optimizer, lr=0.1, lr_batch_size=None, warmup_steps=2,
                    warmup_factor=0.5, momentum=0, weight_decay=0.2)  # fmt: skip
    for lr in (0.05, 0.075, 0.1):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        solver.backward(sum(parameter.sum() for parameter in model.parameters()) * 0)
        solver.clip_gradients()
        solver.step()
        assert [group["lr"] for group in solver.optimizer.param_groups] == pytest.approx([lr, lr])
        for name, parameter in model.named_parameters():
            decay_factor = 1 - lr * 0.2 if name in ("0.weight", "2.weight") else 1
            torch.testing.assert_close(parameter.detach(), decay_factor * before[name])


def test_frozen_parameters_are_left_out():
    model = small_model()
    model[0].requires_grad_(False)
    assert len(Solver(model, total_steps=1).parameters) == 4


def test_the_average_equals_a_plain_loop_and_includes_buffers():
    model, decay = small_model(), 0.7
    solver = Solver(model, total_steps=30, lr=0.05, lr_batch_size=None, warmup_steps=0, ema=decay)
    expected, decays = None, []
    for n in range(25):
        train(model, solver, 1)
        state = {key: value.double().clone() for key, value in model.state_dict().items()}
        if expected is None:
            expected = state  # it starts with the weights of the first step, not with the random ones
        else:
            decays.append(min(decay, (1 + n) / (10 + n)))
            expected = {key: decays[-1] * expected[key] + (1 - decays[-1]) * state[key] for key in state}
        average = solver.evaluated_model.state_dict()
        assert average.keys() == expected.keys()
        for key in average:
            if average[key].is_floating_point():
                assert torch.allclose(average[key], expected[key], rtol=1e-12, atol=1e-14), (n, key)
            else:
                assert average[key] == model.state_dict()[key]
    assert decays[0] < 0.2 and decays[-1] == decay  # it grew up to the decay
    assert not torch.equal(average["1.running_mean"], model[1].running_mean)


class Copies(TorchDispatchMode):
    """Counts the copies from the CPU to another device, which wait for it if it is a GPU."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            self.found += result.device.type != "cpu"
        return result


def test_no_average_waits_for_the_device():
    solver = Solver(small_model().to("meta"), total_steps=3, ema=0.9, precision="float16")
    with Copies() as copies:
        for _ in range(3):
            solver.step_count += 1
            solver._average()
        assert copies.found == 0
        torch.zeros(()).to("meta")
        assert copies.found == 1  # proof that such a copy counts


def test_without_average_the_model_itself_is_evaluated():
    model = small_model()
    assert Solver(model, total_steps=1).evaluated_model is model


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_restored_solver_continues_bit_for_bit(optimizer, ema, same):
    options = dict(total_steps=8, optimizer=optimizer, lr=0.1, warmup_steps=4, schedule="cosine", clip_norm=1, ema=ema)
    model = small_model()
    solver = Solver(model, **options)
    train(model, solver, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "solver": solver.state_dict()}, file)
    file.seek(0)
    content = torch.load(file, weights_only=True)

    restored_model = small_model(seed=1)
    restored = Solver(restored_model, **options)
    restored_model.load_state_dict(content["model"])
    restored.load_state_dict(content["solver"])
    assert restored.step_count == 3
    train(model, solver, 5)
    train(restored_model, restored, 5)
    assert same(model.state_dict(), restored_model.state_dict())
    assert same(solver.state_dict(), restored.state_dict())
    assert restored.done

    fresh_solver = Solver(small_model(), **options)  # without the state, training differs
    fresh_solver.model.load_state_dict(content["model"])
    train(fresh_solver.model, fresh_solver, 5)
    assert not same(model.state_dict(), fresh_solver.model.state_dict())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_in_float16_an_overflow_skips_the_step_and_leaves_no_trace(optimizer):
    model, twin = nn.Linear(3, 1), nn.Linear(3, 1)
    twin.load_state_dict(model.state_dict())
    options = {"total_steps": 9, "optimizer": optimizer, "lr_batch_size": None, "warmup_steps": 0}
    solver = Solver(model, **options, decay_at=[], precision="float16")
    plain_solver = Solver(twin, **options, decay_at=[])
    before, scale = copy.deepcopy(model.state_dict()), solver.scaler.get_scale()

    solver.backward(model.weight.sum() * torch.inf)
    solver.clip_gradients()
    solver.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert solver.scaler.get_scale() < scale

    for each_model, each_solver in ((model, solver), (twin, plain_solver)):
        for _ in range(2):
            each_solver.backward(each_model(torch.tensor([[1.0, -2.0, 0.5]])).square().sum())
            each_solver.clip_gradients()
            each_solver.step()
    torch.testing.assert_close(model.weight, twin.weight)
