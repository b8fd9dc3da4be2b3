"""The two loops: what a step does, what stops it, and what evaluation gives and leaves alone."""

import copy
import os
import signal

import pytest
import torch
from torch import nn

from detector import assemble, engine, losses
from detector.config import Config
from detector.configure import complete
from detector.engine import predict, train_until
from detector.errors import Stopped, UserError
from detector.stop import Stop
from detector.structures import Batch, Detections, Losses, Predictions, Target

CPU = torch.device("cpu")


class Recorder:
    """The methods of the logger and of its clock that train_until calls."""

    def __init__(self, observe=()):
        self.observed = dict.fromkeys(observe)
        self.steps, self.said, self.calls = [], [], []
        self.clock = self

    def start(self, step, total_steps):
        self.calls.append(f"start {step} of {total_steps}")

    def next_batch(self, batches, unread=None):
        self.calls.append("next")
        return next(batches, None)

    def step_done(self):
        self.calls.append("done")

    def wants_gradients(self, step):
        return step in self.observed

    def gradients(self, observation, step):
        self.observed[step] = observation

    def say(self, text):
        self.said.append(text)

    def step(self, values, terms, lr, images, step):
        self.steps.append((values, set(terms), lr, images, step))


def make(norm="gn", steps=10, precision="float32", class_loss=None, box_loss=None, **solver):
    model = {"backbone": "resnet18", "weights": "none", "norm": norm, "fpn_channels": 32, "head": {"width": 32,
             "depth": 1}}  # fmt: skip
    options = {"batch_size": 2, "lr_batch_size": None, "lr": 0.01, "warmup_steps": 0, "max_steps": steps, **solver}
    cfg = Config(model=model, solver=options, precision=precision, class_loss=class_loss or {"name": "ghm_c"},
                 box_loss=box_loss or {"name": "smooth_l1"})  # fmt: skip
    cfg = complete(cfg, "test")
    torch.manual_seed(0)
    net = assemble.build_model(cfg, num_classes=3)
    return net, assemble.build_criterion(cfg), assemble.build_solver(cfg, net, steps_per_epoch=steps)


def train(model, criterion, batches, solver, logger, device):
    train_until(model, criterion, batches, solver, logger, device, until_step=solver.total_steps)


def batch(ids=(1, 2), seed=0, size=(64, 64)) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(ids), 3, *size), generator=generator, dtype=torch.uint8)
    targets = [Target(torch.tensor([[4.0 + i, 6, 44, 40]]), torch.tensor([i % 3])) for i in range(len(ids))]
    return Batch(images, targets, list(ids), [size] * len(ids), [size] * len(ids))


def test_a_step_moves_the_weights_and_is_logged():
    model, criterion, solver = make(steps=3)
    before = copy.deepcopy(model.state_dict())
    logger = Recorder()
    train(model, criterion, [batch()] * 2, solver, logger, CPU)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [step for *_, step in logger.steps] == [1, 2] and solver.step_count == 2
    values, terms, lr, images, _ = logger.steps[0]
    assert terms == {"class", "box"} and images == 2 and lr == pytest.approx(0.01)
    assert set(values) == {"class", "box", "gradient_norm", "true_class_probability", "positives_per_image"}
    assert values["gradient_norm"] > 0
    assert criterion.class_loss.updates == 2
    assert model.training and criterion.training


def test_it_ends_where_the_solver_is_done():
    model, criterion, solver = make(steps=2)
    logger = Recorder()
    train_until(model, criterion, [batch()] * 5, solver, logger, CPU, until_step=4)
    assert len(logger.steps) == 2 and solver.done
    assert logger.calls == ["start 0 of 2", "next", "next", "done", "done"]


@pytest.mark.parametrize("error", [UserError("an image cannot be read"), Stopped(signal.SIGTERM)])
def test_an_error_in_place_of_a_batch_comes_after_the_step_before(error):
    def stream():
        yield batch()
        raise error

    model, criterion, solver = make()
    logger = Recorder()
    with pytest.raises(type(error)):
        train(model, criterion, stream(), solver, logger, CPU)
    assert solver.step_count == len(logger.steps) == 1


