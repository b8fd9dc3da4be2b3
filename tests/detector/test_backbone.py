import copy
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model_weights
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from detector.backbone import BACKBONES, Backbone, FrozenBatchNorm
from detector.pretrained import load_backbone_weights

SMALL = ["resnet18", "mobilenet_v2", "mobilenet_v3_large"]  # one of each kind
CHANNELS = {
    "resnet18": (128, 256, 512),
    "resnet34": (128, 256, 512),
    "mobilenet_v2": (32, 96, 320),
    "mobilenet_v3_large": (40, 112, 160),
}
NORMS = {"bn": nn.BatchNorm2d, "gn": nn.GroupNorm, "frozen_bn": FrozenBatchNorm}
STAGES = {  # torchvision's names of the outputs at strides 4, 8, 16 and 32
    "mobilenet_v2": [f"features.{index}" for index in (3, 6, 13, 17)],
    "mobilenet_v3_large": [f"features.{index}" for index in (3, 6, 12, 15)],
}


def extractor(network, name):
    """torchvision's C3, C4, C5, as a list."""
    stages = STAGES.get(name, ["layer1", "layer2", "layer3", "layer4"])
    extract = create_feature_extractor(network, stages[1:])
    return lambda images: list(extract(images).values())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_builds_with_its_strides_and_channels(name):
    with torch.device("meta"):
        backbone = Backbone(name, "bn", 0)
        features = backbone(torch.empty(2, 3, 96, 160))
    c3, c4, c5 = CHANNELS.get(name, (512, 1024, 2048))
    assert backbone.channels == (c3, c4, c5)
    assert [tuple(f.shape) for f in features] == [(2, c3, 12, 20), (2, c4, 6, 10), (2, c5, 3, 5)]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_has_the_tensors_of_torchvision(name):
    with torch.device("meta"):
        ours = {key: value.shape for key, value in Backbone(name, "bn", 0).state_dict().items()}
        theirs = {key: value.shape for key, value in getattr(torchvision.models, name)().state_dict().items()}
    unused_prefix = {"mobilenet_v2": "features.18.", "mobilenet_v3_large": "features.16."}.get(name, "fc.")
    assert ours == {key: shape for key, shape in theirs.items() if not key.startswith((unused_prefix, "classifier."))}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_has_imagenet_weights(name):
    assert name in get_model_weights(name)["IMAGENET1K_V1"].url


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "sync_bn"])
def test_features_equal_torchvision_with_the_same_weights(name, norm, networks, tmp_path):
    theirs = networks(name)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    backbone = Backbone(name, norm, 1)
    load_backbone_weights(backbone, name, str(tmp_path / "weights.pth"))
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = backbone.eval()(images), extractor(theirs, name)(images)
    torch.testing.assert_close(list(ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_bn_updates_its_statistics_as_torchvision_does(name, networks):
    theirs = networks(name).train()
    ours = Backbone(name, "bn", 0)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(list(ours(images)), extractor(theirs, name)(images))
    state = theirs.state_dict()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[key], msg=key)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_builds_its_layers(norm):
    norms = tuple(NORMS.values())
    types = [type(module) for module in Backbone("resnet18", norm, 0).modules() if isinstance(module, norms)]
    assert set(types) == {NORMS[norm]} and len(types) == 20


@pytest.mark.parametrize("name", [*SMALL, "resnet50", "resnext50_32x4d"])
def test_folded_frozen_bn_has_the_values_and_gradients_of_torchvision(name, networks):
    eps = 1e-3 if name == "mobilenet_v3_large" else 1e-5
    theirs = networks(name, norm_layer=partial(FrozenBatchNorm2d, eps=eps)).double()
    ours = Backbone(name, "frozen_bn", 0).double()
    assert not [module for module in ours.modules() if type(module) is nn.Conv2d and module.bias is None]
    ours.load_state_dict(theirs.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    features, expected = list(ours(images)), extractor(theirs, name)(images)
    torch.testing.assert_close(features, expected)
    for outputs in (features, expected):
        sum((output * torch.linspace(-1, 1, output.shape[1])[:, None, None]).sum() for output in outputs).backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert parameter.grad.abs().sum() > 0, key
        torch.testing.assert_close(parameter.grad, gradients[key].grad, msg=key)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("frozen", range(5))
def test_frozen_stages_get_no_gradient_and_keep_their_statistics(name, frozen):
    parts = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    ends = [0, 3, 4, 5, 6]
    if name == "mobilenet_v2":
        parts, ends = [f"features.{index}" for index in range(18)], [0, 4, 7, 14, 18]
    prefixes = tuple(f"{part}." for part in parts[: ends[frozen]])
    torch.manual_seed(0)
    backbone = Backbone(name, "bn", frozen)
    backbone.eval()
    backbone.train()  # as an epoch does after an evaluation
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    features = backbone(torch.randn(2, 3, 64, 64))
    if frozen < 4:
        sum(feature.sum() for feature in features).backward()
    for key, parameter in backbone.named_parameters():
        assert (parameter.grad is None) == key.startswith(prefixes), key
    for key, value in backbone.state_dict().items():
        if "running_mean" in key:
            assert torch.equal(value, before[key]) == key.startswith(prefixes), key


def test_evaluation_mode_reaches_every_stage():
    backbone = Backbone("resnet18", "bn", 2).eval()
    assert not any(module.training for module in backbone.modules())


def test_frozen_stages_survive_a_copy():
    backbone = copy.deepcopy(Backbone("resnet18", "bn", 1)).train()
    assert not backbone.bn1.training and backbone.layer2[0].bn1.training


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_large"])
def test_depthwise_convolutions_train_in_float32_where_bfloat16_is_slow(name, norm):
    backbone = Backbone(name, norm, 0)
    depthwise = [m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels]
    slow = [conv for conv in depthwise if conv.kernel_size == (5, 5) or conv.stride == (2, 2)]
    assert len(depthwise) > len(slow) > 3
    for conv in slow:
        x = torch.randn(1, conv.in_channels, 8, 6).bfloat16().requires_grad_()
        options = conv.stride, conv.padding, conv.dilation, conv.groups
        with torch.autocast("cpu", torch.bfloat16):
            trained = conv(x)
            with torch.no_grad():  # as in the first pass of a step in several parts
                again = conv(x)
            evaluated = conv.eval()(x)
        weight, bias = conv.folded() if norm == "frozen_bn" else (conv.weight, None)
        assert torch.equal(trained, nn.functional.conv2d(x.float(), weight, bias, *options).bfloat16())  # rounded once
        assert torch.equal(again, trained)
        in_bfloat16 = nn.functional.conv2d(x, weight.bfloat16(), None if bias is None else bias.bfloat16(), *options)
        assert torch.equal(evaluated, in_bfloat16)
        trained.sum().backward()
        assert x.grad.dtype == torch.bfloat16 and conv.weight.grad.dtype == torch.float32
