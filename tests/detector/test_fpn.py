import pytest
import torch
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from detector.fpn import FPN

CHANNELS = (16, 32, 64)


def features(height, width, batch=2):
    """C3..C5 of an image."""
    rng = torch.Generator().manual_seed(0)
    sizes = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32)]
    return tuple(torch.randn(batch, c, *size, generator=rng) for c, size in zip(CHANNELS, sizes))


@pytest.mark.parametrize("p6_from", ["c5", "p5"])
@pytest.mark.parametrize("size", [(128, 256), (96, 160), (32, 32), (800, 1344), (100, 75)])
def test_shapes_of_all_levels(p6_from, size):
    levels = FPN(CHANNELS, 8, p6_from)(features(*size))
    expected = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in (8, 16, 32, 64, 128)]
    assert [tuple(level.shape) for level in levels] == [(2, 8, *map_size) for map_size in expected]


@pytest.mark.parametrize("p6_from", ["c5", "p5"])
def test_equals_torchvision_with_the_same_weights(p6_from):
    ours = FPN(CHANNELS, 8, p6_from)
    top_block = LastLevelP6P7(64 if p6_from == "c5" else 8, 8)
    theirs = FeaturePyramidNetwork(list(CHANNELS), 8, extra_blocks=top_block)
    for index in range(3):
        theirs.inner_blocks[index][0].load_state_dict(ours.lateral[index].state_dict())
        theirs.layer_blocks[index][0].load_state_dict(ours.output[index].state_dict())
    top_block.p6.load_state_dict(ours.p6.state_dict())
    top_block.p7.load_state_dict(ours.p7.state_dict())
    inputs = features(96, 160)
    expected = theirs({str(index): feature for index, feature in enumerate(inputs)})
    for level, expected_level in zip(ours(inputs), expected.values(), strict=True):
        torch.testing.assert_close(level, expected_level)


def test_p6_from_c5_does_not_see_p5():
    inputs = features(64, 64)
    for p6_from, depends_on_p5 in [("c5", False), ("p5", True)]:
        fpn = FPN(CHANNELS, 8, p6_from)
        before = fpn(inputs)[3]
        torch.nn.init.constant_(fpn.output[2].bias, 1.0)
        assert torch.equal(fpn(inputs)[3], before) != depends_on_p5


def test_every_weight_gets_a_gradient():
    fpn = FPN(CHANNELS, 8)
    sum(level.square().sum() for level in fpn(features(64, 96))).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in fpn.parameters())


@pytest.mark.parametrize("p6_from", ["c5", "p5"])
@pytest.mark.parametrize("size", [(32, 32), (64, 32), (160, 32), (64, 64), (96, 96), (320, 64), (32, 128)])
def test_gradients_in_bfloat16_equal_those_of_float32(p6_from, size):
    """Also on the narrowest maps, where torch's stride-2 convolution on a CPU gives other gradients."""
    fpn = FPN((64, 64, 64), 64, p6_from)
    inputs = [torch.randn(4, 64, *feature.shape[-2:]) for feature in features(*size)]
    gradients = []
    for enabled in (False, True):
        fpn.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            levels = fpn(tuple(inputs))
        sum(level.float().square().sum() for level in levels).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in fpn.named_parameters()})
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() < 0.02 * expected.norm(), name
