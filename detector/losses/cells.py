"""Every (anchor, class) cell is one binary example; this file turns logits into cells and cells into a sum.

With p = sigmoid(x) and target p* in {0, 1}, everything a class loss needs depends on one number a cell:

    z = x where p* = 0, -x where p* = 1         how strongly the logit speaks against the truth

    cross entropy   -[p* log p + (1-p*) log(1-p)] = softplus(z)
    gradient norm   |p - p*|                      = sigmoid(z)
    prob. of truth  p_t                           = sigmoid(-z)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def logits_against_truth(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """z (N, C), at least float32; 0 in rows that are not valid, so that NaN or inf there reaches nothing.

    logits (N, C); labels (N,) int64 in 0..C, C = background, anything where not valid; valid (N,) bool.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(~valid[:, None], 0)
    # One cell a row may change its sign, so that no one-hot target, as large as the logits, is ever built.
    index, positive = _label_cell(labels, logits.shape[1])
    at_label = x.gather(1, index)
    return x.scatter(1, index, torch.where(positive, -at_label, at_label))


def cross_entropy(z: Tensor) -> Tensor:
    """Binary cross entropy of every cell, (N, C)."""
    # Past the threshold softplus(z) becomes z. The default, 20, is 2e-9 off, which float64 checks see; 40 is exact.
    return F.softplus(z, threshold=40)


def sum_cells(values: Tensor, valid: Tensor) -> Tensor:
    """Sum of `values` (N, C) over the valid rows; by rows first, since a flat float32 sum loses digits."""
    return values.sum(-1).masked_fill(~valid, 0).sum()


def balanced_sum(values: Tensor, labels: Tensor, valid: Tensor, alpha: float) -> Tensor:
    """`sum_cells` with weight alpha on positive cells and 1 - alpha on negative ones."""
    index, positive = _label_cell(labels, values.shape[1])
    at_label = values.gather(1, index).masked_fill(~positive, 0)
    rows = (1 - alpha) * values.sum(-1) + (2 * alpha - 1) * at_label[:, 0]
    return rows.masked_fill(~valid, 0).sum()


def label_logits(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Logit of the class that each label names (N, 1), at least float32; 0 where there is none or not valid."""
    index, positive = _label_cell(labels, logits.shape[1])
    x = logits.gather(1, index).to(torch.promote_types(logits.dtype, torch.float32))
    return x.masked_fill(~(positive & valid[:, None]), 0)


def with_positives(values: Tensor, labels: Tensor, at_label: Tensor) -> Tensor:
    """`values` (N, C) with those of positive cells taken from `at_label` (N, 1)."""
    index, positive = _label_cell(labels, values.shape[1])
    return values.scatter(1, index, torch.where(positive, at_label, values.gather(1, index)))


def _label_cell(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Column of the cell that each label names (N, 1), and whether there is one (N, 1): background has none."""
    return labels.clamp(0, num_classes - 1)[:, None], (labels < num_classes)[:, None]
