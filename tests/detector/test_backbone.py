import copy
import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from detector.backbone import BACKBONES, Backbone, FrozenBatchNorm, load_backbone_weights, read_weights
from detector.errors import UserError


@pytest.fixture(scope="module")
def resnet18():
    """torchvision's, with statistics that show when they are not taken over."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return resnet.eval()


@pytest.fixture
def resnet18_file(resnet18, tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    return path


def features_of(resnet, images):
    extractor = create_feature_extractor(resnet, ["layer2", "layer3", "layer4"])
    with torch.no_grad():
        return list(extractor(images).values())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_builds_with_its_strides_and_channels(name):
    with torch.device("meta"):
        backbone = Backbone(name, "bn", 0)
        features = backbone(torch.empty(2, 3, 96, 160))
    base = 64 if name in ("resnet18", "resnet34") else 256
    assert backbone.channels == (base * 2, base * 4, base * 8)
    assert [tuple(f.shape) for f in features] == [
        (2, base * 2, 12, 20),
        (2, base * 4, 6, 10),
        (2, base * 8, 3, 5),
    ]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_has_the_tensors_of_torchvision(name):
    with torch.device("meta"):
        ours = {key: value.shape for key, value in Backbone(name, "bn", 0).state_dict().items()}
        theirs = {key: value.shape for key, value in getattr(torchvision.models, name)().state_dict().items()}
    assert ours == {key: shape for key, shape in theirs.items() if not key.startswith("fc.")}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_downloads_the_weights_of_that_name(name):
    assert name in BACKBONES[name][1].url


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_features_equal_torchvision_with_the_same_weights(norm, resnet18, resnet18_file):
    backbone = Backbone("resnet18", norm, 1)
    load_backbone_weights(backbone, "resnet18", str(resnet18_file))
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = backbone.eval()(images)
    for feature, expected in zip(ours, features_of(resnet18, images), strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "kind"), [("bn", nn.BatchNorm2d), ("gn", nn.GroupNorm), ("frozen_bn", FrozenBatchNorm)]
)
def test_norm(norm, kind):
    norms = {"bn": nn.BatchNorm2d, "gn": nn.GroupNorm, "frozen_bn": FrozenBatchNorm}.values()
    found = [type(module) for module in Backbone("resnet18", norm, 0).modules() if isinstance(module, tuple(norms))]
    assert set(found) == {kind} and len(found) == 20


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_folded_frozen_bn_has_the_values_and_gradients_of_torchvisions(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d).double()
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.8)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    ours = Backbone(name, "frozen_bn", 0).double()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected = list(create_feature_extractor(theirs, ["layer2", "layer3", "layer4"])(images).values())
    features = ours(images)
    torch.testing.assert_close(list(features), expected)
    for outputs in (features, expected):
        sum((output * torch.linspace(-1, 1, output.shape[1])[:, None, None]).sum() for output in outputs).backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, msg=key)


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_stages_get_no_gradient_and_their_statistics_stand_still(frozen):
    stages = [("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",)]
    is_frozen = {part: index < frozen for index, parts in enumerate(stages) for part in parts}
    torch.manual_seed(0)
    backbone = Backbone("resnet18", "bn", frozen)
    backbone.eval()
    backbone.train()  # as an epoch does after an evaluation
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    features = backbone(torch.randn(2, 3, 64, 64))
    if frozen < 4:
        sum(feature.sum() for feature in features).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is None) == is_frozen[name.split(".")[0]], name
    for name, value in backbone.state_dict().items():
        if "running_mean" in name:
            assert torch.equal(value, before[name]) == is_frozen[name.split(".")[0]], name


def test_evaluation_mode_reaches_every_stage():
    backbone = Backbone("resnet18", "bn", 2).eval()
    assert not any(module.training for module in backbone.modules())


def test_frozen_stages_survive_a_copy():
    backbone = copy.deepcopy(Backbone("resnet18", "bn", 1)).train()
    assert not backbone.bn1.training and backbone.layer2[0].bn1.training


def error_of(weights, name="resnet18"):
    """The message of the UserError that these weights raise; one line."""
    with pytest.raises(UserError) as caught:
        load_backbone_weights(Backbone(name, "bn", 0), name, str(weights))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def test_missing_file(tmp_path):
    assert error_of(tmp_path / "gone.pth") == f"{tmp_path}/gone.pth: no such file"


@pytest.mark.parametrize("content", [b"", b"not weights\nat all", b"PK\x03\x04broken", bytes(range(256)) * 8])
def test_file_of_something_else(tmp_path, content):
    path = tmp_path / "text.pth"
    path.write_bytes(content)
    assert "not a readable weights file" in error_of(path)


def test_file_of_code_is_not_run(tmp_path):
    path = tmp_path / "module.pth"
    torch.save(nn.Linear(2, 2), path)
    assert "not a readable weights file" in error_of(path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {1: torch.zeros(3)}])
def test_file_of_no_state_dict(tmp_path, content):
    path = tmp_path / "list.pth"
    torch.save(content, path)
    assert "not a dict of tensors by name" in error_of(path)


def test_wrong_state_dict(tmp_path):
    path = tmp_path / "linear.pth"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    assert "is no resnet18: it lacks conv1.weight and " in error_of(path)


def test_wrong_architecture(resnet18_file):
    assert "is no resnet34: it lacks layer1.2.conv1.weight and " in error_of(resnet18_file, "resnet34")


def test_wrong_shape(resnet18, tmp_path):
    path = tmp_path / "wide.pth"
    torch.save(resnet18.state_dict() | {"layer4.1.conv2.weight": torch.zeros(3, 3)}, path)
    assert "layer4.1.conv2.weight" in error_of(path)


def test_value_that_is_no_tensor(resnet18, tmp_path):
    path = tmp_path / "text.pth"
    torch.save(resnet18.state_dict() | {"conv1.weight": "text"}, path)
    assert "conv1.weight" in error_of(path)


def test_weights_of_an_old_torch_and_with_more_in_it_load(resnet18, tmp_path):
    """Before PyTorch 0.4.1 BatchNorm did not count batches."""
    path = tmp_path / "old.pth"
    state = {key: value for key, value in resnet18.state_dict().items() if "num_batches" not in key}
    torch.save(state | {"decoder.weight": torch.zeros(3)}, path)
    backbone = Backbone("resnet18", "bn", 1)
    load_backbone_weights(backbone, "resnet18", str(path))
    assert torch.equal(backbone.layer4[1].bn2.running_var, resnet18.layer4[1].bn2.running_var)


def test_read_weights_gives_what_was_saved(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth")["a"].tolist() == [0, 1, 2]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder on a loopback server, from where resnet18's ImageNet weights are said to come."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def serve(content, digest=None):
            """Make `content` the weights' file; `digest` is the hash that its name promises."""
            digest = digest or hashlib.sha256(content).hexdigest()
            (folder / f"resnet18-{digest[:8]}.pth").write_bytes(content)
            url = f"http://127.0.0.1:{server.server_port}/resnet18-{digest[:8]}.pth"
            monkeypatch.setattr(BACKBONES["resnet18"][1].value, "url", url)

        def stop():
            server.shutdown()
            server.server_close()

        serve.stop = stop
        yield serve
        server.shutdown()
        thread.join()


def test_imagenet_weights_are_downloaded_once(server, resnet18, resnet18_file):
    server(resnet18_file.read_bytes())
    backbone = Backbone("resnet18", "frozen_bn", 1)
    load_backbone_weights(backbone, "resnet18", "imagenet")
    assert torch.equal(backbone.layer4[1].bn2.running_var, resnet18.layer4[1].bn2.running_var)
    server.stop()
    load_backbone_weights(backbone, "resnet18", "imagenet")  # from the cache


@pytest.mark.parametrize("fault", ["gone", "not found", "wrong content"])
def test_imagenet_weights_that_cannot_be_downloaded(server, fault, monkeypatch):
    server(b"a page of some proxy", digest="0" * 64)
    if fault == "gone":
        server.stop()
    if fault == "not found":
        url = BACKBONES["resnet18"][1].url
        monkeypatch.setattr(BACKBONES["resnet18"][1].value, "url", url.replace("resnet18-0", "resnet18-1"))
    message = error_of("imagenet")
    assert message.startswith("model.weights: imagenet weights of resnet18 cannot be downloaded (")
    assert "set model.weights to a local file" in message
