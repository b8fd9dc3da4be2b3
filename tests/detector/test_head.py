import pytest
import torch
from torch import nn

from detector.anchors import Anchors
from detector.conv import ConvReLU
from detector.head import Head

MAP_SIZES = [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
STRIDES = (8, 16, 32, 64, 128)


def marked_output(layer, level, row, column, channel):
    """Pyramid levels and weights of `layer` with which one output channel at one location is 1, all others 0."""
    nn.init.zeros_(layer.bias)
    nn.init.zeros_(layer.weight)
    layer.weight.data[channel, 0, 1, 1] = 1
    levels = [torch.zeros(1, 1, *map_size) for map_size in MAP_SIZES]
    levels[level][0, 0, row, column] = 1
    return levels


def marked_anchor(values):
    """The only anchor where `values` (1, A, K) are not 0, and the index of that value."""
    (index,) = values[0].nonzero().tolist()
    anchor = Anchors()(MAP_SIZES, (96, 160), torch.device("cpu"))[index[0]]
    return anchor, index[1]


def expect_anchor(anchor, level, row, column, shape):
    centre, side = (anchor[:2] + anchor[2:]) / 2, anchor[2:] - anchor[:2]
    ratio, octave = (0.5, 1.0, 2.0)[shape // 3], shape % 3
    assert centre.tolist() == pytest.approx([column * STRIDES[level], row * STRIDES[level]], abs=1e-3)
    assert (side[1] / side[0]).item() == pytest.approx(ratio, rel=1e-4)
    assert side.prod().sqrt().item() == pytest.approx(32 * 2 ** (level + octave / 3), rel=1e-4)


CELLS = [(0, 0, 0, 0), (0, 11, 19, 8), (0, 3, 7, 5), (1, 5, 2, 1), (2, 2, 4, 3), (3, 1, 2, 7), (4, 0, 1, 6)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("label", [0, 3])
def test_a_marked_class_cell_marks_its_anchor(cell, label):
    head = Head(channels=1, anchors_per_position=9, num_classes=4, depth=0)
    level, row, column, shape = cell
    logits, _ = head(marked_output(head.logits, level, row, column, shape * 4 + label))
    anchor, marked_label = marked_anchor(logits)
    expect_anchor(anchor, *cell)
    assert marked_label == label


@pytest.mark.parametrize("cell", CELLS)
def test_a_marked_box_cell_marks_its_anchor(cell):
    head = Head(channels=1, anchors_per_position=9, num_classes=4, depth=0)
    level, row, column, shape = cell
    _, deltas = head(marked_output(head.deltas, level, row, column, shape * 4 + 2))
    anchor, marked_coordinate = marked_anchor(deltas)
    expect_anchor(anchor, *cell)
    assert marked_coordinate == 2


@pytest.mark.parametrize("norm", ["none", "gn"])
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_shapes_and_layers(norm, depth):
    head = Head(channels=8, anchors_per_position=3, num_classes=5, depth=depth, width=32, norm=norm)
    logits, deltas = head([torch.randn(2, 8, *map_size) for map_size in MAP_SIZES])
    count = 3 * sum(height * width for height, width in MAP_SIZES)
    assert logits.shape == (2, count, 5) and deltas.shape == (2, count, 4)
    layer_types = [nn.Conv2d, nn.GroupNorm, nn.ReLU] if norm == "gn" else [ConvReLU, nn.Identity]
    for tower in (head.class_tower, head.box_tower):
        assert [type(layer) for layer in tower] == layer_types * depth


def test_an_untrained_head_predicts_the_prior_everywhere():
    head = Head(channels=8, anchors_per_position=3, num_classes=5, depth=1, width=32, prior=0.03)
    logits, deltas = head([torch.zeros(1, 8, *map_size) for map_size in MAP_SIZES])
    torch.testing.assert_close(logits.sigmoid(), torch.full_like(logits, 0.03))
    assert not deltas.any()


def test_levels_share_the_towers_and_do_not_mix():
    head = Head(channels=8, anchors_per_position=3, num_classes=5, depth=2, width=32).eval()
    levels = [torch.randn(1, 8, 4, 4) for _ in MAP_SIZES]
    joined_logits, _ = head(levels)
    separate_logits = torch.cat([head([level])[0] for level in levels], dim=1)
    torch.testing.assert_close(joined_logits, separate_logits)
    levels[2] = levels[0]
    logits = head(levels)[0].view(1, 5, 48, 5)
    torch.testing.assert_close(logits[:, 2], logits[:, 0])


def test_classes_and_boxes_do_not_share_a_tower():
    head = Head(channels=8, anchors_per_position=3, num_classes=5, depth=1, width=32)
    head([torch.randn(1, 8, 4, 4)])[0].sum().backward()
    assert head.class_tower[0].weight.grad is not None and head.box_tower[0].weight.grad is None
