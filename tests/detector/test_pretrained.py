"""The weights a new model starts with: which tensors they fill, and the messages for files that do not fit."""

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model_weights

from detector.backbone import Backbone
from detector.checkpoint import read_weights
from detector.errors import UserError
from detector.pretrained import load_backbone_weights, load_initial_weights

RESNET18 = get_model_weights("resnet18")["IMAGENET1K_V1"]


@pytest.fixture
def initial(make_run):
    """Makes a model with weights from a file. Gives the model and the description of its weights."""

    def fill(weights, names=("cat", "dog", "cow"), anchors=None, **changes):
        sections = {"anchors": anchors} if anchors else {}
        run = make_run(len(names), model={"weights": str(weights), **changes}, **sections)
        return run.solver.model, load_initial_weights(run.solver.model, run.cfg, names)

    return fill


def test_no_weights_leave_the_random_ones(make_run, same):
    run = make_run()
    model = run.solver.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert load_initial_weights(model, run.cfg, run.class_names) == "random weights"
    assert same(before, dict(model.state_dict()))


def test_a_backbones_file_fills_the_backbone(initial, folder):
    torch.manual_seed(5)
    resnet = torchvision.models.resnet18(weights=None)
    torch.save(resnet.state_dict(), folder / "resnet18.pt")
    model, description = initial(folder / "resnet18.pt")
    assert torch.equal(model.backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
    assert torch.equal(model.backbone.bn1.running_var, resnet.bn1.running_var)
    assert str(folder / "resnet18.pt") in description and "backbone" in description
    with pytest.raises(UserError, match="is no resnet34") as error:
        initial(folder / "resnet18.pt", backbone="resnet34")
    assert "\n" not in str(error.value)


def class_outputs(model, names):
    """The filters and biases of each class: anchors x (weights + 1), by name."""
    head, count = model.head, model.anchors.per_position
    every = torch.cat([head.logits.weight.flatten(1), head.logits.bias[:, None]], dim=1)
    return {name: every.view(count, len(names), -1)[:, label] for label, name in enumerate(names)}


FEW = {"name": "grid", "octaves": 1}  # 3 anchors


@pytest.mark.parametrize(
    "names",
    [
        ("cat", "dog", "cow"),
        ("dog", "cow", "cat"),
        ("cat", "owl", "cow"),
        ("owl", "cow", "ant", "cat", "bee"),
        ("dog",),
    ],
    ids=" ".join,
)
def test_class_outputs_are_filled_by_name(initial, saved, names):
    path, run = saved  # of cat, dog and cow
    torch.manual_seed(9)
    fresh, _ = initial("none", names)
    torch.manual_seed(9)
    model, description = initial(path, names)
    theirs, random = class_outputs(run.solver.model, run.class_names), class_outputs(fresh, names)
    shared = [name for name in names if name in theirs]
    assert f"from {path}, {len(shared)} of {len(names)} classes by name" in description and "random" not in description
    for name, outputs in class_outputs(model, names).items():
        assert torch.equal(outputs, theirs[name] if name in theirs else random[name]), name


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (("ant", "bee", "owl"), {}),
        (("ant", "bee", "owl", "fox", "hen"), {}),
        (("cat", "dog", "cow"), {"anchors": FEW}),
        (("cat", "dog", "cow", "ant", "bee", "owl", "fox", "hen", "pig"), {"anchors": FEW}),  # 3 x 9, not 9 x 3
        (("cat", "dog", "cow"), {"head": {"width": 64, "depth": 1}}),
    ],
)
def test_class_outputs_stay_random_without_a_shared_name_or_with_other_anchors_or_channels(
    initial, saved, names, changes
):
    path, run = saved
    torch.manual_seed(9)
    fresh, _ = initial("none", names, **changes)
    torch.manual_seed(9)
    model, description = initial(path, names, **changes)
    keys = {"head.logits.weight", "head.logits.bias"}
    assert keys <= {*description.partition("random: ")[2].split(", ")}
    state, theirs = model.state_dict(), run.solver.model.state_dict()
    assert all(torch.equal(state[key], fresh.state_dict()[key]) for key in keys)
    assert ("0 of" in description) == (names[0] == "ant") and "3 of" not in description
    for key in state.keys() - keys:
        assert state[key].shape != theirs[key].shape or torch.equal(state[key], theirs[key]), key


def test_a_checkpoint_without_names_fills_as_many_classes_in_order(initial, saved, folder):
    path, run = folder / "nameless.pt", saved[1]
    torch.save({**torch.load(saved[0], weights_only=True), "class_names": []}, path)
    model, description = initial(path, ("cow", "ant", "cat"))
    assert torch.equal(model.head.logits.weight, run.solver.model.head.logits.weight) and "by name" not in description
    assert "random: head.logits.weight, head.logits.bias" in initial(path, ("cat", "dog"))[1]


