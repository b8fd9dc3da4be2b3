"""The loops of training and of prediction: what a step does, what stops it, and what evaluation leaves unchanged."""

import copy
import os
import signal

import pytest
import torch
from torch import nn

from data.loader import collate
from detector import assemble, engine, losses
from detector.config import Config
from detector.configure import complete
from detector.engine import predict, train_until
from detector.errors import Stopped, UserError
from detector.gradients import observe
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

    def next_batch(self, batches, pending_losses=None):
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
    weights = "imagenet" if norm == "frozen_bn" else "none"  # a config needs them, and a model is built without
    model = {"backbone": "resnet18", "weights": weights, "norm": norm, "fpn_channels": 32, "head": {"width": 32,
             "depth": 1}}  # fmt: skip
    options = {"batch_size": 2, "lr_batch_size": None, "lr": 0.01, "warmup_steps": 0, "max_steps": steps, **solver}
    cfg = Config(model=model, solver=options, precision=precision, class_loss=class_loss or {"name": "ghm_c"},
                 box_loss=box_loss or {"name": "smooth_l1"})  # fmt: skip
    cfg = complete(cfg, "test")
    torch.manual_seed(0)
    net = assemble.build_model(cfg, num_classes=3)
    return net, assemble.build_criterion(cfg), assemble.build_solver(cfg, net, steps_per_epoch=steps)


def train(model, criterion, batches, solver, logger):
    train_until(model, criterion, batches, solver, logger, until_step=solver.total_steps)


def batch(ids=(1, 2), seed=0, size=(64, 64)) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(ids), 3, *size), generator=generator, dtype=torch.uint8)
    targets = [Target(torch.tensor([[4.0 + i, 6, 44, 40]]), torch.tensor([i % 3])) for i in range(len(ids))]
    return collate(list(zip(images, targets, ids, [size] * len(ids))))


def test_a_step_moves_the_weights_and_is_logged():
    model, criterion, solver = make(steps=3)
    before = copy.deepcopy(model.state_dict())
    logger = Recorder()
    train(model, criterion, [batch()] * 2, solver, logger)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [step for *_, step in logger.steps] == [1, 2] and solver.step_count == 2
    values, terms, lr, images, _ = logger.steps[0]
    assert terms == {"class", "box"} and images == 2 and lr == pytest.approx(0.01)
    assert set(values) == {"class", "box", "gradient_norm", "true_class_probability", "positives_per_image"}
    assert values["gradient_norm"] > 0
    assert criterion.class_loss.updates == 2
    assert model.training and criterion.training


def test_training_ends_when_the_solver_is_done():
    model, criterion, solver = make(steps=2)
    logger = Recorder()
    train_until(model, criterion, [batch()] * 5, solver, logger, until_step=4)
    assert len(logger.steps) == 2 and solver.done
    assert logger.calls == ["start 0 of 2", "next", "next", "done", "done"]


@pytest.mark.parametrize("error", [UserError("an image cannot be read"), Stopped(signal.SIGTERM)])
def test_an_error_in_place_of_a_batch_is_raised_after_the_step_before(error):
    def stream():
        yield batch()
        raise error

    model, criterion, solver = make()
    logger = Recorder()
    with pytest.raises(type(error)):
        train(model, criterion, stream(), solver, logger)
    assert solver.step_count == len(logger.steps) == 1


def test_gradients_are_observed_on_request_and_change_nothing():
    states = []
    for steps in ((), (2,)):
        model, criterion, solver = make(steps=3)
        logger = Recorder(steps)
        train(model, criterion, [batch(seed=i) for i in range(3)], solver, logger)
        states.append([*model.state_dict().values(), *criterion.state_dict().values()])
        assert all(observation is not None for observation in logger.observed.values())
    assert all(torch.equal(a, b) for a, b in zip(*states))


