"""Who may know whom (DESIGN section 2): parses the imports of every file and fails where one runs the wrong way."""

import ast
from collections import deque
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG_READERS = {
    "train",
    "eval",
    "detector.assemble",
    "detector.checkpoint",
    "detector.run",
    "detector.pretrained",
    "detector.config_files",
    "detector.torchvision_checkpoint",
    "detector.config",
    "data.assemble",
}
SEPARATE = {"detector.anchors", "detector.assigner", "detector.box_coder"}
FROM_DATA = {"detector.structures", "detector.errors", "detector.boxes", "detector.resize", "detector.atomic"}
FROM_DATA_ASSEMBLE = FROM_DATA | {"detector.config", "detector.checkpoint"}
FROM_LOSSES = {"detector.distributed", "detector.losses.cells", "detector.losses.fused", "detector.losses.overlap"}


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
    """Dotted names of what a module imports, wherever it does: `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.add("torch.distributed")
    return found


def knows(found, name):
    """Whether `name`, or something in it, is imported."""
    return any(one == name or one.startswith(name + ".") for one in found)


def project_modules(found, modules):
    """Which of the project's modules are imported; `from detector.boxes import area` is detector.boxes."""
    named = found & modules
    # `from detector import boxes` also names the package; an empty package is no module of its own.
    return {one for one in named if not any(other.startswith(one + ".") for other in named)}


def violations(module, found, modules):
    """The rules of DESIGN section 2 that these imports of `module` break."""
    top = module.split(".")[0]
    broken = []
    if top == "detector" and knows(found, "data"):
        broken.append("detector imports data")
    if top in ("detector", "data") and knows(found, "scripts"):
        broken.append("the product imports scripts")
    if top in ("detector", "data") and (knows(found, "train") or knows(found, "eval")):
        broken.append("a part imports an entry point")
    own = {one for one in project_modules(found, modules) if one.split(".")[0] == "detector"}
    allowed = FROM_DATA_ASSEMBLE if module == "data.assemble" else FROM_DATA
    if top == "data" and (own - allowed or "detector.*" in found or "detector" in own):
        broken.append("data imports more of detector than its types, errors, boxes and sizes")
    if module in SEPARATE and any(knows(found, other) for other in {*SEPARATE, "detector.losses"} - {module}):
        broken.append("anchors, assigner, box coder and losses import one another")
    if module.startswith("detector.losses.") and project_modules(found, modules) - FROM_LOSSES:
        broken.append("a loss imports another part")
    if module != "detector.distributed" and knows(found, "torch.distributed"):
        broken.append("torch.distributed outside distributed.py")
    of_data = any(knows(found, name) for name in ("albumentations", "pycocotools", "hotcoco"))
    if top != "data" and not module.startswith("scripts.bench.") and of_data:  # to a benchmark they are peers
        broken.append("albumentations, pycocotools or hotcoco outside data")
    if top != "scripts" and module not in CONFIG_READERS and knows(found, "detector.config"):
        broken.append("a part sees the config")
    return broken


def shortest_walk(graph, start, goal):
    """The modules from `start` to `goal`, both included, along imports; None where there is no way."""
    before, queue = {start: None}, deque([start])
    while queue:
        here = queue.popleft()
        if here == goal:
            walk = []
            while here is not None:
                walk.append(here)
                here = before[here]
            return walk[::-1]
        for there in sorted(graph.get(here, ())):
            if there not in before:
                before[there] = here
                queue.append(there)
    return None


SOURCES = product()


