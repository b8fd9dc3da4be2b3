"""A training step beside torchvision's RetinaNet: images per second and peak memory.

    python scripts/bench/step.py [--work resnet18:512:2 resnet50:512:4] [--boxes 10] [--repeats 7]
        [--also "class_loss.name=ghm_c box_loss.name=ghm_r" ...] [--ours]

Forward, losses, backward, clipping, SGD. Both have the same backbone with the same weights, BatchNorm and the first
stage frozen, as both have by default, the same pyramid and head sizes, and the same images. "torchvision" is as its
users run it: float32, a list of float images that its model normalises and pads. "tuned" is the same with channels_last
and autocast to the precision that ours picks on this machine. "ours" is what train.py does by default on this machine,
keeping freed memory included; "float32" the same in float32. Each runs in its own process, and they take turns; memory
is that of one call beyond the weights.
--also: also ours with these settings. --ours: without torchvision's and float32.
"""

import argparse
import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detector import assemble
from detector.configure import configure
from detector.device import autocast, keep_freed_memory, pick_device, pick_precision, place
from detector.errors import UserError, run_main
from detector.graphs import speed_up
from detector.model import RetinaNet
from detector.solver import PRECISIONS
from detector.structures import Batch, Target
from scripts.bench import measure
from scripts.comparison.timing import training_step

COCO = Path(__file__).resolve().parents[2] / "configs/coco/base.yaml"
CLASSES = 80
# Forks of a process that has only imported this file: a fork of this process would inherit its threads and its GPU's
# context.
servers = multiprocessing.get_context("spawn") if sys.platform == "win32" else multiprocessing.get_context("forkserver")
servers.set_forkserver_preload(["scripts.bench.step"])  # or each child imports PyTorch again
WORK = ["resnet18:512:2", "resnet50:512:4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=WORK, metavar="BACKBONE:SIDE:BATCH")
    parser.add_argument("--boxes", type=int, default=10, help="an image")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--also", nargs="+", default=[], metavar="SETTINGS", help="ours with these, each a row")
    parser.add_argument("--ours", action="store_true", help="leave torchvision and float32 out")
    args = parser.parse_args()
    device = pick_device("auto")
    print(f"{measure.environment()}\nprecision of ours: {', '.join(pick_precision('auto', device))}")
    for workload in args.work:
        name, side, batch = parse(workload)
        builders: dict[str, Callable] = {}
        if not args.ours:
            builders["torchvision"] = torchvision_step
            builders["torchvision, tuned"] = partial(torchvision_step, tuned=True)
            builders["ours, float32"] = partial(our_step, settings=["precision=float32"])
        builders["ours"] = our_step
        builders |= {f"ours, {settings}": partial(our_step, settings=settings.split()) for settings in args.also}
        compare(builders, name, side, batch, args.boxes, args.repeats)


def parse(workload: str) -> tuple[str, int, int]:
    """Split BACKBONE:SIDE:BATCH."""
    parts = workload.split(":")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts[1:]):
        raise UserError(f"--work {workload}: write it as BACKBONE:SIDE:BATCH, such as resnet18:512:2")
    return parts[0], int(parts[1]), int(parts[2])


def compare(builders: dict[str, Callable], name: str, side: int, batch: int, boxes: int, repeats: int) -> None:
    peer = next(iter(builders))
    pipes = {}
    with contextlib.ExitStack() as stack:
        for label, build in builders.items():
            pipe, theirs = multiprocessing.Pipe()
            kept = label.startswith("ours")  # freed memory, as train.py does
            given = (theirs, build, kept, name, side, batch, boxes)
            process = servers.Process(target=serve, args=given, daemon=True)
            process.start()
            stack.callback(process.kill)
            pipes[label] = pipe
        memory = {label: pipe.recv() for label, pipe in pipes.items()}  # they start at the same time
        as_in_training = {}  # whether a row, in its last step, used all that train.py would

        def take_turn(label: str) -> None:
            pipes[label].send(True)
            as_in_training[label] = pipes[label].recv()

        calls = {label: partial(take_turn, label) for label in pipes}
        warmup = 4 if torch.cuda.is_available() else 1  # a graph is recorded at the third
        times = measure.alternate(calls, repeats, warmup)
    rows = [
        [
            label if as_in_training[label] else f"{label} (without a graph)",
            f"{median:,.0f}",
            f"{1000 * batch / median:.2f}",
            f"{measure.ratio(times, peer, label):.2f}",
            f"{memory[label] / measure.MIB:,.0f}",
        ]
        for label, median in measure.medians(times).items()
    ]
    print(f"\nTraining step, {name}, {batch} x {side} x {side} px, {boxes} boxes an image\n")
    print(measure.table(["", "ms", "images/s", f"x {peer}", "peak MiB"], rows), flush=True)


