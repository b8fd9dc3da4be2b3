"""Matching anchors to boxes, ours beside torchvision's Matcher: milliseconds and peak memory for an image.

    python scripts/bench/assigner.py [--sides 512 1024] [--boxes 1 10 100 300] [--repeats 9]

The peer computes the IoU of all pairs and calls Matcher, like torchvision's RetinaNet. Both get the same anchors and
boxes. "differ" is the number of anchors with different matches.
"""

import argparse

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detector.anchors import Anchors
from detector.assigner import IoUAssigner
from detector.device import keep_freed_memory, pick_device
from detector.structures import Assignment
from scripts.bench import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024], help="sides of square images, in pixels")
    parser.add_argument("--boxes", type=int, nargs="+", default=[1, 10, 100, 300])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    device = pick_device("auto")
    cases = [(side, count, *case(side, count, device)) for side in args.sides for count in args.boxes]
    calls = [{"torchvision": lambda c=c: theirs(*c), "ours": lambda c=c: IoUAssigner()(*c)} for _, _, *c in cases]
    memory = [{name: measure.peak(call) / measure.MIB for name, call in pair.items()} for pair in calls]
    keep_freed_memory(device)
    rows = []
    for (side, count, anchors, _), pair, peaks in zip(cases, calls, memory):
        times = measure.alternate(pair, args.repeats)
        medians = measure.medians(times)
        differ = (pair["torchvision"]() != matches(pair["ours"]())).sum().item()
        rows.append(
            [
                f"{side} px, {len(anchors):,} x {count}",
                *(f"{medians[name]:.1f}" for name in pair),
                f"{measure.ratio(times, 'torchvision', 'ours'):.1f}x",
                *(f"{peaks[name]:,.0f}" for name in pair),
                differ,
            ]
        )
    print(f"{measure.environment()}\n")
    print(measure.table(["anchors x boxes", "torchvision ms", "ours ms", "", "MiB", "ours MiB", "differ"], rows))


def case(side: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    sides = side * (1 / 32 + torch.rand(count, 2, generator=rng).square() / 2)  # more small boxes than large ones
    corners = torch.rand(count, 2, generator=rng) * (side - sides)
    map_sizes = [(-(-side // stride),) * 2 for stride in (8, 16, 32, 64, 128)]
    return Anchors()(map_sizes, (side, side), device), torch.cat([corners, corners + sides], dim=1).to(device)


def theirs(anchors: Tensor, boxes: Tensor) -> Tensor:
    return Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(boxes, anchors))


def matches(assignment: Assignment) -> Tensor:
    """In torchvision's notation: index of the box, -1 background, -2 ignored."""
    return torch.where(assignment.ignored, -2, torch.where(assignment.positive, assignment.gt_index, -1))


if __name__ == "__main__":
    main()
