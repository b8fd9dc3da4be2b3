"""What the documents show runs, or at least says nothing that is not there."""

import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import train
from detector import assemble
from detector.losses import CrossEntropy
from scripts import compare, reference

ROOT = Path(__file__).parents[1]


def test_the_losses_example_trains_a_foreign_detector():
    """Its loop with the smallest stand-ins for what it takes from elsewhere."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "losses.md").read_text(encoding="utf-8"), re.S)
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 3 + 4)
    anchors, features = torch.rand(30, 4), torch.rand(30, 2)

    def model(_images):
        both = layer(features)
        return both[:, :3], both[:, 3:], anchors

    def assign(_anchors, _gt):
        number = torch.arange(30)
        return torch.zeros_like(number), number < 4, (number >= 4) & (number < 7)

    gt = SimpleNamespace(boxes=torch.rand(1, 4), labels=torch.tensor([2]))
    names = {
        "model": model,
        "assign": assign,
        "encode": lambda boxes, anchors: boxes - anchors,
        "loader": [(None, gt)] * 60,
        "optimizer": torch.optim.Adam(layer.parameters(), lr=0.02),
    }
    values = []
    exec(code.replace("loss.backward()", "record(loss.item()); loss.backward()"), names | {"record": values.append})
    assert len(values) == 60 and sum(values[-10:]) < sum(values[:10])


# ------------------------------------------------------------------------------------------------------ the commands

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text):
    """What stands indented, over several lines where one ends in a backslash, and in code spans with an option."""
    lines = re.sub(r"```.*?```", "", text, flags=re.S).replace("\\\n", " ").splitlines()
    found = [line.strip() for line in lines if re.match(r"    (python|torchrun|srun) ", line)]
    return found + [span for span in re.findall(r"`(python [^`]*--[^`]*)`", " ".join(text.split()))]


COMMANDS = sorted({one for path in DOCUMENTS for one in commands(path.read_text(encoding="utf-8"))})
SCRIPTS = [
    path
    for path in [ROOT / "train.py", ROOT / "eval.py", *sorted((ROOT / "scripts").rglob("*.py"))]
    if "ArgumentParser(" in path.read_text(encoding="utf-8")
]


@cache
def module(path):
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_is_a_page(path, command):
    code, out, _ = command(module(path).main, "--help")
    assert code == 0 and len(out.splitlines()) >= 10
    assert path.name in out  # an example


@pytest.mark.parametrize("text", COMMANDS)
def test_a_documented_command_is_one_that_there_is(text, command):
    """Its script, options, configs, settings and variants; what the scripts do is tested where they are."""
    words = shlex.split(text.replace("...", ""))
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None:
        assert words[:3] == ["python", "-m", "data.demo"]
        return
    assert (ROOT / script).exists()
    given = words[words.index(script) + 1 :]
    if ROOT / script in SCRIPTS:
        _, page, _ = command(module(ROOT / script).main, "--help")
        for word in given:
            assert not word.startswith("--") or re.search(rf"{re.escape(word)}\b", page), word
    config = next((word for word in given if word.startswith("configs/")), "configs/coco/focal.yaml")
    assert (ROOT / config).exists()
    settings = [word for word in given if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=[^x]", word)]
    variants = given[given.index("--variants") + 1 :] if "--variants" in given else []
    for word in variants:
        if word.startswith("--"):
            break
        for part in word.split("+"):
            assert part == "smoothed_ce" or (ROOT / config).with_name(f"{part}.yaml").exists(), part
    assemble.configure(
        str(ROOT / config), [one for one in settings if not one.startswith(("class_loss.", "box_loss."))]
    )


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 25 and len(SCRIPTS) > 12


def test_the_reference_is_current(command):
    code, _, err = command(reference.main, "--check")
    assert code == 0, err
    text = reference.render()
    for expected in ("`solver.lr`", "`data.train.annotations`", "| `ghm_c` |", "`model.backbone`", "`precision`"):
        assert expected in text
    for line in text.splitlines():
        assert not line.startswith("| `") or not line.endswith("|  |"), f"{line}: nothing is said of it"


def test_the_example_of_a_loss_trains(tiny, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "new_loss.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (config,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    names = {"__name__": "smoothed"}
    exec(code, names)
    loss = names["SmoothedCrossEntropy"]
    monkeypatch.setitem(assemble.PARTS["class_loss"], "smoothed_ce", loss)
    said = yaml.safe_load(config)
    cfg = assemble.configure(tiny(tmp_path, class_loss=said["class_loss"], box_loss=said["box_loss"]))
    assert cfg.class_loss.options == {"epsilon": 0.02}
    assert train.train(cfg, torch.device("cpu"))["step"] == 4
    cells = torch.randn(20, 3), torch.randint(0, 4, (20,)), torch.rand(20) < 0.8
    torch.testing.assert_close(loss(0.0)(*cells, 5.0), CrossEntropy()(*cells, 5.0))


def test_the_table_of_results_is_what_the_command_writes(tmp_path, monkeypatch):
    """Each number in the README is of a run in results/."""
    monkeypatch.chdir(ROOT)
    runs = sorted(map(str, Path("results/bccd").glob("*.json")))
    compare.main([*runs, "--baseline", "ce", "--markdown", str(tmp_path / "table.md")])
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.count("\n| ") > 10 and table in (ROOT / "README.md").read_text(encoding="utf-8")
