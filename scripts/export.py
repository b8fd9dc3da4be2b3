"""Export a trained model as one ONNX file, and check it against PyTorch.

    python scripts/export.py --checkpoint runs/mine/best.pt --format onnx [--output mine.onnx]
    python scripts/run_onnx.py mine.onnx photo.jpg        runs it without torch

The model takes a batch of images that all have one size; any size works. Resize them first: the sizes of short and
long side are in the file's metadata, and scripts/run_onnx.py does it in two lines. You choose what the graph does:

    --preprocessing  inside: images (B, H, W, 3) uint8 RGB, normalised and padded in the graph
                     outside: images (B, 3, H, W) float32, normalised by the metadata's mean and std, H and W multiples
                     of 32
    --nms            inside: boxes (D, 4) x1, y1, x2, y2 in pixels of the input, scores (D,), labels (D,) and
                     image (D,), the index of its image; best first, as in evaluation
                     outside: boxes (B, A, 4) and scores (B, A, C) of all anchors

The check runs PyTorch and onnxruntime, both in float32, on --images real images (20) of the checkpoint's validation set
or of --data. Boxes must agree within 0.05 pixels and scores within 0.0001, otherwise the file is not kept. Up to 2% of
the boxes may differ where NMS kept the other of two boxes with equal scores.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms
from tqdm import tqdm

from data.assemble import open_dataset
from data.coco import CocoDataset
from detector import assemble, atomic, checkpoint
from detector.boxes import iou
from detector.config import Config
from detector.device import keep_freed_memory
from detector.errors import UserError, run_main
from detector.model import MEAN, STD, RetinaNet
from detector.postprocess import Postprocess
from detector.resize import STRIDE
from detector.structures import Predictions

PIXELS, SCORE = 0.05, 1e-4  # tolerances of boxes and scores
TIES = 0.02  # of the boxes may be such that NMS kept another, as good within rounding
TIMED = 10  # images

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes, scores and labels of an image

# Comes before the network if preprocessing is inside. If torch.export traced it too, each size in the network would be
# an expression of the size before padding, and the export would take several times as long.
HEAD = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
head (uint8[B, h, w, 3] images) => (float[B, 3, H, W] pixels, float[2] size) {{
  image_planes = Transpose <perm = [0, 3, 1, 2]> (images)
  image_values = Cast <to = 1> (image_planes)
  image_mean = Constant <value = float[1, 3, 1, 1] {{{mean}}}> ()
  image_std = Constant <value = float[1, 3, 1, 1] {{{std}}}> ()
  image_centred = Sub (image_values, image_mean)
  image_normal = Div (image_centred, image_std)
  image_sides = Shape <start = 1, end = 3> (images)
  image_multiple = Constant <value_int = {multiple}> ()
  image_negative = Neg (image_sides)
  image_missing = Mod (image_negative, image_multiple)
  image_nothing = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()
  image_padding = Concat <axis = 0> (image_nothing, image_missing)
  pixels = Pad (image_normal, image_padding)
  size = Cast <to = 1> (image_sides)
}}
"""
# Follows the network if NMS is inside. `kept` are the detections whose rank in their image is below the limit.
TAIL = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
tail (float[B, A, C] all_scores, float[B, A, 4] all_boxes)
  => (float[D, 4] boxes, float[D] scores, int64[D] labels, int64[D] image) {{
  limit = Constant <value_int = {limit}> ()
  iou = Constant <value_float = {iou}> ()
  least = Constant <value_float = {least}> ()
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  first_axis = Constant <value_ints = [0]> ()
  columns = Constant <value_ints = [0, 2]> ()
  two = Constant <value = double {{2.0}}> ()
  by_class = Transpose <perm = [0, 2, 1]> (all_scores)
  chosen = NonMaxSuppression (all_boxes, by_class, limit, iou, least)
  score = GatherND (by_class, chosen)
  of_image = Gather <axis = 1> (chosen, zero)

  of_image_double = Cast <to = 11> (of_image)
  score_double = Cast <to = 11> (score)
  far = Mul (of_image_double, two)
  place = Sub (far, score_double)
  count = Shape (score)
  sorted_place, order = TopK <axis = 0, largest = 0> (place, count)

  ordered_image = Gather (of_image, order)
  batch = Shape <start = 0, end = 1> (all_scores)
  off_on = Constant <value_ints = [0, 1]> ()
  hot = OneHot <axis = -1> (ordered_image, batch, off_on)
  of_each = ReduceSum <keepdims = 0> (hot, first_axis)
  starts = CumSum <exclusive = 1> (of_each, zero)
  start = Gather (starts, ordered_image)
  total = Squeeze (count, first_axis)
  at = Range (zero, total, one)
  rank = Sub (at, start)
  kept = Less (rank, limit)
  best = Compress <axis = 0> (order, kept)

  image = Gather (of_image, best)
  scores = Gather (score, best)
  chosen_best = Gather (chosen, best)
  class_place = Constant <value_int = 1> ()
  labels = Gather <axis = 1> (chosen_best, class_place)
  anchor = Gather <axis = 1> (chosen_best, columns)
  boxes = GatherND (all_boxes, anchor)
}}
"""


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 torch.onnx needs it
    except ImportError as error:
        raise UserError(f"--format onnx: {error.name} is missing; pip install onnx onnxscript onnxruntime") from None

    keep_freed_memory()
    content = checkpoint.read(args.checkpoint)
    model, cfg = checkpoint.build_model(content, args.checkpoint)
    dataset = open_dataset(args.checkpoint, content, cfg, args.data)
    postprocess = assemble.build_postprocess(cfg)
    exported = Exported(model, postprocess, preprocessing=args.preprocessing == "inside", nms=args.nms == "inside")
    about = metadata(content, cfg, args)
    target = args.output or Path(args.checkpoint).with_suffix(".onnx")
    if target.is_dir():
        raise UserError(f"--output {target}: is a folder; give the name of a file, such as {target / 'mine.onnx'}")
    print(f"exporting {args.checkpoint}, which takes a minute", flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(target) as beside:
            beside.touch()  # fails now, not after a minute, if it cannot be written
            graph = to_onnx(exported, about)
            onnx.save(graph, beside)
            session = onnxruntime.InferenceSession(str(beside), providers=["CPUExecutionProvider"])
            worst = check(exported, session, dataset, args.images)
    except OSError as error:
        raise UserError(f"--output {target}: cannot be written ({error.strerror or error})") from None
    compared = (
        f"{worst['boxes']} boxes of {worst['images']} images agree with PyTorch, at worst within "
        f"{worst['pixels']:.4f} pixels and a score of {worst['score']:.6f}"
    )
    if not worst["boxes"]:
        nothing = f"the model finds no object in {worst['images']} images"
        compared = f"the check compared nothing, because {nothing}; give others with --data"
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, opset {graph.opset_import[0].version}; {compared}")
    speed(exported, session, dataset)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--format", required=True, choices=["onnx"])
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: beside the checkpoint, .onnx")
    parser.add_argument("--preprocessing", choices=["inside", "outside"], default="inside", help="(%(default)s)")
    parser.add_argument("--nms", choices=["inside", "outside"], default="inside", help="(%(default)s)")
    parser.add_argument(
        "--data",
        nargs=2,
        metavar=("ANNOTATIONS", "IMAGES"),
        help="check on this data instead of the run's validation set",
    )
    parser.add_argument("--images", type=int, default=20, metavar="N", help="number of images to check (default: 20)")
    args = parser.parse_args(argv)
    if args.images < 1:
        raise UserError(f"--images {args.images}: give at least 1")
    return args


def metadata(content: checkpoint.Content, cfg: Config, args: argparse.Namespace) -> dict[str, Any]:
    """What an ONNX file says about its model, besides the graph."""
    return {
        "class_names": checkpoint.class_names(content),
        "category_ids": content["category_ids"],
        "score_thresholds": checkpoint.score_thresholds(content),
        "short_side": cfg.data.short_side,
        "long_side": cfg.data.long_side,
        "mean": MEAN,
        "std": STD,
        "preprocessing": args.preprocessing,
        "nms": args.nms,
    }


class Exported(nn.Module):
    """The detector as one function of tensors; returns (boxes (B, A, 4), scores (B, A, C)).

    With `nms`, scores are 0 in cells that evaluation would not pass to NMS: all but the `top_k` best of each level.
    """

    def __init__(self, model: RetinaNet, postprocess: Postprocess, *, preprocessing: bool, nms: bool):
        super().__init__()
        self.model, self.postprocess = model, postprocess
        self.preprocessing, self.nms = preprocessing, nms

    def forward(self, pixels: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of normalised images, padded to multiples of 32. `size`: their (height, width) before padding, if it differs.

        With `preprocessing`, HEAD makes both from the images.
        """
        predictions = self.predictions(pixels)
        boxes = self.postprocess.coder.decode(predictions.deltas, predictions.anchors)
        x, y = boxes[..., 0::2].clamp(0, pixels.shape[3]), boxes[..., 1::2].clamp(0, pixels.shape[2])
        if size is not None:
            x, y = x.minimum(size[1]), y.minimum(size[0])
        boxes = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)
        scores = predictions.logits.sigmoid()
        if self.nms:
            scores = torch.cat([self.best_of(level) for level in scores.split(predictions.levels, dim=1)], dim=1)
        return boxes, scores

    def predictions(self, images: Tensor) -> Predictions:
        """Like RetinaNet.forward, but for normalised images and with the anchors inside the graph."""
        levels = self.model.fpn(self.model.backbone(images))
        logits, deltas = self.model.head(levels)
        map_sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        anchors = self.model.anchors.build(map_sizes, (images.shape[-2], images.shape[-1]))
        counts = tuple(height * width * self.model.anchors.per_position for height, width in map_sizes)
        return Predictions(logits, deltas, anchors.to(deltas.device), counts)

    def best_of(self, scores: Tensor) -> Tensor:
        """Scores (B, a, C) of a level, set to 0 below the `top_k`-th of each image."""
        flat = scores.flatten(1)
        filled = F.pad(flat, (0, self.postprocess.top_k))  # small levels have fewer scores
        least = filled.topk(self.postprocess.top_k).values[:, -1, None, None]
        return torch.where(scores >= least, scores, 0)


