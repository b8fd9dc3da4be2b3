"""The two loops: train_one_epoch and predict."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detector import boxes as box_ops
from detector import distributed
from detector.criterion import Criterion
from detector.gradients import observe
from detector.postprocess import Postprocess
from detector.solver import Solver
from detector.structures import Batch, Detections

if TYPE_CHECKING:
    from detector.logger import Logger


def train_one_epoch(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Batch],
    solver: Solver,
    logger: "Logger",
    device: torch.device,
) -> None:
    """Train on every batch, or until the solver is done.

    Raises FloatingPointError, before the weights are touched, where the loss or its gradient is not finite.
    """
    model.train()
    criterion.train()
    for batch in logger.progress(batches, solver):
        sums: dict[str, Tensor] = {}
        for part in _split(batch, solver.accumulate):
            images = part.images.to(device, non_blocking=True)
            with torch.autocast(device.type, solver.precision, enabled=solver.precision != torch.float32):
                predictions = model(images, part.sizes)
            targets = [target.to(device) for target in part.targets]
            losses = criterion(predictions, targets)
            # Gradients are averaged over processes, while each holds its share of one sum.
            if logger.wants_gradients(solver.step_count + 1) and not sums:  # of the first part
                logger.gradients(observe(criterion, predictions, targets), solver.step_count + 1)
            solver.backward(losses.total * distributed.world_size())
            for name, value in (losses.terms | losses.diagnostics).items():
                sums[name] = sums.get(name, 0) + value.detach() / solver.accumulate
        sums["gradient_norm"] = solver.gradient_norm()
        values = _to_numbers(sums, losses.terms.keys())
        _stop_unless_finite(values, losses.terms.keys(), solver, batch)
        lr = solver.lr_at(solver.step_count)
        solver.step()
        logger.step(values, losses.terms.keys(), lr, len(batch.images) * distributed.world_size(), solver.step_count)
        if solver.done:
            break


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    postprocess: Postprocess,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> dict[int, Detections]:
    """Detections of every image, on the CPU, in pixels of the original image, keyed by image id.

    With several processes each predicts its share, and all get all.
    """
    model.eval()
    found: dict[int, Detections] = {}
    for batch in batches:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            predictions = model(batch.images.to(device, non_blocking=True), batch.sizes)
        detections = postprocess(predictions, batch.sizes)
        for image_id, one, size, original in zip(batch.image_ids, detections, batch.sizes, batch.original_sizes):
            boxes = box_ops.rescale(one.boxes, size, original)
            found[image_id] = Detections(boxes.cpu(), one.scores.cpu(), one.labels.cpu())
    everywhere: dict[int, Detections] = {}
    for share in distributed.gather(found):
        everywhere.update(share)
    return everywhere


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


def _stop_unless_finite(values: dict[str, float], terms: Iterable[str], solver: Solver, batch: Batch) -> None:
    # In float16 a gradient may overflow: then the scaler skips the step and lowers its scale; below 1 it never ends.
    watched = [*terms] if solver.scaler.is_enabled() else [*terms, "gradient_norm"]
    bad = {name: values[name] for name in watched if not abs(values[name]) < float("inf")}
    if solver.scaler.get_scale() < 1:
        bad["float16 loss scale"] = solver.scaler.get_scale()
    if bad:
        found = ", ".join(f"{name} = {value}" for name, value in bad.items())
        images = [image_id for share in distributed.gather(batch.image_ids) for image_id in share]
        raise FloatingPointError(
            f"{found} at step {solver.step_count + 1}, images {images}; the weights were not updated: "
            "check these images' boxes, or lower solver.lr or set solver.clip_norm, and go on with --resume"
        )
