"""scripts/batch_regions.py: its figures on regions agree with the loss."""

import csv

import pytest
import torch
from torchvision.io import read_image

import train
from detector.configure import configure
from detector.gradients import by_region
from detector.losses import GHMC
from scripts import batch_regions
from scripts.batch_regions import BINS, FORMS, PUBLISHED, Measured, simulate


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    settings = ["solver.max_steps=2", "class_loss.name=ghm_c", "tensorboard.enabled=false"]
    cfg = configure(tiny(tmp_path_factory.mktemp("regions")), settings)
    train.train(cfg, torch.device("cpu"))
    return cfg.folder / "last.pt"


def test_tables_a_picture_and_a_csv_line_for_each_region_are_written(checkpoint, folder, command):
    arguments = ("--checkpoints", checkpoint, checkpoint, "--images", 10, "--batches", 2, 4, "--output", folder / "new")
    code, out, err = command(batch_regions.main, *arguments)
    assert code == 0, err
    assert out.count("step 2: 10 images of") == 2  # 8 images, so that a second epoch begins
    for form in FORMS:
        assert f"| {form} | 2 |" in out and f"| {form} | 4 |" in out
    picture = read_image(str(folder / "new" / "batch_regions.png"))
    assert picture.shape[1] > 1000 and picture.float().std() > 10  # it is not blank
    printed = (folder / "new" / "batch_regions.md").read_text(encoding="utf-8")
    assert printed.strip() in out and printed.count("images of") == 2
    with open(folder / "new" / "batch_regions.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * BINS
    cells = sum(float(line["mean cells"]) for line in lines if line["images a batch"] == "4")
    assert cells == pytest.approx(
        2 * sum(float(line["mean cells"]) for line in lines if line["images a batch"] == "2"), rel=1e-2
    )


def test_measure_takes_the_norms_of_all_cells(checkpoint):
    name, counts, norms = batch_regions.measure(str(checkpoint), 5)
    assert name.endswith("step 2") and counts.shape == norms.shape == (5, BINS)
    assert counts.sum(dim=1).min() > 1000
    mean, lower_edges = norms / counts, torch.arange(BINS) / BINS
    filled = counts > 0
    assert ((mean >= lower_edges - 1e-6) & (mean <= lower_edges + 1 / BINS + 1e-6))[filled].all()
    assert (norms[~filled] == 0).all()


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_simulated_shares_of_the_gradient_are_those_of_the_loss(options):
    generator = torch.Generator().manual_seed(1)
    images = [3 * torch.randn(400, 5, generator=generator) - 3 for _ in range(6)]
    all_cells = torch.ones(400, dtype=torch.bool)
    regions = [by_region(z.sigmoid(), z.sigmoid(), all_cells, BINS) for z in images]
    form = simulate(Measured("", *map(torch.stack, zip(*regions))), 2, options)
    batches = torch.randint(6, (batch_regions.STEPS, 2), generator=torch.Generator().manual_seed(0))
    loss = GHMC(**options)
    for pair in batches:  # the loss sees the same batches, so that its memory is the same
        z = torch.cat([images[i] for i in pair]).requires_grad_()
        background = torch.full((800,), 5)
        loss(z, background, all_cells.repeat(2), 1).backward()
    gradient = by_region(z.detach().sigmoid(), z.grad, all_cells.repeat(2), loss.bins).gradient
    torch.testing.assert_close(form.gradient[-1], gradient / gradient.sum(), rtol=1e-4, atol=1e-7)
    weights = (z.grad / z.detach().sigmoid()).max() * z.numel()
    assert form.beta[-1].max().item() == pytest.approx(weights.item(), rel=1e-4)


def test_sparse_regions_match_a_calculation_by_hand():
    counts, norms = torch.zeros(1, BINS, dtype=torch.int64), torch.zeros(1, BINS, dtype=torch.float64)
    counts[0, 0], norms[0, 0] = 996, 9.96  # of 0.01 each
    counts[0, -1], norms[0, -1] = 4, 3.96  # of 0.99 each
    form = simulate(Measured("", counts, norms), 1, FORMS[PUBLISHED])
    assert form.largest() == pytest.approx(1000 / (4 * 2))  # N / (S n) of two regions
    assert form.from_few(10) == form.from_few(100) == pytest.approx(0.99)
    assert form.from_few(1000) == pytest.approx(1)
    empty_batch = torch.zeros(1, BINS)  # in half of the batches: only the other half sets a cell's weight
    half_empty = form._replace(counts=torch.cat([form.counts, empty_batch]), beta=torch.cat([form.beta, empty_batch]))
    half_empty = half_empty._replace(counts=half_empty.counts[-2:], beta=half_empty.beta[-2:])
    assert half_empty.weights()[-1].item() == pytest.approx(1000 / (4 * 2)) and half_empty.weights()[1] == 0
    assert simulate(Measured("", counts, norms), 3, FORMS[PUBLISHED]).from_few(10) == 0  # 12 cells


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", 0], "--images, --batches"),
        (["--batches", 2, 0], "--images, --batches"),
        (["--output", "/dev/null/x", "--images", 1, "--batches", 1], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(checkpoint, command, arguments, words):
    code, _, err = command(batch_regions.main, "--checkpoints", checkpoint, *arguments)
    assert code == 2 and words in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")
    code, _, err = command(batch_regions.main, "--checkpoints", "none.pt")
    assert code == 2 and "none.pt" in err
