"""The time of a training step of several losses, which take turns in one process.

Separate trainings do not compare, whether they run one after another or at the same time: on two cores the steps of
two trainings with the same loss once differed by 18%. Here all losses share the same minutes, images and model.
"""

import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import cycle, islice
from typing import Any

from data.assemble import build_datasets
from data.loader import train_loader
from detector import assemble
from detector.config import Config
from detector.criterion import Criterion
from detector.device import keep_freed_memory, pick_device, place
from detector.engine import compute_gradients
from detector.graphs import SEEN, speed_up
from detector.model import RetinaNet
from detector.randomness import seed_everything
from detector.solver import Solver
from detector.structures import Batch
from scripts.bench import measure

BATCHES = 4
ROUNDS = 20  # timed steps of each loss


def time_steps(configs: dict[str, Config], rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """The `timing` of each config: seconds (median), steps, started, machine. They may differ only in losses.

    Uses one process and fresh weights, as at the start of a training.
    """
    turns, warmup = training_steps(configs)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    times = measure.alternate(turns, rounds, warmup)
    common = {"steps": rounds, "started": started, "machine": measure.environment()}
    return {name: {"seconds": round(statistics.median(ms) / 1000, 6), **common} for name, ms in times.items()}


def training_steps(configs: dict[str, Config], batches: int = BATCHES) -> tuple[dict[str, Callable[[], None]], int]:
    """A training step of each config, and how many calls of each warm it up.

    The configs may differ only in losses. All share one model, its solver, and batches in the device's memory.
    """
    first = next(iter(configs.values()))
    device = pick_device(first.device)
    keep_freed_memory(device)
    seed_everything(first.seed)
    train_set, _ = build_datasets(first)
    loader = train_loader(train_set, first.solver.batch_size, **assemble.loader_options(first, device), seed=first.seed)
    kept = [batch.to(device) for batch in islice(loader, batches)]
    model = assemble.build_model(first, len(train_set.category_ids)).train()
    place(model, device, channels_last=first.channels_last)
    solver = assemble.build_solver(first, model, steps_per_epoch=len(loader))
    speed_up(model)
    turns = {
        name: on_each(training_step(model, assemble.build_criterion(cfg).to(device).train(), solver), kept)
        for name, cfg in configs.items()
    }
    return turns, SEEN * batches if model.graphs is not None else 2  # by then each size of images has its graph


def training_step(model: RetinaNet, criterion: Criterion, solver: Solver) -> Callable[[Batch], None]:
    """A function that updates the weights once from a batch on the device."""

    def step(batch: Batch) -> None:
        matches = criterion.match(model.grid(batch.images), batch.targets)
        compute_gradients(model, criterion, batch, matches, solver)
        solver.clip_gradients()
        solver.step()

    return step


def on_each(step: Callable[[Batch], None], batches: list[Batch]) -> Callable[[], None]:
    """A function that calls `step` on the next batch, and starts again after the last."""
    endless = cycle(batches)
    return lambda: step(next(endless))
