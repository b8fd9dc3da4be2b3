"""Every name of a part builds, every option is typed, and every class loss works with every box loss."""

import pytest
import torch

from detector import assemble, losses
from detector.backbone import BACKBONES
from detector.config import Config, LossPart, Model, Part
from detector.configure import PARTS, complete
from detector.errors import UserError
from detector.structures import Target

MENU = [(section, name) for section, menu in PARTS.items() for name in menu]


def part(section, name, **options):
    return (LossPart if section.endswith("loss") else Part)(name=name, **options)


def completed(section, name, **options):
    return complete(Config(**{section: part(section, name, **options)}), "x.yaml")


@pytest.mark.parametrize(("section", "name"), MENU)
def test_every_name_builds_with_its_defaults_spelled_out(section, name):
    cfg = completed(section, name)
    instance = assemble.build_part(cfg, section)
    constructor = PARTS[section][name]
    assert type(instance) is getattr(constructor, "__self__", constructor)  # `released` is a class method
    assert complete(cfg, "again") == cfg


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "gn"])
def test_every_backbone_builds(name, norm):
    cfg = Config(model=Model(backbone=name, norm=norm, weights="some.pt"))
    if norm == "gn" and name.startswith("mobilenet"):
        with pytest.raises(UserError) as error:
            complete(cfg, "x.yaml")
        assert str(error.value) == (
            f"x.yaml: model.norm: gn needs multiples of 32 channels, {name} has others; use frozen_bn or bn"
        )
        return
    cfg = complete(cfg, "x.yaml")
    with torch.device("meta"):
        model = assemble.build_model(cfg, num_classes=7)
    assert model.head.num_classes == 7


@pytest.mark.parametrize("section", PARTS)
def test_an_unknown_name_is_refused_with_the_known_names(section):
    with pytest.raises(UserError) as error:
        completed(section, "nothing")
    known_names = ", ".join(PARTS[section])
    assert str(error.value) == f"x.yaml: {section}.name: no 'nothing'; it may be one of {known_names}"


@pytest.mark.parametrize(
    ("section", "name", "options", "expected"),
    [
        ("class_loss", "ghm_c", {"bins": "many"}, "class_loss.bins: Input should be a valid integer"),
        ("class_loss", "ghm_c", {"bins": 0}, "class_loss: GHMC: bins is 0; it must be at least 1"),
        ("class_loss", "ghm_c", {"normalizer": "none"}, "class_loss.normalizer: "),
        ("class_loss", "focal", {"gamma": float("nan")}, "class_loss.gamma: "),
        ("class_loss", "focal", {"alpha": 2}, "class_loss: Focal: alpha is 2"),
        ("box_loss", "smooth_l1", {"beta": 0}, "box_loss: SmoothL1: beta is 0"),
        ("assigner", "iou", {"fg_iou": 0.3}, "assigner: bg_iou 0.4 and fg_iou 0.3"),
        ("anchors", "grid", {"sizes": [8, 16]}, "anchors: sizes and strides need five numbers"),
        ("anchors", "grid", {"sizes": 8}, "anchors.sizes: "),
    ],
)
def test_wrong_options_are_refused_with_the_constructors_message(section, name, options, expected):
    with pytest.raises(UserError) as error:
        completed(section, name, **options)
    assert str(error.value).startswith(f"x.yaml: {expected}")
    assert "\n" not in str(error.value)


def test_options_reach_the_part():
    cfg = completed("class_loss", "ghm_c", bins="12", momentum=0, weight=3)
    criterion = assemble.build_criterion(cfg)
    assert (criterion.class_loss.bins, criterion.class_loss.momentum, criterion.class_weight) == (12, 0, 3)
    assert criterion.box_weight == 1


@pytest.fixture(scope="module")
def predictions():
    """Predictions of a random tiny model for one image with boxes and one without, and the targets."""
    torch.manual_seed(0)
    model = Model(backbone="resnet18", weights="none", norm="gn", fpn_channels=32, head={"width": 32, "depth": 1})
    cfg = complete(Config(model=model), "x.yaml")
    output = assemble.build_model(cfg, num_classes=3)(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    boxes = torch.tensor([[4.0, 4, 40, 36], [20, 30, 60, 62]])
    empty_target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return output, [Target(boxes, torch.tensor([0, 2])), empty_target]


@pytest.mark.parametrize("class_loss", losses.CLASS_LOSSES)
@pytest.mark.parametrize("box_loss", losses.BOX_LOSSES)
def test_any_class_loss_works_with_any_box_loss(predictions, class_loss, box_loss):
    output, targets = predictions
    cfg = Config(class_loss=part("class_loss", class_loss), box_loss=part("box_loss", box_loss, weight=2))
    criterion = assemble.build_criterion(complete(cfg, "x.yaml"))
    logits, deltas = (values.detach().requires_grad_() for values in (output.logits, output.deltas))
    losses = criterion(output._replace(logits=logits, deltas=deltas), targets)
    assert set(losses.terms) == {"class", "box"}
    assert set(losses.diagnostics) == {"true_class_probability", "positives_per_image"}
    assert all(torch.isfinite(value) and value > 0 for value in losses.terms.values())
    losses.total.backward()
    for gradient in (logits.grad, deltas.grad):
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    assert deltas.grad[1].abs().sum() == 0  # an image without boxes gives no box gradient


def test_the_batch_must_split_evenly_over_processes(monkeypatch):
    cfg = Config(solver={"batch_size": 6, "accumulate": 2})
    assert assemble.train_batch_size(cfg) == 6
    monkeypatch.setattr(assemble.distributed, "world_size", lambda: 3)
    assert assemble.train_batch_size(cfg) == 2
    monkeypatch.setattr(assemble.distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="multiple of 4"):
        assemble.train_batch_size(cfg)
