"""Refuse arguments that a loss would otherwise take for something else."""

import torch
from torch import Tensor


def check_cells(logits: Tensor, labels: Tensor, valid: Tensor, quality: Tensor | None = None) -> None:
    """Raise ValueError unless logits are (N, C), the others (N,), valid bool, and labels of valid rows in 0..C.

    A GPU's labels are not read, since that would wait for it.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or valid.shape != labels.shape:
        shapes = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}, valid {tuple(valid.shape)}"
        raise ValueError(f"{shapes}: must be (N, C), (N,) and (N,); join images and levels, as by logits.flatten(0, 1)")
    if quality is not None and quality.shape != labels.shape:
        raise ValueError(f"quality {tuple(quality.shape)}: must be {tuple(labels.shape)}, a number for each row")
    if valid.dtype != torch.bool:
        raise ValueError(f"valid is {valid.dtype}: must be bool, as by valid.bool()")
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}: must be int64, as by labels.long()")
    classes = logits.shape[1]
    if labels.device.type != "cpu" or not len(labels) or torch.compiler.is_compiling():
        return
    least, most = labels.aminmax()
    if least < 0 or most > classes:
        wrong = labels[valid & ((labels < 0) | (labels > classes))]
        if len(wrong):
            raise ValueError(
                f"label {wrong[0]} of a valid row: must be 0 to {classes - 1}, or {classes} for background"
            )


def check_boxes(boxes: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless both are (P, 4), because other shapes may broadcast."""
    if boxes.shape != targets.shape or boxes.shape[1:] != (4,):
        shapes = f"{tuple(boxes.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(f"boxes or deltas {shapes}: both must be (P, 4), a row for each positive anchor")
