"""Who may import whom: parses the imports of every file and fails if one breaks a rule."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

from detector import losses

ROOT = Path(__file__).parents[1]
CONFIG_READERS = {
    "train",
    "eval",
    "detector.assemble",
    "detector.configure",
    "detector.checkpoint",
    "detector.run",
    "detector.pretrained",
    "detector.config_files",
    "detector.torchvision_checkpoint",
    "detector.config",
    "data.assemble",
}
SEPARATE = {"detector.anchors", "detector.assigner", "detector.box_coder"}
FROM_DATA = {
    "detector.structures",
    "detector.metrics",
    "detector.errors",
    "detector.boxes",
    "detector.resize",
    "detector.atomic",
    "detector.images",
}
FROM_DATA_ASSEMBLE = FROM_DATA | {"detector.config", "detector.checkpoint"}
# Files of losses/ that are no loss.
SHARED_BY_LOSSES = ("cells", "checks", "density", "dispatch", "fused", "kernels", "regions")
FROM_LOSSES = {"detector.distributed", *(f"detector.losses.{name}" for name in SHARED_BY_LOSSES)}


def module_name(path):
    """detector/losses/focal.py -> detector.losses.focal; a package is its __init__.py."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def product():
    """Source of every module of the product, by name."""
    files = [Path("train.py"), Path("eval.py")]
    for folder in ("detector", "data", "scripts"):
        files += sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))
    return {module_name(path): (ROOT / path).read_text(encoding="utf-8") for path in files}


def imports(source, module):
    """Dotted names of all that a module imports, anywhere in it: `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


def knows(imported, name):
    """Whether `name`, or something in it, is imported."""
    return any(imported_name == name or imported_name.startswith(name + ".") for imported_name in imported)


def project_modules(imported, modules):
    """Which of the project's modules are imported; `from detector.boxes import area` is detector.boxes."""
    imported_modules = imported & modules
    # `from detector import boxes` also names the package `detector`. Only its module `boxes` counts.
    return {
        module for module in imported_modules if not any(other.startswith(module + ".") for other in imported_modules)
    }


def violations(module, imported, modules):
    """The rules that these imports of `module` break."""
    top = module.split(".")[0]
    broken = []
    if top == "detector" and knows(imported, "data"):
        broken.append("detector imports data")
    if top in ("detector", "data") and knows(imported, "scripts"):
        broken.append("the product imports scripts")
    if top in ("detector", "data") and (knows(imported, "train") or knows(imported, "eval")):
        broken.append("a part imports an entry point")
    detector_modules = {target for target in project_modules(imported, modules) if target.split(".")[0] == "detector"}
    allowed = FROM_DATA_ASSEMBLE if module == "data.assemble" else FROM_DATA
    if top == "data" and (detector_modules - allowed or "detector.*" in imported or "detector" in detector_modules):
        broken.append("data imports more of detector than its types, errors, boxes, sizes and image reader")
    if module in SEPARATE and any(knows(imported, other) for other in {*SEPARATE, "detector.losses"} - {module}):
        broken.append("anchors, assigner, box coder and losses import one another")
    if module.startswith("detector.losses.") and project_modules(imported, modules) - FROM_LOSSES:
        broken.append("a loss imports another part")
    if module != "detector.distributed" and knows(imported, "torch.distributed"):
        broken.append("torch.distributed outside distributed.py")
    data_library = any(knows(imported, name) for name in ("albumentations", "pycocotools", "hotcoco"))
    if top != "data" and not module.startswith("scripts.bench.") and data_library:  # benchmarks compare with them
        broken.append("albumentations, pycocotools or hotcoco outside data")
    if top != "scripts" and module not in CONFIG_READERS and knows(imported, "detector.config"):
        broken.append("a part sees the config")
    return broken


SOURCES = product()


