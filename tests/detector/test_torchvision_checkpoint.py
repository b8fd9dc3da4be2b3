import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet50
from torchvision.models.detection import RetinaNet, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detector import checkpoint, torchvision_checkpoint
from detector.box_coder import BoxCoder
from detector.postprocess import Postprocess
from detector.structures import Predictions

# Each short side is 160, so that torchvision's resize leaves them alone; both are padded to 224 x 224.
SIZES = [(160, 213), (224, 160)]
OPTIONS = {"num_classes": 91, "min_size": 160, "max_size": 1000}
BUILD = {"v1": retinanet_resnet50_fpn, "v2": retinanet_resnet50_fpn_v2}


def randomize(model, images):
    """Set random weights: every tensor affects the result, and some classes pass a score of 0.05."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Variances, some as small as epsilon, so that epsilon has an effect; gains that keep the signal's size.
            module.running_var.data = 10 ** torch.empty_like(module.running_var).uniform_(-5, 0)
            module.running_mean.data = torch.randn_like(module.running_mean) * module.running_var.sqrt() * 0.1
            module.weight.data = module.running_var.sqrt() * torch.empty_like(module.weight).uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    outputs = run(model, images)
    classes, boxes = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
    for layer, values, spread in [(classes, outputs.logits, 1.0), (boxes, outputs.deltas, 0.3)]:
        layer.weight.data *= spread / values.std()
        nn.init.normal_(layer.bias, std=0.2)
    # Some hundred cells pass. The threshold lies in the widest gap there, so rounding moves no cell across it.
    best = run(model, images).logits.flatten().topk(500).values[300:]
    widest = (best[:-1] - best[1:]).argmax()
    classes.bias.data += math.log(0.05 / 0.95) - (best[widest] + best[widest + 1]) / 2


@torch.no_grad()
def run(model, images):
    """The intermediate outputs of torchvision's RetinaNet, and its detections."""
    outputs = {}
    handles = [
        model.head.register_forward_hook(lambda _, args, result: outputs.update(result, levels=args[0])),
        model.anchor_generator.register_forward_hook(lambda _, args, result: outputs.update(anchors=result[0])),
    ]
    detections = model([image.float() / 255 for image in images])
    for handle in handles:
        handle.remove()
    return SimpleNamespace(
        logits=outputs["cls_logits"],
        deltas=outputs["bbox_regression"],
        anchors=outputs["anchors"],
        levels=outputs["levels"],
        detections=detections,
    )


def close(ours, theirs, tolerance=1e-4):
    """Equal within `tolerance` of the largest value."""
    return (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture(scope="module", params=["v1", "v2"])
def case(request, tmp_path_factory):
    """torchvision's model and ours rebuilt from its file, and both run on the same two images."""
    torch.manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in SIZES]
    theirs = BUILD[request.param](weights=None, weights_backbone=None, **OPTIONS).eval()
    randomize(theirs, images)
    path = tmp_path_factory.mktemp("torchvision") / f"retinanet_{request.param}.pth"
    torch.save(theirs.state_dict(), path)
    content = checkpoint.read(path)
    model, config = checkpoint.build_model(content, path)
    batch = torch.stack([F.pad(image, (0, 224 - image.shape[2], 0, 224 - image.shape[1])) for image in images])
    with torch.no_grad():
        ours = model(batch, SIZES)
    yield SimpleNamespace(
        name=request.param,
        images=images,
        batch=batch,
        path=path,
        content=content,
        config=config,
        state=theirs.state_dict(),
        model=model,
        ours=ours,
        theirs=run(theirs, images),
    )
    path.unlink()  # 140 MB


def test_the_file_determines_config_and_classes(case):
    assert case.config.model.p6_from == {"v1": "p5", "v2": "c5"}[case.name]
    assert case.config.model.head.norm == {"v1": "none", "v2": "gn"}[case.name]
    assert case.config.run == f"retinanet_{case.name}"
    assert case.content["category_ids"] == list(range(91))
    assert case.content["class_names"] == []  # the file has none
    assert not case.model.training


def test_anchors_are_the_same(case):
    assert torch.equal(case.ours.anchors, case.theirs.anchors)


def test_logits_agree(case):
    assert case.ours.logits.shape == case.theirs.logits.shape
    assert close(case.ours.logits, case.theirs.logits)


