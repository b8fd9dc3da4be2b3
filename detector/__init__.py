"""Model, losses, training step and checkpoints. In a notebook: `from detector import load`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from detector.inference import Detector


def load(path: "str | Path", device: str = "auto") -> "Detector":
    """The detector of a checkpoint: `load("best.pt")(image)` gives boxes, scores, names. See detector/inference.py."""
    from detector.inference import load  # lazy, so that importing a loss stays light

    return load(path, device)
