"""Triton's compiler accepts each loss's kernels for a GPU; test_fused.py runs them in its interpreter."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch, triton
from triton.backends.compiler import GPUTarget
from detector.losses import CLASS_LOSSES, dispatch, kernels
from detector.losses.fused import _CellSum

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}

def kind(value):
    if isinstance(value, tuple):
        return tuple(map(kind, value))
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return {int: "i64", float: "fp32"}.get(type(value), "constexpr")

class Compiled:  # in place of a kernel: compiles it for what it is called with, and does not run it
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def call(*values, **options):
            given = dict(zip(self.kernel.arg_names, values)) | options
            for function in (self.kernel, *given.values()):
                if isinstance(function, triton.JITFunction):
                    assert function.cache_key  # a launch looks up all names here, also in branches not compiled
            constants = {p.name for p in self.kernel.params if p.is_constexpr} & given.keys()
            constants |= {name for name, value in given.items() if value is None}
            signature = {name: "constexpr" if name in constants else kind(value) for name, value in given.items()}
            source = triton.compiler.ASTSource(self.kernel, signature, {name: given[name] for name in constants})
            assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
        return call

for name in ("_sweep", "_histogram", "_scale"):
    setattr(kernels, name, Compiled(getattr(kernels, name)))
dispatch.triton_for = lambda logits: kernels
def give_up(curve, error):
    raise error

dispatch._give_up_triton = give_up
logits = torch.zeros(50, 8, dtype=torch.bfloat16, requires_grad=True)
labels, valid = torch.full((50,), 8), torch.ones(50, dtype=torch.bool)
for name, make in CLASS_LOSSES.items():
    make()(logits, labels, valid, 1).backward()
    print(name)
from detector.losses import ohem
ohem._by_digits(logits.float(), labels, valid, 3, True)
"""


def test_every_class_loss_compiles_for_a_gpu():
    pytest.importorskip("triton.backends.compiler")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert {"ce", "focal", "ghm_c", "qfl", "varifocal", "ohem"} <= set(result.stdout.split())
