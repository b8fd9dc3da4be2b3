"""The wheel holds `detector`, whose losses need torch alone; an editable install makes the repository importable."""

import os
import re
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


def copy_sources(folder):
    """Copy what setuptools needs of the repository, because it leaves files beside the sources."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py", "eval.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("detector", "data", "scripts"):
        shutil.copytree(ROOT / name, folder / name)


def built(result):
    """Check that pip has succeeded. Skip the test if it could not reach a package index, to install setuptools."""
    if "No matching distribution found for setuptools" in result.stderr:
        pytest.skip("needs a package index")
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("sources") / "copy"
    copy_sources(source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    built(subprocess.run(command, capture_output=True, text=True))
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
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))  # a gigabyte that is already here
    python = tmp_path / "env" / "bin" / "python"
    result = subprocess.run([python, "-I", "-c", USE % NOT_NEEDED], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith(str(packages))


def test_the_extras_are_what_requirements_txt_installs(wheel):
    (path,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
    lines = zipfile.ZipFile(wheel).read(path).decode().splitlines()
    extras = [line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")]
    (installed,) = re.findall(r"^-e \.\[(.*)\]$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert sorted(extras) == sorted(installed.split(","))
    for package in ("torchvision", "scikit-learn", "onnxruntime"):
        assert any(line.startswith(f"Requires-Dist: {package}") for line in lines), package


def test_an_editable_install_is_imported_and_run_from_anywhere(tmp_path):
    source, env, elsewhere = tmp_path / "source", tmp_path / "env", tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy_sources(source)
    venv.create(env, with_pip=False)
    python = env / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "-e", source]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    built(subprocess.run(install, cwd=elsewhere, env=environment, capture_output=True, text=True))
    (packages,) = env.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    code = "import detector, data.coco, scripts.compare as s; print(detector.__file__, data.coco.__file__, s.__file__)"
    for command in ([python, "-c", code], [python, source / "scripts" / "compare.py", "--help"]):
        result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        if command[1] == "-c":
            assert all(path.startswith(str(source)) for path in result.stdout.split()), result.stdout


def test_no_file_changes_sys_path():
    """The editable install puts the repository on Python's path; nothing else does."""
    files = [path for folder in ("detector", "data", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for path in [ROOT / "train.py", ROOT / "eval.py", *files]:
        assert not re.search(r"sys\.path\.(insert|append)", path.read_text(encoding="utf-8")), path
