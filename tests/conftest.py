"""The fixtures of the tests of whole runs: a small demo set, drawn rectangles, and a config that trains in seconds."""

import os
from pathlib import Path

import torch

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before data.transforms is imported: it would access the network
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on a CPU
# Commands that tests start import this checkout too, even if another one is installed in the environment.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import gc
import json
import multiprocessing
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
import yaml
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib import pyplot as plt

import train
from data import fonts
from data.demo import write_demo
from detector import config_files
from detector.configure import configure
from detector.errors import SIGNALS, run_main

gc.freeze()  # visiting what the imports made takes 2 to 5% of the tests' time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would the processes that tests start
os.fsync = lambda file: None  # no test cuts the power, and a short run waits for the disk 8% of its time
COLOURS = ((255, 60, 60), (60, 255, 60), (90, 90, 255))


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker waits at the end: those that compile losses, then whole runs."""
    items.sort(key=lambda item: ("losses" in item.path.parts, item.path), reverse=True)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """Eight training and four validation scenes of the demo set."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, train_images=8, val_images=4)
    return folder


@pytest.fixture(autouse=True)
def handlers():
    """Restore the signal handlers: a stopped command ignores signals, the tests' process must not."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    hook = sys.unraisablehook
    yield
    for timer in threading.enumerate():
        if isinstance(timer, threading.Timer):  # it sends another signal
            timer.join()
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def figures():
    """Close the figures of a test: matplotlib warns of more than 20, and the scripts leave theirs to their end."""
    yield
    plt.close("all")


@pytest.fixture
def within():
    """A context that fails after a number of seconds, for code that may hang forever."""

    def late(*_):
        raise AssertionError("it hangs")

    @contextmanager
    def limit(seconds: float):
        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return limit


@pytest.fixture
def folder(tmp_path):
    """A folder emptied after the test: each checkpoint has some 100 MB."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def full_disk():
    """A context in which no file grows beyond a number of bytes, as on a full disk."""

    @contextmanager
    def limit(size: int):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limit


@pytest.fixture(scope="session")
def tiny(demo):
    """Writes a config into a folder and returns its path: two epochs of two steps, changed by whole sections."""

    def write(folder: Path, **changes) -> str:
        files = {}
        for split in ("train", "val"):
            files[split] = {"annotations": str(demo / f"{split}.json"), "images": str(demo / split)}
        values = {
            "run": "tiny",
            "output": str(folder / "runs"),
            "device": "cpu",
            "data": {**files, "short_side": 96, "long_side": 128, "workers": 0},
            "model": {
                "backbone": "resnet18",
                "weights": "none",
                "norm": "bn",
                "fpn_channels": 32,
                "head": {"width": 32, "depth": 1},
            },
            "solver": {"batch_size": 4, "lr_batch_size": None, "epochs": 2, "warmup_steps": 1},
            "tensorboard": {"every": 1, "images": 1},
        }
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(config_files.merge(values, changes)))
        return str(path)

    return write


@pytest.fixture(scope="session")
def rectangles():
    """Writes images of bright rectangles on black, a colour a class, and their COCO file; category ids have gaps."""

    def write(folder: Path, boxes: list[list[tuple[int, list[int]]]], classes: int, side: int = 64) -> tuple[str, str]:
        """boxes: of each image, (class, [x, y, width, height]) -> annotation file, image folder."""
        (folder / "images").mkdir(parents=True, exist_ok=True)
        document = {"images": [], "annotations": [], "categories": []}
        document["categories"] = [{"id": 3 + 4 * c, "name": f"colour {c}"} for c in range(classes)]
        for number, content in enumerate(boxes):
            image = np.zeros((side, side, 3), np.uint8)
            document["images"].append({"id": 50 + number, "file_name": f"{number}.png", "width": side, "height": side})
            for c, (x, y, width, height) in content:
                image[y : y + height, x : x + width] = COLOURS[c][::-1]
                document["annotations"].append(
                    {
                        "id": len(document["annotations"]) + 1,
                        "image_id": 50 + number,
                        "category_id": 3 + 4 * c,
                        "bbox": [x, y, width, height],
                        "area": width * height,
                        "iscrowd": 0,
                    }
                )
            cv2.imwrite(str(folder / "images" / f"{number}.png"), image)
        (folder / "annotations.json").write_text(json.dumps(document))
        return str(folder / "annotations.json"), str(folder / "images")

    return write


@pytest.fixture(scope="session")
def overfit(rectangles):
    """Trains on two images of rectangles and scores on the same; returns the run folder and its metrics."""

    def run(folder: Path, classes: int, **changes) -> tuple[Path, dict]:
        second, last = min(1, classes - 1), classes - 1
        boxes = [
            [(0, [9, 12, 30, 36]), (last, [54, 45, 33, 30])],
            [(second, [45, 9, 39, 33]), (0, [12, 54, 27, 30])],
        ]
        # Training has each image twelve times, because every epoch writes a checkpoint.
        files = {}
        for split, times in (("train", 12), ("val", 1)):
            annotations, images = rectangles(folder / split, boxes * times, classes, side=96)
            files[split] = {"annotations": annotations, "images": images}
        values = {
            "run": "overfit",
            "output": str(folder / "runs"),
            "device": "cpu",
            "data": {**files, "short_side": 64, "long_side": 64, "workers": 0, "horizontal_flip": 0},
            "model": {
                "backbone": "resnet18",
                "weights": "none",
                "norm": "gn",  # no gap between training and evaluation, as BatchNorm has with two images
                "p6_from": "p5",
                "fpn_channels": 32,
                "head": {"width": 32, "depth": 1},
            },
            "anchors": {"name": "grid", "sizes": [16, 32, 48, 64, 96]},
            "solver": {"optimizer": "adamw", "lr": 1e-3, "lr_batch_size": None, "batch_size": 2, "epochs": 3,
                       "warmup_steps": 5, "schedule": "cosine", "clip_norm": 10},
            "evaluation": {"every": 3},
            "tensorboard": {"every": 10, "images": 2},
        }  # fmt: skip
        (folder / "overfit.yaml").write_text(yaml.safe_dump(config_files.merge(values, changes)))
        cfg = configure(str(folder / "overfit.yaml"))
        return cfg.folder, train.train(cfg, torch.device("cpu"))

    return run


