import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from detector.backbone import BACKBONES, Backbone, FrozenBatchNorm
from detector.pretrained import load_backbone_weights


def features_of(resnet, images):
    extractor = create_feature_extractor(resnet, ["layer2", "layer3", "layer4"])
    with torch.no_grad():
        return list(extractor(images).values())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_builds_with_its_strides_and_channels(name):
    with torch.device("meta"):
        backbone = Backbone(name, "bn", 0)
        features = backbone(torch.empty(2, 3, 96, 160))
    base = 64 if name in ("resnet18", "resnet34") else 256
    assert backbone.channels == (base * 2, base * 4, base * 8)
    assert [tuple(f.shape) for f in features] == [
        (2, base * 2, 12, 20),
        (2, base * 4, 6, 10),
        (2, base * 8, 3, 5),
    ]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_has_the_tensors_of_torchvision(name):
    with torch.device("meta"):
        ours = {key: value.shape for key, value in Backbone(name, "bn", 0).state_dict().items()}
        theirs = {key: value.shape for key, value in getattr(torchvision.models, name)().state_dict().items()}
    assert ours == {key: shape for key, shape in theirs.items() if not key.startswith("fc.")}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_downloads_the_weights_of_that_name(name):
    assert name in BACKBONES[name][1].url


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_features_equal_torchvision_with_the_same_weights(norm, resnet18, resnet18_file):
    backbone = Backbone("resnet18", norm, 1)
    load_backbone_weights(backbone, "resnet18", str(resnet18_file))
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = backbone.eval()(images)
    for feature, expected in zip(ours, features_of(resnet18, images), strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "kind"), [("bn", nn.BatchNorm2d), ("gn", nn.GroupNorm), ("frozen_bn", FrozenBatchNorm)]
)
def test_norm(norm, kind):
    norms = {"bn": nn.BatchNorm2d, "gn": nn.GroupNorm, "frozen_bn": FrozenBatchNorm}.values()
    found = [type(module) for module in Backbone("resnet18", norm, 0).modules() if isinstance(module, tuple(norms))]
    assert set(found) == {kind} and len(found) == 20


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_folded_frozen_bn_has_the_values_and_gradients_of_torchvisions(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d).double()
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.8)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    ours = Backbone(name, "frozen_bn", 0).double()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected = list(create_feature_extractor(theirs, ["layer2", "layer3", "layer4"])(images).values())
    features = ours(images)
    torch.testing.assert_close(list(features), expected)
    for outputs in (features, expected):
        sum((output * torch.linspace(-1, 1, output.shape[1])[:, None, None]).sum() for output in outputs).backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, msg=key)


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_stages_get_no_gradient_and_their_statistics_stand_still(frozen):
    stages = [("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",)]
    is_frozen = {part: index < frozen for index, parts in enumerate(stages) for part in parts}
    torch.manual_seed(0)
    backbone = Backbone("resnet18", "bn", frozen)
    backbone.eval()
    backbone.train()  # as an epoch does after an evaluation
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    features = backbone(torch.randn(2, 3, 64, 64))
    if frozen < 4:
        sum(feature.sum() for feature in features).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is None) == is_frozen[name.split(".")[0]], name
    for name, value in backbone.state_dict().items():
        if "running_mean" in name:
            assert torch.equal(value, before[name]) == is_frozen[name.split(".")[0]], name


def test_evaluation_mode_reaches_every_stage():
    backbone = Backbone("resnet18", "bn", 2).eval()
    assert not any(module.training for module in backbone.modules())


def test_frozen_stages_survive_a_copy():
    backbone = copy.deepcopy(Backbone("resnet18", "bn", 1)).train()
    assert not backbone.bn1.training and backbone.layer2[0].bn1.training
