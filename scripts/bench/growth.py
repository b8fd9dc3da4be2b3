"""How our training step grows with batch and image size, and our evaluation with the detections; draws a plot.

    python scripts/bench/growth.py [--backbone resnet18] [--batches 1 2 4 8] [--sides 256 384 512 768 1024]
        [--images 5000] [--repeats 3] [--plot docs/growth.png]

--batches use 512 px, --sides use batches of 2. "s per megapixel" stays the same if the time grows linearly.
"""

import argparse

import matplotlib.pyplot as plt

from detector.device import keep_freed_memory, pick_device
from detector.errors import run_main
from scripts.bench import evaluation, measure, step

DETECTIONS = (10, 20, 50, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 384, 512, 768, 1024], help="in pixels")
    parser.add_argument("--images", type=int, default=5000, help="images of an evaluation")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", metavar="FILE")
    args = parser.parse_args()
    keep_freed_memory(pick_device("auto"))
    state = step.backbone_weights(args.backbone)

    def seconds(batch: int, side: int) -> float:
        ours, _ = step.our_step(args.backbone, state, *step.work(side, batch, 10, pick_device("auto")))
        return measure.medians(measure.alternate({"ours": ours}, args.repeats))["ours"] / 1000

    by_batch = [(batch, batch * 512**2 / 1e6, seconds(batch, 512)) for batch in args.batches]
    by_side = [(side, 2 * side**2 / 1e6, seconds(2, side)) for side in args.sides]
    cases = {count: evaluation.ours(evaluation.make_case(args.images, count, 0)) for count in DETECTIONS}
    scoring = measure.medians(measure.alternate(cases, args.repeats))

    print(f"{measure.environment()}\n\nTraining step, {args.backbone}\n")
    rows = [(f"{batch} x 512 px", size, taken, batch) for batch, size, taken in by_batch]
    rows += [(f"2 x {side} px", size, taken, 2) for side, size, taken in by_side]
    print(
        measure.table(
            ["", "s", "images/s", "s per megapixel"],
            [[name, f"{t:.2f}", f"{images / t:.2f}", f"{t / size:.2f}"] for name, size, t, images in rows],
        )
    )
    print(f"\nEvaluation, {args.images:,} images\n")
    print(measure.table(["detections an image", "ms"], [[n, f"{ms:,.0f}"] for n, ms in scoring.items()]))
    if args.plot:
        plot(args.plot, by_batch, by_side, {n * args.images: ms / 1000 for n, ms in scoring.items()})


def plot(path: str, by_batch: list[tuple], by_side: list[tuple], scoring: dict[int, float]) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    left.plot([batch for batch, _, _ in by_batch], [batch / taken for batch, _, taken in by_batch], "o-")
    left.set(title="Training, 512 px", xlabel="images in a batch", ylabel="images per second")
    pixels, taken = [size for _, size, _ in by_side], [taken for *_, taken in by_side]
    labels = [str(side) for side, *_ in by_side]
    draw_growth(middle, pixels, taken)
    middle.set(title="Training, batches of 2", xlabel="side of an image, px", ylabel="seconds per step")
    middle.set_xticks(pixels, labels, rotation=60)
    draw_growth(right, [n / 1000 for n in scoring], list(scoring.values()))
    right.set(title="Evaluation", xlabel="thousand detections", ylabel="seconds")
    for axes in (left, middle, right):
        axes.set_ylim(bottom=0, top=1.1 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def draw_growth(axes: plt.Axes, sizes: list[float], taken: list[float]) -> None:
    axes.plot(sizes, taken, "o-", label="measured")
    axes.plot([0, sizes[-1]], [0, taken[-1]], "--", color="gray", label="linear")
    axes.legend()


if __name__ == "__main__":
    run_main(main)
