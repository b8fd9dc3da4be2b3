"""Score a checkpoint: python eval.py --checkpoint runs/X/best.pt [--data ANNOTATIONS IMAGES]"""

import argparse
import json
from pathlib import Path

import torch

from data.coco import CocoDataset
from data.coco_eval import coco_results, metrics_table, per_class_table, score
from data.loader import eval_loader
from data.transforms import EvalTransform
from detector import assemble, checkpoint, config, distributed
from detector.engine import predict
from detector.errors import UserError, run_main
from detector.solver import PRECISIONS
from train import evaluation_batch, loader_options, pick_device


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Score a checkpoint of train.py, or one of torchvision's retinanet_resnet50_fpn (v1 or v2), "
        "on its validation set or on another. Prints the COCO table and writes metrics.json and detections.json "
        "(COCO results format)."
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument(
        "--data", nargs=2, metavar=("ANNOTATIONS", "IMAGES"), help="annotation file and image folder, not its own"
    )
    parser.add_argument("--output", metavar="FOLDER", help="for the results; by default the checkpoint's own folder")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other options")
    args = parser.parse_args()

    content = checkpoint.read(args.checkpoint)
    content["config"] = config.with_settings(content["config"], args.set)
    model, cfg = checkpoint.build_model(content, args.checkpoint)
    device = distributed.setup(pick_device(cfg.device))
    annotations, images = args.data or (cfg.data.val.annotations, cfg.data.val.images)
    if not annotations or not images:
        raise UserError(f"{args.checkpoint} names no validation set; give one by --data ANNOTATIONS IMAGES")
    size = (cfg.data.short_side, cfg.data.long_side)
    classes = {"category_ids": content["category_ids"], "class_names": content["class_names"] or None}
    dataset = CocoDataset(annotations, images, EvalTransform(*size), **classes)
    print(f"{args.checkpoint} on {annotations}: {dataset.summary()}")

    model.to(device, memory_format=torch.channels_last if cfg.channels_last else torch.contiguous_format)
    batches = eval_loader(dataset, evaluation_batch(cfg), **loader_options(cfg, device))
    postprocess = assemble.build_postprocess(cfg)
    detections = predict(model, batches, postprocess, device, PRECISIONS[cfg.precision])
    metrics = score(dataset.annotations, detections, dataset.category_ids)
    run = content.get("run", {})
    metrics |= {"step": run.get("solver", {}).get("step"), "epoch": run.get("epoch")}
    metrics |= {"seconds_per_step": run.get("seconds_per_step")}
    if distributed.is_main():
        print(f"{metrics_table(metrics)}\n\n{per_class_table(metrics)}")
        folder = Path(args.output or Path(args.checkpoint).parent)
        write(folder, metrics, coco_results(detections, dataset.category_ids))
    distributed.shutdown()


def write(folder: Path, metrics: dict, results: list[dict]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        (folder / "detections.json").write_text(json.dumps(results), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written ({error.strerror})") from None
    print(f"written: {folder / 'metrics.json'}, {folder / 'detections.json'}")


if __name__ == "__main__":
    run_main(main)
