import os
from pathlib import Path

import pytest
import torch

from detector.device import pick_device, pick_precision, pick_workers, usable_cores
from detector.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FACTS = """processor\t: 0
vendor_id\t: {vendor}
flags\t\t: fpu avx512f {flags}
"""


@pytest.mark.parametrize(
    ("vendor", "flags", "precision"),
    [
        ("AuthenticAMD", "avx512_bf16", "bfloat16"),
        ("GenuineIntel", "avx512_bf16", "float32"),
        ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", "bfloat16"),
        ("AuthenticAMD", "avx2", "float32"),
    ],
)
def test_bfloat16_where_the_processor_has_units_for_it(vendor, flags, precision, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: FACTS.format(vendor=vendor, flags=flags))
    picked_precision, reason = pick_precision("auto", CPU)
    assert picked_precision == precision
    assert reason == f"the cpu has {'no ' if precision == 'float32' else ''}matrix units for bfloat16"


def test_float32_where_the_processor_is_unknown(monkeypatch):
    def absent(path, encoding):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert pick_precision("auto", CPU)[0] == "float32"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_bfloat16_where_the_gpu_has_it(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", torch.device("cuda"))[0] == precision


def test_explicit_settings_are_used():
    assert pick_precision("float16", CPU) == ("float16", "as configured")
    assert [pick_workers(number, device) for device in (CPU, CUDA) for number in (0, 40)] == [0, 40, 0, 40]


@pytest.mark.parametrize(
    ("cores", "processes", "on_cpu", "on_gpu"),
    [(1, 1, 0, 1), (2, 1, 1, 1), (16, 1, 1, 15), (192, 1, 1, 16), (64, 8, 1, 7), (8, 8, 0, 1), (4, 8, 0, 1)],
)
def test_the_number_of_workers_follows_the_number_of_cores(cores, processes, on_cpu, on_gpu, monkeypatch):
    monkeypatch.setenv("PYTHON_CPU_COUNT", str(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert (pick_workers("auto", CPU), pick_workers("auto", CUDA)) == (on_cpu, on_gpu)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert pick_workers("auto", CUDA) == min(max(cores - 1, 1), 16)


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 12), ("400000 100000", 4), ("150000 100000", 1), ("50000 100000", 1), ("9900000 100000", 12)],
)
def test_usable_cores_respect_affinity_and_a_containers_limit(limit, cores, monkeypatch):
    monkeypatch.delenv("PYTHON_CPU_COUNT", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: limit + "\n")
    assert usable_cores() == cores


def test_a_missing_device_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^device: 'nonsense' cannot be used here .*; try auto$"):
        pick_device("nonsense")
