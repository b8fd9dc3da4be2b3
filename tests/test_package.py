"""The wheel holds the losses, which need torch alone."""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
USE = """
import sys
class Nothing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in %r:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import torch
from detector.losses import GHMC, GHMR, Focal, GIoU
logits, labels = torch.randn(50, 3, requires_grad=True), torch.randint(0, 4, (50,))
for loss in (GHMC(), GHMC(density="exact"), Focal()):
    loss(logits, labels, torch.ones(50, dtype=torch.bool), 5.0).backward()
assert logits.grad.isfinite().all() and GHMR()(torch.zeros(2, 4), torch.ones(2, 4), 2.0) > 0
import detector
print(detector.__file__)
"""
NOT_NEEDED = ["albumentations", "cv2", "hotcoco", "matplotlib", "numpy", "pycocotools", "pydantic", "tqdm", "yaml"]
NOT_NEEDED += ["tensorboard", "torchvision"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder, source = (
        tmp_path_factory.mktemp("wheel"),
        tmp_path_factory.mktemp("source"),
    )  # setuptools leaves things there
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("detector", "data", "scripts"):
        shutil.copytree(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_detector_alone_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"detector"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert required == ["torch>=2.11"]


def test_a_loss_runs_in_an_environment_with_torch_alone(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))  # a gigabyte that is here already
    python = tmp_path / "env" / "bin" / "python"
    done = subprocess.run([python, "-c", USE % NOT_NEEDED], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(packages))
