"""From gradients to new weights: optimizer, warm-up and schedule, clipping, averaged weights."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Solver:
    """One optimizer step at a time, and the state that goes with it.

    `lr` is meant for batches of `lr_batch_size` and scaled to `batch_size`: in proportion for SGD (Goyal et
    al., 2017), by the square root for AdamW (Malladi et al., 2022). Warm-up steps scale inversely, so that
    warm-up covers the same number of images. The schedule spans `total_steps`.

    Weight decay applies to tensors of two or more dimensions: the weights of convolutions and linear layers. It leaves
    out norms and biases, which have one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.01,
        lr_batch_size: int | None = 16,
        batch_size: int = 16,
        accumulate: int = 1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup_steps: int = 500,
        warmup_factor: float = 0.001,
        schedule: Literal["step", "cosine"] = "step",
        decay_at: list[float] | None = None,
        decay_factor: float = 0.1,
        clip_norm: float | None = None,
        ema: float | None = None,
        skip_nonfinite: int = 0,
        precision: str = "float32",
    ):
        scale = batch_size / (lr_batch_size or batch_size)
        self.total_steps, self.accumulate = total_steps, accumulate
        self.lr = lr * (scale if optimizer == "sgd" else math.sqrt(scale))
        self.warmup_steps = min(round(warmup_steps / scale), total_steps // 2)
        self.warmup_factor, self.schedule = warmup_factor, schedule
        self.decay_steps = [round(share * total_steps) for share in decay_at or []]
        self.decay_factor = decay_factor
        self._described = (lr, lr_batch_size, batch_size, optimizer, warmup_steps)

        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Fused: one pass over the weights instead of ten, on the CPU as on a GPU. Not in float16: if the first step
        # overflows, fused SGD leaves its momentum uninitialised.
        fused = precision != "float16"
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, self.lr, momentum, fused=fused)
        else:
            self.optimizer = torch.optim.AdamW(groups, self.lr, fused=fused)
        self.clip_norm = clip_norm
        self.precision = PRECISIONS[precision]
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=precision == "float16")
        self.model = model
        self.step_count = 0  # steps done, including skipped ones
        self.skipped, self.may_skip = 0, skip_nonfinite  # steps that `skip` left out, and how many may be
        self.averaged = AveragedModel(model) if ema else None
        self.ema = ema

    @property
    def done(self) -> bool:
        return self.step_count >= self.total_steps

    def lr_at(self, step: int) -> float:
        """Learning rate of the next step when `step` steps are done."""
        lr = self.lr
        if self.schedule == "cosine":
            progress = max(step - self.warmup_steps, 0) / max(self.total_steps - self.warmup_steps, 1)
            lr *= 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        else:
            lr *= self.decay_factor ** sum(step >= decay for decay in self.decay_steps)
        if step < self.warmup_steps:
            lr *= self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        return lr

    def describe(self) -> str:
        """The resulting learning rate and schedule, in one line."""
        lr, lr_batch_size, batch_size, optimizer, warmup = self._described
        text = f"{optimizer}: lr {self.lr:.4g}"
        if lr_batch_size and lr_batch_size != batch_size:
            rule = "in proportion" if optimizer == "sgd" else "by the square root"
            text += f" ({lr:g} at batch {lr_batch_size}, scaled {rule} to batch {batch_size})"
        text += f", warm-up {self.warmup_steps} steps"
        if self.warmup_steps != warmup:
            text += f" (from {warmup})"
        if self.schedule == "cosine":
            return text + f", then cosine to 0 at step {self.total_steps}"
        drops = " and ".join(map(str, self.decay_steps)) or "no step"
        return text + f", x{self.decay_factor:g} at {drops}, {self.total_steps} steps in all"

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a batch."""
        self.scaler.scale(loss).backward()

    def clip_gradients(self) -> Tensor:
        """Unscale the gradients and clip them if `clip_norm` is set; returns their norm before clipping.

        Call it once a step, before `step`.
        """
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.parameters, self.clip_norm or math.inf)

    def step(self) -> None:
        """Update the weights and their average, and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.step_count)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        self._average()

    def skip(self) -> None:
        """Count a step, and leave the weights as they are."""
        self.optimizer.zero_grad(set_to_none=True)
        # Clears the scaler's record of this step; otherwise the next unscale_ would raise.
        self.scaler.update(self.scaler.get_scale())
        self.step_count += 1
        self.skipped += 1

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged weights if there are any, else the trained ones."""
        return self.averaged.module if self.averaged is not None else self.model

    def state_dict(self) -> dict[str, Any]:
        """All but the trained weights, which run.py saves beside it."""
        return {
            "step": self.step_count,
            "skipped": self.skipped,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the model's weights before this. The optimizer's options stay those of the config.

        Raises ValueError for the state of another optimizer: torch would accept it and fail at the next step.
        """
        groups, saved = (each["param_groups"] for each in (self.optimizer.state_dict(), state["optimizer"]))
        if [(g.keys(), g["params"]) for g in groups] != [(g.keys(), g["params"]) for g in saved]:
            raise ValueError("the checkpoint has another optimizer's state")
        self.step_count, self.skipped = state["step"], state["skipped"]
        groups = [group | {"lr": before["lr"]} for group, before in zip(groups, saved)]  # not an option: `step` sets it
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged is not None:
            if state["averaged"] is not None:
                self.averaged.load_state_dict(state["averaged"])
            else:  # `ema` is new: the average begins with the trained weights, which are loaded by now
                self.averaged.module.load_state_dict(self.model.state_dict())

    @torch.no_grad()
    def _average(self) -> None:
        """Update the exponential moving average of weights and statistics; the first step copies them.

        The decay grows as (1 + n) / (10 + n) up to `ema`, so the start does not dominate the average of a short run.
        """
        if self.averaged is None:
            return
        n = self.step_count - 1  # earlier steps, skipped ones too
        weight = 1 - min(self.ema or 0.0, (1 + n) / (10 + n)) if self.averaged.n_averaged else 1.0
        self.averaged.n_averaged += 1
        # Not by AveragedModel.update_parameters, which waits for the device.
        averages, currents = ([*m.parameters(), *m.buffers()] for m in (self.averaged.module, self.model))
        floats = [i for i, average in enumerate(averages) if average.is_floating_point()]
        torch._foreach_lerp_([averages[i] for i in floats], [currents[i] for i in floats], weight)
        if counters := [i for i, average in enumerate(averages) if not average.is_floating_point()]:  # of BatchNorm
            torch._foreach_copy_([averages[i] for i in counters], [currents[i] for i in counters])
