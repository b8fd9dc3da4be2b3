"""A trained model, ready to use: images in, detections out."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detector import assemble, checkpoint
from detector import boxes as box_ops
from detector.device import autocast, keep_freed_memory, pick_device, pick_precision, place
from detector.images import from_pil, read_image
from detector.model import RetinaNet
from detector.postprocess import Postprocess
from detector.resize import STRIDE, resize_image, target_size
from detector.solver import PRECISIONS
from detector.structures import Detections

UNKNOWN_THRESHOLD = 0.3  # for a class in which no evaluation had a hit


class NamedDetections(NamedTuple):
    """The objects found in one image, best first."""

    boxes: Tensor  # (D, 4) float32 xyxy, in pixels of the image as given
    scores: Tensor  # (D,) float32
    names: list[str]  # (D,) of the classes


class Detector:
    """A model with everything needed to use it; see `load`.

    Args:
        thresholds: of each class, the lowest score of a detection that is shown
    """

    def __init__(
        self,
        model: RetinaNet,
        postprocess: Postprocess,
        class_names: Sequence[str],
        category_ids: Sequence[int],
        thresholds: Sequence[float],
        *,
        short_side: int,
        long_side: int,
        precision: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        self.model, self.postprocess = model.eval(), postprocess
        self.class_names, self.category_ids = list(class_names), list(category_ids)
        self.thresholds = torch.tensor(thresholds, dtype=torch.float32)
        self.short_side, self.long_side = short_side, long_side
        self.precision, self.device = precision, device or torch.device("cpu")

    def __call__(self, image: str | Path | np.ndarray | Image.Image, min_score: float | None = None) -> NamedDetections:
        """Objects that reach `min_score` or their class's threshold, in an image.

        It is a file, a PIL image or an array, (h, w, 3) uint8 RGB or (h, w) uint8 gray. Raises UserError if the file
        cannot be read, OSError if PIL cannot decode its image, and ValueError for anything else.
        """
        lowest = self.thresholds if min_score is None else torch.full_like(self.thresholds, min_score)
        ((boxes, scores, labels),) = self.detect([_as_array(image)], float(lowest.min()))
        shown = scores >= lowest[labels]
        names = [self.class_names[label] for label in labels[shown].tolist()]
        return NamedDetections(boxes[shown], scores[shown], names)

    @torch.no_grad()
    def detect(self, images: Sequence[np.ndarray], min_score: float = 1.0) -> list[Detections]:
        """All detections of a batch of images (h, w, 3) uint8 RGB, on the CPU, in each image's own pixels.

        Resizing and postprocessing are those of evaluation, whose score threshold `min_score` can lower; images are
        padded to the largest of them. Raises FloatingPointError if the model's output is not finite.
        """
        postprocess = copy(self.postprocess)
        postprocess.score_threshold = min(postprocess.score_threshold, min_score)
        originals = [image.shape[:2] for image in images]
        sizes = [target_size(height, width, self.short_side, self.long_side) for height, width in originals]
        height, width = (-(-max(sides) // STRIDE) * STRIDE for sides in zip(*sizes))
        batch = np.zeros((len(images), height, width, 3), np.uint8)
        for padded, image, size in zip(batch, images, sizes):
            padded[: size[0], : size[1]] = resize_image(image, *size)
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(self.device)
        with autocast(self.device, self.precision):
            predictions = self.model(pixels, sizes)
        results = []
        for (boxes, scores, labels), size, original in zip(postprocess(predictions, sizes), sizes, originals):
            boxes = box_ops.rescale(boxes, size, original)
            results.append(Detections(boxes.cpu(), scores.cpu(), labels.cpu()))
        return results


def load(path: str | Path, device: str = "auto") -> Detector:
    """The detector of a checkpoint of train.py, or of torchvision's retinanet_resnet50_fpn.

    Raises UserError if the file is no checkpoint or the device is not available.
    """
    content = checkpoint.read(path)
    model, cfg = checkpoint.build_model(content, path)
    where = pick_device(device)
    keep_freed_memory(where)
    place(model, where, channels_last=cfg.channels_last)
    return Detector(
        model,
        assemble.build_postprocess(cfg),
        checkpoint.class_names(content),
        content["category_ids"],
        checkpoint.score_thresholds(content, UNKNOWN_THRESHOLD),
        short_side=cfg.data.short_side,
        long_side=cfg.data.long_side,
        precision=PRECISIONS[pick_precision(cfg.precision, where)[0]],
        device=where,
    )


def _as_array(image: str | Path | np.ndarray | Image.Image) -> np.ndarray:
    if isinstance(image, str | Path):
        return read_image(image)
    array = from_pil(image) if isinstance(image, Image.Image) else image
    given = type(array).__name__
    if isinstance(array, np.ndarray):
        if array.dtype == np.uint8 and array.size and array.ndim == 2:
            return np.repeat(array[:, :, None], 3, axis=2)
        if array.dtype == np.uint8 and array.size and array.shape[2:] == (3,):
            return array
        given = f"{array.dtype} {array.shape}"
    raise ValueError(
        "an image is a path, a PIL image or a uint8 array (height, width, 3) RGB or (height, width) gray, with "
        f"pixels, not {given}"
    )
