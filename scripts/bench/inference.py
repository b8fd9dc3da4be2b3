"""Inference beside torchvision's RetinaNet: images per second, and the share of postprocessing.

    python scripts/bench/inference.py [--work resnet18:512:2 resnet50:512:2] [--repeats 7]

Measures from images to boxes in pixels, both with the same backbone, sizes and images. "torchvision" runs by default,
in float32; ours runs as our configs do on this machine. "untrained" is a new network, whose scores are all near the
prior of 0.01 and thus dropped. "trained" imitates a trained network: the class output is spread so that some 500
cells an image pass the threshold. The rows of a table alternate in one process.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from detector import assemble
from detector.device import autocast, keep_freed_memory, pick_device, pick_precision
from detector.errors import run_main
from detector.model import RetinaNet
from detector.solver import PRECISIONS
from detector.structures import Detections, Predictions
from scripts.bench import measure, step

CELLS = 500  # cells of an image that pass the threshold in a trained network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", nargs="+", default=["resnet18:512:2", "resnet50:512:2"], metavar="BACKBONE:SIDE:BATCH"
    )
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device = pick_device("auto")
    keep_freed_memory(device)
    print(f"{measure.environment()}\nprecision of ours: {', '.join(pick_precision('auto', device))}")
    for work in args.work:
        name, side, batch = step.parse(work)
        for trained in (False, True):
            compare(name, side, batch, trained, args.repeats)


def compare(name: str, side: int, batch: int, trained: bool, repeats: int) -> None:
    images, _ = step.work(side, batch, 1, pick_device("auto"))
    state = step.backbone_weights(name)
    cfg, model = step.our_model(name, state)
    model.eval()
    peer = step.torchvision_model(name, state, side, detections_per_img=cfg.postprocess.max_detections).eval()
    if trained:
        spread(peer.head.classification_head.cls_logits, lambda: peer_logits(peer, images))
        spread(model.head.logits, lambda: model(images).logits)
    ours, network, after = our_calls(cfg, model, images)
    floats = list(images.float() / 255)
    calls = {"torchvision": lambda: peer(floats), "ours": ours, "network": network, "after": after}
    with torch.no_grad():
        counts = [sum(len(result["boxes"]) for result in peer(floats)), sum(len(result.boxes) for result in ours())]
        times = measure.alternate(calls, repeats)
    medians = measure.medians(times)
    print(f"\nInference, {name}, {'trained' if trained else 'untrained'}, {batch} x {side} x {side} px\n")
    rows = [
        [label, f"{medians[label]:,.0f}", f"{1000 * batch / medians[label]:.2f}",
         f"{measure.ratio(times, 'torchvision', label):.2f}", boxes]
        for label, boxes in zip(("torchvision", "ours"), counts)
    ]  # fmt: skip
    print(measure.table(["", "ms", "images/s", "x torchvision", "boxes"], rows))
    print(f"\nOurs: postprocessing is {100 * medians['after'] / medians['ours']:.1f}%, {medians['after']:.1f} ms")


def our_calls(
    cfg: assemble.Config, model: RetinaNet, images: Tensor
) -> tuple[Callable[[], list[Detections]], Callable[[], Predictions], Callable[[], list[Detections]]]:
    """Functions for images to boxes, the network alone, and the postprocessing alone."""
    precision = PRECISIONS[pick_precision(cfg.precision, images.device)[0]]
    postprocess, sizes = assemble.build_postprocess(cfg), [(images.shape[2], images.shape[3])] * len(images)

    def network() -> Predictions:
        with torch.no_grad(), autocast(images.device, precision):
            return model(images, sizes)

    predictions = network()
    return lambda: postprocess(network(), sizes), network, lambda: postprocess(predictions, sizes)


@torch.no_grad()
def spread(output: nn.Conv2d, logits: Callable[[], Tensor]) -> None:
    """Scale and shift the class output so that CELLS cells an image have a score above 0.05, the best of them 0.9."""
    values = logits().float().flatten(1).topk(CELLS, dim=1).values
    best, last = values[:, 0].mean(), values[:, -1].mean()
    scale = (2.2 + 2.944) / (best - last)  # logits of 0.9 and 0.05
    output.weight *= scale
    assert output.bias is not None
    output.bias.copy_(output.bias * scale + 2.2 - best * scale)


def peer_logits(peer: step.TorchvisionRetinaNet, images: Tensor) -> Tensor:
    inputs, _ = peer.transform(list(images.float() / 255))
    return peer.head(list(peer.backbone(inputs.tensors).values()))["cls_logits"]


if __name__ == "__main__":
    run_main(main)
