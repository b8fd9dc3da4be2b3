"""The two loops: train_until and predict."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from detector import boxes as box_ops
from detector import distributed
from detector.criterion import Criterion, Matches
from detector.device import autocast
from detector.gradients import Observation, observe
from detector.postprocess import NonFiniteOutput, Postprocess
from detector.solver import Solver
from detector.stopwatch import Stopwatch
from detector.structures import Batch, Detections, Losses, Predictions
from detector.transfer import PendingCopy, copied_ahead

if TYPE_CHECKING:
    from detector.logger import Logger
    from detector.model import RetinaNet


class NonFiniteLoss(FloatingPointError):
    """Loss or gradient is not finite; `batch` is this process's part of the step's images."""

    def __init__(self, message: str, batch: Batch):
        super().__init__(message)
        self.batch = batch


def train_until(
    replica: nn.Module,
    criterion: Criterion,
    batches: Iterable[Batch],
    solver: Solver,
    logger: "Logger",
    *,
    until_step: int,
) -> None:
    """Train to step `until_step`, the solver's last step or the last batch. The batches are on the device.

    `replica` is the solver's model as `distributed.replicate` returns it.

    Raises NonFiniteLoss, without updating the weights, if loss or gradient is not finite and the solver may not skip
    the step. If the batches raise UserError or Stopped, all processes raise it after the same step.
    """
    replica.train()
    criterion.train()
    last = min(until_step, solver.total_steps)
    if solver.step_count >= last:
        return
    logger.start(solver.step_count, solver.total_steps)
    stream = distributed.padded_alike(batches)

    def fetch(pending_losses: PendingCopy | None = None) -> tuple[Batch, Matches] | None:
        batch = logger.clock.next_batch(stream, pending_losses)
        # Matching needs the images' size and the targets, but no prediction, so it comes before the model.
        return batch and (batch, criterion.match(cast("RetinaNet", solver.model).grid(batch.images), batch.targets))

    upcoming = fetch()
    while upcoming is not None:
        (batch, matches), upcoming, number = upcoming, None, solver.step_count + 1
        observing = logger.wants_gradients(number)
        losses, observation = compute_gradients(replica, criterion, batch, matches, solver, observing)
        if observation is not None:
            logger.gradients(observation, number)
        scalars = {name: value.detach() for name, value in (losses.terms | losses.diagnostics).items()}
        scalars["gradient_norm"] = solver.clip_gradients()
        summed = PendingCopy(distributed.all_sum(torch.stack([value.float() for value in scalars.values()])))
        try:
            if number < last:  # before reading the losses, so a GPU that still computes them continues without a gap
                upcoming = fetch(summed)
        finally:  # also after an error in loading, so no step is lost
            values = dict(zip(scalars, summed.get().tolist()))
            for name in values.keys() - losses.terms.keys():  # averaged over processes; the losses' terms are summed
                values[name] /= distributed.world_size()
            _update(solver, values, losses.terms.keys(), batch, logger)


def _update(solver: Solver, values: dict[str, float], terms: Iterable[str], batch: Batch, logger: "Logger") -> None:
    """Update the weights and log the step. If a value is not finite, skip the step or raise NonFiniteLoss."""
    if bad := _not_finite(values, terms, solver):
        message = _describe_failure(bad, solver.step_count + 1, batch)
        if solver.skipped >= solver.may_skip:
            raise NonFiniteLoss(f"{message}; the weights were not updated", batch)
        solver.skip()
        logger.say(f"{message}; skipped, {solver.may_skip - solver.skipped} more may be (solver.skip_nonfinite)")
    else:
        lr = solver.lr_at(solver.step_count)
        solver.step()
        logger.step(values, terms, lr, len(batch.images) * distributed.world_size(), solver.step_count)
    logger.clock.step_done()


def compute_gradients(
    replica: nn.Module, criterion: Criterion, batch: Batch, matches: Matches, solver: Solver, observing: bool = False
) -> tuple[Losses, Observation | None]:
    """Run model and losses, and add to the parameters' `grad`. If `observing`, measure the gradient by region too."""

    def forward(images: Tensor, sizes: Tensor) -> Predictions:
        with autocast(images.device, solver.precision):
            return replica(images, sizes)

    per_part = len(batch.counts) // solver.accumulate
    parts = list(zip(batch.images.split(per_part), batch.sizes.split(per_part)))
    if len(parts) > 1:
        # The loss needs the whole batch, because its normaliser and GHM's density count all images. So predict all
        # parts without autograd, take the loss's gradient with respect to the predictions, then run each part again and
        # backpropagate its share.
        buffers = [buffer.clone() for buffer in replica.buffers()]
        with torch.no_grad():
            predicted = [forward(*part) for part in parts]
            for buffer, before in zip(replica.buffers(), buffers):  # BatchNorm must not count the images twice
                buffer.copy_(before)
        logits, deltas = (torch.cat(values).requires_grad_() for values in list(zip(*predicted))[:2])
        predictions = predicted[0]._replace(logits=logits, deltas=deltas)
        del predicted  # otherwise the parts' logits stay in memory beside their copy
    else:
        predictions = forward(*parts[0])
    observation = observe(criterion, predictions, batch.targets, matches=matches) if observing else None
    losses = criterion(predictions, batch.targets, matches)
    # Gradients are averaged over processes; the losses of all processes are meant to be summed.
    solver.backward(losses.total * distributed.world_size())
    if len(parts) > 1:
        for i, part in enumerate(parts):
            images = slice(i * per_part, (i + 1) * per_part)
            gradients = [cast(Tensor, output.grad)[images] for output in (predictions.logits, predictions.deltas)]
            with distributed.averaging(replica, part is parts[-1]):  # once a step
                again = forward(*part)
                torch.autograd.backward([again.logits, again.deltas], gradients)
    return losses, observation


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    postprocess: Postprocess,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    watch: Stopwatch | None = None,
) -> dict[int, Detections]:
    """Detections of every image, on the CPU, in pixels of the original image, keyed by image id.

    Each process predicts its own batches; every process returns all detections. `watch` gets the seconds by stage.

    If loading raises UserError or Stopped, every process raises it. If an output is not finite, all raise
    FloatingPointError with the image ids.
    """
    model.eval()
    watch = watch or Stopwatch()
    by_image: dict[int, Detections] = {}
    not_finite: list[int] = []
    with distributed.together():
        for batch in watch.each("loading", copied_ahead(batches, device)):
            with watch("network"), autocast(device, precision):
                predictions = model(batch.images, batch.sizes)
            with watch("postprocessing"):
                try:
                    detections = postprocess(predictions, batch.sizes)
                except NonFiniteOutput as error:
                    # Raised after the loop: raised here, it would leave the other processes waiting.
                    not_finite = [batch.image_ids[index] for index in error.images]
                    break
                rows = zip(batch.image_ids, detections, batch.sizes.tolist(), batch.original_sizes)
                for image_id, (boxes, scores, labels), size, original in rows:
                    boxes = box_ops.rescale(boxes, size, original)
                    by_image[image_id] = Detections(boxes.cpu(), scores.cpu(), labels.cpu())
    parts, failed = zip(*distributed.gather((by_image, not_finite)))
    if any(failed):
        ids = [image_id for part in failed for image_id in part]
        raise FloatingPointError(f"images {ids}: {NonFiniteOutput.reason}")
    return {image_id: detections for part in parts for image_id, detections in part.items()}


def _not_finite(values: dict[str, float], terms: Iterable[str], solver: Solver) -> dict[str, float]:
    # In float16 an overflow is normal: GradScaler skips the step and halves its scale. Below 1 halving no longer helps.
    watched = [*terms] if solver.scaler.is_enabled() else [*terms, "gradient_norm"]
    bad = {name: values[name] for name in watched if not abs(values[name]) < float("inf")}
    if solver.scaler.get_scale() < 1:
        bad["float16 loss scale"] = solver.scaler.get_scale()
    return bad


def _describe_failure(bad: dict[str, float], step: int, batch: Batch) -> str:
    numbers = ", ".join(f"{name} = {value}" for name, value in bad.items())
    images = [image_id for ids in distributed.gather(batch.image_ids) for image_id in ids]
    return f"{numbers} at step {step}, images {images}"
