"""The data sets that a config or a checkpoint names."""

from collections.abc import Sequence
from pathlib import Path

from data.coco import CocoDataset
from data.transforms import EvalTransform, TrainTransform
from detector.checkpoint import Content
from detector.config import Config
from detector.errors import UserError


def build_datasets(cfg: Config) -> tuple[CocoDataset, CocoDataset]:
    """Training and validation set; the training set defines the classes."""
    for split in ("train", "val"):
        key, file = f"data.{split}.annotations", getattr(cfg.data, split).annotations
        if not file or not Path(file).exists():
            problem = f"no such file: {file}" if file else "not set"
            raise UserError(f"{key}: {problem}; name it in the config or by --set {key}=...")
    size = (cfg.data.short_side, cfg.data.long_side)
    augment = TrainTransform(
        *size,
        horizontal_flip=cfg.data.horizontal_flip,
        vertical_flip=cfg.data.vertical_flip,
        scale_jitter=cfg.data.scale_jitter,
        strong=cfg.data.strong,
    )
    train, val = cfg.data.train, cfg.data.val
    train_set = CocoDataset(train.annotations, train.images, augment, cache=cfg.data.cache, trust=cfg.data.trust)
    if not cfg.data.trust:
        train_set.refuse_without_boxes()
    train_set.remarks += classes_without_boxes(train_set)
    val_set = CocoDataset(
        val.annotations,
        val.images,
        EvalTransform(*size),
        category_ids=train_set.category_ids,
        class_names=train_set.class_names,
        cache=cfg.data.cache,
        trust=cfg.data.trust,
    )
    return train_set, val_set


def classes_without_boxes(dataset: CocoDataset) -> list[str]:
    """A remark, if training has no box of some classes."""
    learnt = set(dataset.annotations.categories[~dataset.annotations.crowds].tolist())
    missing = [name for key, name in zip(dataset.category_ids, dataset.class_names) if key not in learnt]
    about = f"no box of {len(missing):,} of the {len(dataset.class_names):,} classes, which cannot be learnt"
    return [f"{about} (the first is {missing[0]!r})"] if missing else []


def open_dataset(source: str | Path, content: Content, cfg: Config, files: Sequence[str | Path] | None) -> CocoDataset:
    """The data set for the checkpoint from `source`: `files` (annotation file, image folder) or its validation set."""
    annotations, images = files or (cfg.data.val.annotations, cfg.data.val.images)
    if not annotations:
        raise UserError(f"{source} names no validation set; give one by --data ANNOTATIONS IMAGES")
    return CocoDataset(
        annotations,
        images,
        EvalTransform(cfg.data.short_side, cfg.data.long_side),
        category_ids=content["category_ids"],
        class_names=content["class_names"] or None,
        cache="" if files else cfg.data.cache,
        trust=cfg.data.trust,
    )