def test_gradients_are_observed_when_asked_for_and_change_nothing():
    after = []
    for observe in ((), (2,)):
        model, criterion, solver = make(steps=3)
        printed = Recorder(observe)
        train(model, criterion, [batch(seed=i) for i in range(3)], solver, printed, CPU)
        after.append([*model.state_dict().values(), *criterion.state_dict().values()])
        assert all(observation is not None for observation in printed.observed.values())
    assert all(torch.equal(a, b) for a, b in zip(*after))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value):
    model, criterion, solver = make()
    solver.step_count = 6
    forward = criterion.forward

    def poisoned(*given):
        losses = forward(*given)
        return Losses({**losses.terms, "box": losses.terms["box"] * value}, losses.diagnostics)

    criterion.forward = poisoned
    before = copy.deepcopy({key: value for key, value in model.named_parameters()})
    with pytest.raises(FloatingPointError) as error:
        train(model, criterion, [batch(ids=(17, 39))], solver, Recorder(), CPU)
    message = str(error.value)
    assert "box = " in message and "step 7" in message and "[17, 39]" in message and "\n" not in message
    assert "class = " not in message
    assert all(torch.equal(before[key], value) for key, value in model.named_parameters())
    assert solver.step_count == 6


def test_a_gradient_that_is_not_finite_stops_as_well():
    model, criterion, solver = make()
    model.head.deltas.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"gradient_norm = (inf|nan) at step 1"):
        train(model, criterion, [batch()], solver, Recorder(), CPU)


def test_nan_weights_stop_it():
    model, criterion, solver = make(class_loss={"name": "focal"})
    with torch.no_grad():
        model.head.logits.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="class = nan"):
        train(model, criterion, [batch()], solver, Recorder(), CPU)


def test_accumulation_visits_every_image_once_in_order():
    model, criterion, solver = make(batch_size=4, accumulate=2)
    seen, forward = [], model.forward

    def spied(images, sizes):
        seen.append(images)
        return forward(images, sizes)

    model.forward = spied
    four = batch(ids=(1, 2, 3, 4))
    logger = Recorder()
    train(model, criterion, [four], solver, logger, CPU)
    assert [len(images) for images in seen] == [2, 2, 2, 2]  # once for what they say, once for the gradient
    assert torch.equal(torch.cat(seen[:2]), four.images) and torch.equal(torch.cat(seen[2:]), four.images)
    assert solver.step_count == 1 and len(logger.steps) == 1 and logger.steps[0][3] == 4


PAIRS = [(name, "smooth_l1") for name in losses.CLASS_LOSSES] + [("focal", name) for name in losses.BOX_LOSSES]


@pytest.mark.parametrize("class_loss, box_loss", PAIRS)
def test_accumulated_parts_are_the_whole_batch(class_loss, box_loss):
    # In float64: a float32 rounding that carries one activation across a ReLU's edge is as large as a fault.
    results = []
    for accumulate in (1, 3):
        model, criterion, solver = make(
            batch_size=6, accumulate=accumulate, momentum=0, weight_decay=0, lr=1e-2,
            class_loss={"name": class_loss}, box_loss={"name": box_loss},
        )  # fmt: skip
        model.double()
        model.backbone.requires_grad_(class_loss == "ce")  # once is enough: its gradients take most of the time
        before = [p.detach().clone() for p in model.parameters()]
        logger = Recorder()
        for step in range(2):
            six = batch(ids=range(6), seed=step, size=(32, 32))
            six = six._replace(images=six.images.double())
            train(model, criterion, [six], solver, logger, CPU)
        moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before)])
        results.append((moved, [values for values, *_ in logger.steps], criterion.state_dict()))
    (moved, values, state), (moved_in_parts, values_in_parts, state_in_parts) = results
    assert (moved - moved_in_parts).norm() < 1e-9 * moved.norm()
    for whole, parts in zip(values, values_in_parts):
        assert whole["positives_per_image"] > 0 and whole == pytest.approx(parts, rel=1e-9)
    for name, value in state.items():
        torch.testing.assert_close(state_in_parts[name], value, rtol=1e-9, atol=0)


