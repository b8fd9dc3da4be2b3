"""The menu: every name that YAML may say, and the parts built from it."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
from pydantic import ConfigDict, ValidationError

from detector import config, config_files, distributed, losses
from detector.anchors import Anchors, TorchvisionAnchors
from detector.assigner import ATSSAssigner, IoUAssigner
from detector.backbone import BACKBONES, Backbone
from detector.box_coder import BoxCoder
from detector.config import Config, Part
from detector.criterion import Criterion
from detector.device import pick_precision
from detector.errors import UserError, one_line
from detector.fpn import FPN
from detector.head import Head
from detector.model import RetinaNet
from detector.option_errors import describe
from detector.postprocess import Postprocess
from detector.solver import Solver

STRIDES = (8, 16, 32, 64, 128)  # of P3..P7
ANCHORS = {"grid": Anchors, "torchvision": TorchvisionAnchors}
ASSIGNERS = {"iou": IoUAssigner, "atss": ATSSAssigner}
PARTS: dict[str, Mapping[str, Any]] = {
    "anchors": ANCHORS,
    "assigner": ASSIGNERS,
    "class_loss": losses.CLASS_LOSSES,
    "box_loss": losses.BOX_LOSSES,
}


def configure(path: str | Path, settings: list[str] | None = None) -> Config:
    """The config of a YAML file, every part's options checked and filled in; UserError for any slip."""
    return resolve(config_files.read(path), str(path), settings or [])


def resolve(values: dict[str, Any], source: str, settings: list[str]) -> Config:
    """The config of plain values with `settings` ("a.b=value") on top, every part's options checked and filled in.

    The UserError for a mistake names `source`, or the settings where it is theirs.
    """
    changed = config_files.with_settings(values, settings)
    try:
        return complete(config.build(changed, source), source)
    except UserError as error:
        if not settings:
            raise
        try:
            resolve(values, source, [])
        except UserError as without:
            if str(error).startswith(str(without).partition(" (and ")[0]):  # how many more there are may differ
                raise error from None
        message = str(error).removeprefix(f"{source}: ")
        suspects = [setting for setting in settings if _concerns(setting.partition("=")[0], message)] or settings
        raise UserError(f"--set {one_line(' '.join(suspects))}: {message}") from None


def _concerns(key: str, message: str) -> bool:
    """Whether an error is about the option `key`, what it is in, or what is in it."""
    about = message.partition(": ")[0]
    return f"{about}.".startswith(f"{key}.") or f"{key}.".startswith(f"{about}.") or key in about.split()


def complete(cfg: Config, source: str) -> Config:
    """`cfg` with the defaults of its parts spelled out; UserError, naming `source`, where it cannot be built."""
    try:
        _pick(BACKBONES, "model.backbone", cfg.model.backbone)
        parts = {}
        for section, menu in PARTS.items():
            part: Part = getattr(cfg, section)
            fixed = {key: getattr(part, key) for key in type(part).model_fields}
            options = _typed_options(_pick(menu, f"{section}.name", part.name), section, part.options, fixed)
            parts[section] = type(part)(**fixed, **options)
        completed = cfg.model_copy(update=parts)
        for section in PARTS:
            _build(completed, section)
        if tuple(parts["anchors"].options["strides"]) != STRIDES:
            raise UserError(f"anchors.strides: the pyramid's are {list(STRIDES)}; leave them out")
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return completed


def build_model(cfg: Config, num_classes: int) -> RetinaNet:
    """The detector with random weights; checkpoint.py fills in better ones."""
    options = cfg.model
    backbone = Backbone(options.backbone, options.norm, options.frozen_stages or 0)
    fpn = FPN(backbone.channels, options.fpn_channels, options.p6_from)
    anchors = _build(cfg, "anchors")
    head = Head(options.fpn_channels, anchors.per_cell, num_classes, **options.head.model_dump())
    return RetinaNet(backbone, fpn, head, anchors)


def build_criterion(cfg: Config) -> Criterion:
    return Criterion(
        assigner=_build(cfg, "assigner"),
        coder=BoxCoder(cfg.box_coder.weights),
        class_loss=_build(cfg, "class_loss"),
        box_loss=_build(cfg, "box_loss"),
        class_weight=cfg.class_loss.weight,
        box_weight=cfg.box_loss.weight,
    )


def build_postprocess(cfg: Config) -> Postprocess:
    return Postprocess(BoxCoder(cfg.box_coder.weights), **cfg.postprocess.model_dump())


def build_solver(cfg: Config, model: RetinaNet, steps_per_epoch: int) -> Solver:
    total = cfg.solver.epochs * steps_per_epoch
    return Solver(
        model,
        total_steps=min(total, cfg.solver.max_steps or total),
        precision=pick_precision(cfg.precision, next(model.parameters()).device)[0],
        **cfg.solver.model_dump(exclude={"epochs", "max_steps"}),
    )


def images_per_process(cfg: Config) -> int:
    """Images of a step that one process computes, in `solver.accumulate` parts."""
    processes, parts = distributed.world_size(), cfg.solver.accumulate
    if cfg.solver.batch_size % (processes * parts):
        raise UserError(
            f"solver.batch_size {cfg.solver.batch_size} cannot be split over {processes} processes x "
            f"accumulate {parts}; make it a multiple of {processes * parts}"
        )
    return cfg.solver.batch_size // processes


def evaluation_batch(cfg: Config) -> int:
    """Images that one process evaluates at once; unless the config says, it does not depend on their number."""
    return cfg.evaluation.batch_size or min(8, cfg.solver.batch_size // cfg.solver.accumulate)


def loader_options(cfg: Config, device: torch.device) -> dict[str, Any]:
    """What the training and the evaluation loader have in common."""
    return {
        "workers": cfg.data.workers,
        "pad_to": cfg.data.pad_to,
        "pin_memory": device.type == "cuda",
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
    }


def _build(cfg: Config, section: str) -> Any:
    part: Part = getattr(cfg, section)
    try:
        return PARTS[section][part.name](**part.options)
    except ValueError as error:
        raise UserError(f"{section}: {error}") from None


def _pick(menu: Mapping[str, Any], key: str, name: str) -> Any:
    if name not in menu:
        raise UserError(f"{key}: no {name!r}; it may be one of {', '.join(menu)}")
    return menu[name]


def _typed_options(part: Callable, section: str, options: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """`options` checked against the arguments of the part's constructor, its defaults filled in.

    `fixed`: the keys that the section has whatever the part.
    """
    parameters = list(inspect.signature(part).parameters.values())
    fields: dict[str, Any] = {p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in parameters}
    strict = ConfigDict(extra="forbid", allow_inf_nan=False)
    checked = pydantic.create_model(section, __config__=strict, **fields)
    try:
        return checked.model_validate(options).model_dump(mode="json")
    except ValidationError as error:
        raise UserError(describe(error, checked, where=section, also=fixed)) from None
