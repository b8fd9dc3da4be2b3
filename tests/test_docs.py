"""The documents are true: their code runs, and commands write their tables."""

import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import train
from detector.configure import PARTS, configure
from detector.losses import CrossEntropy
from scripts import compare, compare_conditions, summarize, write_config_docs
from scripts.comparison.rows import known_values, mean_and_spread, read_rows
from scripts.studies import overview

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
IMBALANCE = (70, 350, 1600, 11000, 46000)  # negative anchors for each positive one, in results/imbalance


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_the_losses_example_trains_a_foreign_detector():
    """Run the loop of the example, with minimal stand-ins for the names that it does not define."""
    (code,) = re.findall(r"```python\n(.*?)```", page("losses"), re.S)
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 3 + 4)
    anchors, features = torch.rand(30, 4), torch.rand(30, 2)

    def model(_images):
        outputs = layer(features)
        return outputs[:, :3], outputs[:, 3:], anchors

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


def test_the_config_reference_is_current(command):
    code, _, err = command(write_config_docs.main, "--check")
    assert code == 0, err
    text = write_config_docs.render()
    for expected in ("`solver.lr`", "`data.train.annotations`", "| `ghm_c` |", "`model.backbone`", "`precision`"):
        assert expected in text
    for line in text.splitlines():
        assert not line.startswith("| `") or not line.endswith("|  |"), f"{line}: nothing is said of it"