@pytest.mark.parametrize("change", [{"backbone": "resnet34"}, {"norm": "gn"}], ids=str)
def test_a_checkpoint_of_another_backbone_or_norm_is_refused(initial, saved, change):
    # ResNet-18 and -34 share most names and shapes: taking what fits would leave half the network random.
    with pytest.raises(UserError, match=r"is of another backbone or norm") as error:
        initial(saved[0], **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, {"category_ids": [1]}, {}])
def test_weights_of_something_else_are_refused(initial, tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt") as error:
        initial(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_a_typo_in_weights_names_the_key(initial):
    with pytest.raises(UserError, match=r"model\.weights: imagnet: no such file"):
        initial("imagnet")


def error_of(weights, name="resnet18"):
    """The message of the UserError that these weights raise; one line."""
    with pytest.raises(UserError) as caught:
        load_backbone_weights(Backbone(name, "bn", 0), name, str(weights))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    assert error_of(tmp_path / "gone.pth") == f"{tmp_path}/gone.pth: no such file"


@pytest.mark.parametrize("content", [b"", b"not weights\nat all", b"PK\x03\x04broken", bytes(range(256)) * 8])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content):
    path = tmp_path / "text.pth"
    path.write_bytes(content)
    assert "not a readable weights file" in error_of(path)


def test_a_file_of_code_is_not_run(tmp_path):
    path = tmp_path / "module.pth"
    torch.save(nn.Linear(2, 2), path)
    assert "not a readable weights file" in error_of(path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {1: torch.zeros(3)}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "list.pth"
    torch.save(content, path)
    assert "not a dict of tensors by name" in error_of(path)


def test_the_state_dict_of_another_module_is_refused(tmp_path):
    path = tmp_path / "linear.pth"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    assert "is no resnet18: it lacks conv1.weight and " in error_of(path)


def test_the_weights_of_another_resnet_are_refused(resnet18_file):
    assert "is no resnet34: it lacks layer1.2.conv1.weight and " in error_of(resnet18_file, "resnet34")


@pytest.mark.parametrize(
    ("name", "given", "lacks"),
    [
        ("mobilenet_v2", "resnet18", "features.0.0.weight"),
        ("resnet18", "mobilenet_v2", "conv1.weight"),
        ("mobilenet_v3_large", "mobilenet_v2", "features.1.block.0.0.weight"),
    ],
)
def test_the_weights_of_another_kind_of_backbone_are_refused(networks, tmp_path, name, given, lacks):
    torch.save(networks(given).state_dict(), tmp_path / "weights.pth")
    assert f"weights.pth is no {name}: it lacks {lacks} and " in error_of(tmp_path / "weights.pth", name)


def test_a_wrong_shape_is_refused(resnet18, tmp_path):
    path = tmp_path / "wide.pth"
    torch.save(resnet18.state_dict() | {"layer4.1.conv2.weight": torch.zeros(3, 3)}, path)
    assert "layer4.1.conv2.weight" in error_of(path)


def test_a_value_that_is_no_tensor_is_refused(resnet18, tmp_path):
    path = tmp_path / "text.pth"
    torch.save(resnet18.state_dict() | {"conv1.weight": "text"}, path)
    assert "conv1.weight" in error_of(path)


def test_weights_of_an_old_torch_with_extra_tensors_load(resnet18, tmp_path):
    """Before PyTorch 0.4.1 BatchNorm did not count batches."""
    path = tmp_path / "old.pth"
    state = {key: value for key, value in resnet18.state_dict().items() if "num_batches" not in key}
    torch.save(state | {"decoder.weight": torch.zeros(3)}, path)
    backbone = Backbone("resnet18", "bn", 1)
    load_backbone_weights(backbone, "resnet18", str(path))
    assert torch.equal(backbone.layer4[1].bn2.running_var, resnet18.layer4[1].bn2.running_var)


def test_read_weights_gives_the_saved_tensors(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth")["a"].tolist() == [0, 1, 2]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a folder on a loopback server, and makes it the source of resnet18's ImageNet weights."""
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
            monkeypatch.setattr(RESNET18.value, "url", url)

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
def test_imagenet_weights_that_cannot_be_downloaded_are_reported(server, fault, monkeypatch):
    server(b"a page of some proxy", digest="0" * 64)
    if fault == "gone":
        server.stop()
    if fault == "not found":
        monkeypatch.setattr(RESNET18.value, "url", RESNET18.url.replace("resnet18-0", "resnet18-1"))
    message = error_of("imagenet")
    assert message.startswith("model.weights: imagenet weights of resnet18 cannot be downloaded (")
    assert "set model.weights to a local file" in message