def without_encoding(source):
    """Lines that read or write text in the encoding that a machine happens to have."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            function, given = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
            of, _, name = function.rpartition(".")
            modes = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
            file = (
                name == "open" and of not in ("Image", "os", "writer") and not {"rb", "wb", "ab"} & {*map(str, modes)}
            )
            if (file or name in ("read_text", "write_text") or "text" in given) and "encoding" not in given:
                found.append(node.lineno)
    return found


LOSSES = [name for name in SOURCES if name.startswith("detector.losses.") and name not in FROM_LOSSES]


def graph(sources):
    return {name: imports(source, name) & sources.keys() for name, source in sources.items()}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_run_the_right_way(module):
    assert violations(module, imports(SOURCES[module], module), set(SOURCES)) == []


@pytest.mark.parametrize("loss", LOSSES)
def test_four_files_from_the_command_line_to_any_loss(loss):
    walk = shortest_walk(graph(SOURCES), "train", loss)
    assert walk is not None and len(walk) <= 4, walk


def test_the_parser_sees_the_product():
    assert {"train", "eval", "detector.losses", "detector.losses.focal", "data.coco"} <= SOURCES.keys()
    assert len(LOSSES) >= 7
    assert "detector.engine" in graph(SOURCES)["train"]
    assert "detector.boxes" in graph(SOURCES)["detector.assigner"]  # written as `from detector import boxes`


@pytest.mark.parametrize("module", SOURCES)
def test_text_is_utf8_on_every_machine(module):
    assert without_encoding(SOURCES[module]) == []


def test_the_checker_of_encodings_finds_what_has_none():
    wrong = "open(p)\np.open()\np.open('w')\np.read_text()\np.write_text('rb')\nsubprocess.run(c, text=True)"
    assert without_encoding(wrong) == [1, 2, 3, 4, 5, 6]
    right = (
        "open(p, 'rb')\np.open(mode='wb')\nImage.open(p)\nopen(p, encoding='utf-8')\np.read_bytes()\nrun(c, text=True"
    )
    assert without_encoding(right + ", encoding='utf-8')") == []


# Its own, since it runs where nothing but onnxruntime is.
@pytest.mark.parametrize("module", [name for name in SOURCES if "__main__" in SOURCES[name]])
def test_entry_points_can_print_anywhere(module):
    assert module.startswith("scripts.bench.") or "    run_main(main" in SOURCES[module].partition("__main__")[2]


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
]


@pytest.mark.parametrize(("module", "source", "rule"), WRONG)
def test_the_checker_finds_an_import_that_runs_the_wrong_way(module, source, rule):
    assert any(rule in broken for broken in violations(module, imports(source, module), set(SOURCES)))


RIGHT = [
    ("train", "from data.coco import CocoDataset\nfrom detector import assemble, config, distributed"),
    ("data.coco", "from detector.structures import Target\nfrom detector import boxes\nimport albumentations"),
    ("detector.assigner", "from detector import boxes as box_ops\nfrom detector.structures import Assignment"),
    ("detector.losses.focal", "from detector.distributed import all_sum\nfrom .cells import cross_entropy"),
    ("detector.losses.focal", "from detector import distributed\nimport torch.nn.functional as F"),
    ("detector.losses", "from detector.losses.focal import Focal"),
    ("detector.distributed", "from torch import distributed as dist"),
    ("detector.engine", "from torch.utils.data import DataLoader\nfrom detector import distributed"),
    ("scripts.ablate", "from detector import config\nfrom data.coco import CocoDataset\nimport train"),
]


@pytest.mark.parametrize(("module", "source"), RIGHT)
def test_the_checker_leaves_right_imports_alone(module, source):
    assert violations(module, imports(source, module), set(SOURCES)) == []


def test_the_checker_measures_walks():
    sources = {
        "train": "from detector import engine",
        "detector.engine": "from detector.criterion import Criterion",
        "detector.criterion": "from detector import middle",
        "detector.middle": "import detector.losses.focal",
        "detector.losses.focal": "",
        "detector.losses.alone": "",
    }
    assert len(shortest_walk(graph(sources), "train", "detector.losses.focal")) == 5
    assert shortest_walk(graph(sources), "train", "detector.losses.alone") is None
    sources["detector.criterion"] = "from detector.losses import focal"
    assert shortest_walk(graph(sources), "train", "detector.losses.focal") == [
        "train",
        "detector.engine",
        "detector.criterion",
        "detector.losses.focal",
    ]
