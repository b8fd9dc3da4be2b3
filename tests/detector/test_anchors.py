import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detector import boxes
from detector.anchors import Anchors, TorchvisionAnchors

CPU = torch.device("cpu")
STRIDES = (8, 16, 32, 64, 128)


def map_sizes_of(height, width):
    """(Height, width) of each level's map. Padded stride-2 convolutions round it up."""
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES]


def torchvision_anchors(height, width):
    """Anchors from the generator that torchvision's RetinaNet builds."""
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    images = ImageList(torch.empty(1, 3, height, width, device="meta"), [(height, width)])
    return generator(images, [torch.empty(1, 1, *map_size) for map_size in map_sizes_of(height, width)])[0]


def test_one_shape_on_a_tiny_grid_by_hand():
    anchors = Anchors(octaves=1, ratios=(1.0,))([(2, 3), (1, 2), (1, 1), (1, 1), (1, 1)], (16, 24), CPU)
    level3 = [[x - 16, y - 16, x + 16, y + 16] for y in (0, 8) for x in (0, 8, 16)]
    level4 = [[x - 32, -32, x + 32, 32] for x in (0, 16)]
    coarse = [[-64, -64, 64, 64], [-128, -128, 128, 128], [-256, -256, 256, 256]]
    assert anchors.tolist() == level3 + level4 + coarse


def test_order_is_level_row_column_shape():
    map_sizes = map_sizes_of(96, 160)
    anchors = Anchors()(map_sizes, (96, 160), CPU)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    sides = anchors[:, 2:] - anchors[:, :2]
    position = 0
    for level, (height, width) in enumerate(map_sizes):
        for row in range(height):
            for column in range(width):
                for ratio in (0.5, 1, 2):
                    for octave in range(3):
                        side_x, side_y = sides[position].tolist()
                        assert centres[position].tolist() == pytest.approx(
                            [STRIDES[level] * column, STRIDES[level] * row], abs=1e-4
                        )
                        assert side_y / side_x == pytest.approx(ratio, rel=1e-4)
                        area = (32 * 2**level) ** 2 * 4 ** (octave / 3)
                        assert side_x * side_y == pytest.approx(area, rel=1e-4)
                        position += 1
    assert position == len(anchors)


def test_every_ratio_keeps_the_area():
    anchors = Anchors(octaves=1, ratios=(0.1, 0.7, 3.0, 11.0))
    assert anchors.per_position == 4
    areas = boxes.area(anchors([(1, 1)] * 5, (8, 8), CPU)).view(5, 4)
    torch.testing.assert_close(areas, torch.tensor([32.0, 64, 128, 256, 512])[:, None].square().expand(5, 4))


def test_number_of_anchors():
    anchors = Anchors(octaves=2, ratios=(1.0, 2.0))
    map_sizes = map_sizes_of(96, 224)
    assert len(anchors(map_sizes, (96, 224), CPU)) == anchors.per_position * sum(h * w for h, w in map_sizes)


@pytest.mark.parametrize("size", [(800, 1344), (320, 448), (96, 160), (32, 32), (608, 992), (128, 256)])
def test_torchvision_anchors_equal_torchvision(size):
    ours = TorchvisionAnchors()(map_sizes_of(*size), size, CPU)
    theirs = torchvision_anchors(*size)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_both_kinds_agree_if_strides_divide_the_size_and_sides_are_integers():
    size, options = (256, 384), {"octaves": 1, "ratios": (0.25, 1.0, 4.0)}
    ours = Anchors(**options)(map_sizes_of(*size), size, CPU)
    assert torch.equal(ours, TorchvisionAnchors(**options)(map_sizes_of(*size), size, CPU))


def test_both_kinds_differ_where_a_map_is_rounded_up():
    size, options = (800, 1344), {"octaves": 1, "ratios": (1.0,)}
    map_sizes = map_sizes_of(*size)
    ours, theirs = Anchors(**options)(map_sizes, size, CPU), TorchvisionAnchors(**options)(map_sizes, size, CPU)
    p7 = slice(-map_sizes[-1][0] * map_sizes[-1][1], None)
    assert ours[p7][-1, 1] + 256 == 6 * 128
    assert theirs[p7][-1, 1] + 256 == 6 * (800 // 7)


def test_calls_with_other_sizes_change_nothing():
    anchors = Anchors()
    first = anchors(map_sizes_of(96, 160), (96, 160), CPU).clone()
    other = anchors(map_sizes_of(64, 64), (64, 64), CPU).clone()
    assert torch.equal(anchors(map_sizes_of(96, 160), (96, 160), CPU), first)
    assert torch.equal(anchors(map_sizes_of(64, 64), (64, 64), CPU), other)
    assert torch.equal(Anchors()(map_sizes_of(96, 160), (96, 160), CPU), first)


def test_the_cache_depends_on_the_image_size():
    anchors = TorchvisionAnchors()
    map_sizes = [(13, 13), (7, 7), (4, 4), (2, 2), (1, 1)]
    narrow, wide = (anchors(map_sizes, (100, width), CPU) for width in (97, 104))
    assert not torch.equal(narrow, wide)


def test_many_sizes_do_not_fill_the_memory():
    anchors = Anchors(octaves=1, ratios=(1.0,))
    for side in range(1, 200):
        anchors([(side, 1)] + [(1, 1)] * 4, (side * 8, 8), CPU)
    assert len(anchors._cache) <= 64
    assert len(anchors([(1, 1)] * 5, (8, 8), CPU)) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"sizes": (32, 64)},
        {"strides": (8,) * 4},
        {"octaves": 0},
        {"ratios": ()},
        {"ratios": (0.0,)},
        {"sizes": (0, 1, 2, 3, 4)},
        {"strides": (0, 1, 2, 3, 4)},
    ],
)
def test_refuses_options_that_make_no_anchors(options):
    with pytest.raises(ValueError):
        Anchors(**options)
