"""Pure box arithmetic. Boxes are (..., 4) as (x1, y1, x2, y2) in pixels."""

from collections.abc import Iterable

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...) in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def clip(boxes: Tensor, size: Iterable[int | Tensor]) -> Tensor:
    """Clip boxes (D, 4) to an image: size (height, width), two numbers, or two tensors (D,) with one for each box."""
    height, width = (torch.as_tensor(side, dtype=boxes.dtype, device=boxes.device) for side in size)
    x1, y1, x2, y2 = boxes.clamp(min=0).unbind(-1)
    return torch.stack([x1.minimum(width), y1.minimum(height), x2.minimum(width), y2.minimum(height)], dim=-1)


def rescale(boxes: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """(D, 4) in an image of `size` -> the same boxes in the image resized to `new_size`, both (height, width)."""
    y, x = new_size[0] / size[0], new_size[1] / size[1]
    return boxes * boxes.new_tensor([x, y, x, y])


def iou_of_pairs(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each of (..., 4) boxes with its counterpart in (..., 4) others, broadcast -> (...)."""
    width = boxes[..., 2].minimum(others[..., 2]) - boxes[..., 0].maximum(others[..., 0])
    height = boxes[..., 3].minimum(others[..., 3]) - boxes[..., 1].maximum(others[..., 1])
    intersection = width.clamp_(min=0) * height.clamp_(min=0)
    return intersection / (area(boxes) + area(others) - intersection)


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each of (..., G, 4) boxes with each of (A, 4) others -> (..., G, A)."""
    low, high = others[:, :2].t(), others[:, 2:].t()
    low_corners, high_corners = boxes[..., :2, None], boxes[..., 2:, None]
    sides = torch.minimum(high, high_corners).sub_(torch.maximum(low, low_corners)).clamp_(min=0)  # (..., G, 2, A)
    intersection = sides[..., 0, :].mul_(sides[..., 1, :])
    union = (area(boxes)[..., None] + area(others)).sub_(intersection)
    return intersection.div_(union)
