"""Train torchvision's RetinaNet with our data, recipe and steps, to compare it with a run of ours.

    python scripts/bench/torchvision_baseline.py --config configs/bccd/focal.yaml [--set run=... ...]

From us: the sizes of backbone, pyramid and head, the anchors, the images with their order and augmentation, optimizer,
schedule, averaged weights and evaluation. From torchvision: the model, its initial weights, the assignment, the focal
loss and L1 box loss, and the postprocessing. Writes the run folder <output>/<run>_torchvision with a metrics.json that
scripts/compare.py reads.
"""

import argparse
import json
import time

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from data.assemble import build_datasets
from data.coco_eval import score
from data.loader import eval_loader, train_loader
from data.tables import metrics_table
from detector import assemble, boxes, config
from detector.backbone import BACKBONES, Backbone, set_norm
from detector.config import Config, LossPart
from detector.configure import configure
from detector.device import autocast, keep_freed_memory, pick_device, place
from detector.errors import UserError, run_main
from detector.model import MEAN, STD
from detector.randomness import seed_everything
from detector.structures import Batch, Detections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="a config of this project")
    parser.add_argument(
        "--set", nargs="+", action="extend", metavar="KEY=VALUE", help="options that override the config"
    )
    args = parser.parse_args()
    cfg = configure(args.config, args.set)
    if cfg.model.weights != "none" or cfg.anchors.name != "grid" or cfg.model.head.norm != "none":
        raise UserError("this comparison trains from scratch: it needs weights none, anchors grid and head norm none")
    losses = {"class_loss": LossPart(name="focal"), "box_loss": LossPart(name="l1")}
    cfg = cfg.model_copy(update={"run": cfg.run + "_torchvision", **losses})
    cfg.folder.mkdir(parents=True, exist_ok=True)
    (cfg.folder / "config.yaml").write_text(config.dump(cfg), encoding="utf-8")

    device = pick_device(cfg.device)
    keep_freed_memory(device)
    seed_everything(cfg.seed)
    train_set, val_set = build_datasets(cfg)
    options = assemble.loader_options(cfg, device)
    batches = train_loader(train_set, cfg.solver.batch_size, **options, seed=cfg.seed)
    val_batches = eval_loader(val_set, assemble.eval_batch_size(cfg), **options)
    model = build(cfg, len(train_set.category_ids))
    place(model, device, channels_last=True)
    solver = assemble.build_solver(cfg, model, len(batches))

    model.train()
    seconds: list[float] = []
    while not solver.done:
        batches.batch_sampler.set_position(*divmod(solver.step_count, len(batches)))
        start = time.perf_counter()
        for batch in batches:
            images, targets = inputs(batch, device)
            with autocast(device, solver.precision):
                losses = model(images, targets)
            total = torch.stack(list(losses.values())).sum()
            solver.backward(total)
            solver.clip_gradients()
            solver.step()
            end = time.perf_counter()
            seconds.append(end - start)
            start = end
            if solver.step_count % 20 == 0:
                print(f"step {solver.step_count}/{solver.total_steps}, loss {total.detach():.4f}", flush=True)
            if solver.done:
                break

    metrics = score(val_set.annotations, predict(solver.evaluated_model, val_batches, device), val_set.category_ids)
    metrics |= {"step": solver.step_count, "epoch": cfg.solver.epochs}
    metrics |= {"seconds_per_step": sorted(seconds)[len(seconds) // 2]}
    (cfg.folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    print(metrics_table(metrics))


def build(cfg: Config, num_classes: int) -> RetinaNet:
    """torchvision's RetinaNet with the sizes in the config."""
    options, anchors = cfg.model, cfg.anchors.options
    with torch.device("meta"):
        channels = list(Backbone(options.backbone, "bn", 0).channels)
    network = torchvision.models.get_model(options.backbone, weights=None)
    set_norm(network, options.norm)
    layers = getattr(network, "features", network)
    names = [name for name, _ in layers.named_children()]
    stages = {names[end - 1]: str(level) for level, end in enumerate(BACKBONES[options.backbone][1:])}
    last = LastLevelP6P7(channels[-1] if options.p6_from == "c5" else options.fpn_channels, options.fpn_channels)
    backbone = BackboneWithFPN(layers, stages, channels, options.fpn_channels, extra_blocks=last)
    sizes = tuple(
        tuple(size * 2 ** (i / anchors["octaves"]) for i in range(anchors["octaves"])) for size in anchors["sizes"]
    )
    model = RetinaNet(
        backbone,
        num_classes,
        anchor_generator=AnchorGenerator(sizes, (tuple(anchors["ratios"]),) * len(sizes)),
        score_thresh=cfg.postprocess.score_threshold,
        nms_thresh=cfg.postprocess.nms_iou,
        detections_per_img=cfg.postprocess.max_detections,
        topk_candidates=cfg.postprocess.top_k,
    )
    # Its heads are always four convolutions deep, as wide as the pyramid.
    if options.head.width != options.fpn_channels:
        raise UserError(
            "torchvision's heads are as wide as its pyramid: set model.head.width equal to model.fpn_channels"
        )
    for tower in (model.head.classification_head, model.head.regression_head):
        tower.conv = tower.conv[: options.head.depth]
    model.transform = Prepared()
    return model


class Prepared(nn.Module):
    """Replaces torchvision's transform: our loader has resized, padded and normalised the images."""

    def forward(self, images, targets=None):
        return images, targets

    def postprocess(self, result, image_sizes, original_sizes):
        return result


class Images:
    """The part of ImageList that torchvision's model uses."""

    def __init__(self, tensors: Tensor, sizes: list[tuple[int, int]]):
        self.tensors, self.image_sizes = tensors, sizes

    def __iter__(self):
        return iter(self.tensors)


def inputs(batch: Batch, device: torch.device) -> tuple[Images, list[dict[str, Tensor]]]:
    images = batch.images.to(device).float()
    images = (images - images.new_tensor(MEAN).view(3, 1, 1)) / images.new_tensor(STD).view(3, 1, 1)
    for image, (height, width) in zip(images, batch.sizes):
        image[:, height:] = 0
        image[:, :, width:] = 0
    targets = [{"boxes": t.boxes.to(device), "labels": t.labels.to(device)} for t in batch.targets]
    return Images(images, batch.sizes), targets


@torch.no_grad()
def predict(model: nn.Module, batches, device: torch.device) -> dict[int, Detections]:
    model.eval()
    detections = {}
    for batch in batches:
        results = model(inputs(batch, device)[0])
        for image_id, result, size, original in zip(batch.image_ids, results, batch.sizes, batch.original_sizes):
            scaled = boxes.rescale(result["boxes"], size, original)
            detections[image_id] = Detections(scaled.cpu(), result["scores"].cpu(), result["labels"].cpu())
    return detections


if __name__ == "__main__":
    run_main(main)
