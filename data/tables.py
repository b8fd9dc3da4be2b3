"""Metrics as people read them."""

from detector.metrics import AP, AR, Metrics

AP_NAMES: tuple[AP, ...] = ("AP", "AP50", "AP75", "AP80", "AP90", "APs", "APm", "APl")
AR_NAMES: tuple[AR, ...] = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
# COCO's sizes go by the annotation's `area`, which in COCO is the mask's.
SIZES: tuple[tuple[AP, AR, str], ...] = (
    ("APs", "ARs", "no small boxes (area < 32^2 px)"),
    ("APm", "ARm", "no medium boxes (area 32^2 to 96^2 px)"),
    ("APl", "ARl", "no large boxes (area > 96^2 px)"),
)


def metrics_line(metrics: Metrics) -> str:
    """The main numbers, in percent; "-" for -1."""
    names: tuple[AP, ...] = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return ", ".join(f"{name} {percent(metrics[name])}" for name in names)


def metrics_table(metrics: Metrics) -> str:
    """The numbers over all classes, in percent; "-" for -1 and, below, why. Says where to read on if AP is 0."""
    lines = [f"{metrics['images']} images, {metrics['engine']}, in percent", ""]
    for names in (AP_NAMES, AR_NAMES):
        lines.append("".join(f"{name:>7}" for name in names))
        lines.append("".join(f"{percent(metrics[name]):>7}" for name in names))
    missing = explain_missing(metrics)
    if metrics["AP"] == 0:
        missing.append("AP is 0: docs/troubleshooting.md says why that may be")
    return "\n".join(lines + (["", *missing] if missing else []))


def per_class_table(metrics: Metrics) -> str:
    """One line a class, in the order of the file: ground-truth boxes; AP, AP50, AP75 in percent."""
    per_class = metrics["per_class"]
    width = max(len(name) for name in ["class", *per_class])
    lines = [f"{'class':<{width}}{'boxes':>9}{'AP':>7}{'AP50':>7}{'AP75':>7}"]
    for name, values in per_class.items():
        numbers = "".join(f"{percent(values[key]):>7}" for key in ("AP", "AP50", "AP75"))
        lines.append(f"{name:<{width}}{values['boxes']:>9}{numbers}")
    return "\n".join(lines)


def explain_missing(metrics: Metrics) -> list[str]:
    """One line for each reason why numbers are missing; empty if none is."""
    if metrics["images"] == 0:
        return ["all numbers are unknown (-1 in the files): no images were scored"]
    if metrics["AP"] < 0:
        return ["all numbers are unknown (-1 in the files): the validation set has no boxes, apart from crowds"]
    unknown = "unknown (-1 in the files)"
    lines = [
        f"{ap} and {ar} are {unknown}: the validation set has {reason}" for ap, ar, reason in SIZES if metrics[ap] < 0
    ]
    empty = [name for name, values in metrics["per_class"].items() if values["AP"] < 0]
    if empty:
        names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        lines.append(f"AP of {names} is {unknown} and not in the mean: the validation set has no such boxes")
    return lines


def percent(value: float) -> str:
    """One decimal; "-" for -1."""
    return "-" if value < 0 else f"{100 * value:.1f}"
