"""Train a RetinaNet with the losses that a YAML file names.

    python train.py --config configs/demo/focal.yaml [--set solver.lr=0.02 run=mine ...] [--resume]
    torchrun --nproc_per_node=8 train.py --config configs/coco/focal.yaml

Writes the folder output/run: config.yaml, last.pt, best.pt (the best AP so far), metrics.json, detections.json and
detections.png of the last evaluation, and TensorBoard's files. A run that ends before its time, by whatever cause, goes
on with --resume as if it had not. All options: docs/configuration.md; what may go wrong: docs/troubleshooting.md.
"""

import argparse
import contextlib
import json
import os
import random

import numpy as np
import torch
from torchvision.io import write_png

from data.coco import CocoDataset
from data.coco_eval import coco_results, metrics_table, score
from data.draw import contact_sheet, validation_pictures
from data.images import remark_lines
from data.loader import eval_loader, train_loader
from data.transforms import EvalTransform, TrainTransform
from detector import assemble, checkpoint, config, distributed
from detector.config import Config
from detector.device import keep_freed_memory, peak_memory, pick_device, pick_precision
from detector.engine import NonFiniteLoss, predict, train_one_epoch
from detector.errors import Stopped, UserError, run_main
from detector.logger import Logger
from detector.stop import Stop
from detector.structures import Batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML with what differs from the defaults")
    parser.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE", help="one-off options on top")
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest whole checkpoint, if any")
    parser.add_argument("--accept-changes", action="store_true", help="with --resume, even if the config has changed")
    args = parser.parse_args()
    cfg = assemble.configure(args.config, args.set)
    with distributed.group(pick_device(cfg.device)) as device:
        train(cfg, device, resume=args.resume, accept_changes=args.accept_changes)