def serve(pipe: Connection, build: Callable, kept: bool, name: str, side: int, batch: int, boxes: int) -> None:
    """Run in a separate process: send the peak memory of a step, then do a step for each message."""
    device = pick_device("auto")
    step, model = build(name, backbone_weights(name), *work(side, batch, boxes, device))
    graphs = getattr(model, "graphs", None)
    step()
    pipe.send(measure.peak(step))
    if kept:
        keep_freed_memory(device)
    while pipe.recv():
        step()
        measure.wait()
        pipe.send(graphs is None or bool(graphs.recorded))


def work(side: int, batch: int, boxes: int, device: torch.device) -> tuple[Tensor, list[Target]]:
    """Images (batch, 3, side, side) uint8, and boxes of a sixteenth to half of the side."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, side, side), generator=rng, dtype=torch.uint8)
    sides = side * (1 / 16 + 7 / 16 * torch.rand(batch, boxes, 2, generator=rng))
    corners = torch.rand(batch, boxes, 2, generator=rng) * (side - sides)
    labels = torch.randint(0, CLASSES, (batch, boxes), generator=rng)
    targets = [Target(*pair) for pair in zip(torch.cat([corners, corners + sides], 2).to(device), labels.to(device))]
    return images.to(device), targets


def backbone_weights(name: str) -> dict[str, Tensor]:
    """Random weights with BatchNorm statistics that fit them, so that frozen ones keep the activations in bounds."""
    torch.manual_seed(0)
    resnet = torchvision.models.get_model(name, weights=None)
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        resnet.train()(torch.randn(4, 3, 128, 128))
    return {key: value for key, value in resnet.state_dict().items() if not key.startswith("fc.")}


def our_model(name: str, state: dict[str, Tensor], *settings: str) -> tuple[assemble.Config, RetinaNet]:
    torch.manual_seed(0)
    cfg = configure(str(COCO), [f"model.backbone={name}", *settings])
    model = assemble.build_model(cfg, CLASSES)
    model.backbone.load_state_dict(state, strict=False)
    place(model, pick_device("auto"), channels_last=True)
    return cfg, model


def our_step(
    name: str,
    state: dict[str, Tensor],
    images: Tensor,
    targets: list[Target],
    settings: Sequence[str] = (),
) -> tuple[Callable[[], object], RetinaNet]:
    cfg, model = our_model(name, state, f"solver.batch_size={len(images)}", *settings)
    criterion = assemble.build_criterion(cfg).to(images.device).train()
    solver = assemble.build_solver(cfg, model.train(), steps_per_epoch=1_000_000)
    sizes = [(images.shape[2], images.shape[3])] * len(images)
    speed_up(model)
    batch = Batch.allocate(images.shape, targets, list(range(len(images))), sizes, sizes)
    batch.images.copy_(images)
    return partial(training_step(model, criterion, solver), batch), model


def torchvision_model(name: str, state: dict[str, Tensor], side: int, **options: object) -> TorchvisionRetinaNet:
    """torchvision's RetinaNet as `retinanet_resnet50_fpn` builds it; images stay as large as they are."""
    torch.manual_seed(0)
    last = LastLevelP6P7(2048 if name == "resnet50" else 512, 256)
    backbone = resnet_fpn_backbone(
        backbone_name=name, weights=None, trainable_layers=3, returned_layers=[2, 3, 4], extra_blocks=last
    )
    backbone.body.load_state_dict(state, strict=False)
    model = TorchvisionRetinaNet(
        backbone, CLASSES, anchor_generator=_default_anchorgen(), min_size=side, max_size=side, **options
    )
    return model.to(pick_device("auto"))


def torchvision_step(
    name: str, state: dict[str, Tensor], images: Tensor, targets: list[Target], tuned: bool = False
) -> tuple[Callable[[], object], nn.Module]:
    model = torchvision_model(name, state, images.shape[-1]).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9, weight_decay=1e-4)
    place(model, images.device, channels_last=tuned)
    floats = list(images.float() / 255)
    truth = [{"boxes": target.boxes, "labels": target.labels} for target in targets]

    # Without units for it, bfloat16 takes 12 times as long.
    precision = PRECISIONS[pick_precision("auto", images.device)[0]] if tuned else torch.float32

    def step() -> None:
        with autocast(images.device, precision):
            losses = model(floats, truth)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()

    return step, model


if __name__ == "__main__":
    run_main(main)
