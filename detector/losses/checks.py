"""Refuse arguments that a class loss would otherwise take for something else."""

import torch
from torch import Tensor


def check_cells(logits: Tensor, labels: Tensor, valid: Tensor) -> None:
    """Raise ValueError unless logits are (N, C), labels and valid (N,), valid bool, and labels of valid rows in 0..C.

    A GPU's labels are not read, since that would wait for it.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or valid.shape != labels.shape:
        shapes = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}, valid {tuple(valid.shape)}"
        raise ValueError(f"{shapes}: must be (N, C), (N,) and (N,); join images and levels, as by logits.flatten(0, 1)")
    if valid.dtype != torch.bool:
        raise ValueError(f"valid is {valid.dtype}: must be bool, as by valid.bool()")
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
