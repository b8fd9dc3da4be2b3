from pathlib import Path

import pytest
import torch

from detector.device import pick_device, pick_precision
from detector.errors import UserError

CPU = torch.device("cpu")
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
def test_bfloat16_where_the_processor_gains_by_it(vendor, flags, precision, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: FACTS.format(vendor=vendor, flags=flags))
    found, reason = pick_precision("auto", CPU)
    assert found == precision
    assert reason == f"the cpu has {'no ' if precision == 'float32' else ''}matrix units for bfloat16"


def test_float32_where_the_processor_does_not_say(monkeypatch):
    def absent(path, encoding):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert pick_precision("auto", CPU)[0] == "float32"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_bfloat16_where_the_gpu_has_it(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", torch.device("cuda"))[0] == precision


def test_what_is_asked_for_is_taken():
    assert pick_precision("float16", CPU) == ("float16", "as configured")


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"^device: 'nonsense' cannot be used here .*; try auto$"):
        pick_device("nonsense")