def to_onnx(exported: Exported, about: dict):
    """The graph as an onnx.ModelProto with `about` in its metadata."""
    import onnx

    dynamic = torch.export.Dim.DYNAMIC
    # No side is a multiple of another, so the exporter takes none for a constant.
    example = [torch.zeros(2, 3, 5 * STRIDE, 7 * STRIDE)]
    inputs = ["images"]
    free: list[dict | None] = [{0: dynamic, 2: dynamic, 3: dynamic}]
    if exported.preprocessing:
        example.append(torch.tensor([5.0 * STRIDE, 7.0 * STRIDE]))
        inputs, free = ["pixels", "size"], [*free, None]
    names = ["all_boxes", "all_scores"] if exported.nms else ["boxes", "scores"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about itself
        program = torch.onnx.export(
            exported,
            tuple(example),
            input_names=inputs,
            output_names=names,
            dynamic_shapes=tuple(free),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # the older exporter returns none
    graph = program.model_proto
    version = {"ir": graph.ir_version, "opset": graph.opset_import[0].version}
    if exported.preprocessing:
        mean, std = (", ".join(map(str, values)) for values in (MEAN, STD))
        head = onnx.parser.parse_model(HEAD.format(**version, mean=mean, std=std, multiple=STRIDE))
        graph = onnx.compose.merge_models(head, graph, io_map=[(name, name) for name in inputs])
    if exported.nms:
        after = exported.postprocess
        tail = onnx.parser.parse_model(
            TAIL.format(
                **version,
                limit=after.max_detections,
                iou=f"{after.nms_iou:.9f}",
                least=f"{after.score_threshold:.9f}",
            )
        )
        graph = onnx.compose.merge_models(graph, tail, io_map=[(name, name) for name in names])
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in about.items()})
    onnx.checker.check_model(graph)
    return graph


