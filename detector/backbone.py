"""Stages C3..C5 of torchvision's ResNets, ResNeXts and MobileNets."""

from collections.abc import Callable
from itertools import pairwise

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from detector.conv import Conv, FoldedConv, FrozenBatchNorm, Residual

# torchvision's names, and the number of layers up to C2, C3, C4 and C5: a ResNet's children, a MobileNet's features.
# The 1x1 convolution after a MobileNet's C5 is left out: it widens C5 for the classifier; the pyramid would narrow it.
BACKBONES = {
    **dict.fromkeys(["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"], (5, 6, 7, 8)),
    **dict.fromkeys(["resnext50_32x4d", "resnext101_32x8d"], (5, 6, 7, 8)),
    "mobilenet_v2": (4, 7, 14, 18),
    "mobilenet_v3_large": (4, 7, 13, 16),
}

NORMS: dict[str, Callable[[nn.BatchNorm2d], nn.Module]] = {  # each in place of torchvision's BatchNorm
    "frozen_bn": lambda bn: FrozenBatchNorm(bn.num_features, bn.eps),
    "bn": lambda bn: bn,
    "sync_bn": nn.SyncBatchNorm.convert_sync_batchnorm,
    "gn": lambda bn: nn.GroupNorm(32, bn.num_features),  # 32 groups, as in Wu and He, Group Normalization, 2018
}


def set_norm(network: nn.Module, norm: str) -> None:
    """Replace each BatchNorm by what `NORMS[norm]` makes.

    A frozen one is folded into the convolution before it. In a ResNet these convolutions also apply the ReLUs after
    them, and the last one of a block adds the shortcut (`Residual`).
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, NORMS[norm](child))
        for (name, conv), (_, after) in list(pairwise(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(after, FrozenBatchNorm):
                setattr(parent, name, FoldedConv(conv, after))
            elif type(conv) is nn.Conv2d:
                conv.__class__ = Conv
    for parent in list(network.modules()) if norm == "frozen_bn" else []:
        for name, child in list(parent.named_children()):
            if isinstance(child, BasicBlock | Bottleneck):
                setattr(parent, name, Residual(child))
        if isinstance(parent, ResNet):
            # The stem's convolution applies the ReLU. An Identity takes its place, because BACKBONES counts the layers.
            parent.conv1.relu, parent.relu = True, nn.Identity()  # type: ignore[assignment]


class Backbone(nn.Module):
    """images (B, 3, H, W), normalised -> C3, C4, C5 at strides 8, 16, 32.

    Args:
        name: a key of `BACKBONES`
        norm: a key of `NORMS`; frozen_bn keeps the given statistics and affine part; sync_bn is bn with
            statistics over the images of all processes, and has the same tensors
        frozen_stages: 0 none, 1 the stem and the first stage (C2), ... 4 all
    """

    def __init__(self, name: str, norm: str, frozen_stages: int):
        super().__init__()
        network = torchvision.models.get_model(name, weights=None)
        set_norm(network, norm)
        ends = BACKBONES[name]
        if hasattr(network, "features"):
            self.features = network.features[: ends[-1]]
            layers = list(self.features)
        else:
            for child, layer in list(network.named_children())[: ends[-1]]:
                self.add_module(child, layer)
            layers = list(self.children())
        # A plain list, so the tensors keep torchvision's names.
        self._stages = [nn.Sequential(*layers[start:end]) for start, end in pairwise((0, *ends))]
        convs = [[layer for layer in stage.modules() if isinstance(layer, nn.Conv2d)] for stage in self._stages]
        self.channels = (convs[1][-1].out_channels, convs[2][-1].out_channels, convs[3][-1].out_channels)
        self._frozen = self._stages[:frozen_stages]
        for stage in self._frozen:
            stage.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        to_c2, to_c3, to_c4, to_c5 = self._stages
        c3 = to_c3(to_c2(images))
        c4 = to_c4(c3)
        return c3, c4, to_c5(c4)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for stage in self._frozen:  # in a frozen stage, BatchNorm must not update its statistics
            stage.eval()
        return self
