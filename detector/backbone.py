"""ResNet / ResNeXt stages C3..C5 from torchvision."""

from itertools import pairwise
from typing import Any, cast

import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

BACKBONES = {
    "resnet18": (torchvision.models.resnet18, torchvision.models.ResNet18_Weights.IMAGENET1K_V1),
    "resnet34": (torchvision.models.resnet34, torchvision.models.ResNet34_Weights.IMAGENET1K_V1),
    "resnet50": (torchvision.models.resnet50, torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": (torchvision.models.resnet101, torchvision.models.ResNet101_Weights.IMAGENET1K_V1),
    "resnet152": (torchvision.models.resnet152, torchvision.models.ResNet152_Weights.IMAGENET1K_V1),
    "resnext50_32x4d": (
        torchvision.models.resnext50_32x4d,
        torchvision.models.ResNeXt50_32X4D_Weights.IMAGENET1K_V1,
    ),
    "resnext101_32x8d": (
        torchvision.models.resnext101_32x8d,
        torchvision.models.ResNeXt101_32X8D_Weights.IMAGENET1K_V1,
    ),
}


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, as in Wu and He, Group Normalization, 2018."""
    return nn.GroupNorm(32, channels)


class FrozenBatchNorm(FrozenBatchNorm2d):
    """Identity: the FoldedConv before it already applies the statistics and the affine part."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedConv(nn.Conv2d):
    """A convolution and the frozen BatchNorm behind it in one, which scales the weights and not the activations.

    Saves two passes over the activations, and under autocast keeping them in float32.
    """

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
        self._norm = (norm,)  # in a tuple: its tensors keep their names

    def forward(self, x: Tensor) -> Tensor:
        norm = self._norm[0]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self._conv_forward(x, self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale)


def fold(module: nn.Module) -> None:
    """Replace each convolution before a FrozenBatchNorm by the FoldedConv of both."""
    for parent in list(module.modules()):
        for (name, conv), (_, norm) in list(pairwise(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm):
                setattr(parent, name, FoldedConv(conv, norm))


NORMS: dict[str, Any] = {
    "frozen_bn": FrozenBatchNorm,
    "bn": nn.BatchNorm2d,
    "sync_bn": nn.SyncBatchNorm,
    "gn": group_norm,
}


class Backbone(nn.Module):
    """images (B, 3, H, W), normalised -> C3, C4, C5 at strides 8, 16, 32.

    Args:
        name: a key of `BACKBONES`
        norm: a key of `NORMS`; frozen_bn keeps the statistics and the affine part of the weights it is given;
            sync_bn is bn with statistics over the images of all processes, and has the same tensors
        frozen_stages: 0 none, 1 the stem and the first stage (C2), ... 4 all
    """

    def __init__(self, name: str, norm: str, frozen_stages: int):
        super().__init__()
        build, _ = BACKBONES[name]
        resnet = build(weights=None, norm_layer=NORMS[norm])
        fold(resnet)
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        per_block = resnet.fc.in_features // 8
        self.channels = (per_block * 2, per_block * 4, per_block * 8)
        stages = [nn.ModuleList([self.conv1, self.bn1, self.layer1]), self.layer2, self.layer3, self.layer4]
        self._frozen = stages[:frozen_stages]
        for stage in self._frozen:
            stage.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c2 = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return c3, c4, self.layer4(c4)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for stage in self._frozen:  # the statistics of a frozen BatchNorm must not move
            stage.eval()
        return self
