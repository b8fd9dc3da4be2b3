"""Fixtures for the tests of checkpoints, resuming and initial weights."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from detector import assemble, checkpoint
from detector.config import Config
from detector.configure import complete
from detector.run import Run

IDS, NAMES = [3, 7, 11], ["cat", "dog", "cow"]
THRESHOLDS = [0.5, -1.0, 0.25]


def make_run(classes=3, **sections) -> Run:
    model = {"backbone": "resnet18", "weights": "none", "norm": "bn", "fpn_channels": 32, "head": {"width": 32,
             "depth": 1}}  # fmt: skip
    cfg = Config(model={**model, **sections.pop("model", {})}, **sections)
    cfg = complete(cfg, "test")
    net = assemble.build_model(cfg, classes)
    solver = assemble.build_solver(cfg, net, steps_per_epoch=5)
    data = {"data.train": "some boxes", "data.val": "others"}
    return Run(cfg, solver, assemble.build_criterion(cfg), IDS[:classes], NAMES[:classes], steps_per_epoch=5, data=data)


@pytest.fixture(scope="session", name="make_run")
def _make_run():
    """Builds a small run, of three classes by default. Keyword arguments set sections of its config."""
    return make_run


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The last.pt of a run with GHM-C that was evaluated at step 4, and the run."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    run = make_run(class_loss={"name": "ghm_c"})
    run.criterion.class_loss.average += torch.arange(30.0)
    run.evaluated_step, run.best_ap, run.score_thresholds = 4, 0.5, THRESHOLDS
    checkpoint.save(folder / "last.pt", run.content())
    yield folder / "last.pt", run
    (folder / "last.pt").unlink()


@pytest.fixture(scope="session")
def networks():
    """Builds a torchvision network by name, with random norm statistics: a test sees if they are not loaded."""
    return _network


def _network(name, **options):
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, **options)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


@pytest.fixture(scope="session")
def resnet18():
    return _network("resnet18")


@pytest.fixture
def resnet18_file(resnet18, tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    return path
