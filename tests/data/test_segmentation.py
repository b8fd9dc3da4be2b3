"""Laws of data/segmentation.py: the bounds enclose the pixels of a mask, or the points of polygons."""

import numpy as np
import pytest
from pycocotools import mask

from data.segmentation import bounds


def blob(seed):
    pixels = np.zeros((30, 40), np.uint8)
    rng = np.random.default_rng(seed)
    y, x = rng.integers(0, 20, 2)
    pixels[y : y + rng.integers(1, 10), x : x + rng.integers(1, 20)] = 1
    pixels[rng.integers(30), rng.integers(40)] = 1
    return pixels


def runs(pixels):
    """Uncompressed counts, column by column, background first."""
    counts, value = [0], 0
    for pixel in pixels.flatten(order="F").tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


@pytest.mark.parametrize("seed", range(6))
def test_bounds_of_masks_are_those_of_their_pixels(seed):
    pixels = blob(seed)
    y, x = np.nonzero(pixels)
    expected = (x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1)
    compressed = mask.encode(np.asfortranarray(pixels))["counts"].decode()
    for counts in (runs(pixels), compressed):
        assert bounds({"size": [30, 40], "counts": counts}) == expected
    assert bounds([{"size": [30, 40], "counts": compressed}, [0, 0, 1, 0, 1, 1]])[:2] == (0, 0)


def test_bounds_of_polygons():
    assert bounds([[1, 2, 5, 2.5, 3, 9]]) == (1, 2, 4, 7)
    assert bounds([[1, 2, 5, 2.5, 3, 9], [10, 1, 11, 1, 11, 2]]) == (1, 1, 10, 8)
    assert bounds([1, 2, 5, 2.5, 3, 9]) == bounds([[1, 2], [5, 2.5], [3, 9]]) == (1, 2, 4, 7)
    assert bounds([]) is None and bounds(None) is None and bounds([[]]) is None
    assert bounds({"size": [3, 4], "counts": [12]}) is None


@pytest.mark.parametrize(
    "flaw",
    [
        [[1, 2, 3]], [[1, "x"]], "polygon", 5, {"size": [3, 4]}, {"counts": [12]}, {"size": [3, 4], "counts": [5]},
        {"size": [3, 4], "counts": [-1, 13]}, {"size": [3, 4], "counts": "P"}, {"size": [3, 4], "counts": "a b"},
        {"size": [3, 4], "counts": ""}, {"size": [0, 4], "counts": [0]}, [[1, 2, 3, float("nan")]],
        {"size": [3, 4], "counts": "oooooooooO"}, {"size": [3, 4], "counts": [True, 11]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_malformed_segmentation_is_a_value_error(flaw):
    with pytest.raises(ValueError):
        bounds(flaw)
