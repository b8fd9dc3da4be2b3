import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.functional import normalize

from detector.anchors import Anchors, TorchvisionAnchors
from detector.backbone import Backbone
from detector.fpn import FPN
from detector.head import Head
from detector.model import RetinaNet


def build(anchors=None):
    torch.manual_seed(0)
    anchors = anchors or Anchors()
    backbone = Backbone("resnet18", "bn", 0)
    head = Head(32, anchors.per_position, num_classes=3, depth=1, width=32)
    model = RetinaNet(backbone, FPN(backbone.channels, 32), head, anchors).eval()
    torch.nn.init.normal_(model.head.logits.weight, std=0.3)  # so that logits differ visibly
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def random_images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_shapes_add_up(model):
    predictions = model(random_images(2, 3, 96, 160))
    count = 9 * (12 * 20 + 6 * 10 + 3 * 5 + 2 * 3 + 1 * 2)
    assert predictions.logits.shape == (2, count, 3)
    assert predictions.deltas.shape == (2, count, 4)
    assert predictions.anchors.shape == (count, 4)
    assert predictions.levels == (12 * 20 * 9, 6 * 10 * 9, 3 * 5 * 9, 2 * 3 * 9, 1 * 2 * 9)


def test_normalizes_as_torchvision(model):
    images = random_images(2, 3, 32, 64)
    expected = normalize(images.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(model.normalize(images, None), expected, rtol=1e-5, atol=1e-5)


def test_padding_is_exactly_zero_before_the_first_convolution(model):
    images = random_images(3, 3, 64, 96).clamp(min=1)
    sizes = [(64, 96), (50, 96), (33, 47)]
    inputs = []
    handle = model.backbone.conv1.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    with torch.no_grad():
        model(images, sizes)
    handle.remove()
    normalized = normalize(images.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for image, expected, (height, width) in zip(inputs[0], normalized, sizes):
        torch.testing.assert_close(image[:, :height, :width], expected[:, :height, :width], rtol=1e-5, atol=1e-5)
        assert not image[:, height:].any() and not image[:, :, width:].any()


@torch.no_grad()
def test_the_content_of_the_padding_does_not_matter(model):
    images, sizes = random_images(1, 3, 64, 96), [(50, 70)]
    zero_padded = F.pad(images[:, :, :50, :70], (0, 26, 0, 14))
    assert torch.equal(model(images, sizes).logits, model(zero_padded, sizes).logits)
    assert not torch.equal(model(images).logits, model(zero_padded).logits)  # without the sizes it does


def test_images_are_left_unchanged(model):
    images = random_images(1, 3, 64, 96)
    original = images.clone()
    with torch.no_grad():
        model(images, [(10, 10)])
    assert torch.equal(images, original)


@torch.no_grad()
def test_permuting_the_batch_permutes_the_results(model):
    images, sizes = random_images(3, 3, 64, 96), [(64, 96), (40, 96), (64, 50)]
    order = [2, 0, 1]
    predictions = model(images, sizes)
    permuted = model(images[order], [sizes[i] for i in order])
    torch.testing.assert_close(permuted.logits, predictions.logits[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(permuted.deltas, predictions.deltas[order], rtol=1e-4, atol=1e-5)
    assert (predictions.logits[0] - predictions.logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [Anchors, TorchvisionAnchors])
@torch.no_grad()
def test_anchors_are_float32_under_autocast_and_the_same(kind):
    images = random_images(1, 3, 96, 160)
    float_predictions = build(kind())(images)
    with torch.autocast("cpu", torch.bfloat16):
        half_predictions = build(kind())(images)
    assert half_predictions.logits.dtype == half_predictions.deltas.dtype == torch.bfloat16
    assert half_predictions.anchors.dtype == float_predictions.anchors.dtype == torch.float32
    assert torch.equal(half_predictions.anchors, float_predictions.anchors)


@torch.no_grad()
def test_anchors_of_a_half_precision_model_are_float32(model):
    anchors = build().to(torch.bfloat16)(random_images(1, 3, 96, 160)).anchors
    assert anchors.dtype == torch.float32
    assert torch.equal(anchors, model(random_images(1, 3, 96, 160)).anchors)


@torch.no_grad()
def test_a_bias_on_one_shape_marks_that_shape_on_every_level():
    model = build()
    torch.nn.init.zeros_(model.head.logits.weight)
    torch.nn.init.zeros_(model.head.logits.bias)
    model.head.logits.bias[7 * 3 + 1] = 1  # ratio 2, octave 1/3; class 1
    predictions = model(random_images(1, 3, 96, 160))
    anchor, label = predictions.logits[0].nonzero(as_tuple=True)
    assert (label == 1).all() and len(anchor) == sum(predictions.levels) // 9
    sides = predictions.anchors[anchor, 2:] - predictions.anchors[anchor, :2]
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.full((len(sides),), 2.0), rtol=1e-4, atol=0)
    level = torch.repeat_interleave(torch.arange(5), torch.tensor(predictions.levels) // 9)
    torch.testing.assert_close(sides.prod(1).sqrt(), 32 * 2 ** (level + 1 / 3), rtol=1e-4, atol=0)


def test_saved_weights_hold_no_constants(model):
    assert not {"mean", "std"} & model.state_dict().keys()