def test_accumulation_leaves_batchnorms_statistics_as_one_pass_does():
    counted = []
    for accumulate in (1, 2):
        model, criterion, solver = make(norm="bn", batch_size=4, accumulate=accumulate)
        train(model, criterion, [batch(ids=range(4))], solver, Recorder(), CPU)
        counted.append(int(model.backbone.bn1.num_batches_tracked))
    assert counted == [1, 2]  # the parts, each once


def test_a_step_that_is_not_finite_may_be_skipped():
    model, criterion, solver = make(skip_nonfinite=1)
    hook = model.head.deltas.bias.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy({key: value for key, value in model.named_parameters()})
    logger = Recorder()
    train(model, criterion, [batch()], solver, logger, CPU)
    assert solver.step_count == solver.skipped == 1 and "skipped, 0 more" in logger.said[0]
    assert all(torch.equal(before[key], value) for key, value in model.named_parameters())
    with pytest.raises(FloatingPointError, match="at step 2"):
        train(model, criterion, [batch()], solver, logger, CPU)
    hook.remove()
    solver.optimizer.zero_grad()
    train(model, criterion, [batch()], solver, logger, CPU)
    assert solver.step_count == 2 and any(not torch.equal(before[k], v) for k, v in model.named_parameters())


def test_it_ends_at_the_step_it_is_given_and_between_two_where_it_is_asked_to():
    model, criterion, solver = make()
    train_until(model, criterion, [batch()] * 5, solver, Recorder(), CPU, until_step=2)
    assert solver.step_count == 2
    backward = solver.backward

    def ask(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        backward(loss)

    solver.backward = ask
    with Stop() as stop, pytest.raises(Stopped):
        train(model, criterion, stop.between([batch()] * 5), solver, Recorder(), CPU)
    assert solver.step_count == 3


def test_a_stream_goes_on_where_the_last_steps_ended():
    model, criterion, solver = make()
    seen = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    batches = [batch(seed=seed) for seed in range(4)]
    stream = (one for one in batches)
    for step in (1, 3, 4):
        train_until(model, criterion, stream, solver, Recorder(), CPU, until_step=step)
    assert all(images is one.images for images, one in zip(seen, batches, strict=True))


class Fixed(nn.Module):
    """No detector: its "predictions" are a mean for each image, to test the loop alone."""

    def forward(self, images, sizes):
        return Predictions(images.float().mean((1, 2, 3)), None, None, ())


def test_predict_gives_every_image_once_in_pixels_of_the_original():
    sizes, originals = [(64, 96), (48, 64), (60, 30)], [(128, 192), (480, 320), (20, 10)]
    batches = []
    for size, original, image_id in zip(sizes, originals, (7, 5, 9)):
        batches.append(Batch(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), [None], [image_id], [size], [original]))
    joined = Batch(torch.zeros(2, 3, 64, 96, dtype=torch.uint8), [None] * 2, [7, 5], sizes[:2], originals[:2])

    def whole_image(predictions, sizes):
        boxes = [torch.tensor([[0.0, 0, w, h], [w / 2, h / 4, w, h / 2]]) for h, w in sizes]
        return [Detections(box, torch.tensor([0.9, 0.8]), torch.tensor([0, 1])) for box in boxes]

    found = predict(Fixed(), [joined, batches[2]], whole_image, CPU)
    assert list(found) == [7, 5, 9]
    for image_id, (h, w) in zip((7, 5, 9), originals):
        expected = torch.tensor([[0.0, 0, w, h], [w / 2, h / 4, w, h / 2]])
        assert torch.allclose(found[image_id].boxes, expected)
        assert found[image_id].scores.tolist() == pytest.approx([0.9, 0.8])
        assert found[image_id].labels.tolist() == [0, 1]


