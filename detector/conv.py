"""Convolutions fused with the next operations: a frozen BatchNorm, and if cuDNN can, bias, shortcut and ReLU.

PyTorch makes a pass over the activations for each of these. On an H100 the passes took a quarter of a training step.
"""

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

_broken: list[str] = []  # why cuDNN's kernels are no longer used


class ConvReLU(nn.Conv2d):
    """relu(conv(x) + bias) of a map, or of each map in a list, with the same weights."""

    def forward(self, x: Tensor | list[Tensor]) -> Any:
        if isinstance(x, Tensor):
            return conv_relu(self, [x], self.weight, self.bias)[0]
        return conv_relu(self, x, self.weight, self.bias)


class FrozenBatchNorm(FrozenBatchNorm2d):
    """Identity: the FoldedConv before it already applies the statistics and the affine part."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Conv(nn.Conv2d):
    """A convolution that trains in float32 where oneDNN is slow in bfloat16.

    On a CPU, the backward pass of a depthwise convolution takes 2 to 20 times as long in bfloat16, except for 3x3 with
    a stride of 1.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        depthwise = 1 < self.groups == self.in_channels
        fast = not depthwise or (self.kernel_size, self.stride) == ((3, 3), (1, 1))
        if fast or not self.training or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            y = super()._conv_forward(x.float(), weight, bias)
        return y.to(torch.get_autocast_dtype("cpu"))


class FoldedConv(Conv):
    """A convolution fused with the frozen BatchNorm after it: it scales the weights instead of the activations.

    This saves two passes over the activations, and under autocast the memory to keep them in float32.
    """

    relu = False  # whether it also applies the ReLU after the BatchNorm

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            cast(tuple[int, int], conv.kernel_size),
            stride=cast(tuple[int, int], conv.stride),
            padding=cast(tuple[int, int], conv.padding),
            dilation=cast(tuple[int, int], conv.dilation),
            groups=conv.groups,
            bias=False,
        )
        self.weight = conv.weight
        self._norm = (norm,)  # a tuple hides it from nn.Module, so its tensors keep their names

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of convolution and norm in one."""
        norm = self._norm[0]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        return conv_relu(self, [x], *self.folded())[0] if self.relu else self._conv_forward(x, *self.folded())


class Residual(nn.Module):
    """torchvision's BasicBlock or Bottleneck with folded convolutions, each fused with the ReLU after it."""

    def __init__(self, block: BasicBlock | Bottleneck):
        super().__init__()
        for name, child in block.named_children():  # under the same names
            self.add_module(name, child)
            if isinstance(child, FoldedConv):
                child.relu = True

    def forward(self, x: Tensor) -> Tensor:
        *convs, last = [child for child in self.children() if isinstance(child, FoldedConv)]
        y = x
        for conv in convs:
            y = conv(y)
        weight, bias = last.folded()
        if (downsample := getattr(self, "downsample", None)) is not None:
            to_shortcut, more = downsample[0].folded()
            x, bias = downsample[0]._conv_forward(x, to_shortcut, None), bias + more
        return conv_relu(last, [y], weight, bias, x)[0]


def conv_relu(
    conv: nn.Conv2d, maps: list[Tensor], weight: Tensor, bias: Tensor | None, shortcut: Tensor | None = None
) -> list[Tensor]:
    """relu(conv(x) + bias + shortcut) of each map, with this weight and bias instead of the convolution's own."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else maps[0].dtype
    if bias is not None and _has_kernel(conv, maps[0], dtype):
        try:
            return list(_ConvReLU.apply(conv, dtype, weight, bias, shortcut, *maps))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # this cuDNN has no kernel for such a convolution
            _broken.append(str(error).strip().partition("\n")[0])
            warnings.warn(
                f"convolutions run without cuDNN's fused kernels, which is slower: {_broken[0]}", stacklevel=2
            )
    outputs = [conv._conv_forward(x, weight, bias) for x in maps]
    if shortcut is not None:
        outputs[0] += shortcut
    return [F.relu(output, inplace=True) for output in outputs]


def _has_kernel(conv: nn.Conv2d, x: Tensor, dtype: torch.dtype) -> bool:
    return (
        x.is_cuda
        and dtype in (torch.bfloat16, torch.float16)
        and conv.groups == 1
        and x.is_contiguous(memory_format=torch.channels_last)
        and not _broken
        and not torch.compiler.is_compiling()
    )


class _ConvReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        conv: nn.Conv2d,
        dtype: torch.dtype,
        weight: Tensor,
        bias: Tensor,
        shortcut: Tensor | None,
        *maps: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.options = list(conv.stride), list(conv.padding), list(conv.dilation)
        ctx.dtypes = weight.dtype, bias.dtype
        weight, bias, *inputs = (given.to(dtype) for given in (weight, bias, *maps))
        if shortcut is None:
            outputs = [torch.cudnn_convolution_relu(x, weight, bias, *ctx.options, 1) for x in inputs]  # type: ignore[call-arg]
        else:
            shortcut = shortcut.to(dtype)
            outputs = [torch.cudnn_convolution_add_relu(x, weight, shortcut, 1, bias, *ctx.options, 1) for x in inputs]  # type: ignore[call-arg]
        ctx.save_for_backward(weight, *inputs, *outputs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        weight, *saved = ctx.saved_tensors
        of_weight, of_bias, of_shortcut, *of_maps = ctx.needs_input_grad[2:]
        sums: list[Tensor | None] = [None, None]
        to_maps, before = [], None
        for gradient, x, output, wanted in zip(gradients, saved, saved[len(gradients) :], of_maps):
            before = torch.ops.aten.threshold_backward(gradient, output, 0)
            sizes = [len(weight)] if of_bias else None
            to_x, *to_parameters = torch.ops.aten.convolution_backward(
                before, x, weight, sizes, *ctx.options, False, [0, 0], 1, [wanted, of_weight, of_bias]
            )
            to_maps.append(to_x)
            for i, value in enumerate(to_parameters):
                if value is not None:  # summed over maps in the parameters' float32, whatever the maps' dtype
                    total = sums[i]
                    sums[i] = value.to(ctx.dtypes[i]) if total is None else total.add_(value)
        return None, None, *sums, before if of_shortcut else None, *to_maps
