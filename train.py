"""Train a RetinaNet with the losses that a YAML file names.

    python train.py --config configs/demo/focal.yaml [--set solver.lr=0.02 run=mine ...] [--resume]
    torchrun --nproc_per_node=8 train.py --config configs/coco/focal.yaml

Writes the folder output/run: config.yaml, last.pt, previous.pt (the one before), best.pt (the best AP so far),
metrics.json, detections.json and detections.png of the last evaluation, and TensorBoard's files. Whatever interrupted a
run, --resume continues it. All options: docs/configuration.md; problems: docs/troubleshooting.md.
"""

import argparse
import contextlib
from collections.abc import Iterator

import torch

from data.assemble import build_datasets
from data.coco import CocoDataset
from data.coco_eval import score
from data.coco_results import coco_results, write_results
from data.draw import side_by_side, validation_pictures, write_contact_sheet
from data.loader import eval_loader, train_loader
from data.tables import metrics_line, metrics_table
from data.workers import BatchLoader
from detector import assemble, checkpoint, config, distributed
from detector.config import Config
from detector.configure import configure
from detector.device import keep_freed_memory, peak_memory, pick_device, pick_precision, place
from detector.engine import NonFiniteLoss, predict, train_until
from detector.errors import Stopped, UserError, run_main
from detector.graphs import speed_up
from detector.images import remark_lines
from detector.logger import Logger
from detector.metrics import Metrics
from detector.pretrained import load_initial_weights
from detector.randomness import seed_everything
from detector.run import Run, checkpoint_to_resume
from detector.stop import Stop
from detector.structures import Batch, Detections
from detector.transfer import copied_ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML with what differs from the defaults")
    parser.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE", help="override the file's options")
    parser.add_argument("--resume", action="store_true", help="continue from the newest undamaged checkpoint, if any")
    parser.add_argument("--accept-changes", action="store_true", help="with --resume: also if config or data changed")
    args = parser.parse_args()
    cfg = configure(args.config, args.set)
    with distributed.group(pick_device(cfg.device)) as device:
        train(cfg, device, resume=args.resume, accept_changes=args.accept_changes)


def train(cfg: Config, device: torch.device, *, resume: bool = False, accept_changes: bool = False) -> Metrics:
    """Train as `cfg` says, into the folder `cfg.folder`; returns the metrics of the last evaluation."""
    precision, reason = pick_precision(cfg.precision, device)
    cfg = cfg.model_copy(update={"precision": precision})
    seed_everything(cfg.seed)
    train_set, val_set = build_datasets(cfg)
    del train_set.annotations  # 60 MB of COCO's, which only scoring needs
    keep_freed_memory(device)  # only from here on, so memory that reading freed goes back to the system
    loading = assemble.loader_options(cfg, device)
    batches = train_loader(train_set, assemble.train_batch_size(cfg), **loading, seed=cfg.seed)
    val_batches = eval_loader(val_set, assemble.eval_batch_size(cfg), **loading)

    saved = checkpoint_to_resume(cfg, resume=resume)
    model = assemble.build_model(cfg, num_classes=len(train_set.category_ids))
    weights = f"weights from {saved.path}" if saved else load_initial_weights(model, cfg, train_set.class_names)
    place(model, device, channels_last=cfg.channels_last)
    criterion = assemble.build_criterion(cfg).to(device)
    solver = assemble.build_solver(cfg, model, steps_per_epoch=len(batches))
    speed_up(model)
    data = {"data.train": train_set.fingerprint(), "data.val": val_set.fingerprint()}
    run = Run(cfg, solver, criterion, train_set.category_ids, train_set.class_names, len(batches), data)
    run.refuse_unequal_processes(saved)
    remarks = run.resume(saved, accept_changes=accept_changes) if saved else []
    run.open_folder()

    board = cfg.tensorboard
    logger = Logger(cfg.folder if board.enabled else None, board.every, run.step, run.seconds_per_step, board.gradients)
    with contextlib.closing(logger), Stop() as stop:  # closed on errors too: no message may land in the progress line
        logger.tensorboard.config(config.dump(cfg), config.flat(cfg.model_dump(mode="json")))
        details = (", channels_last" if cfg.channels_last else "") + (f", from step {run.step}" if saved else "")
        lines = [f"run: {cfg.folder} on {device}, {precision} ({reason}){details}, data.workers {batches.num_workers}"]
        lines += [*remarks, f"train: {train_set.summary()}", f"val: {val_set.summary()}"]
        logger.say("\n".join([*lines, f"{cfg.model.backbone}: {model.describe()}, {weights}", solver.describe()]))

        replica = distributed.replicate(model, device)
        # One stream over all epochs: at an epoch's end and during evaluation, the next epoch's batches already load.
        batches.batch_sampler.set_position(*run.position, until=cfg.solver.epochs)
        upcoming = stop.between(copied_ahead(batches, device))
        if run.evaluation_due:  # an evaluation was due when the run stopped, or the run is finished
            metrics = evaluate(run, val_set, val_batches, stop, logger, device)
        while not solver.done:
            advance(run, replica, upcoming, logger, device)
            if run.evaluation_due:
                metrics = evaluate(run, val_set, val_batches, stop, logger, device)
    odd_images = remark_lines(*distributed.gather(train_set.image_remarks), *distributed.gather(val_set.image_remarks))
    logger.say("\n".join([*odd_images, metrics_table(metrics), run.describe_files()]))
    return metrics