@pytest.fixture(scope="session")
def learnt(overfit, tmp_path_factory):
    """The folder of a run that knows two images of three classes by heart. Many tests read it: do not change it."""
    run, _ = overfit(tmp_path_factory.mktemp("learnt"), 3, solver={"ema": 0.5}, precision="float32")
    return run


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls an entry point as the shell would: its exit code, standard output and standard error."""

    def call(main, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            run_main(main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


# Runs in a process that has imported PyTorch, and turns it into the command that a command line would start.
WARM = """
import atexit, multiprocessing, os, runpy, sys
multiprocessing.set_start_method(start_method, force=True)  # here it is forkserver
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
if new_session:
    os.setsid()
for number, file in ((1, out), (2, err)):
    os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
sys.stdin = open(os.devnull)
sys.stdout, sys.stderr = (open(number, "w", 1, "utf-8", closefd=False) for number in (1, 2))
is_module = words[0] == "-m"
sys.argv = words[is_module:]
try:
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
finally:
    sys.stdout.flush(), sys.stderr.flush()
    atexit._run_exitfuncs()
"""


class WarmStart:
    """Like subprocess.Popen for `python SCRIPT ...` and `python -m MODULE ...`, without four seconds of imports.

    The command runs in its own process, forked from one that has only imported PyTorch.
    """

    context = multiprocessing.get_context("forkserver")

    def __init__(self, args, *, cwd=".", env=None, stdout=None, stderr=None, text=None, start_new_session=False):
        self.args, self.returncode, self._files = args, None, []
        for stream in (stdout, stderr):
            needs_file = stream in (None, subprocess.PIPE)
            self._files.append(tempfile.NamedTemporaryFile() if needs_file else open(stream.name))  # noqa: SIM115
        out, err = (file.name for file in self._files)
        values = {"words": [str(word) for word in args[1:]], "folder": str(cwd), "out": out, "err": err}
        values["start_method"] = multiprocessing.get_start_method()
        values |= {"environment": dict(os.environ if env is None else env), "new_session": start_new_session}
        self._process = self.context.Process(target=exec, args=(WARM, values))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._ended(0)

    def wait(self, timeout=None):
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, _input=None, timeout=None):
        self.wait(timeout)
        return tuple(Path(file.name).read_text(encoding="utf-8") for file in self._files)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout):
        self._process.join(timeout)
        self.returncode = self._process.exitcode
        return self.returncode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()
        for file in self._files:
            file.close()


@pytest.fixture(scope="session")
def warm_start():
    """The class to use in place of subprocess.Popen."""
    WarmStart.context.set_forkserver_preload(["train"])
    return WarmStart


@pytest.fixture
def warm_starts(warm_start, monkeypatch):
    """Python commands that the test starts need not import PyTorch again. Their own children do."""
    original_popen = subprocess.Popen

    def start(args, **options):
        return (warm_start if args[0] == sys.executable else original_popen)(args, **options)

    monkeypatch.setattr(subprocess, "Popen", start)


@pytest.fixture
def font(tmp_path):
    """Makes a font in which each letter is a black square with a margin, and returns its file."""

    def make(file: str, letters: str, style: str = "Regular", advance: int = 1000, name: str = "Made") -> str:
        pen = TTGlyphPen(None)
        for point, draw in zip(((100, 0), (100, 800), (900, 800), (900, 0)), (pen.moveTo, *[pen.lineTo] * 3)):
            draw(point)
        pen.closePath()
        square = pen.glyph()
        names = [".notdef", *(f"u{ord(letter):x}" for letter in letters)]
        builder = FontBuilder(1000)
        builder.setupGlyphOrder(names)
        builder.setupCharacterMap({ord(letter): f"u{ord(letter):x}" for letter in letters})
        builder.setupGlyf(dict.fromkeys(names, square))
        builder.setupHorizontalMetrics(dict.fromkeys(names, (advance, 100)))
        builder.setupHorizontalHeader(ascent=800, descent=-200)
        builder.setupNameTable({"familyName": name, "styleName": style})
        builder.setupOS2()
        builder.setupPost()
        builder.save(tmp_path / f"{file}.ttf")
        return str(tmp_path / f"{file}.ttf")

    return make


@pytest.fixture
def machine(monkeypatch):
    """Makes these files the machine's only fonts, and clears the caches of fonts."""

    def has(*files: str) -> None:
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(files))
        monkeypatch.setattr(fonts, "_missing", set())
        fonts._others.cache_clear()

    yield has
    fonts._others.cache_clear()


@pytest.fixture(scope="session")
def same():
    """Whether two nested values are equal to the last bit."""

    def equal(first, second) -> bool:
        if isinstance(first, torch.Tensor):
            return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        if isinstance(first, dict):
            return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
        if isinstance(first, (list, tuple)):
            return len(first) == len(second) and all(map(equal, first, second))
        return first == second

    return equal