def test_the_observed_gradient_counts_the_batch_once():
    model, criterion, solver = make()
    logger = Recorder((2,))
    train_until(model, criterion, iter([batch(seed=0)]), solver, logger, until_step=1)
    second, as_before = batch(size=(128, 128)), copy.deepcopy(criterion)
    expected = observe(as_before, model(second.images, second.sizes), second.targets)
    train_until(model, criterion, iter([second]), solver, logger, until_step=2)
    torch.testing.assert_close(logger.observed[2].cells, expected.cells)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_stops_training_before_the_update(value):
    model, criterion, solver = make()
    solver.step_count = 6
    forward = criterion.forward

    def poisoned(*args):
        losses = forward(*args)
        return Losses({**losses.terms, "box": losses.terms["box"] * value}, losses.diagnostics)

    criterion.forward = poisoned
    before = copy.deepcopy({key: value for key, value in model.named_parameters()})
    with pytest.raises(FloatingPointError) as error:
        train(model, criterion, [batch(ids=(17, 39))], solver, Recorder())
    message = str(error.value)
    assert "box = " in message and "step 7" in message and "[17, 39]" in message and "\n" not in message
    assert "class = " not in message
    assert all(torch.equal(before[key], value) for key, value in model.named_parameters())
    assert solver.step_count == 6


def test_a_gradient_that_is_not_finite_stops_training():
    model, criterion, solver = make()
    model.head.deltas.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"gradient_norm = (inf|nan) at step 1"):
        train(model, criterion, [batch()], solver, Recorder())


def test_nan_weights_stop_training():
    model, criterion, solver = make(class_loss={"name": "focal"})
    with torch.no_grad():
        model.head.logits.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="class = nan"):
        train(model, criterion, [batch()], solver, Recorder())


def test_accumulation_visits_every_image_once_in_order():
    model, criterion, solver = make(batch_size=4, accumulate=2)
    parts, forward = [], model.forward

    def spied(images, sizes):
        parts.append(images)
        return forward(images, sizes)

    model.forward = spied
    full_batch = batch(ids=(1, 2, 3, 4))
    logger = Recorder()
    train(model, criterion, [full_batch], solver, logger)
    assert [len(images) for images in parts] == [2, 2, 2, 2]  # once for the outputs, once for the gradient
    assert torch.equal(torch.cat(parts[:2]), full_batch.images) and torch.equal(torch.cat(parts[2:]), full_batch.images)
    assert solver.step_count == 1 and len(logger.steps) == 1 and logger.steps[0][3] == 4


PAIRS = [(name, "smooth_l1") for name in losses.CLASS_LOSSES] + [("focal", name) for name in losses.BOX_LOSSES]


@pytest.mark.parametrize("class_loss, box_loss", PAIRS)
def test_accumulated_parts_equal_the_whole_batch(class_loss, box_loss):
    # In float64: if float32 rounding moves one activation across a ReLU's edge, the error is as large as a bug's.
    results = []
    for accumulate in (1, 3):
        model, criterion, solver = make(
            batch_size=6, accumulate=accumulate, momentum=0, weight_decay=0, lr=1e-2,
            class_loss={"name": class_loss}, box_loss={"name": box_loss},
        )  # fmt: skip
        model.double()
        # One loss is enough: the backbone's gradients take most of the time.
        model.backbone.requires_grad_(class_loss == "ce")
        before = [p.detach().clone() for p in model.parameters()]
        logger = Recorder()
        for step in range(2):
            full_batch = batch(ids=range(6), seed=step, size=(32, 32))
            train(model, criterion, [full_batch], solver, logger)
        weight_change = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before)])
        results.append((weight_change, [values for values, *_ in logger.steps], criterion.state_dict()))
    (weight_change, values, state), (weight_change_in_parts, values_in_parts, state_in_parts) = results
    assert (weight_change - weight_change_in_parts).norm() < 1e-9 * weight_change.norm()
    for step_values, step_values_in_parts in zip(values, values_in_parts):
        assert step_values["positives_per_image"] > 0 and step_values == pytest.approx(step_values_in_parts, rel=1e-9)
    for name, value in state.items():
        torch.testing.assert_close(state_in_parts[name], value, rtol=1e-9, atol=0)


