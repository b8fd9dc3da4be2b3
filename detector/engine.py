"""The two loops: train_one_epoch and predict."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector import boxes as box_ops
from detector import distributed
from detector.criterion import Criterion
from detector.errors import Stopped, UserError
from detector.gradients import Observation, observe
from detector.postprocess import NonFiniteOutput, Postprocess
from detector.solver import Solver
from detector.stopwatch import Stopwatch
from detector.structures import Batch, Detections, Losses, Predictions

if TYPE_CHECKING:
    from detector.logger import Logger


class NonFiniteLoss(FloatingPointError):
    """Loss or gradient is not finite; `batch` is this process's share of the images that led to it."""

    def __init__(self, message: str, batch: Batch):
        super().__init__(message)
        self.batch = batch


def train_one_epoch(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Batch],
    solver: Solver,
    logger: "Logger",
    device: torch.device,
    *,
    until: int | None = None,
) -> None:
    """Train on every batch, or up to step `until`, or until the solver is done.

    Raises NonFiniteLoss, before the weights are touched, where the loss or its gradient is not finite, and the solver
    may not skip the step. UserError and Stopped of the batches come between two steps, the same two in all processes.
    """
    model.train()
    criterion.train()
    until = min(until or solver.total_steps, solver.total_steps)
    if solver.step_count >= until:
        return
    for batch in _alike(logger.progress(batches, solver), device):
        step = solver.step_count + 1
        losses, observed = _backward(model, criterion, batch, solver, device, logger.wants_gradients(step))
        if observed is not None:
            logger.gradients(observed, step)
        sums = {name: value.detach() for name, value in (losses.terms | losses.diagnostics).items()}
        sums["gradient_norm"] = solver.gradient_norm()
        values = _to_numbers(sums, losses.terms.keys())
        if bad := _not_finite(values, losses.terms.keys(), solver):
            message = _complaint(bad, step, batch)
            if solver.skipped >= solver.may_skip:
                raise NonFiniteLoss(f"{message}; the weights were not updated", batch)
            solver.skip()
            logger.say(f"{message}; skipped, {solver.may_skip - solver.skipped} more may be (solver.skip_nonfinite)")
        else:
            lr = solver.lr_at(solver.step_count)
            solver.step()
            logger.step(values, losses.terms.keys(), lr, len(batch.images) * distributed.world_size(), step)
        if solver.step_count >= until:
            break