def without_encoding(source):
    """Lines that read or write text in the default encoding of the machine."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            function, keywords = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
            owner, _, name = function.rpartition(".")
            modes = [constant.value for constant in ast.walk(node) if isinstance(constant, ast.Constant)]
            opens_text = (
                name == "open"
                and owner not in ("Image", "os", "writer")
                and not {"rb", "wb", "ab"} & {*map(str, modes)}
            )
            if (opens_text or name in ("read_text", "write_text") or "text" in keywords) and "encoding" not in keywords:
                lines.append(node.lineno)
    return lines


LOSSES = [name for name in SOURCES if name.startswith("detector.losses.") and name not in FROM_LOSSES]


def graph(sources):
    return {name: imports(source, name) & sources.keys() for name, source in sources.items()}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_keep_the_rules(module):
    assert violations(module, imports(SOURCES[module], module), set(SOURCES)) == []


WAY = ["train", "detector.engine", "detector.criterion"]  # the criterion calls the loss that it was given
MENU = {**losses.CLASS_LOSSES, **losses.BOX_LOSSES}


def calls(source):
    """What a module calls, as its source writes it: `self.class_loss`."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}


def home(loss):
    """The module that defines the `forward` of a loss. For a constructor such as GHMC.released, that of its class."""
    return getattr(loss, "__self__", loss).forward.__module__


def test_train_reaches_the_losses_by_way_of_the_engine_and_the_criterion():
    for here, there in pairwise(WAY):
        assert there in graph(SOURCES)[here]
    assert "train_until" in calls(SOURCES["train"]) and "criterion" in calls(SOURCES["detector.engine"])
    assert {"self.class_loss", "self.box_loss"} <= calls(SOURCES["detector.criterion"])


@pytest.mark.parametrize("name", MENU)
def test_four_files_from_the_command_line_to_the_formula_of_any_loss(name):
    assert home(MENU[name]) in LOSSES  # the fourth, after the three of WAY


@pytest.mark.parametrize("name", sorted(losses.CLASS_LOSSES.keys() - {"rank_sort"}))  # a ranking is no sum over cells
def test_a_fifth_file_sums_every_class_loss_over_the_cells(name):
    loss = home(losses.CLASS_LOSSES[name])
    assert "cell_sum" in calls(SOURCES[loss]) and "detector.losses.fused" in graph(SOURCES)[loss]


def test_the_parser_sees_the_product():
    assert {"train", "eval", "detector.losses", "detector.losses.focal", "data.coco"} <= SOURCES.keys()
    assert len(LOSSES) >= 7
    assert "detector.engine" in graph(SOURCES)["train"]
    assert "detector.boxes" in graph(SOURCES)["detector.assigner"]  # written as `from detector import boxes`


@pytest.mark.parametrize("module", SOURCES)
def test_text_is_utf8_on_every_machine(module):
    assert without_encoding(SOURCES[module]) == []


def test_the_encoding_check_finds_calls_without_an_encoding():
    wrong = "open(p)\np.open()\np.open('w')\np.read_text()\np.write_text('rb')\nsubprocess.run(c, text=True)"
    assert without_encoding(wrong) == [1, 2, 3, 4, 5, 6]
    right = (
        "open(p, 'rb')\np.open(mode='wb')\nImage.open(p)\nopen(p, encoding='utf-8')\np.read_bytes()\nrun(c, text=True"
    )
    assert without_encoding(right + ", encoding='utf-8')") == []


# scripts/run_onnx.py is not among these modules: it has no __main__ and runs with onnxruntime alone.
@pytest.mark.parametrize("module", [name for name in SOURCES if "__main__" in SOURCES[name]])
def test_entry_points_can_print_anywhere(module):
    assert "    run_main(main" in SOURCES[module].partition("__main__")[2]


def test_tests_have_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))  # tests/data/__init__.py would hide the package data