def advance(run: Run, replica: torch.nn.Module, batches: Iterator[Batch], logger: Logger, device: torch.device) -> None:
    """Train to the next pause or interruption, then save a checkpoint, or the batch if its loss is not finite."""
    interruption: UserError | Stopped | None = None
    try:
        train_until(replica, run.criterion, batches, run.solver, logger, until_step=run.next_pause)
    except NonFiniteLoss as error:
        raise FloatingPointError(f"{error}; {run.save_batch(error.batch)}") from None
    except Stopped as error:
        interruption = error
    except UserError as error:  # an image that cannot be read, a loading process that died
        interruption = UserError(f"{error}; continue with --resume")
    run.seconds_per_step = logger.clock.seconds_per_step
    run.peak_memory = max(run.peak_memory, peak_memory(device))
    run.save(checkpoint.LAST)
    if interruption:
        raise interruption


def evaluate(
    run: Run, val_set: CocoDataset, batches: BatchLoader, stop: Stop, logger: Logger, device: torch.device
) -> Metrics:
    """Score the present weights on the validation set, report, and save."""
    model, cfg, metrics = run.solver.evaluated_model, run.cfg, None
    distributed.share_buffers(model)
    detections = predict(model, stop.between(batches), assemble.build_postprocess(cfg), device, run.solver.precision)
    with distributed.together():
        if distributed.is_main():
            metrics = score(val_set.annotations, detections, val_set.category_ids)
            metrics |= run.figures
            report(run, metrics, val_set, detections, logger)
    metrics = distributed.from_main(metrics)
    run.record_and_save(metrics)
    return metrics


def report(run: Run, metrics: Metrics, val_set: CocoDataset, detections: dict[int, Detections], logger: Logger) -> None:
    """Report an evaluation: print a line; write metrics.json, detections.json, TensorBoard and detections.png."""
    write_results(run.cfg.folder, metrics, coco_results(detections, val_set.category_ids))
    logger.say(f"epoch {run.epoch}, step {run.step}: {metrics_line(metrics)}")
    logger.tensorboard.metrics(metrics, run.step)
    if pictures := list(map(side_by_side, validation_pictures(val_set, detections, run.cfg.tensorboard.images))):
        logger.tensorboard.images("validation", pictures, run.step)
        write_contact_sheet(run.cfg.folder / "detections.png", pictures)


if __name__ == "__main__":
    run_main(main, after_stop="; continue with the same command and --resume")
