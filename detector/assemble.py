"""The parts of a detector, built from a config."""

from typing import Any

import torch

from detector import distributed
from detector.backbone import Backbone
from detector.box_coder import BoxCoder
from detector.config import Config
from detector.configure import build_part
from detector.criterion import Criterion
from detector.device import pick_precision, pick_workers
from detector.errors import UserError
from detector.fpn import FPN
from detector.head import Head
from detector.model import RetinaNet
from detector.postprocess import Postprocess
from detector.solver import Solver


def build_model(cfg: Config, num_classes: int) -> RetinaNet:
    """The detector with random weights; pretrained.py or a checkpoint fills in better ones."""
    options = cfg.model
    backbone = Backbone(options.backbone, options.norm, options.frozen_stages or 0)
    fpn = FPN(backbone.channels, options.fpn_channels, options.p6_from)
    anchors = build_part(cfg, "anchors")
    head = Head(options.fpn_channels, anchors.per_position, num_classes, **options.head.model_dump())
    return RetinaNet(backbone, fpn, head, anchors)


def build_criterion(cfg: Config) -> Criterion:
    return Criterion(
        assigner=build_part(cfg, "assigner"),
        coder=BoxCoder(cfg.box_coder.weights),
        class_loss=build_part(cfg, "class_loss"),
        box_loss=build_part(cfg, "box_loss"),
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


def train_batch_size(cfg: Config) -> int:
    """Images of a step that one process computes, in `solver.accumulate` parts."""
    processes, parts = distributed.world_size(), cfg.solver.accumulate
    if cfg.solver.batch_size % (processes * parts):
        raise UserError(
            f"solver.batch_size {cfg.solver.batch_size} cannot be split over {processes} processes x "
            f"accumulate {parts}; make it a multiple of {processes * parts}"
        )
    return cfg.solver.batch_size // processes


def eval_batch_size(cfg: Config) -> int:
    """Images that one process evaluates at once: by default the same for any number of processes."""
    return cfg.evaluation.batch_size or min(8, cfg.solver.batch_size // cfg.solver.accumulate)


def loader_options(cfg: Config, device: torch.device) -> dict[str, Any]:
    """What the training and the evaluation loader have in common."""
    return {
        "workers": pick_workers(cfg.data.workers, device),
        "pad_to": cfg.data.pad_to,
        "pin_memory": device.type == "cuda",
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
    }
