"""Score a checkpoint of train.py, or one of torchvision's retinanet_resnet50_fpn (v1 or v2).

    python eval.py --checkpoint runs/mine/best.pt [--data annotations.json images/] [--benchmark]

Scores on its own validation set or on --data. Prints the COCO table and writes metrics.json and detections.json (COCO's
results format) into the checkpoint's folder; with --data, into a subfolder named after the annotation file and its
folder, which scripts/compare.py compares like a run's folder.
"""

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data.assemble import open_dataset
from data.coco import CocoDataset
from data.coco_eval import score
from data.coco_results import coco_results, write_results
from data.loader import eval_loader
from data.tables import metrics_table, per_class_table
from detector import assemble, atomic, checkpoint, config, distributed
from detector.checkpoint import Content
from detector.config import Config
from detector.device import keep_freed_memory, pick_device, pick_precision, place
from detector.engine import predict
from detector.errors import UserError, run_main
from detector.images import remark_lines
from detector.model import RetinaNet
from detector.solver import PRECISIONS
from detector.stopwatch import Stopwatch
from detector.structures import Detections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of train.py, or torchvision's")
    parser.add_argument(
        "--data",
        nargs=2,
        metavar=("ANNOTATIONS", "IMAGES"),
        help="score these instead of the run's own validation set; torchvision's checkpoints need them",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="for the results (default: the run's, whose own are replaced; for another set, a new one in it)",
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other options")
    parser.add_argument("--benchmark", action="store_true", help="print the images per second of each stage")
    args = parser.parse_args()

    content = checkpoint.read(args.checkpoint)
    model, cfg = checkpoint.build_model(content, args.checkpoint, args.set)
    folder = Path(args.output) if args.output else None
    with distributed.group(pick_device(cfg.device)) as device:
        keep_freed_memory(device)
        watch = Stopwatch(device) if args.benchmark else None
        evaluate(args.checkpoint, content, model, cfg, args.data, folder, device, watch)


def evaluate(
    source: str,
    content: Content,
    model: RetinaNet,
    cfg: Config,
    data: list[str] | None,
    folder: Path | None,
    device: torch.device,
    watch: Stopwatch | None = None,
) -> None:
    """Score the checkpoint read from `source` on `data`, or on its own validation set, and write the results.

    They go into the run's folder by default; of another set than the run's own, into a new one in it.
    """
    dataset = open_dataset(source, content, cfg, data)
    run: Mapping[str, Any] = content.get("run") or {}
    folder = folder or results_folder(source, content, dataset, given=bool(data))
    if (folder / "last.pt").exists() and folder.resolve() != Path(source).parent.resolve():
        raise UserError(f"--output: {folder} is the folder of another run, whose results would be replaced")
    distributed.same_everywhere({"--data": dataset.fingerprint()})
    if distributed.is_main():
        print(f"{source} on {dataset.summary()}")

    detections = detect(model, cfg, dataset, device, watch)
    remarks = distributed.gather(dataset.image_remarks)
    if not distributed.is_main():
        return
    with watch("scoring") if watch else contextlib.nullcontext():
        metrics = score(dataset.annotations, detections, dataset.category_ids)
    metrics["step"], metrics["epoch"] = run.get("solver", {}).get("step"), run.get("epoch")
    metrics["seconds_per_step"], metrics["peak_memory"] = run.get("seconds_per_step"), run.get("peak_memory", 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != Path(source).parent.resolve():  # so compare.py can read it like a run's folder
            val = cfg.data.val.model_copy(update={"annotations": str(dataset.path), "images": str(dataset.folder)})
            scored = cfg.model_copy(update={"data": cfg.data.model_copy(update={"val": val})})
            atomic.write(folder / "config.yaml", config.dump(scored))
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written ({error.strerror})") from None
    # Before printing, so an error there does not lose the results.
    write_results(folder, metrics, coco_results(detections, dataset.category_ids))
    print(f"{metrics_table(metrics)}\n\n{per_class_table(metrics)}")
    for line in remark_lines(*remarks):
        print(line)
    print(f"written: {folder / 'metrics.json'}, {folder / 'detections.json'}")
    if watch:
        print(f"\n{speeds(watch, -(-len(dataset) // distributed.world_size()))}")


def results_folder(source: str, content: Content, dataset: CocoDataset, *, given: bool) -> Path:
    """The checkpoint's folder; for another set than the run's own, one in it named after the set."""
    run: Mapping[str, Any] = content.get("run") or {}
    own = not given and run.get("data", {}).get("data.val") in (None, dataset.fingerprint())
    return Path(source).parent / ("" if own else f"{dataset.path.resolve().parent.name}_{dataset.path.stem}")


def detect(
    model: RetinaNet, cfg: Config, dataset: CocoDataset, device: torch.device, watch: Stopwatch | None = None
) -> dict[int, Detections]:
    """Detections of every image of a data set, by image id."""
    place(model, device, channels_last=cfg.channels_last)
    batches = eval_loader(dataset, assemble.eval_batch_size(cfg), **assemble.loader_options(cfg, device))
    precision = PRECISIONS[pick_precision(cfg.precision, device)[0]]
    return predict(model, batches, assemble.build_postprocess(cfg), device, precision, watch)


def speeds(watch: Stopwatch, images: int) -> str:
    """Images per second of each stage, and of all stages in sequence."""
    stages = {**watch.seconds, "all": sum(watch.seconds.values())}
    lines = [f"{'stage':<16}{'images/s':>10}{'share':>8}"]
    for stage, seconds in stages.items():
        lines.append(f"{stage:<16}{images / seconds:>10,.1f}{seconds / stages['all']:>8.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
