"""From a YAML file to a complete config: the menu of names it may use, and the options of each part."""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic import ValidationError

from detector import config, config_files, losses
from detector.anchors import Anchors, TorchvisionAnchors
from detector.assigner import ATSSAssigner, IoUAssigner
from detector.backbone import BACKBONES
from detector.config import Config, Options, Part
from detector.errors import UserError, one_line
from detector.option_errors import describe, suggestion

STRIDES = (8, 16, 32, 64, 128)  # of P3..P7
PRIOR = 0.01  # RetinaNet's, for a class loss that has no `prior` of its own
ANCHORS = {"grid": Anchors, "torchvision": TorchvisionAnchors}
ASSIGNERS = {"iou": IoUAssigner, "atss": ATSSAssigner}
PARTS: dict[str, Mapping[str, Any]] = {
    "anchors": ANCHORS,
    "assigner": ASSIGNERS,
    "class_loss": losses.CLASS_LOSSES,
    "box_loss": losses.BOX_LOSSES,
}


def configure(path: str | Path, settings: list[str] | None = None) -> Config:
    """The config of a YAML file, with each part's options checked and filled in. Raises UserError for any mistake."""
    return resolve(config_files.read(path), str(path), settings or [])


def resolve(values: dict[str, Any], source: str, settings: list[str]) -> Config:
    """The config of plain values with `settings` ("a.b=value") on top, every part's options checked and filled in.

    A UserError names `source`, or the settings if they cause it.
    """
    changed = config_files.with_settings(values, settings)
    try:
        return complete(config.build(changed, source), source)
    except UserError as error:
        first = _first_error(values, source, settings)
        if first == _first_error(values, source, []):  # the settings are not its cause
            raise
        message = str(error).removeprefix(f"{source}: ")
        suspects = [setting for setting in settings if _concerns(setting.partition("=")[0], message)] or settings
        others = {suspect: [setting for setting in settings if setting != suspect] for suspect in suspects}
        causes = [suspect for suspect in others if _first_error(values, source, others[suspect]) != first]
        raise UserError(f"--set {one_line(' '.join(causes or suspects))}: {message}") from None


def _first_error(values: dict[str, Any], source: str, settings: list[str]) -> str:
    """The first error in the values with `settings` on top, without the number of further ones; empty without any."""
    try:
        complete(config.build(config_files.with_settings(values, settings), source), source)
    except UserError as error:
        return str(error).partition(" (and ")[0]
    return ""


def flat_values(saved: dict[str, Any]) -> dict[str, Any]:
    """The values of a config that a run saved, by dotted key. An option that is newer than the run has its default."""
    with contextlib.suppress(UserError):  # an option that no longer exists
        saved = resolve(saved, "saved", []).model_dump(mode="json")
    return config.flat(saved)


def _concerns(key: str, message: str) -> bool:
    """Whether an error is about the option `key`, its parent or one of its parts."""
    about = message.partition(": ")[0]
    return f"{about}.".startswith(f"{key}.") or f"{key}.".startswith(f"{about}.") or key in about.split()


def complete(cfg: Config, source: str) -> Config:
    """`cfg` with the defaults of its parts filled in. Raises UserError, naming `source`, if it cannot be built."""
    try:
        _pick(BACKBONES, "model.backbone", cfg.model.backbone)
        if cfg.model.norm == "gn" and cfg.model.backbone.startswith("mobilenet"):
            raise UserError(
                f"model.norm: gn needs multiples of 32 channels, {cfg.model.backbone} has others; use frozen_bn or bn"
            )
        parts = {}
        for section, menu in PARTS.items():
            part: Part = getattr(cfg, section)
            fixed = {key: getattr(part, key) for key in type(part).model_fields}
            options = _typed_options(_pick(menu, f"{section}.name", part.name), section, part.options, fixed)
            parts[section] = type(part)(**fixed, **options)
        completed = cfg.model_copy(update=parts)
        if completed.model.head.prior is None:
            completed = completed.model_copy(deep=True)
            completed.model.head.prior = getattr(losses.CLASS_LOSSES[cfg.class_loss.name], "prior", PRIOR)
        for section in PARTS:
            build_part(completed, section)
        if tuple(parts["anchors"].options["strides"]) != STRIDES:
            raise UserError(f"anchors.strides: the pyramid's are {list(STRIDES)}; leave them out")
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return completed


def build_part(cfg: Config, section: str) -> Any:
    """The anchors, assigner or loss that a section of the config names."""
    part: Part = getattr(cfg, section)
    try:
        return PARTS[section][part.name](**part.options)
    except ValueError as error:
        raise UserError(f"{section}: {error}") from None


def _pick(menu: Mapping[str, Any], key: str, name: str) -> Any:
    if name not in menu:
        raise UserError(f"{key}: no {name!r}; {suggestion(name, menu)}")
    return menu[name]


def _typed_options(part: Callable, section: str, options: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """`options` checked against the arguments of the part's constructor, its defaults filled in.

    `fixed`: the section's keys that do not depend on the part.
    """
    parameters = list(inspect.signature(part).parameters.values())
    fields: dict[str, Any] = {p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in parameters}
    checked = pydantic.create_model(section, __base__=Options, **fields)
    try:
        return checked.model_validate(options).model_dump(mode="json")
    except ValidationError as error:
        raise UserError(describe(error, checked, where=section, also=fixed)) from None
