"""Sizes of the pyramid's maps -> anchors, ordered level, row, column, shape, as the heads' outputs are."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Anchors:
    """RetinaNet's anchors: at each position of each level, `octaves` sizes x `ratios` shapes.

    A position's anchors are centred on pixel (stride x column, stride x row), the centre of its receptive field behind
    stride-2 convolutions with padding 1. Shapes are ordered ratio first, then size.

    Args:
        sizes: side of the base anchor of each level P3..P7, in pixels
        octaves: scales per octave: sizes are size x 2^(i / octaves), i = 0 .. octaves - 1
        ratios: height / width
        strides: pixels between neighbouring positions of each level

    `shapes`: each level's anchors around (0, 0), (octaves x ratios, 4).

    Source: Lin et al., Focal Loss, 2017, section 4.
    """

    def __init__(
        self,
        sizes: tuple[float, ...] = (32, 64, 128, 256, 512),
        octaves: int = 3,
        ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
        strides: tuple[int, ...] = (8, 16, 32, 64, 128),
    ):
        if len(sizes) != 5 or len(strides) != 5:
            raise ValueError("sizes and strides need five numbers each, one for each level P3..P7")
        if octaves < 1 or not ratios or min(sizes) <= 0 or min(ratios) <= 0 or min(strides) < 1:
            raise ValueError("octaves, sizes, ratios and strides must be positive, and at least one ratio given")
        self.strides = tuple(strides)
        self.per_position = octaves * len(ratios)
        self.shapes = [self._level_shapes(size, octaves, ratios) for size in sizes]
        self._cache: dict[tuple, Tensor] = {}  # images come in few sizes: the anchors of each are built once

    @staticmethod
    def _level_shapes(size: float, octaves: int, ratios: Sequence[float]) -> Tensor:
        """Boxes around (0, 0) for one level, (octaves x ratios, 4)."""
        sides = torch.tensor([size * 2 ** (i / octaves) for i in range(octaves)])
        roots = torch.tensor([math.sqrt(ratio) for ratio in ratios])
        widths = (sides[None] / roots[:, None]).flatten()
        heights = (sides[None] * roots[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def steps(self, map_size: tuple[int, int], level: int, image_size: tuple[int, int]) -> tuple[int, int]:
        """Pixels between positions of a level, (vertical, horizontal), given its map's and the padded image's size."""
        return self.strides[level], self.strides[level]

    def __call__(
        self, map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int], device: torch.device
    ) -> Tensor:
        """(Height, width) of each level's map and the padded image's (height, width) -> (A, 4) float32."""
        key = (tuple(map_sizes), image_size, device)
        if key not in self._cache:
            if len(self._cache) >= 64:  # multi-scale training meets many sizes; one costs a few MB
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = self.build(map_sizes, image_size).to(device)
        return self._cache[key]

    def build(self, map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]) -> Tensor:
        """The same, computed on the CPU and not cached."""
        levels = []
        for level, (height, width) in enumerate(map_sizes):
            step_y, step_x = self.steps((height, width), level, image_size)
            y, x = torch.meshgrid(torch.arange(height) * step_y, torch.arange(width) * step_x, indexing="ij")
            centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            levels.append((centres + self.shapes[level]).reshape(-1, 4))
        return torch.cat(levels)


class TorchvisionAnchors(Anchors):
    """Anchors as torchvision's RetinaNet has them, for its checkpoints.

    They differ in three ways: sizes are cut to whole pixels, boxes are rounded to whole pixels, and the step
    of a level is the image size // map size, which on P6 and P7 is less than the stride wherever the map
    was rounded up (800 px: 61 instead of 64, 114 instead of 128).
    """

    @staticmethod
    def _level_shapes(size: float, octaves: int, ratios: Sequence[float]) -> Tensor:
        sides = torch.tensor([int(size * 2 ** (i / octaves)) for i in range(octaves)], dtype=torch.float32)
        roots = torch.tensor(list(ratios), dtype=torch.float32).sqrt()
        widths = ((1 / roots)[:, None] * sides[None]).flatten()
        heights = (roots[:, None] * sides[None]).flatten()
        return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).round()

    def steps(self, map_size: tuple[int, int], level: int, image_size: tuple[int, int]) -> tuple[int, int]:
        return image_size[0] // map_size[0], image_size[1] // map_size[1]