def images_of(exported: Exported, dataset: CocoDataset, count: int):
    """Inputs of the graph, (1, ...) each: images spread over the set, resized as in evaluation."""
    count = min(count, len(dataset))
    for number in range(count):
        image = dataset[number * len(dataset) // count][0]  # (3, h, w) uint8
        if exported.preprocessing:
            yield image.permute(1, 2, 0)[None].contiguous().numpy()
        else:
            pixels = (image.float() - exported.model.mean) / exported.model.std
            padding = (0, -image.shape[2] % STRIDE, 0, -image.shape[1] % STRIDE)
            yield F.pad(pixels, padding)[None].numpy()


@torch.no_grad()
def reference(exported: Exported, images: np.ndarray) -> list[Found]:
    """What the code that evaluation uses finds in each image."""
    pixels = torch.from_numpy(images)
    if exported.preprocessing:
        size = tuple(images.shape[1:3])
        pixels = pixels.permute(0, 3, 1, 2)
        pixels = F.pad(pixels, (0, -size[1] % STRIDE, 0, -size[0] % STRIDE))
        predictions = exported.model(pixels, [size] * len(images))
    else:
        size = tuple(images.shape[2:])
        predictions = exported.predictions(pixels)
    detections = exported.postprocess(predictions, [size] * len(images))
    return [(boxes.numpy(), scores.numpy(), labels.numpy()) for boxes, scores, labels in detections]


def onnx_detections(exported: Exported, session, images: np.ndarray) -> list[Found]:
    """The same from onnxruntime. If NMS is outside the graph, this project's NMS follows."""
    outputs = session.run(None, {"images": images})
    by_name = {output.name: value for output, value in zip(session.get_outputs(), outputs)}
    boxes, scores = by_name["boxes"], by_name["scores"]
    if exported.nms:
        masks = [by_name["image"] == index for index in range(len(images))]
        return [(boxes[mask], scores[mask], by_name["labels"][mask]) for mask in masks]
    after = exported.postprocess
    detections = []
    for of_image, scores_of_image in zip(boxes, scores):
        anchor, label = np.nonzero(scores_of_image > after.score_threshold)
        found = of_image[anchor], scores_of_image[anchor, label], label
        keep = batched_nms(*map(torch.from_numpy, found), after.nms_iou)[: after.max_detections].numpy()
        detections.append((found[0][keep], found[1][keep], label[keep]))
    return detections


def check(exported: Exported, session, dataset: CocoDataset, count: int) -> dict[str, float]:
    """The worst differences over real images, one and two at a time. Raises UserError if one is too large."""
    worst = {"images": 0, "boxes": 0, "ties": 0, "pixels": 0.0, "score": 0.0}
    for images in tqdm(images_of(exported, dataset, count), total=min(count, len(dataset)), unit="image"):
        # Also a batch with the same image upside down, and another size: the image transposed.
        turned = images.transpose(0, 2, 1, 3) if exported.preprocessing else images.transpose(0, 1, 3, 2)
        pair = np.concatenate([images, images[:, ::-1] if exported.preprocessing else images[:, :, ::-1]])
        for batch in (images, pair, np.ascontiguousarray(turned)):
            for theirs, ours in zip(reference(exported, batch), onnx_detections(exported, session, batch), strict=True):
                compare(theirs, ours, exported.postprocess, worst)
        worst["images"] += 1
    if worst["ties"] > max(1, TIES * worst["boxes"]):
        raise UserError(
            f"the export differs from the model: in {worst['ties']} places onnxruntime finds another box than PyTorch, "
            f"and in {worst['boxes']} the same; nothing is kept"
        )
    return worst


def compare(theirs: Found, ours: Found, after: Postprocess, worst: dict[str, float]) -> None:
    """Match two sets of detections. Raises UserError if one has a detection that the other lacks.

    Of two boxes whose scores are equal within rounding, NMS may keep one here and the other there: that is a tie.
    """
    # A score at the threshold may fall on either side of it.
    edge = after.score_threshold + SCORE
    if max(len(theirs[0]), len(ours[0])) >= after.max_detections:
        edge = max(edge, min(scores.min() for _, scores, _ in (theirs, ours) if len(scores)) + SCORE)
    alone, free = np.ones(len(theirs[0]), bool), np.ones(len(ours[0]), bool)
    for index, (box, score, label) in enumerate(zip(*theirs)):
        gap = np.abs(ours[0] - box).max(axis=1, initial=0)
        gap = np.where(free & (ours[2] == label) & (np.abs(ours[1] - score) <= SCORE), gap, math.inf)
        if gap.min(initial=math.inf) <= PIXELS:
            best = gap.argmin()
            alone[index] = free[best] = False
            worst["boxes"] += 1
            worst["pixels"] = max(worst["pixels"], float(gap[best]))
            worst["score"] = max(worst["score"], float(abs(ours[1][best] - score)))
    of_pytorch, of_onnx = (
        [column[unmatched] for column in side] for side, unmatched in ((theirs, alone), (ours, free))
    )
    for name, lacking, side, other in (
        ("PyTorch", "onnxruntime", of_pytorch, of_onnx),
        ("onnxruntime", "PyTorch", of_onnx, of_pytorch),
    ):
        for box, score, label in zip(*side):
            if score > edge and not _suppressed(box, score, label, other, after.nms_iou):
                raise UserError(
                    f"the export differs from the model: {name} finds {np.round(box, 2).tolist()} with {score:.5f}, "
                    f"and {lacking} does not; nothing is kept"
                )
    worst["ties"] += int((of_pytorch[1] > edge).sum())


def _suppressed(box: np.ndarray, score: float, label: int, others: list, nms_iou: float) -> bool:
    """Whether one of the other side's boxes without a match is of this class, as good within rounding, and overlaps."""
    overlap = iou(torch.from_numpy(box[None].astype(float)), torch.from_numpy(others[0].astype(float)))[0].numpy()
    return bool(((others[2] == label) & (others[1] >= score - SCORE) & (overlap > nms_iou - 1e-3)).any())


def speed(exported: Exported, session, dataset: CocoDataset) -> None:
    """Print the images per second of each, one image at a time and taking turns."""
    images = list(images_of(exported, dataset, TIMED))
    calls: dict[str, Callable[[np.ndarray], object]] = {
        "PyTorch": lambda image: reference(exported, image),
        "onnxruntime": lambda image: session.run(None, {"images": image}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for image in (images[0], *images):  # the first warms up
        for name, call in calls.items():
            start = time.perf_counter()
            call(image)
            seconds[name].append(time.perf_counter() - start)
    rates = {name: 1 / float(np.median(taken[1:])) for name, taken in seconds.items()}
    ratio = rates["onnxruntime"] / rates["PyTorch"]
    print(", ".join(f"{name} {value:.2f} images/s" for name, value in rates.items()) + f" on the CPU: {ratio:.2f}x")


if __name__ == "__main__":
    run_main(main)
