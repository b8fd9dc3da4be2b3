"""ResNet / ResNeXt stages C3..C5 from torchvision."""

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from detector.errors import UserError

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
    """torchvision's, whose work the convolution before it has done already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedConv(nn.Conv2d):
    """A convolution and the frozen BatchNorm behind it in one: scaled are the weights, not the activations.

    Saves two passes over the activations, and under autocast having them in float32.
    """

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm):
        options = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, bias=False, **options)
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
            if isinstance(norm, FrozenBatchNorm):
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
        norm: a key of `NORMS`; frozen_bn keeps the statistics and the affine part of the weights it is given,
            sync_bn is bn whose statistics are of all processes' images, with the same tensors
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
        for stage in self._frozen:  # a frozen stage's BatchNorm must not go on counting
            stage.eval()
        return self


def load_backbone_weights(backbone: Backbone, name: str, weights: str) -> None:
    """Fill the backbone from ImageNet ("imagenet") or from a file with torchvision's names.

    Raises UserError if the file is not there, is no state dict of this backbone, or cannot be downloaded.
    """
    if weights == "imagenet":
        try:
            state = BACKBONES[name][1].get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"model.weights: imagenet weights of {name} cannot be downloaded ({error}); "
                "set model.weights to a local file with them, or to none"
            ) from None
    else:
        state = read_weights(weights)
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    missing = [key for key in backbone.state_dict() if key not in state and "num_batches" not in key]
    if missing:
        raise UserError(
            f"model.weights: {weights} is no {name}: it lacks {missing[0]} and {len(missing) - 1} more; "
            "give a state dict with torchvision's names"
        )
    try:
        backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"model.weights: {weights} is no {name}: {detail}") from None


def read_weights(path: str | Path) -> dict[str, Any]:
    """A file of plain tensors; UserError where it is none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its words are about how to load it all the same, which may run what is in it
        told = "it is none of PyTorch's, or holds more than tensors"
        raise UserError(f"{path}: not a readable weights file ({told})") from None
    except Exception as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: not a readable weights file ({detail})") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors by name")
    return content