def test_accumulation_updates_batchnorm_statistics_once_for_each_part():
    batch_counts = []
    for accumulate in (1, 2):
        model, criterion, solver = make(norm="bn", batch_size=4, accumulate=accumulate)
        train(model, criterion, [batch(ids=range(4))], solver, Recorder())
        batch_counts.append(int(model.backbone.bn1.num_batches_tracked))
    assert batch_counts == [1, 2]  # each part once


def test_a_step_that_is_not_finite_may_be_skipped():
    model, criterion, solver = make(skip_nonfinite=1)
    hook = model.head.deltas.bias.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy({key: value for key, value in model.named_parameters()})
    logger = Recorder()
    train(model, criterion, [batch()], solver, logger)
    assert solver.step_count == solver.skipped == 1 and "skipped, 0 more" in logger.said[0]
    assert all(torch.equal(before[key], value) for key, value in model.named_parameters())
    with pytest.raises(FloatingPointError, match="at step 2"):
        train(model, criterion, [batch()], solver, logger)
    hook.remove()
    solver.optimizer.zero_grad()
    train(model, criterion, [batch()], solver, logger)
    assert solver.step_count == 2 and any(not torch.equal(before[k], v) for k, v in model.named_parameters())


def test_training_ends_at_the_given_step_and_after_a_signal():
    model, criterion, solver = make()
    train_until(model, criterion, [batch()] * 5, solver, Recorder(), until_step=2)
    assert solver.step_count == 2
    backward = solver.backward

    def ask(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        backward(loss)

    solver.backward = ask
    with Stop() as stop, pytest.raises(Stopped):
        train(model, criterion, stop.between([batch()] * 5), solver, Recorder())
    assert solver.step_count == 3


def test_a_stream_continues_where_the_last_call_ended():
    model, criterion, solver = make()
    seen_images = []
    model.register_forward_pre_hook(lambda _, arguments: seen_images.append(arguments[0]))
    batches = [batch(seed=seed) for seed in range(4)]
    stream = (loaded_batch for loaded_batch in batches)
    for step in (1, 3, 4):
        train_until(model, criterion, stream, solver, Recorder(), until_step=step)
    pairs = zip(seen_images, batches, strict=True)
    assert all(images.data_ptr() == loaded_batch.data.data_ptr() for images, loaded_batch in pairs)


class Fixed(nn.Module):
    """No detector: its "predictions" are a mean for each image, to test the loop alone."""

    def forward(self, images, sizes):
        return Predictions(images.float().mean((1, 2, 3)), None, None, ())


def test_predict_gives_every_image_once_in_pixels_of_the_original():
    sizes, originals = [(64, 96), (48, 64), (60, 30)], [(128, 192), (480, 320), (20, 10)]
    no_box = Target(torch.zeros(0, 4), torch.zeros(0))
    samples = [
        (torch.zeros(3, *size, dtype=torch.uint8), no_box, image_id, original)
        for size, image_id, original in zip(sizes, (7, 5, 9), originals)
    ]
    batches = [collate(samples[:2]), collate(samples[2:])]

    def whole_image(predictions, sizes):
        boxes = [torch.tensor([[0.0, 0, w, h], [w / 2, h / 4, w, h / 2]]) for h, w in sizes.tolist()]
        return [Detections(box, torch.tensor([0.9, 0.8]), torch.tensor([0, 1])) for box in boxes]

    detections = predict(Fixed(), batches, whole_image, CPU)
    assert list(detections) == [7, 5, 9]
    for image_id, (h, w) in zip((7, 5, 9), originals):
        expected = torch.tensor([[0.0, 0, w, h], [w / 2, h / 4, w, h / 2]])
        assert torch.allclose(detections[image_id].boxes, expected)
        assert detections[image_id].scores.tolist() == pytest.approx([0.9, 0.8])
        assert detections[image_id].labels.tolist() == [0, 1]


def test_predict_joins_the_shares_of_all_processes(monkeypatch):
    own_batch = batch(ids=(1,))
    no_detections = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    # The other process's values: its detections and bad images; and None, for no error.
    other_share = {tuple: ({2: no_detections, 1: no_detections}, []), type(None): None}
    monkeypatch.setattr(engine.distributed, "gather", lambda value: [value, other_share[type(value)]])
    assert set(predict(Fixed(), [own_batch], lambda p, sizes: [no_detections], CPU)) == {1, 2}


def test_predict_stops_at_an_output_that_is_not_finite_and_every_process_names_the_images(monkeypatch):
    model, _, _ = make()
    postprocess = assemble.build_postprocess(Config())
    batch_sizes, forward = [], model.forward

    def broken(images, sizes):
        predictions = forward(images, sizes)
        batch_sizes.append(len(images))
        if len(batch_sizes) == 2:
            predictions.logits[1] = torch.nan
        return predictions

    model.forward = broken
    batches = [batch(ids=(1, 2)), batch(ids=(3, 4)), batch(ids=(5, 6))]
    with pytest.raises(FloatingPointError, match=r"^images \[4\]: the model's output is not finite"):
        predict(model, batches, postprocess, CPU)
    assert batch_sizes == [2, 2]
    gathered = []
    # The other process's values: its detections and bad images; and None, for no error.
    other_share = {tuple: ({}, [9]), type(None): None}
    monkeypatch.setattr(
        engine.distributed, "gather", lambda value: gathered.append(value) or [value, other_share[type(value)]]
    )
    with pytest.raises(FloatingPointError, match=r"^images \[9\]: "):  # this process's images are fine
        predict(model, batches, postprocess, CPU)
    assert gathered[0] is None and set(gathered[1][0]) == {1, 2, 3, 4, 5, 6}


def test_evaluation_leaves_statistics_and_the_losses_state_unchanged(same):
    model, criterion, solver = make(norm="bn")
    train(model, criterion, [batch()], solver, Recorder())
    before = copy.deepcopy((model.state_dict(), criterion.state_dict(), solver.state_dict()))
    postprocess = assemble.build_postprocess(Config(postprocess={"score_threshold": 0}))
    detections = predict(model, [batch(ids=(1, 2)), batch(ids=(3,), seed=1)], postprocess, CPU)
    assert same(before, (model.state_dict(), criterion.state_dict(), solver.state_dict()))
    assert sorted(detections) == [1, 2, 3] and all(len(result.boxes) == 100 for result in detections.values())
    criterion.eval()
    criterion(model(batch().images), batch().targets)
    assert same(before[1], criterion.state_dict())


def test_predict_does_not_depend_on_the_batch():
    model, _, _ = make(norm="bn")
    postprocess = assemble.build_postprocess(Config(postprocess={"score_threshold": 0}))
    full_batch, ids = batch(), (1, 2)
    singles = [collate([(full_batch.images[i], full_batch.targets[i], ids[i], (64, 64))]) for i in range(2)]
    from_batch, from_singles = predict(model, [full_batch], postprocess, CPU), predict(model, singles, postprocess, CPU)
    for i in ids:
        assert torch.allclose(from_batch[i].scores, from_singles[i].scores, atol=1e-5)


def test_only_the_model_runs_in_bfloat16():
    model, criterion, solver = make(precision="bfloat16")
    dtypes, forward = [], criterion.forward

    def spied(predictions, *args):
        losses = forward(predictions, *args)
        dtypes.append((predictions.logits.dtype, predictions.anchors.dtype, {v.dtype for v in losses.terms.values()}))
        return losses

    criterion.forward = spied
    # Not 64 pixels: if P6 has one position, torch 2.15 reads stray memory for P7's bfloat16 weight gradient on a CPU.
    train(model, criterion, [batch(size=(96, 96))], solver, Recorder())
    assert dtypes == [(torch.bfloat16, torch.float32, {torch.float32})]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    detections = predict(model, [batch()], assemble.build_postprocess(Config(postprocess={"score_threshold": 0})), CPU,
                    torch.bfloat16)  # fmt: skip
    assert (
        {result.boxes.dtype for result in detections.values()}
        == {result.scores.dtype for result in detections.values()}
        == {torch.float32}
    )