def test_the_example_of_a_new_loss_trains(tiny, tmp_path, monkeypatch):
    text = page("new_loss")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (config,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    names = {"__name__": "generalized"}
    exec(code, names)
    loss = names["GeneralizedCrossEntropy"]
    monkeypatch.setitem(PARTS["class_loss"], "gce", loss)
    values = yaml.safe_load(config)
    cfg = configure(tiny(tmp_path, class_loss=values["class_loss"], box_loss=values["box_loss"]))
    assert cfg.class_loss.options == {"q": 0.5}
    assert train.train(cfg, torch.device("cpu"))["step"] == 4
    cells = torch.randn(20, 3), torch.randint(0, 4, (20,)), torch.rand(20) < 0.8
    torch.testing.assert_close(loss(1e-3)(*cells, 5.0), CrossEntropy()(*cells, 5.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("document", "results", "baseline"),
    [
        ("results", ["laptop/*"], "ce"),
        ("results", ["cards/*"], "ce"),
        ("results", ["scratch/*"], "ce"),
        ("results", ["cards_long/*"], "ce"),
        ("results_ghm", ["batches/4/*", "forms/demo/*"], "ghm_c[max_weight=null]"),
        ("results_ghm", ["imbalance/350/*", "forms/imbalance/350/*"], "ghm_c[max_weight=null]"),
        (
            "results_ghm",
            ["laptop_short/ce-s*", "laptop_short/ghm_c-s*", "laptop_short/ghm_c_limited-s*", "forms/bccd/*"],
            "ghm_c",
        ),
        ("results_ghm", ["switches/*"], "ghm_c_limited[scope=batch]"),
        ("results_ghm", ["counts/*"], "ghm_c_limited[local_counts=false]"),
        ("results_ghm", ["scope/*"], "ghm_c_limited[scope=batch][weight=4]"),
    ],
)
def test_a_table_of_results_is_current(tmp_path, monkeypatch, document, results, baseline):
    """Every number in the table comes from a run in results/."""
    monkeypatch.chdir(ROOT)
    runs = [str(path) for pattern in results for path in sorted(Path("results").glob(f"{pattern}.json"))]
    pairs = ["--pairs"] * (baseline == "ce")
    compare.main([*runs, "--baseline", baseline, *pairs, "--markdown", str(tmp_path / "table.md")])
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.count("\n| ") >= 2 and "warning" not in table
    assert table in page(document)


def test_the_table_of_the_readme_is_current(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    runs = sorted(map(str, Path("results/laptop").glob("*.json")))
    summarize.main([*runs, "--baseline", "ce", "--output", str(tmp_path / "losses.png")])
    table = "\n".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert table.count("\n") == 9 and f"\n\n{table}\n\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_overview_is_current(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["overview.py", "--output", str(tmp_path / "overview.png")])
    overview.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    decided = [line for line in lines if not line.endswith(", undecided")]
    assert (len(lines), len(decided)) == (38, 8)
    assert "corrected for all 38, and eight are decided" in page("results").replace("\n", " ")


def test_the_readme_is_short_and_shows_pictures():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    assert text.index("![") < text.index("\n| ") < text.index("    pip install")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_exist(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}, target
        if path.suffix in (".png", ".jpg"):
            assert path.stat().st_size < 300_000, target


def test_the_table_of_wrong_labels_is_current(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    compare_conditions.main(["results/wrong_labels", "--output", str(tmp_path / "noise.png")])
    table = "\n".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert table.count("\n") == 4 and table in page("results_demo")


def test_the_table_of_sparse_regions_comes_from_the_results():
    section = page("results_ghm").partition("## Why GHM-C needs a limit")[2]
    rows = [line for line in section.partition("\n##")[0].splitlines() if line.startswith("|")]
    files = [ROOT / "results/regions" / name / "batch_regions.md" for name in ("bccd", "bccd_large")]
    written = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 5 and set(rows) <= set(written)


@pytest.mark.parametrize("folders", [("cards_short", "cards"), ("laptop_short", "laptop")])
def test_the_table_of_short_and_long_tuning_is_current(folders):
    text = page("results")
    files = [sorted(map(str, (ROOT / "results" / name).glob("*.json"))) for name in folders]
    short, long = ({row.name: row for row in read_rows(of_folder)} for of_folder in files)
    assert len(long) >= 4
    for name in long:
        cells = [mean_and_spread(known_values(row[name])) for row in (short, long)]
        assert f"| {name} | {' | '.join(cells)} |" in text


def test_the_table_of_prior_counts_is_current():
    text = page("results")
    rows = []
    for name in ("laptop", "cards", "scratch"):
        files = [*(ROOT / "results" / name).glob("*.json"), *(ROOT / "results/prior_count" / name).glob("*.json")]
        rows.append({row.name: mean_and_spread(known_values(row)) for row in read_rows(sorted(map(str, files)))})
    for name in ("ce", "focal", "ghm_c", "ghm_c_limited", "ghm_c[prior_count=1000]"):
        assert f"| {name} | {' | '.join(row[name] for row in rows)} |" in text


def test_the_lists_of_imbalance_are_current(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = page("results_demo")
    compare_conditions.main(["results/imbalance", "--output", str(tmp_path / "imbalance.png")])
    table, *lists, _ = capsys.readouterr().out.split("\n\n")  # of each condition, of the change
    assert table.count("\n| ") == 5 and "\n\n".join(lists).count("\n- ") == 18
    assert table in text and "\n\n".join(lists) in text
    compare_conditions.main(["results/few_digits", "--output", str(tmp_path / "few.png")])
    assert capsys.readouterr().out.rpartition("\n\n")[0] in text
    compare_conditions.main(
        ["results/limit", "--baseline", "ghm_c[max_weight=30]", "--output", str(tmp_path / "l.png")]
    )
    assert capsys.readouterr().out.rpartition("\n\n")[0] in text
    prior = ["results/prior_count/imbalance", "--baseline", "ghm_c[max_weight=30]"]
    compare_conditions.main([*prior, "--output", str(tmp_path / "p.png")])
    assert capsys.readouterr().out.rpartition("\n\n")[0] in text
    compare.main([*sorted(map(str, Path("results/imbalance").glob("*/*.json"))), "--baseline", "ce"])
    over_sets = [line for line in capsys.readouterr().out.splitlines() if "; by set " in line]
    assert len(over_sets) == 3 and "\n".join(over_sets) in text
    for name in ("ce", "focal", "ghm_c[max_weight=30]", "ghm_c[max_weight=null]"):
        cells = []
        for ratio in IMBALANCE:
            tuning = json.loads(Path(f"results/imbalance/{ratio}/{name}-s0.json").read_text())["tuning"]
            weights = [f"{value:.3g}{'*' * (key in tuning['at_an_end'])}" for key, value in tuning["chosen"].items()]
            aps = [100 * (trial["AP"] or 0) for trial in tuning["trials"]]
            cells.append(f"{', '.join(weights)} ({max(aps):.1f}; {aps[0]:.1f})")
        assert f"| {name} | {' | '.join(cells)} |" in text


def test_the_table_of_separation_is_current():
    folders = ["batches/4", *(f"imbalance/{ratio}" for ratio in IMBALANCE)]
    line = re.compile(
        r"(.+)/(.+)-s\d: .*: true class (.+), other class (.+), true class first in (.+)%; background (.+)"
    )
    seeds: dict[str, dict[str, list[list[float]]]] = {}
    for found in map(line.fullmatch, (ROOT / "results/separation.txt").read_text(encoding="utf-8").splitlines()):
        folder, name, *values = found.groups()
        if folder in folders:
            seeds.setdefault(name, {}).setdefault(folder, []).append([float(value) for value in values])
    text = page("results_ghm")
    assert len(seeds) > 8
    for name, of_row in seeds.items():
        cells = []
        for folder in folders:
            if folder in of_row:
                assert len(of_row[folder]) == 3
                true, other, first, background = (statistics.fmean(values) for values in zip(*of_row[folder]))
                cells.append(f"{true:.2f} / {other:.2f} / {background:.2f}, {first:.0f}%")
            else:
                cells.append("-")
        assert f"| {name} | {' | '.join(cells)} |" in text


def test_the_table_of_batches_is_current(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    compare_conditions.main(["results/batches", "--baseline", "focal", "--output", str(tmp_path / "batches.png")])
    table = "\n".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert table.count("\n") == 4 and table in page("results_ghm")