def test_predict_joins_the_shares_of_all_processes(monkeypatch):
    one = Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [None], [1], [(32, 32)], [(32, 32)])
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    other = {tuple: ({2: nothing, 1: nothing}, []), type(None): None}  # its share, and that it met no error
    monkeypatch.setattr(engine.distributed, "gather", lambda value: [value, other[type(value)]])
    assert set(predict(Fixed(), [one], lambda p, sizes: [nothing], CPU)) == {1, 2}


def test_predict_stops_where_the_output_is_not_finite_and_all_processes_say_on_which_images(monkeypatch):
    model, _, _ = make()
    postprocess = assemble.build_postprocess(Config())
    seen, forward = [], model.forward

    def broken(images, sizes):
        predictions = forward(images, sizes)
        seen.append(len(images))
        if len(seen) == 2:
            predictions.logits[1] = torch.nan
        return predictions

    model.forward = broken
    batches = [batch(ids=(1, 2)), batch(ids=(3, 4)), batch(ids=(5, 6))]
    with pytest.raises(FloatingPointError, match=r"^images \[4\]: the model's output is not finite"):
        predict(model, batches, postprocess, CPU)
    assert seen == [2, 2]
    gathered = []
    other = {tuple: ({}, [9]), type(None): None}  # its share, and that it met no error
    monkeypatch.setattr(
        engine.distributed, "gather", lambda value: gathered.append(value) or [value, other[type(value)]]
    )
    with pytest.raises(FloatingPointError, match=r"^images \[9\]: "):  # this process's own are sound
        predict(model, batches, postprocess, CPU)
    assert gathered[0] is None and set(gathered[1][0]) == {1, 2, 3, 4, 5, 6}


def test_evaluation_leaves_statistics_and_the_losses_state_alone(same):
    model, criterion, solver = make(norm="bn")
    train(model, criterion, [batch()], solver, Recorder(), CPU)
    before = copy.deepcopy((model.state_dict(), criterion.state_dict(), solver.state_dict()))
    postprocess = assemble.build_postprocess(Config(postprocess={"score_threshold": 0}))
    found = predict(model, [batch(ids=(1, 2)), batch(ids=(3,), seed=1)], postprocess, CPU)
    assert same(before, (model.state_dict(), criterion.state_dict(), solver.state_dict()))
    assert sorted(found) == [1, 2, 3] and all(len(one.boxes) == 100 for one in found.values())
    criterion.eval()
    criterion(model(batch().images), batch().targets)
    assert same(before[1], criterion.state_dict())


def test_predict_does_not_depend_on_the_batch():
    model, _, _ = make(norm="bn")
    postprocess = assemble.build_postprocess(Config(postprocess={"score_threshold": 0}))
    two, ids = batch(), (1, 2)
    singles = [Batch(*(values[i : i + 1] for values in two)) for i in range(2)]
    together, apart = predict(model, [two], postprocess, CPU), predict(model, singles, postprocess, CPU)
    for i in ids:
        assert torch.allclose(together[i].scores, apart[i].scores, atol=1e-5)


def test_bfloat16_is_for_the_model_alone():
    model, criterion, solver = make(precision="bfloat16")
    seen, forward = [], criterion.forward

    def spied(predictions, *given):
        losses = forward(predictions, *given)
        seen.append((predictions.logits.dtype, predictions.anchors.dtype, {v.dtype for v in losses.terms.values()}))
        return losses

    criterion.forward = spied
    # Not 64 pixels: of a P6 of one cell, torch 2.15 makes a bfloat16 gradient of P7's weights from stray memory (CPU).
    train(model, criterion, [batch(size=(96, 96))], solver, Recorder(), CPU)
    assert seen == [(torch.bfloat16, torch.float32, {torch.float32})]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    found = predict(model, [batch()], assemble.build_postprocess(Config(postprocess={"score_threshold": 0})), CPU,
                    torch.bfloat16)  # fmt: skip
    assert (
        {one.boxes.dtype for one in found.values()} == {one.scores.dtype for one in found.values()} == {torch.float32}
    )
