"""Convert checkpoints of torchvision's RetinaNet to ours.

It takes `retinanet_resnet50_fpn` and `retinanet_resnet50_fpn_v2`: the published files or any state dict with
their names. Their labels are category ids (0 and COCO's gaps are outputs that were never trained), so the
category ids of the converted checkpoint are simply 0, 1, 2, ...
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.config import Config, HeadOptions, Model, Part, PostprocessOptions

# torchvision evaluates this one file with an epsilon of 0 in its BatchNorms.
PUBLISHED_V1_SHA256 = "eeacb38b"
EPSILON = 1e-5

_HEADS = {  # theirs: our tower, their output, our output
    "classification_head": ("class_tower", "cls_logits", "logits"),
    "regression_head": ("box_tower", "bbox_reg", "deltas"),
}


def is_torchvision(content: dict[str, Any]) -> bool:
    # FCOS has the same heads, and also a centerness branch: bbox_ctrness.
    return {
        "head.classification_head.cls_logits.bias",
        "head.regression_head.bbox_reg.weight",
        "backbone.fpn.extra_blocks.p6.weight",
    } <= content.keys() and "head.regression_head.bbox_ctrness.weight" not in content


def convert(state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """A state dict read from `path` -> the `config`, `category_ids`, `class_names` and `model` of a checkpoint."""
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    if _sha256(path).startswith(PUBLISHED_V1_SHA256):
        state = _without_epsilon(state)
    head_norm = "gn" if "head.classification_head.conv.0.1.weight" in state else "none"
    config = Config(
        run=path.stem,
        model=Model(
            backbone="resnet50",
            weights="imagenet",
            norm="frozen_bn",
            p6_from="p5" if state["backbone.fpn.extra_blocks.p6.weight"].shape[1] == 256 else "c5",
            head=HeadOptions(norm=head_norm),
        ),
        anchors=Part(name="torchvision"),
        postprocess=PostprocessOptions(),
    )
    outputs, anchors = state["head.classification_head.cls_logits.bias"], 9
    num_classes = len(outputs) // anchors
    return {
        "config": config.model_dump(mode="json"),
        "category_ids": list(range(num_classes)),
        "class_names": [],  # the file does not say
        "model": {_our_name(key, head_norm): value for key, value in state.items()},
    }


def _our_name(key: str, head_norm: str) -> str:
    parts = key.split(".")
    if key.startswith("backbone.body."):
        return ".".join(["backbone", *parts[2:]])
    if key.startswith("backbone.fpn.extra_blocks."):
        return ".".join(["fpn", *parts[3:]])
    if key.startswith("backbone.fpn."):  # inner_blocks.0.0.weight, in the published first file inner_blocks.0.weight
        return ".".join(["fpn", {"inner_blocks": "lateral", "layer_blocks": "output"}[parts[2]], parts[3], parts[-1]])
    tower, theirs, ours = _HEADS[parts[1]]
    if parts[2] == theirs:
        return f"head.{ours}.{parts[-1]}"
    if len(parts) == 5:  # conv.2.weight: the published first file counts convolutions and ReLUs in one row, as ours
        return f"head.{tower}.{parts[3]}.{parts[-1]}"
    layers = 3 if head_norm == "gn" else 2  # convolution, norm, ReLU, in one row of ours
    return f"head.{tower}.{int(parts[3]) * layers + int(parts[4])}.{parts[-1]}"


def _without_epsilon(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scales that undo our epsilon: w / sqrt(var) = w' / sqrt(var + epsilon)."""
    state = dict(state)
    for key in [k for k in state if k.endswith("running_var")]:
        weight, variance = key.replace("running_var", "weight"), state[key].double()
        state[weight] = (state[weight].double() * ((variance + EPSILON) / variance).sqrt()).to(torch.float32)
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
