"""The HTML page that scripts/compare.py --html writes: its tables, curves and pictures."""

import json
import math
import statistics
import textwrap
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt

from data.coco import CocoDataset
from data.coco_results import from_coco_results
from data.draw import validation_pictures
from data.transforms import EvalTransform
from detector.errors import UserError
from scripts.comparison import page, result, tuning
from scripts.comparison.differences import Difference, in_digits
from scripts.comparison.rows import Costs, Row, gradient_shares

PICTURES = 4  # validation images
COLUMNS, CHARACTERS = 3, 70  # of a legend: at most so many columns, and characters beside each other
BANDS = {"easy": "#9ecae1", "medium": "#3182bd", "outlier": "#d62728"}
NO_GRADIENTS = (
    "No run recorded its gradient. Training records it every tensorboard.gradients steps and at the end, unless that "
    "is 0."
)
IOUS = [round(0.5 + 0.05 * i, 2) for i in range(10)]


def write(path: Path, compared: Sequence[Any], header: Sequence[str], together: Sequence[str]) -> None:
    """Write the page from the sets that compare.py has `compared`, and the lines on all of them `together`.

    Raises UserError if that fails.
    """
    sections = []
    for comparison in compared:
        before = [comparison.title] * (len(compared) > 1)
        sections += [
            (": ".join([*before, *[title] * bool(title)]), parts) for title, parts in of_set(comparison, header)
        ]
    if together:
        sections.insert(0, (f"All {len(compared)} sets", [page.text(together[0]), *lists(together[1:])]))
    names = dict.fromkeys(row.name for comparison in compared for row in comparison.rows)
    page.write(path, "Comparison of " + ", ".join(names), sections)


def lists(lines: Sequence[str]) -> list[str]:
    """Lines of Markdown: those that begin with a hyphen as items, others as paragraphs."""
    items = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return [*([page.items(items)] if items else []), *(page.text(line) for line in lines if line[:2] not in ("", "- "))]