def train(cfg: Config, device: torch.device, *, resume: bool = False, accept_changes: bool = False) -> dict:
    """Train as `cfg` says, into the folder `cfg.folder`; returns the metrics of the last evaluation."""
    precision, reason = pick_precision(cfg.precision, device)
    cfg = cfg.model_copy(update={"precision": precision})
    seed_everything(cfg.seed)
    train_set, val_set = build_datasets(cfg)
    train_set.annotations = None  # 60 MB of COCO's, for scoring alone
    if device.type == "cpu":
        keep_freed_memory()  # from here on: what reading has freed goes back
    loading = assemble.loader_options(cfg, device)
    batches = train_loader(train_set, assemble.images_per_process(cfg), **loading, seed=cfg.seed)
    val_batches = eval_loader(val_set, assemble.evaluation_batch(cfg), **loading)

    refuse_overwriting(cfg, resume)
    last, content, broken = checkpoint.newest(cfg.folder) or (None, None, [])
    model = assemble.build_model(cfg, num_classes=len(train_set.category_ids))
    weights = f"weights from {last}" if last else checkpoint.load_initial_weights(model, cfg)
    model.to(device, memory_format=torch.channels_last if cfg.channels_last else torch.contiguous_format)
    criterion = assemble.build_criterion(cfg).to(device)
    solver = assemble.build_solver(cfg, model, steps_per_epoch=len(batches))
    if cfg.compile:
        model.compile_parts()
    postprocess = assemble.build_postprocess(cfg)
    kept = {"evaluated": 0, "best": float("-inf"), "seconds_per_step": None, "peak_memory": 0}
    kept |= {"score_thresholds": None, "changes": []}
    if last:
        classes = train_set.category_ids
        kept = checkpoint.resume(content, last, cfg, solver, criterion, classes, accept_changes=accept_changes)

    options = config.flat(cfg.model_dump(mode="json"))
    here = {key: value for key, value in options.items() if not key.startswith(("output", "data.train", "data.val"))}
    here |= {"data.train": train_set.fingerprint(), "data.val": val_set.fingerprint()}
    distributed.same_everywhere(here | {"the checkpoint's step": solver.step_count})

    open_folder(cfg)
    curves = cfg.folder if cfg.tensorboard.enabled else None
    board = cfg.tensorboard
    logger = Logger(curves, board.every, solver.step_count, kept["seconds_per_step"], board.gradients)
    with contextlib.closing(logger), Stop() as stop:  # also on an error, which must not land in the progress line
        logger.config(config.dump(cfg), options)
        layout = ", channels_last" if cfg.channels_last else ""
        start = f", from step {solver.step_count}" if last else ""
        logger.say(f"run: {cfg.folder} on {device}, {precision} ({reason}){layout}{start}")
        for line in (*broken, *(f"changed: {change}" for change in kept["changes"])):
            logger.say(line)
        logger.say(f"train: {train_set.summary()}\nval: {val_set.summary()}")
        logger.say(f"{cfg.model.backbone}: {checkpoint.describe_size(model)}, {weights}\n{solver.describe()}")

        replica = distributed.replicate(model, device)
        evaluated, best, memory, metrics = kept["evaluated"], kept["best"], kept["peak_memory"], {}
        thresholds = kept["score_thresholds"] or [-1.0] * len(train_set.class_names)

        def save(name: str) -> None:
            with distributed.together():
                if distributed.is_main():
                    checkpoint.save(
                        cfg.folder / name,
                        cfg,
                        solver,
                        criterion,
                        category_ids=train_set.category_ids,
                        class_names=train_set.class_names,
                        score_thresholds=thresholds,
                        epoch=-(-solver.step_count // len(batches)),
                        evaluated=evaluated,
                        best=best,
                        seconds_per_step=logger.seconds_per_step,
                        peak_memory=memory,
                    )

        while not solver.done or evaluated != solver.step_count or not metrics:
            epoch, batch = divmod(solver.step_count, len(batches))
            due = solver.done or (batch == 0 and epoch > 0 and epoch % cfg.evaluation.every == 0)
            # What was done last may have been saved, and its evaluation not; a finished run is evaluated once more.
            if due and (evaluated != solver.step_count or solver.done):
                distributed.share_buffers(solver.evaluated_model)
                watched = stop.between(val_batches)
                detections = predict(solver.evaluated_model, watched, postprocess, device, solver.precision)
                with distributed.together():
                    if distributed.is_main():
                        metrics = score(val_set.annotations, detections, val_set.category_ids)
                        metrics |= {"step": solver.step_count, "epoch": -(-solver.step_count // len(batches))}
                        metrics |= {"seconds_per_step": logger.seconds_per_step, "peak_memory": memory}
                        report(cfg, metrics, val_set, detections, logger)
                metrics = distributed.from_main(metrics)
                evaluated = solver.step_count
                of_class = metrics["per_class"]
                thresholds = [of_class.get(name, {}).get("threshold", -1.0) for name in train_set.class_names]
                if metrics["AP"] > best:
                    best = metrics["AP"]
                    # The best first: were it lost between the two, last.pt would have its AP, and it would not return.
                    save("best.pt")
                save("last.pt")
                continue
            batches.batch_sampler.set_position(epoch, batch)
            next_save = (solver.step_count // cfg.checkpoint.every + 1) * cfg.checkpoint.every
            until = min((epoch + 1) * len(batches), next_save)
            try:
                train_one_epoch(replica, criterion, stop.between(batches), solver, logger, device, until=until)
                memory = max(memory, peak_memory(device))
            except UserError as error:  # between two steps: an image that cannot be read, a loading process that died
                save("last.pt")
                raise UserError(f"{error}; go on with --resume") from None
            except Stopped:  # between two steps, too
                save("last.pt")
                raise
            except NonFiniteLoss as error:
                raise FloatingPointError(f"{error}; {keep_batch(cfg, error.batch)}") from None
            save("last.pt")
    remarks = [*distributed.gather(train_set.image_remarks), *distributed.gather(val_set.image_remarks)]
    for line in remark_lines(*remarks):
        logger.say(line)
    logger.say(metrics_table(metrics))
    files = "last.pt, best.pt, metrics.json, detections.json, detections.png"
    logger.say(f"in {cfg.folder}: {files}; tensorboard --logdir {cfg.output}")
    return metrics


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_datasets(cfg: Config) -> tuple[CocoDataset, CocoDataset]:
    """Training and validation set; the training set says which classes there are."""
    for split in ("train", "val"):
        if not getattr(cfg.data, split).annotations:
            key = f"data.{split}.annotations"
            raise UserError(f"{key}: not set; name it in the config or --set {key}=...")
    size = (cfg.data.short_side, cfg.data.long_side)
    augment = TrainTransform(
        *size,
        horizontal_flip=cfg.data.horizontal_flip,
        vertical_flip=cfg.data.vertical_flip,
        scale_jitter=cfg.data.scale_jitter,
        strong=cfg.data.strong,
    )
    train, val = cfg.data.train, cfg.data.val
    common = {"cache": cfg.data.cache, "trust": cfg.data.trust}
    train_set = CocoDataset(train.annotations, train.images, augment, **common)
    if not cfg.data.trust:
        train_set.refuse_without_boxes()
    classes = {"category_ids": train_set.category_ids, "class_names": train_set.class_names}
    val_set = CocoDataset(val.annotations, val.images, EvalTransform(*size), **classes, **common)
    return train_set, val_set


def refuse_overwriting(cfg: Config, resume: bool) -> None:
    """UserError where the folder holds a run that is not to be resumed."""
    if not resume and any((cfg.folder / name).exists() for name in (checkpoint.LAST, checkpoint.PREVIOUS)):
        raise UserError(f"{cfg.folder} already holds a run: go on with --resume, or name another by --set run=NAME")


def keep_batch(cfg: Config, batch: Batch) -> str:
    """Save this process's images of a step for a look, and say where."""
    path = cfg.folder / f"nonfinite_{distributed.rank()}.pt"
    try:
        torch.save({**batch._asdict(), "targets": [target._asdict() for target in batch.targets]}, path)
    except (OSError, RuntimeError):
        return f"they could not be saved in {path}"
    return f"they are in {path} for a look; lower solver.lr or set solver.clip_norm, and go on with --resume"


def open_folder(cfg: Config) -> None:
    """Make the run folder and write its config."""
    with distributed.together():
        if distributed.is_main():
            try:
                cfg.folder.mkdir(parents=True, exist_ok=True)
                (cfg.folder / "config.yaml").write_text(config.dump(cfg), encoding="utf-8")
            except OSError as error:
                raise UserError(f"output: the run folder {cfg.folder} cannot be written ({error.strerror})") from None


def report(cfg: Config, metrics: dict, val_set: CocoDataset, detections: dict, logger: Logger) -> None:
    """An evaluation as a line, as metrics.json and detections.json, in TensorBoard and as detections.png."""
    results = coco_results(detections, val_set.category_ids)
    for name, content in (("detections.json", results), ("metrics.json", metrics)):
        beside = cfg.folder / f"{name}.tmp"
        beside.write_text(json.dumps(content, indent=1 if content is metrics else None), encoding="utf-8")
        os.replace(beside, cfg.folder / name)
    logger.metrics(metrics, metrics["step"])
    numbers = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"))
    logger.say(f"epoch {metrics['epoch']}, step {metrics['step']}: {numbers}")
    pictures = list(validation_pictures(val_set, detections, cfg.tensorboard.images))
    for index, picture in enumerate(pictures):
        logger.image(f"validation/{index}", picture, metrics["step"])
    if pictures:
        write_png(contact_sheet(pictures), str(cfg.folder / "detections.png"))


if __name__ == "__main__":
    run_main(main, after_stop="; go on with the same command and --resume")
