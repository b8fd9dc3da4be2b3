"""A convolution with its bias, shortcut and ReLU, in one kernel or in passes. A CPU emulates the kernels."""

import pytest
import torch
from torch.nn import functional as F

from detector import conv as conv_module
from detector.conv import ConvReLU, conv_relu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def cudnn(x, weight, bias, stride, padding, dilation, groups):
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))


def cudnn_add(x, weight, shortcut, alpha, bias, *options):
    return F.relu(F.conv2d(x, weight, bias, *options) + alpha * shortcut)


@pytest.fixture
def one_kernel(monkeypatch, device):
    """Without a GPU, replace the kernels by their definition."""
    if device == "cpu":
        monkeypatch.setattr(conv_module, "_has_kernel", lambda conv, x, dtype: True)
        monkeypatch.setattr(torch, "cudnn_convolution_relu", cudnn)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", cudnn_add)


def case(device, kernel=3, stride=1, levels=1):
    generator = torch.Generator().manual_seed(0)
    conv = ConvReLU(16, 24, kernel, stride=stride, padding=kernel // 2)
    for parameter in conv.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    maps = [torch.randn(2, 16, 9 - 2 * i, 12, generator=generator).bfloat16() for i in range(levels)]
    with torch.no_grad():
        shortcut = torch.randn(
            F.conv2d(maps[0].float(), conv.weight, None, conv.stride, conv.padding).shape, generator=generator
        )
    conv = conv.to(device, memory_format=torch.channels_last)
    maps = [x.to(device, memory_format=torch.channels_last).requires_grad_() for x in maps]
    return conv, maps, shortcut.bfloat16().to(device, memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kernel", "stride", "levels", "joined"), [(3, 1, 3, 0), (1, 1, 1, 1), (3, 2, 1, 1), (3, 2, 1, 0)]
)
def test_equals_float64_forward_and_backward(device, kernel, stride, levels, joined, one_kernel):
    conv, maps, shortcut = case(device, kernel, stride, levels)
    used_shortcut = shortcut if joined else None
    with torch.autocast(device, torch.bfloat16):
        outputs = conv_relu(conv, maps, conv.weight, conv.bias, used_shortcut)
    assert not conv_module._broken
    output_grads = [torch.randn_like(output) for output in outputs]
    torch.autograd.backward(outputs, output_grads)

    rounded_parameters = [parameter.detach().bfloat16().double().requires_grad_() for parameter in conv.parameters()]
    double_inputs = [x.detach().double().requires_grad_() for x in (*maps, shortcut)]
    expected = []
    for x, output in zip(double_inputs, outputs):
        y = F.conv2d(x, *rounded_parameters, conv.stride, conv.padding) + (double_inputs[-1] if joined else 0)
        torch.testing.assert_close(output.double(), y.relu(), rtol=0.01, atol=0.02)
        expected.append(torch.where(output > 0, y, 0))  # where rounding decides, the gradient follows the output
    torch.autograd.backward(expected, [grad.double() for grad in output_grads])
    pairs = zip((*conv.parameters(), *maps, *([shortcut] if joined else [])), (*rounded_parameters, *double_inputs))
    for ours, theirs in pairs:
        assert ours.grad.dtype == ours.dtype
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=0.02, atol=0.02 * theirs.grad.abs().max().item()
        )


@pytest.mark.parametrize("device", DEVICES)
def test_a_map_in_float32_gets_its_gradient_in_float32(device, one_kernel):
    conv, maps, _ = case(device)
    x = maps[0].detach().float().requires_grad_()
    for feature_map in (x, maps[0]):
        conv_module._ConvReLU.apply(conv, torch.bfloat16, conv.weight, conv.bias, None, feature_map)[0].sum().backward()
    assert x.grad.dtype == torch.float32 and torch.equal(x.grad, maps[0].grad.float())


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_weights_get_no_gradient(device, one_kernel):
    conv, maps, _ = case(device)
    conv.requires_grad_(False)
    with torch.autocast(device, torch.bfloat16):
        conv(maps[0]).sum().backward()
    assert maps[0].grad.abs().sum() > 0 and conv.weight.grad is None and conv.bias.grad is None


def test_without_the_kernels_it_warns_once_and_gives_the_same(monkeypatch):
    def missing(*args):
        raise RuntimeError("cuDNN has no engine for this\nand more")

    conv, maps, _ = case("cpu")
    expected = conv(maps[0].float())
    monkeypatch.setattr(conv_module, "_broken", [])
    monkeypatch.setattr(torch, "cudnn_convolution_relu", missing)
    has_kernel = lambda conv, x, dtype: not conv_module._broken  # noqa: E731
    monkeypatch.setattr(conv_module, "_has_kernel", has_kernel)
    with pytest.warns(UserWarning, match="cuDNN has no engine for this$"):
        assert torch.equal(conv(maps[0].float()), expected)
    assert torch.equal(conv(maps[0].float()), expected)