def of_set(comparison: Any, header: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The sections of one set, each with its title."""
    known = [row for row in comparison.rows if row.runs]
    heading = comparison.verdicts[0] if comparison.verdicts else ""
    sections = [
        ("", [page.text(summary(known)), page.table(header, comparison.table, left=3), *lists(comparison.warnings)]),
        ("Better, or chance?", differences(comparison.results, heading, comparison.detectable)),
        ("Notes and published numbers", lists(comparison.notes)),
        ("During training", curves(known)),
        ("How precise the boxes are", [by_iou(known)] if known else []),
        ("By class", [by_class(known)]),
        ("Time and memory", costs(known, comparison.cost)),
        ("Where the gradient comes from", gradients(known)),
        ("How the losses were tuned", tuned(known)),
        ("The same images", pictures(known)),
    ]
    return [(title, parts) for title, parts in sections if parts]


def summary(rows: list[Row]) -> str:
    if not rows:
        return "All runs failed."
    runs = [run for row in rows for run in row.runs]
    machines = dict.fromkeys(
        f"{run['machine']['device']}, torch {run['machine']['torch']}" for run in runs if "machine" in run
    )
    sets = dict.fromkeys(str(run["config"].get("data", {}).get("val", {}).get("annotations")) for run in runs)
    images = dict.fromkeys(str(run["metrics"].get("images")) for run in runs)
    return (
        f"{len(runs)} runs of {len(rows)} losses, scored on the {' / '.join(images)} images of {' / '.join(sets)}; "
        f"on {' / '.join(machines) or 'an unknown machine'}. AP in percent, mean and standard deviation over "
        "seeds."
    )


def differences(results: list[Difference], heading: str, detectable: list[str]) -> list[str]:
    if not results:
        return []
    drawn = [(diff, diff.mean, diff.interval) for diff in results if diff.mean is not None and diff.interval]
    lines = [
        (
            diff.name,
            diff.verdict + (f": {diff.reason}" if diff.reason else ""),
            "-" if diff.mean is None else f"{diff.mean:+.1f}",
            *("-" if end is None else f"{end:+.1f}" for end in diff.interval or (None, None)),
            "-" if diff.p is None else in_digits(diff.p),
        )
        for diff in results
    ]
    table = page.table(("run", "verdict", "difference", "from", "to", "p"), lines, left=2)
    parts = [page.text(heading), table, *map(page.text, detectable)]
    if not drawn:
        return parts
    plot, axis = plt.subplots(figsize=(page.FIGURE[0], 1 + 0.35 * len(drawn)), layout="constrained")
    colours = {"better": "#2ca02c", "worse": "#d62728"}
    for place, (diff, mean, interval) in enumerate(reversed(drawn)):
        colour = colours.get(diff.verdict, "#7f7f7f")
        axis.plot(interval, [place, place], color=colour, linewidth=3)
        axis.plot([mean], [place], "o", color=colour)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(drawn)), [diff.name for diff, _, _ in reversed(drawn)])
    axis.set_xlabel("difference from the baseline, percent")
    words = (
        "Difference from the baseline and its 95% interval over other seeds and other images (over images only if a "
        "row has one seed). Green is better and red is worse, after the correction."
    )
    return [*parts, page.figure(plot, words)]


def axes_of(rows: list[Row], xlabel: str, ylabel: str):
    """A figure, its axes, and a colour and line style for each row."""
    plot, axis = plt.subplots(figsize=page.FIGURE, layout="constrained")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    styles = {row.name: {"color": f"C{i % 10}", "linestyle": ("-", "--")[i // 10 % 2]} for i, row in enumerate(rows)}
    return plot, axis, styles


def legend_below(axis) -> None:
    """Below the axes, where it hides no curve. The figure grows by its height."""
    handles, labels = axis.get_legend_handles_labels()
    labels = [textwrap.fill(label, CHARACTERS) for label in labels]
    columns = max(1, min(COLUMNS, CHARACTERS // (max(map(len, labels)) + 4)))
    width, height = page.FIGURE
    lines = sum(label.count("\n") + 1 for label in labels)
    axis.figure.set_size_inches(width, height + 0.17 * math.ceil(lines / columns))
    axis.legend(handles, labels, fontsize=7, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def spread(values: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over seeds of lists of equal length."""
    array = np.array(values, dtype=float)
    return array.mean(axis=0), array.std(axis=0, ddof=1) if len(array) > 1 else np.zeros(array.shape[1])


def curves(rows: list[Row]) -> list[str]:
    drawn = [curve(rows, "curve", name, 100, f"{name}, percent", f"{name} of each evaluation") for name in result.CURVE]
    words = "probability of the true class"
    drawn.append(curve(rows, "probability", result.PROBABILITY, 1, words, f"The {words} at positive anchors"))
    return [page.row(known)] if (known := [figure for figure in drawn if figure]) else []


def curve(rows: list[Row], key: str, name: str, factor: float, ylabel: str, caption: str) -> str | None:
    """The value `name` of the points under a result's `key` by step; None if no row has it in all its runs."""
    plot, axis, styles = axes_of(rows, "training step", ylabel)
    for row in rows:
        by_step = [{point["step"]: point.get(name) for point in run.get(key, ())} for run in row.runs]
        steps = sorted(set.intersection(*map(set, by_step)))
        steps = [step for step in steps if all(values[step] is not None for values in by_step)]
        if steps:
            mean, deviation = spread([[factor * values[step] for step in steps] for values in by_step])
            axis.plot(steps, mean, marker=".", label=page.label(row.name), **styles[row.name])
            axis.fill_between(
                steps, mean - deviation, mean + deviation, color=styles[row.name]["color"], alpha=0.15, linewidth=0
            )
    if not axis.has_data():
        plt.close(plot)
        return None
    legend_below(axis)
    return page.figure(plot, f"{caption}; the band is one standard deviation.")


def by_iou(rows: list[Row]) -> str:
    plot, axis, styles = axes_of(rows, "IoU threshold", "AP at this threshold, minus the first row's")
    first = None
    for row in rows:
        values = [run["metrics"]["by_iou"] for run in row.runs if len(run["metrics"].get("by_iou", ())) == len(IOUS)]
        if values:
            mean = 100 * np.array(values).mean(axis=0)
            first = mean if first is None else first
            axis.plot(
                IOUS, mean - first, marker=".", label=page.label(f"{row.name} ({mean.mean():.1f})"), **styles[row.name]
            )
    if first is not None:
        legend_below(axis)
    return page.figure(plot, "AP by IoU threshold as the distance from the first row; in brackets, AP itself.")


def by_class(rows: list[Row]) -> str:
    classes = dict.fromkeys(name for row in rows for run in row.runs for name in run["metrics"].get("per_class", ()))
    lines = []
    for name in classes:
        aps = [[run["metrics"].get("per_class", {}).get(name, {}).get("AP", -1) for run in row.runs] for row in rows]
        aps = [[value for value in values if value >= 0] for values in aps]
        lines.append([name, *(f"{100 * statistics.fmean(values):.1f}" if values else "-" for values in aps)])
    return page.table(("class", *(row.name for row in rows)), lines)


def costs(rows: list[Row], cost: Costs) -> list[str]:
    def beside(known: dict[str, float], row: Row, digits: int, unit: float) -> tuple[str, str]:
        value, first = known.get(row.name), known.get(rows[0].name)
        ratio = f"{100 * (value / first - 1):+.1f}%" if value and first else "-"
        return f"{value / unit:.{digits}f}" if value else "-", ratio

    remark = [page.text(cost.remark)] if cost.remark else []
    if not (cost.seconds or cost.memory):
        return remark
    lines = [(row.name, *beside(cost.seconds, row, 3, 1), *beside(cost.memory, row, 2, 1e9)) for row in rows]
    return [*remark, page.table(("run", "seconds a step", "from the first", "peak GB", "from the first"), lines)]


def gradients(rows: list[Row]) -> list[str]:
    drawn = []
    for kind, words in (("class", "cells"), ("box", "box coordinates")):
        shares = {row.name: known for row in rows if (known := gradient_shares(row, kind))}
        if not shares:
            continue
        plot, axis = plt.subplots(figsize=(page.FIGURE[0], 1.3 + 0.3 * len(shares)), layout="constrained")
        left = np.zeros(len(shares))
        for band, colour in BANDS.items():
            width = np.array([of_row[band] for of_row in reversed(shares.values())])
            axis.barh(range(len(shares)), width, left=left, color=colour, label=band)
            left += width
        axis.set_yticks(range(len(shares)), list(reversed(shares)))
        axis.set(xlabel=f"share of the gradient of {words}", xlim=(0, 1))
        axis.legend(fontsize=7, ncols=COLUMNS, loc="lower center", bbox_to_anchor=(0.5, 1))
        words = (
            f"{words.capitalize()}: easy means a gradient norm below 0.1, outlier above 0.9. Mean of all observations."
        )
        drawn.append(page.figure(plot, words))
    return [page.row(drawn)] if drawn else [page.text(NO_GRADIENTS)]


def tuned(rows: list[Row]) -> list[str]:
    tunings = {}
    for row in rows:
        for seed, of_seed in zip(row.seeds, row.tunings):
            tunings[f"{row.name} seed {seed}" if len(row.tunings) > 1 else row.name] = of_seed
    if not tunings:
        return []
    count = max(len(found["trials"]) for found in tunings.values())
    lines = []
    for name, found in tunings.items():
        aps = [trial["AP"] for trial in found["trials"]]
        cells = (f"{100 * ap:.1f}" if ap is not None else "-" for ap in aps + [None] * (count - len(aps)))
        lines.append([name, ", ".join(found["keys"]), *cells, tuning.described([found])])
    words = (
        "AP of tuning runs, trained on three quarters of the training images and scored on the rest. If the best value "
        "is at an end of the range, a wider range may hold a better one. Trial 1 has the values of the variant's file."
    )
    numbers = map(str, range(1, count + 1))
    return [page.text(words), page.table(("run", "option", *numbers, "chosen"), lines, left=2)]


def pictures(rows: list[Row]) -> list[str]:
    """Validation images with the ground truth and the detections of each row's first seed."""
    sheets: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    missing = []
    for row in rows:
        try:
            sheets[row.name] = list(islice(of_run(row.runs[0]), PICTURES))
        except UserError as error:
            missing.append(f"{row.name}: no pictures ({error})")
    parts = []
    for pairs in zip(*sheets.values()):
        images = [("labels", pairs[0][0]), *zip(sheets, (found for _, found in pairs))]
        parts.append(page.row(page.photo(image.permute(1, 2, 0).numpy(), name) for name, image in images))
    if parts:
        words = "The first seed. Drawn are the highest-scoring boxes of the whole set, as many as it has labels."
        parts.insert(0, page.text(words))
    return [*parts, *([page.items(missing)] if missing else [])]


def of_run(run: dict[str, Any]):
    """Pictures of a run from its folder. Raises UserError if the folder is gone."""
    config = run["config"]
    folder = Path(run.get("folder") or Path(config.get("output", "runs")) / config.get("run", ""))
    metrics = result.parse(folder / "metrics.json", json.loads, "its run folder is missing")
    if metrics.get("AP") != run["metrics"]["AP"]:
        raise UserError(f"{folder} holds another run")
    entries = result.parse(folder / "detections.json", json.loads, "it has no detections", kind=list)
    data = config["data"]
    size = EvalTransform(data["short_side"], data["long_side"])
    val = data["val"]
    dataset = CocoDataset(val["annotations"], val["images"], size, trust=data.get("trust", False))
    classes = {*dataset.category_ids}  # the model may also find classes that another set's file lacks
    entries = [entry for entry in entries if entry.get("category_id") in classes]
    detections = from_coco_results(entries, dataset.image_ids, dataset.category_ids)
    return validation_pictures(dataset, detections, PICTURES)
