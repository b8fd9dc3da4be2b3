"""Matching anchors to boxes, ours beside torchvision's Matcher: milliseconds and peak memory for a batch of images.

    python scripts/bench/assigner.py [--images 1] [--sides 512 1024] [--boxes 1 10 100 300] [--repeats 9]

The peer computes the IoU of all pairs and calls Matcher for each image, like torchvision's RetinaNet. Both get the same
anchors and boxes. "differ" is the number of anchors with different matches. ATSS is ours too; it has no peer here.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detector.anchors import Anchors
from detector.assigner import ATSSAssigner, IoUAssigner
from detector.box_coder import BoxCoder
from detector.criterion import Criterion
from detector.device import keep_freed_memory, pick_device
from detector.errors import run_main
from detector.structures import Assignment, Grid, Target
from scripts.bench import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1, help="images in the batch (%(default)s)")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024], help="sides of square images, in pixels")
    parser.add_argument("--boxes", type=int, nargs="+", default=[1, 10, 100, 300], help="boxes in an image")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    device = pick_device("auto")
    iou, atss = (Criterion(rule, BoxCoder(), nn.Identity(), nn.Identity()) for rule in (IoUAssigner(), ATSSAssigner()))
    cases = [(side, count, *case(args.images, side, count, device)) for side in args.sides for count in args.boxes]
    calls: list[dict[str, Callable[[], object]]] = [
        {
            "torchvision": partial(theirs, grid, targets),
            "ours": partial(iou.match, grid, targets),
            "ATSS": partial(atss.match, grid, targets),
        }
        for _, _, grid, targets in cases
    ]
    memory = [{name: measure.peak(call) / measure.MIB for name, call in three.items()} for three in calls]
    keep_freed_memory(device)
    rows, names = [], list(calls[0])
    for (side, count, grid, targets), three, peaks in zip(cases, calls, memory):
        times = measure.alternate(three, args.repeats)
        differ = sum(
            int((their_match != matches(IoUAssigner()(grid.anchors, target.boxes))).sum())
            for their_match, target in zip(theirs(grid, targets), targets)
        )
        rows.append(
            [
                f"{side} px, {len(grid.anchors):,} x {count}",
                *(f"{median:.1f}" for median in measure.medians(times).values()),
                *(f"{measure.ratio(times, 'torchvision', name):.1f}" for name in names[1:]),
                *(f"{peaks[name]:,.0f}" for name in three),
                differ,
            ]
        )
    print(f"{measure.environment()}\nImages in a batch: {args.images}\n")
    header = [*(f"{name} ms" for name in names), "ours x", "ATSS x", *(f"{name} MiB" for name in names)]
    print(measure.table(["anchors x boxes", *header, "differ"], rows))


def case(images: int, side: int, count: int, device: torch.device) -> tuple[Grid, list[Target]]:
    rng = torch.Generator().manual_seed(0)
    map_sizes = [(-(-side // stride),) * 2 for stride in (8, 16, 32, 64, 128)]
    anchors = Anchors()
    levels = tuple(height * width * anchors.per_position for height, width in map_sizes)
    targets = []
    for _ in range(images):
        sides = side * (1 / 32 + torch.rand(count, 2, generator=rng).square() / 2)  # more small boxes than large ones
        corners = torch.rand(count, 2, generator=rng) * (side - sides)
        boxes = torch.cat([corners, corners + sides], dim=1).to(device)
        targets.append(Target(boxes, torch.zeros(count, dtype=torch.int64, device=device)))
    return Grid(anchors(map_sizes, (side, side), device), levels, anchors.per_position), targets


def theirs(grid: Grid, targets: list[Target]) -> list[Tensor]:
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    return [matcher(box_iou(target.boxes, grid.anchors)) for target in targets]


def matches(assignment: Assignment) -> Tensor:
    """In torchvision's notation: index of the box, -1 background, -2 ignored."""
    return torch.where(assignment.ignored, -2, torch.where(assignment.positive, assignment.gt_index, -1))


if __name__ == "__main__":
    run_main(main)