def test_deltas_agree(case):
    assert close(case.ours.deltas, case.theirs.deltas)


def test_on_the_same_outputs_the_detections_are_the_same(case):
    predictions = Predictions(case.theirs.logits, case.theirs.deltas, case.theirs.anchors, case.ours.levels)
    detections = Postprocess(BoxCoder(), 0.05, 1000, 0.5, 300)(predictions, SIZES)
    for ours, theirs in zip(detections, case.theirs.detections, strict=True):
        assert torch.equal(ours.labels, theirs["labels"])
        torch.testing.assert_close(ours.scores, theirs["scores"])
        torch.testing.assert_close(ours.boxes, theirs["boxes"], rtol=1e-5, atol=1e-3)


def test_final_detections_agree(case):
    detections = Postprocess(BoxCoder(), score_threshold=0.05, top_k=1000, nms_iou=0.5, max_detections=300)(
        case.ours, SIZES
    )
    for ours, theirs in zip(detections, case.theirs.detections, strict=True):
        assert 20 < len(ours.scores) < 300  # none is cut off: a tie there could go either way
        assert len(ours.scores) == len(theirs["scores"])
        # Scores that are nearly equal may change places: each of their detections has one of ours.
        distance = (ours.boxes[:, None] - theirs["boxes"]).abs().amax(dim=2)
        matches = (ours.labels[:, None] == theirs["labels"]) & (distance < 0.05)
        matches &= (ours.scores[:, None] - theirs["scores"]).abs() < 1e-4
        assert (matches.sum(dim=0) == 1).all() and (matches.sum(dim=1) == 1).all()


def test_the_tensor_names_of_the_first_published_file_are_understood(case, tmp_path):
    """torchvision had no Conv2dNormActivation when it wrote that file: conv.2.weight, inner_blocks.0.weight."""
    if case.name == "v2":
        pytest.skip("has had the new names from the start")
    old_state = {}
    for key, value in case.state.items():
        parts = key.split(".")
        if parts[2] == "conv":
            parts[3:5] = [str(2 * int(parts[3]))]
        elif parts[2] in ("inner_blocks", "layer_blocks"):
            del parts[4]
        old_state[".".join(parts)] = value
    assert len(old_state.keys() - case.state.keys()) == 2 * (2 * 4 + 2 * 3)
    converted = torchvision_checkpoint.convert(old_state, case.path)
    assert converted["model"].keys() == case.content["model"].keys()
    assert all(torch.equal(value, case.content["model"][key]) for key, value in converted["model"].items())
    # torchvision itself reads these names the same way if the file has no version
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, **OPTIONS)
    theirs.load_state_dict(dict(old_state))
    assert all(torch.equal(value, case.state[key]) for key, value in theirs.state_dict().items())


def test_epsilon_of_the_first_published_file_is_zero(case, monkeypatch):
    if case.name == "v2":
        pytest.skip("is evaluated with the usual epsilon")
    backbone = _resnet_fpn_extractor(
        resnet50(norm_layer=FrozenBatchNorm2d), 3, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    theirs = RetinaNet(backbone, **OPTIONS).eval()
    theirs.load_state_dict(case.state)
    overwrite_eps(theirs, 0.0)  # as retinanet_resnet50_fpn does for that file
    expected = run(theirs, case.images)

    digest = torchvision_checkpoint._sha256(case.path)
    monkeypatch.setattr(torchvision_checkpoint, "PUBLISHED_V1_SHA256", digest[:8])
    model, _ = checkpoint.build_model(checkpoint.read(case.path), case.path)
    with torch.no_grad():
        levels = model.fpn(model.backbone(model.normalize(case.batch, torch.tensor(SIZES))))
    for ours, level in zip(levels, expected.levels, strict=True):
        assert close(ours, level, 1e-3)
    assert not close(case.theirs.levels[0], expected.levels[0], 1e-2)  # epsilon makes a difference here


def test_only_torchvision_files_are_recognized_as_such(case):
    assert torchvision_checkpoint.is_torchvision(case.state)
    assert not torchvision_checkpoint.is_torchvision(case.content)
    assert not torchvision_checkpoint.is_torchvision(resnet50().state_dict())
