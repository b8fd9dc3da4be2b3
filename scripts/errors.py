"""Show what a trained model does wrong, on one page with pictures.

    python scripts/errors.py --checkpoint runs/mine/best.pt [--data annotations.json images/] [--output errors.html]

The page has AP by class, the cost of each kind of error (TIDE's: classification, localisation, both, duplicate,
background, missed), precision against recall, the calibration of the scores, the confusion matrix, and the images
with the most errors. Confusion, pictures and counts use the detections above the best score threshold of their class,
from the run's last evaluation (0.3 if it found none). Everything else uses all detections.

The model runs as in eval.py, on its validation set or on --data. With --detections, a detections.json is used instead.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torchvision.ops import box_convert

from data.analysis import IGNORED, KINDS, MISSED, RIGHT, ImageErrors, classify_errors, confusion, costs
from data.assemble import open_dataset
from data.coco import CocoDataset
from data.coco_eval import score
from data.coco_results import coco_results, from_coco_results
from data.draw import draw_boxes, enlarge
from data.matches import Outcomes, calibration_error, match, precision_recall, reliability
from data.tables import percent
from detector import checkpoint
from detector.device import keep_freed_memory, pick_device
from detector.errors import UserError, run_main
from detector.images import read_image
from detector.inference import UNKNOWN_THRESHOLD
from detector.metrics import AP, Metrics
from eval import detect, results_folder
from scripts.comparison import page, result

COLOURS = {RIGHT: "#2ca02c", IGNORED: "#7f7f7f", "classification": "#e377c2", "localisation": "#ff7f0e"}
COLOURS |= {"both": "#8c564b", "duplicate": "#17becf", "background": "#d62728", MISSED: "#1f77b4"}
ORDER = list(COLOURS)  # right boxes are beneath the others
CURVES = 10  # how many classes get a curve: the worst
NUMBERED = 20  # up to so many classes, the confusion matrix shows numbers
LONG = 24  # longest class name beside it, in letters


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument(
        "--data", nargs=2, metavar=("ANNOTATIONS", "IMAGES"), help="use this data instead of the run's validation set"
    )
    parser.add_argument(
        "--detections", type=Path, metavar="FILE", help="use these detections, in COCO's results format"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: errors.html beside the checkpoint, with --data one folder down",
    )
    parser.add_argument("--images", type=int, default=12, metavar="N", help="number of pictures (default: 12)")
    args = parser.parse_args(argv)
    if args.images < 0:
        raise UserError(f"--images {args.images}: give 0 or more")

    content = checkpoint.read(args.checkpoint)
    model, cfg = checkpoint.build_model(content, args.checkpoint)
    dataset = open_dataset(args.checkpoint, content, cfg, args.data)
    folder = results_folder(args.checkpoint, content, dataset, given=bool(args.data))
    target = args.output or folder / "errors.html"
    page.refuse_folder(target)
    if args.detections:
        given = result.parse(args.detections, json.loads, "give a file that eval.py or train.py wrote", kind=list)
        try:
            detections = from_coco_results(given, dataset.image_ids, dataset.category_ids)
        except UserError as error:
            raise UserError(f"{args.detections}: {error}") from None
        for scores in (of_image.scores for of_image in detections.values()):
            if len(scores) and not (scores.min() >= 0 and scores.max() <= 1):
                raise UserError(
                    f"{args.detections}: has scores outside 0..1; give probabilities, not percent or logits"
                )
    else:
        device = pick_device(cfg.device)
        keep_freed_memory(device)
        detections = detect(model, cfg, dataset, device)
    try:
        metrics = score(dataset.annotations, detections, dataset.category_ids)
    except FloatingPointError as error:
        raise UserError(f"{args.detections or args.checkpoint}: {error}") from None
    results = coco_results(detections, dataset.category_ids)
    thresholds = dict(zip(dataset.category_ids, checkpoint.score_thresholds(content, UNKNOWN_THRESHOLD)))
    sure = [entry for entry in results if entry["score"] >= thresholds[entry["category_id"]]]
    truth, shown = by_image(dataset, dataset.annotations.document()["annotations"]), by_image(dataset, sure)
    judged = {image: classify_errors(truth[image], shown[image]) for image in dataset.image_ids}
    matches = match(dataset.annotations, results)
    lost = costs(dataset.annotations, results)

    names = dataset.annotations.names
    sections = [
        ("", [page.text(summary(dataset, metrics, matches))]),
        ("By class", [by_class(metrics)]),
        ("What the errors cost", kinds(judged, lost)),
        ("Precision and recall", [page.row(curves(matches, names))]),
        ("Calibration of the scores", [page.row([page.figure(calibration(matches), calibration_in_words(matches))])]),
        ("Which classes are confused", confused(dataset, sure)),
        ("The images with the most errors", pictures(dataset, truth, shown, judged, args.images)),
    ]
    page.write(target, f"Errors of {args.checkpoint}", sections)
    print(summary(dataset, metrics, matches))
    print(f"written: {target}")


def summary(dataset: CocoDataset, metrics: Metrics, matches: Outcomes) -> str:
    keys: tuple[AP, ...] = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    parts = [
        f"{dataset.path}: {len(dataset)} images, {dataset.num_boxes} boxes",
        ", ".join(f"{key} {percent(metrics[key])}" for key in keys if metrics[key] >= 0),
    ]
    if (error := calibration_error(matches)) >= 0:
        parts.append(f"calibration error {error:.3f}")
    return "; ".join(filter(None, parts))


def by_image(dataset: CocoDataset, entries: list[dict]) -> dict[int, list[dict]]:
    grouped: dict[int, list[dict]] = {image: [] for image in dataset.image_ids}
    for entry in entries:
        grouped[entry["image_id"]].append(entry)
    return grouped


def by_class(metrics: Metrics) -> str:
    lines = [
        (
            name,
            numbers["boxes"],
            *(percent(numbers[key]) for key in ("AP", "AP50", "AP75", "AR100")),
            "-" if numbers["threshold"] < 0 else f"{numbers['threshold']:.2f}",
        )
        for name, numbers in sorted(metrics["per_class"].items(), key=lambda item: item[1]["AP"])
    ]
    return page.table(("class", "boxes", "AP", "AP50", "AP75", "AR100", "best threshold"), lines)


def kinds(judged: dict[int, ImageErrors], lost: dict[str, float] | None) -> list[str]:
    counts = Counter(kind for of_image in judged.values() for kind in of_image.kinds)
    counts[MISSED] = sum(len(of_image.missed) for of_image in judged.values())
    cost = {kind: f"{100 * lost[kind]:.1f}" if lost else "-" for kind in KINDS}
    header = ("kind of error", "AP50 it costs", "count above the threshold")
    words = (
        "The cost of a kind is the AP50 gained if only this kind were fixed. It is over all detections, the counts "
        f"only over those above the best threshold of their class, {counts[RIGHT]} of which are right."
    )
    if not lost:
        words += " To see the costs, pip install hotcoco."
    return [page.text(words), page.table(header, [(kind, cost[kind], counts[kind]) for kind in KINDS])]


def curves(matches: Outcomes, names: dict[int, str]) -> list[str]:
    """Precision against recall of the worst classes that are detected at all, at IoUs of 0.5 and 0.75."""
    drawn = []
    for index, iou in ((0, 0.5), (5, 0.75)):
        of_class = []
        for class_matches, name in zip(matches.classes, (names[key] for key in sorted(names))):
            precision, recall = precision_recall(class_matches, index)
            if recall.any():
                of_class.append((float(np.trapezoid(precision, recall)), name, precision, recall))
        plot, axis = plt.subplots(figsize=page.FIGURE, layout="constrained")
        for _, name, precision, recall in sorted(of_class, key=lambda curve: curve[0])[:CURVES]:
            axis.plot(recall, precision, label=page.label(name))
        axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        if of_class:
            axis.legend(fontsize=7)
        which = f"the {CURVES} worst of {len(of_class)} classes" if len(of_class) > CURVES else "each class"
        drawn.append(page.figure(plot, f"At an IoU of {iou}: {which} with a right detection."))
    return drawn


def calibration(matches: Outcomes) -> Figure:
    counts, scores, right = reliability(matches)
    filled = counts > 0
    plot, axis = plt.subplots(figsize=page.FIGURE, layout="constrained")
    axis.plot([0, 1], [0, 1], color="#7f7f7f", linewidth=1)
    axis.plot(scores[filled] / counts[filled], right[filled] / counts[filled], "o-", color="#1f77b4")
    axis.set(xlabel="mean score", ylabel="share that is right (IoU 0.5)", xlim=(0, 1), ylim=(0, 1))
    beside = axis.twinx()
    middles = (np.arange(len(counts)) + 0.5) / len(counts)
    beside.bar(middles, counts, width=0.09, color="#1f77b4", alpha=0.15)
    beside.set_ylabel("detections")
    return plot


def calibration_in_words(matches: Outcomes) -> str:
    error = calibration_error(matches)
    if error < 0:
        return "There are no detections."
    return f"On the line, a score equals the share that is right. Expected calibration error {error:.3f}."


def confused(dataset: CocoDataset, sure: list[dict]) -> list[str]:
    counts = confusion(dataset.annotations, sure)
    if counts is None:
        return [page.text("The confusion matrix needs hotcoco (pip install hotcoco) and detections.")]
    matrix, names = counts
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    share[-1] = np.nan  # the background row has no boxes to take a share of
    side = min(12, max(page.FIGURE[0], 1.2 + 0.32 * len(names)))
    plot, axis = plt.subplots(figsize=(side, side * 0.85), layout="constrained")
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_facecolor("#e0e0e0")  # seen where the share is NaN
    size = 8 if len(names) <= NUMBERED else 5
    short = [name if len(name) <= LONG else f"{name[: LONG - 1]}…" for name in names]
    axis.set_xticks(range(len(names)), short, rotation=90, fontsize=size)
    axis.set_yticks(range(len(names)), short, fontsize=size)
    axis.set(xlabel="detected as", ylabel="labelled as")
    if len(names) <= NUMBERED:
        for row, column in np.argwhere(matrix > 0):
            shade = "white" if share[row, column] > 0.5 else "black"
            axis.text(column, row, matrix[row, column], ha="center", va="center", fontsize=7, color=shade)
    words = "Rows are labels, columns are detections; shades are shares of the row. "
    return [page.figure(plot, words + "Grey row: detections without an object. Background column: missed objects.")]


def pictures(
    dataset: CocoDataset,
    truth: dict[int, list[dict]],
    detections: dict[int, list[dict]],
    judged: dict[int, ImageErrors],
    count: int,
) -> list[str]:
    """The images with the most errors, each box in the colour of its kind of error."""
    errors = {
        image: Counter(kind for kind in of_image.kinds if kind in KINDS) + Counter({MISSED: len(of_image.missed)})
        for image, of_image in judged.items()
    }
    worst = sorted((image for image in errors if errors[image]), key=lambda image: -errors[image].total())[:count]
    names = dict(zip(dataset.category_ids, dataset.class_names))  # the file may lack classes that are detected
    index_of = {image: index for index, image in enumerate(dataset.image_ids)}
    shown = []
    for image in worst:
        name, size = dataset.file_names[index_of[image]], dataset.sizes[index_of[image]]
        pixels = torch.from_numpy(read_image(dataset.folder / name, size))
        pixels, zoom = enlarge(pixels.permute(2, 0, 1))
        drawn = [(kind, box, f" {box['score']:.2f}") for kind, box in zip(judged[image].kinds, detections[image])]
        drawn += [(MISSED, truth[image][missed], "") for missed in judged[image].missed]
        drawn.sort(key=lambda entry: -ORDER.index(entry[0]))
        captions = [names[box["category_id"]] + text for _, box, text in drawn]
        colours = [COLOURS[kind] for kind, _, _ in drawn]
        sides = torch.tensor([box["bbox"] for _, box, _ in drawn], dtype=torch.float32)
        pixels = draw_boxes(pixels, box_convert(sides, "xywh", "xyxy") * zoom, captions, colours)
        words = ", ".join(f"{number} {kind}" for kind, number in errors[image].most_common())
        shown.append(page.photo(pixels.permute(1, 2, 0).numpy(), f"{name}: {words}", "plot"))
    if not shown:
        return [page.text("No errors among these detections.")]
    legend = "".join(f'<li style="color:{colour}">{kind}</li>' for kind, colour in COLOURS.items() if kind != IGNORED)
    return [f"<ul>{legend}</ul>", page.row(shown)]


if __name__ == "__main__":
    run_main(main)
