"""scripts/gradients.py: the figures show how each loss changes the gradient."""

import itertools
import json
import statistics
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.io import read_image

import train
from data.coco import CocoDataset
from detector.configure import configure
from detector.gradients import Regions
from scripts import gradients


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    settings = ["solver.max_steps=2", "class_loss.name=ghm_c", "tensorboard.enabled=false"]
    cfg = configure(tiny(folder), settings)
    train.train(cfg, torch.device("cpu"))
    return cfg.folder / "last.pt"


def regions(seed=0):
    counts = torch.randint(1, 1000, (gradients.FINE,), generator=torch.Generator().manual_seed(seed))
    return Regions(counts, counts.double())


def test_three_figures_are_written(checkpoint, folder, command):
    code, out, err = command(gradients.main, "--checkpoint", checkpoint, "--images", 3, "--output", folder)
    assert code == 0, err
    assert " positive anchors, median probability: true class " in out
    for name in ("gradient_norms.png", "gradient_class.png", "gradient_box.png"):
        picture = read_image(str(folder / name))
        assert name in out and picture.shape[1] > 400 and picture.float().std() > 10  # it is not blank


def test_measure_takes_the_norm_of_every_cell_and_coordinate(checkpoint):
    cells, boxes, probabilities = gradients.measure(str(checkpoint), None, 4)
    assert cells.counts.sum() > 4 * 1000 and boxes.counts.sum() % 4 == 0
    # With CE and ASL1 the slope is the norm divided by the positives of the batch. This batch holds all four images.
    positives = boxes.counts.sum() / 4
    assert len(probabilities.true) == len(probabilities.other) == positives
    in_regions = torch.histc(1 - probabilities.true, gradients.FINE, 0, 1)
    near = cells.counts + cells.counts.roll(1) + cells.counts.roll(-1)  # processors round 1 - p differently
    assert (in_regions <= near).all() and len(probabilities.background) > 1000
    for part in (cells, boxes):
        filled = part.counts > 0
        mean = (part.gradient / part.counts * positives)[filled]
        torch.testing.assert_close(mean, gradients.norms(part)[filled], rtol=1e-5, atol=0.5 / gradients.FINE)


def test_some_images_are_of_all_shapes(checkpoint, folder, monkeypatch):
    sides = range(32, 32 + 4 * 40, 4)
    content = gradients.checkpoint.read(checkpoint)
    classes = zip(content["category_ids"], gradients.checkpoint.class_names(content))
    document = {"images": [], "annotations": [], "categories": [{"id": n, "name": name} for n, name in classes]}
    for number, side in enumerate(sides):
        Image.new("RGB", (side, 96)).save(folder / f"{number}.png")
        document["images"].append({"id": number, "file_name": f"{number}.png", "width": side, "height": 96})
        box = {"id": number, "image_id": number, "category_id": content["category_ids"][0], "bbox": [2, 2, 20, 20]}
        document["annotations"].append(box)
    (folder / "a.json").write_text(json.dumps(document))
    used, read = [], CocoDataset.__getitem__
    monkeypatch.setattr(CocoDataset, "__getitem__", lambda dataset, key: used.append(sides[key]) or read(dataset, key))
    for count in (1, 8, 12, 1000):
        used.clear()
        gradients.measure(str(checkpoint), [str(folder / "a.json"), str(folder)], count)
        assert len(used) == len(set(used)) == min(max(count, 4), 40)  # whole batches
        assert statistics.mean(used) == pytest.approx(statistics.mean(sides), rel=0.1)


def test_a_short_last_batch_does_not_stand_for_a_whole_one(checkpoint, folder):
    content = gradients.checkpoint.read(checkpoint)
    category = content["category_ids"][0]
    names = gradients.checkpoint.class_names(content)
    document = {"categories": [{"id": n, "name": name} for n, name in zip(content["category_ids"], names)]}
    document["images"] = [{"id": n, "file_name": f"{n}.png", "width": 96, "height": 96} for n in range(5)]
    document["annotations"] = [
        {"id": n, "image_id": n, "category_id": category, "bbox": [2, 2, 20, 20]} for n in range(5)
    ]
    for number in range(5):
        Image.new("RGB", (96, 96)).save(folder / f"{number}.png")
    (folder / "a.json").write_text(json.dumps(document))

    def cells(count):
        return gradients.measure(str(checkpoint), [str(folder / "a.json"), str(folder)], count)[0].counts.sum()

    assert cells(1) == cells(4) == cells(5) * 4 // 5  # batches of 4 and 1


def test_probabilities_are_those_of_positive_and_of_background_anchors():
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 50, 3, generator=rng), torch.randint(3, (2, 50), generator=rng)
    state = torch.randint(3, (2, 50), generator=rng)  # of each anchor: background, positive, ignored
    rows = (state.flatten() == 1).nonzero().squeeze(1)
    positive = SimpleNamespace(positive=state == 1, valid=state < 2, rows=rows, labels=labels.flatten()[rows])
    measured = gradients.probabilities_of(logits, positive)
    true, other, background = [], [], []
    for image, anchor in itertools.product(range(2), range(50)):
        p = (1 / (1 + (-logits[image, anchor]).exp())).tolist()
        if state[image, anchor] == 1:
            true.append(p.pop(int(labels[image, anchor])))
            other.append(max(p))
        elif state[image, anchor] == 0:
            background.append(max(p))
    for part, expected in zip(measured, (true, other, background), strict=True):
        torch.testing.assert_close(part, torch.tensor(expected))
    highest = sorted(background)[-len(true) :]
    first = sum(t > o for t, o in zip(true, other)) / len(true)
    medians = [statistics.median_low(values) for values in (true, other, highest)]
    assert measured.medians() == (
        f"{len(true)} positive anchors, median probability: true class {medians[0]:.2f}, "
        f"other class {medians[1]:.2f}, true class first in {first:.0%}; background {medians[2]:.2f}"
    )
    none = gradients.Probabilities(torch.zeros(0), torch.zeros(0), torch.ones(3))
    assert none.medians() == "no positive anchors in these images"


def test_ghm_gives_every_region_the_same_weight():
    sample = regions()
    for bins in (gradients.CELL_BINS, gradients.BOX_BINS):
        weight = gradients.harmonized(sample, bins) / gradients.norms(sample) * sample.counts
        in_region = weight.view(bins, -1).sum(1)
        torch.testing.assert_close(in_region, torch.full_like(in_region, float(sample.counts.sum()) / bins))


def test_curves_are_the_slopes_of_the_losses():
    sample = regions()
    g = gradients.norms(sample)
    z = g.logit().requires_grad_()
    (z.sigmoid() ** 2 * torch.nn.functional.softplus(z)).sum().backward()
    curves = gradients.class_curves(sample)
    torch.testing.assert_close(curves["Focal"], z.grad)
    d = (gradients.MU * g / (1 - g * g).sqrt()).requires_grad_()
    torch.nn.functional.smooth_l1_loss(d, torch.zeros_like(d), beta=1 / 9, reduction="sum").backward()
    torch.testing.assert_close(gradients.box_curves(sample)["smooth L1"], d.grad)


@pytest.mark.parametrize(
    "arguments, words", [(["--images", 0], "--images"), (["--data", "no.json", "nowhere"], "no.json")]
)
def test_mistakes_are_one_line(checkpoint, folder, command, arguments, words):
    code, _, err = command(gradients.main, "--checkpoint", checkpoint, "--output", folder, *arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err
