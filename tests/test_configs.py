"""The shipped configs: each builds, and within a folder an ablation changes the loss alone."""

from pathlib import Path

import pytest
import torch
import yaml

from data.transforms import EvalTransform, TrainTransform
from detector import assemble
from detector.config import Config
from detector.configure import configure
from scripts.compare import PUBLISHED, Row, published

ROOT = Path(__file__).parents[1] / "configs"
FILES = sorted(path for path in ROOT.glob("*/*.yaml") if path.name != "base.yaml")
FOLDERS = sorted({path.parent for path in FILES})
CHOSEN = {"run": True, "class_loss": True, "box_loss": True, "model": {"head": {"prior"}}}  # as in scripts/ablate.py


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_config_builds(path):
    cfg = configure(str(path))
    with torch.device("meta"):
        model = assemble.build_model(cfg, num_classes=80)
        assemble.build_solver(cfg, model, steps_per_epoch=100)
    assemble.build_criterion(cfg)
    assemble.build_postprocess(cfg)
    assert assemble.train_batch_size(cfg) == cfg.solver.batch_size
    EvalTransform(cfg.data.short_side, cfg.data.long_side)
    flips = {"horizontal_flip": cfg.data.horizontal_flip, "vertical_flip": cfg.data.vertical_flip}
    size = (cfg.data.short_side, cfg.data.long_side)
    TrainTransform(*size, **flips, scale_jitter=cfg.data.scale_jitter, strong=cfg.data.strong)


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_an_ablation_changes_the_loss_alone(folder):
    configs = [configure(str(path)) for path in FILES if path.parent == folder]
    other_options = [cfg.model_dump(exclude=CHOSEN) for cfg in configs]
    assert all(options == other_options[0] for options in other_options)
    losses = [repr((cfg.class_loss, cfg.box_loss, cfg.model.head.prior)) for cfg in configs]
    assert len(set(losses)) == len(losses)


def test_no_two_configs_share_a_run_folder():
    runs = [configure(str(path)).folder for path in FILES]
    assert len(set(runs)) == len(runs)


def test_every_published_result_is_found_for_some_config():
    rows = {
        str(path.parent.name + "/" + path.stem): row_of(path)
        for path in FILES
        if not path.parent.name.startswith("demo")
    }
    lines = {name: published([row]) for name, row in rows.items()}
    assert lines["coco/focal"] == ["- published, focal: AP 35.6, AP50 55.6, AP75 38.2 (GHM paper, table 5)"]
    assert "35.9" in lines["coco/ghm_c_exact"][0] and "36.4" in lines["coco/ghm"][0]
    assert not any(lines[name] for name in lines if name.startswith(("bccd", "laptop")))
    printed = "\n".join(line for row_lines in lines.values() for line in row_lines)
    for entry in yaml.safe_load(PUBLISHED.read_text()):
        assert f"AP {entry['AP']}" in printed, entry


def row_of(path: Path) -> Row:
    return Row(path.stem, [{"config": configure(str(path)).model_dump(mode="json")}], [])


def test_the_excluded_options_exist_and_there_are_configs_to_compare():
    assert set(Config.model_fields) >= set(CHOSEN)
    assert len(FILES) >= 12
