"""Sizes and pixels of resized images: one rule for training, evaluation and use."""

import cv2
import numpy as np

STRIDE = 32  # of C5: padded sides must be multiples of it


def target_size(height: int, width: int, short_side: float, long_side: float) -> tuple[int, int]:
    """(height, width) with the short side at `short_side`, unless the long side would pass `long_side`.

    480 x 640 with 800 and 1333 gives 800 x 1067; resizing the short side to 800 and then the long one to 1333 does not.
    """
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image (h, w, 3) uint8 at another size."""
    old_height, old_width = image.shape[:2]
    if (height, width) == (old_height, old_width):
        return image
    # Down to half size, bilinear weights reach every pixel. Below that they would skip some, so average areas.
    shrinks = 2 * max(height / old_height, width / old_width) < 1
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
