import pytest
import torch
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder

from detector.box_coder import MAX_LOG_SCALE, BoxCoder

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)]


def random_boxes(count, seed):
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=rng) * 500
    return torch.cat([corner, corner + torch.rand(count, 2, generator=rng) * 200 + 5], dim=1)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_decode_undoes_encode(weights):
    coder, boxes, anchors = BoxCoder(weights), random_boxes(200, 0), random_boxes(200, 1)
    torch.testing.assert_close(coder.decode(coder.encode(boxes, anchors), anchors), boxes, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_equals_torchvision_both_ways(weights):
    coder, theirs = BoxCoder(weights), TorchvisionBoxCoder(weights)
    boxes, anchors = random_boxes(200, 0), random_boxes(200, 1)
    torch.testing.assert_close(coder.encode(boxes, anchors), theirs.encode_single(boxes, anchors))
    deltas = torch.randn(200, 4, generator=torch.Generator().manual_seed(2)) * 3  # some beyond the limit
    torch.testing.assert_close(coder.decode(deltas, anchors), theirs.decode_single(deltas, anchors))


def test_encode_by_hand():
    anchor = torch.tensor([[0.0, 0, 10, 20]])  # centre (5, 10)
    box = torch.tensor([[5.0, 10, 25, 20]])  # centre (15, 15), twice as wide, half as high
    log2 = torch.tensor(2.0).log().item()
    assert BoxCoder().encode(box, anchor)[0].tolist() == pytest.approx([1, 0.25, log2, -log2])
    assert BoxCoder((10, 20, 5, 1)).encode(box, anchor)[0].tolist() == pytest.approx([10, 5, 5 * log2, -log2])


def test_zero_deltas_decode_to_the_anchor():
    anchors = random_boxes(20, 0)
    torch.testing.assert_close(BoxCoder((10, 10, 5, 5)).decode(torch.zeros(20, 4), anchors), anchors)


def test_huge_deltas_stay_finite():
    anchors = random_boxes(3, 0)
    deltas = torch.tensor([1e4, -1e4, 1e30])[:, None].expand(3, 4).clone()
    deltas[:, :2] = 0
    boxes = BoxCoder().decode(deltas, anchors)
    assert boxes.isfinite().all()
    side = anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close((boxes[:, 2:] - boxes[:, :2])[0], side[0] * (1000 / 16))
    assert pytest.approx(1000 / 16) == torch.tensor(MAX_LOG_SCALE).exp().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    coder, anchors = BoxCoder((10, 10, 5, 5)), random_boxes(50, 1)
    deltas = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    decoded = coder.decode(deltas, anchors)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, coder.decode(deltas.float(), anchors))
    boxes = random_boxes(50, 0).to(dtype)
    encoded = coder.encode(boxes, anchors)
    assert encoded.dtype == torch.float32
    assert torch.equal(encoded, coder.encode(boxes.float(), anchors))


def test_leading_dimensions_and_no_boxes_are_allowed():
    coder = BoxCoder()
    boxes, anchors = random_boxes(24, 0), random_boxes(24, 1)
    deltas = coder.encode(boxes, anchors)
    assert torch.equal(
        coder.decode(deltas.view(2, 12, 4), anchors.view(2, 12, 4)), coder.decode(deltas, anchors).view(2, 12, 4)
    )
    assert coder.encode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert coder.decode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("weights", [(1, 1, 1, 0), (-1, 1, 1, 1)])
def test_refuses_weights_that_lose_a_coordinate(weights):
    with pytest.raises(ValueError, match="above 0"):
        BoxCoder(weights)
