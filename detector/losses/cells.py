"""Every (anchor, class) cell is one binary example, with a logit x, p = sigmoid(x) and a target p* in {0, 1}.

Most class losses need one number a cell, z. Those with `takes_quality` also need the quality of the cell's box.

    z = x where p* = 0, -x where p* = 1         how strongly the logit speaks against the truth

    cross entropy   -[p* log p + (1-p*) log(1-p)] = softplus(z)
    gradient norm   |p - p*|                      = sigmoid(z)
    prob. of truth  p_t                           = sigmoid(-z)

The curves of the losses use `sigmoid_softplus`, Focal's also `power`. The other functions are mostly for losses that
count or sort cells: GHM, OHEM, rank & sort.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def logits_against_truth(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """z (N, C), at least float32; 0 in rows that are not valid, so their NaN or inf has no effect.

    logits (N, C); labels (N,) int64 in 0..C, C = background, anything where not valid; valid (N,) bool.
    """
    x = logits.to(compute_dtype(logits)).masked_fill(~valid[:, None], 0)
    # At most one cell of a row changes its sign, so no one-hot target as large as the logits is built.
    column = labels.clamp(0, logits.shape[1] - 1)[:, None]
    at_label = x.gather(1, column)
    return x.scatter(1, column, torch.where((labels < logits.shape[1])[:, None], -at_label, at_label))


def cross_entropy(z: Tensor) -> Tensor:
    """Binary cross entropy of every cell, (N, C)."""
    # Past the threshold softplus(z) becomes z. The default, 20, is 2e-9 off, which float64 checks see; 40 is exact.
    return F.softplus(z, threshold=40)


def sum_cells(values: Tensor, valid: Tensor) -> Tensor:
    """Sum of `values` (N, C) over the valid rows; by rows first, since a flat float32 sum loses digits."""
    return values.sum(-1).masked_fill(~valid, 0).sum()


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The type to compute in: float64 for float64, otherwise float32."""
    return torch.promote_types(logits.dtype, torch.float32)


# Functions for curves, besides torch's. kernels.py runs them in Triton too, so they use only operations it knows.


def sigmoid_softplus(z: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(z) and softplus(z), each to full relative accuracy."""
    if torch.compiler.is_compiling() and z.dtype != torch.float64:
        return sigmoid_softplus_in_one_sweep(z)
    return z.sigmoid(), cross_entropy(z)


def sigmoid_softplus_in_one_sweep(z: Tensor) -> tuple[Tensor, Tensor]:
    """The same, accurate to float32, in a form that a compiler fuses into one sweep."""
    # From one exponential and one division. log(1 + e) = 2 artanh(s) with s = e / (2 + e), at most 1/3. The polynomial
    # of s^2 is within 5e-9 of artanh(s) / s, where Taylor's needs three terms more.
    e = torch.exp(-torch.abs(z))
    both = torch.reciprocal((1 + e) * (2 + e))
    larger = (2 + e) * both
    s = e * ((1 + e) * both)
    q = s * s
    log1p = 2 * s * (1 + q * (0.33333208 + q * (0.20010763 + q * (0.14000923 + q * 0.14005885))))
    return torch.where(z >= 0, larger, e * larger), torch.relu(z) + log1p


def power(base: Tensor, exponent: float, log: Tensor | None = None) -> Tensor:
    """base ** exponent for base in [0, 1]; `log`: the base's logarithm, if known."""
    if exponent == 0:
        return base * 0 + 1
    if exponent == 1:
        return base
    if exponent == 2:
        return base * base
    return torch.pow(base, exponent) if log is None else torch.exp(exponent * log)


def region_of(norms: Tensor, bins: int) -> Tensor:
    """The index of each norm's region among `bins` equal regions of 0..1, int32; 1 is in the last one."""
    return torch.clamp((norms * bins).to(torch.int32), 0, bins - 1)


def lookup(table: Tensor, index: Tensor | int) -> Tensor:
    """The table's (K,) entry for each index."""
    return table[index]


def ordered_bits(z: Tensor) -> Tensor:
    """float32 -> int32 that sort like the floats; 0 and -0 become equal."""
    bits = (z + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