WRONG = [
    ("detector.engine", "from data.loader import train_loader", "detector imports data"),
    ("detector.engine", "import data", "detector imports data"),
    ("detector.engine", "def f():\n    from data import coco", "detector imports data"),
    ("detector.model", "import scripts.compare", "the product imports scripts"),
    ("data.coco", "from scripts import compare", "the product imports scripts"),
    ("detector.engine", "from train import pick_device", "a part imports an entry point"),
    ("data.coco", "from detector.box_coder import BoxCoder", "data imports more"),
    ("data.coco", "from detector import assigner", "data imports more"),
    ("data.coco", "import detector.losses.focal", "data imports more"),
    ("data.coco", "from detector import *", "data imports more"),
    ("detector.anchors", "from detector.box_coder import BoxCoder", "import one another"),
    ("detector.assigner", "from detector import anchors", "import one another"),
    ("detector.box_coder", "from .assigner import IoUAssigner", "import one another"),
    ("detector.assigner", "from detector import losses", "import one another"),
    ("detector.losses.focal", "from detector.losses.ghm import GHMC", "a loss imports another part"),
    ("detector.losses.focal", "from . import ghm", "a loss imports another part"),
    ("detector.losses.focal", "from detector import boxes", "a loss imports another part"),
    ("detector.losses.focal", "from detector.losses import Focal", "a loss imports another part"),
    ("detector.losses.focal", "from data import coco", "a loss imports another part"),
    ("detector.engine", "import torch.distributed as dist", "torch.distributed outside"),
    ("detector.engine", "from torch import distributed", "torch.distributed outside"),
    ("train", "from torch.distributed import all_reduce", "torch.distributed outside"),
    ("data.loader", "import torch\ntorch.distributed.get_rank()", "torch.distributed outside"),
    ("detector.engine", "import albumentations as A", "outside data"),
    ("eval", "from pycocotools.coco import COCO", "outside data"),
    ("scripts.compare", "import hotcoco", "outside data"),
    ("detector.model", "from detector.config import Config", "sees the config"),
    ("detector.losses.focal", "from detector import config", "sees the config"),
    ("data.loader", "import detector.config", "sees the config"),
    ("data.assemble", "from detector.engine import predict", "data imports more"),
]


@pytest.mark.parametrize(("module", "source", "rule"), WRONG)
def test_the_import_check_finds_an_import_that_breaks_a_rule(module, source, rule):
    assert any(rule in broken for broken in violations(module, imports(source, module), set(SOURCES)))


RIGHT = [
    ("train", "from data.coco import CocoDataset\nfrom detector import assemble, config, distributed"),
    ("data.coco", "from detector.structures import Target\nfrom detector import boxes\nimport albumentations"),
    ("data.assemble", "from detector.checkpoint import Content\nfrom detector.config import Config"),
    ("detector.assigner", "from detector import boxes as box_ops\nfrom detector.structures import Assignment"),
    ("detector.losses.focal", "from detector.distributed import all_sum\nfrom .cells import cross_entropy"),
    ("detector.losses.focal", "from detector import distributed\nimport torch.nn.functional as F"),
    ("detector.losses", "from detector.losses.focal import Focal"),
    ("detector.distributed", "from torch import distributed as dist"),
    ("detector.engine", "from torch.utils.data import DataLoader\nfrom detector import distributed"),
    ("scripts.ablate", "from detector import config\nfrom data.coco import CocoDataset\nimport train"),
]


@pytest.mark.parametrize(("module", "source"), RIGHT)
def test_the_import_check_accepts_imports_that_keep_the_rules(module, source):
    assert violations(module, imports(source, module), set(SOURCES)) == []


def test_the_reading_core_is_as_short_as_contributing_says():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    order = text.split("## Reading order")[1].split("The rest is operations")[0]
    files = re.findall(r"`([\w/]+\.py)`", order)
    assert files[0] == "train.py" and files[-1] == "data/coco_eval.py" and len(files) == len(set(files)) > 20
    lines = sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files)
    assert "in 2,500 lines" in order and lines <= 2500