def _backward(
    model: nn.Module, criterion: Criterion, batch: Batch, solver: Solver, device: torch.device, observing: bool
) -> tuple[Losses, Observation | None]:
    """Losses of the batch, and its gradient in the parameters."""

    def forward(part: Batch) -> Predictions:
        images = part.images.to(device, non_blocking=True)
        with torch.autocast(device.type, solver.precision, enabled=solver.precision != torch.float32):
            return model(images, part.sizes)

    parts = _split(batch, solver.accumulate)
    if len(parts) == 1:
        predictions = forward(batch)
    else:
        # The loss is that of the whole batch, which no part alone can tell: normalisers and GHM's density are of all.
        # So first what the model says of all, from it the gradient in the outputs, and with that part by part again.
        buffers = [buffer.clone() for buffer in model.buffers()]
        with torch.no_grad():
            said = [forward(part) for part in parts]
            for buffer, before in zip(model.buffers(), buffers):  # BatchNorm must not count the images twice
                buffer.copy_(before)
        logits, deltas = (torch.cat(values).requires_grad_() for values in list(zip(*said))[:2])
        predictions = said[0]._replace(logits=logits, deltas=deltas)
    targets = [target.to(device) for target in batch.targets]
    losses = criterion(predictions, targets)
    observed = observe(criterion, predictions, targets) if observing else None
    # Gradients are averaged over processes, while each holds its share of one sum.
    solver.backward(losses.total * distributed.world_size())
    if len(parts) > 1:
        gradients = [predictions.logits.grad, predictions.deltas.grad]
        size = len(batch.images) // len(parts)
        for part, *share in zip(parts, *(gradient.split(size) for gradient in gradients)):
            again = forward(part)
            torch.autograd.backward([again.logits, again.deltas], share)
    return losses, observed


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

    With several processes each predicts its share, and all get all. `watch` gets the seconds by stage.

    Raises, on all processes: UserError and Stopped of the batches; FloatingPointError, with the images' ids, where the
    model's output is not finite.
    """
    model.eval()
    watch = watch or Stopwatch()
    found: dict[int, Detections] = {}
    flawed: list[int] = []
    with distributed.together():
        for batch in watch.each("loading", batches):
            with watch("network"), torch.autocast(device.type, precision, enabled=precision != torch.float32):
                predictions = model(batch.images.to(device, non_blocking=True), batch.sizes)
            with watch("postprocessing"):
                try:
                    detections = postprocess(predictions, batch.sizes)
                except NonFiniteOutput as error:  # raised further down, where no process is left waiting for this one
                    flawed = [batch.image_ids[index] for index in error.images]
                    break
                each = zip(batch.image_ids, detections, batch.sizes, batch.original_sizes)
                for image_id, one, size, original in each:
                    boxes = box_ops.rescale(one.boxes, size, original)
                    found[image_id] = Detections(boxes.cpu(), one.scores.cpu(), one.labels.cpu())
    shares, flaws = zip(*distributed.gather((found, flawed)))
    if any(flaws):
        ids = [image_id for one in flaws for image_id in one]
        raise FloatingPointError(f"images {ids}: {NonFiniteOutput.reason}")
    return {image_id: one for share in shares for image_id, one in share.items()}


def _alike(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, padded to the largest images of all processes' shares, as one process would: padding is background.

    Where a process cannot have its next batch (UserError, Stopped), none goes on: all raise its error.
    """
    if distributed.world_size() == 1:
        yield from batches
        return
    batches = iter(batches)
    while True:
        batch = error = None
        try:
            batch = next(batches, None)
        except (UserError, Stopped) as own:
            error = own
        shape = batch.images.shape[-2:] if batch else (0, 0)
        height, width, failed = distributed.all_max(torch.tensor([*shape, error is not None], device=device)).tolist()
        if failed:
            with distributed.together():
                if error is not None:
                    raise error
        if batch is None:
            return
        bottom, right = height - shape[0], width - shape[1]
        yield batch._replace(images=F.pad(batch.images, (0, right, 0, bottom))) if bottom or right else batch


def _split(batch: Batch, parts: int) -> list[Batch]:
    """The batch in equal parts, for gradient accumulation."""
    size = len(batch.images) // parts
    return [Batch(*(values[i * size : (i + 1) * size] for values in batch)) for i in range(parts)]


def _to_numbers(tensors: dict[str, Tensor], shares: Iterable[str]) -> dict[str, float]:
    """Loss terms summed over processes, the others averaged; a single transfer from the device."""
    joined = distributed.all_sum(torch.stack([value.float() for value in tensors.values()]))
    values = dict(zip(tensors, joined.tolist()))
    shares = set(shares)
    return {key: value if key in shares else value / distributed.world_size() for key, value in values.items()}


def _not_finite(values: dict[str, float], terms: Iterable[str], solver: Solver) -> dict[str, float]:
    # In float16 a gradient may overflow: then the scaler skips the step and lowers its scale; below 1 it never ends.
    watched = [*terms] if solver.scaler.is_enabled() else [*terms, "gradient_norm"]
    bad = {name: values[name] for name in watched if not abs(values[name]) < float("inf")}
    if solver.scaler.get_scale() < 1:
        bad["float16 loss scale"] = solver.scaler.get_scale()
    return bad


def _complaint(bad: dict[str, float], step: int, batch: Batch) -> str:
    found = ", ".join(f"{name} = {value}" for name, value in bad.items())
    images = [image_id for share in distributed.gather(batch.image_ids) for image_id in share]
    return f"{found} at step {step}, images {images}"
