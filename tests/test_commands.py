"""Every command in the README and in docs/ exists, and runs as printed."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import cv2
import pytest

import train
from detector.configure import configure

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text):
    """The indented commands, joined over lines that end in a backslash, and the code spans with an option."""
    lines = re.sub(r"```.*?```", "", text, flags=re.S).replace("\\\n", " ").splitlines()
    indented_commands = [line.strip() for line in lines if re.match(r"    (python|torchrun|srun) ", line)]
    return indented_commands + [span for span in re.findall(r"`(python [^`]*--[^`]*)`", " ".join(text.split()))]


COMMANDS = sorted({text for path in DOCUMENTS for text in commands(path.read_text(encoding="utf-8"))})
SCRIPTS = [
    path
    for path in [ROOT / "train.py", ROOT / "eval.py", *sorted((ROOT / "scripts").rglob("*.py"))]
    if "ArgumentParser(" in path.read_text(encoding="utf-8")
]


@cache
def module(path):
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_has_at_least_ten_lines_and_an_example(path, command):
    code, out, _ = command(module(path).main, "--help")
    assert code == 0 and len(out.splitlines()) >= 10
    assert path.name in out  # an example


@pytest.mark.parametrize("text", COMMANDS)
def test_a_documented_command_exists(text, command):
    """Its script, options, configs, settings and variants exist; the scripts' own tests check what they do."""
    words = shlex.split(text.replace("...", ""))
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None:
        assert words[:2] == ["python", "-m"] and words[2] in ("data.demo", "pytest")
        return
    assert (ROOT / script).exists()
    arguments = words[words.index(script) + 1 :]
    if ROOT / script in SCRIPTS:
        _, page, _ = command(module(ROOT / script).main, "--help")
        for word in arguments:
            assert not word.startswith("--") or re.search(rf"{re.escape(word)}\b", page), word
    config = next((word for word in arguments if word.startswith("configs/")), "configs/coco/focal.yaml")
    config = config.replace("gce", "focal")  # docs/new_loss.md defines gce
    assert (ROOT / config).exists()
    settings = [word for word in arguments if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=[^x]", word)]
    variants = arguments[arguments.index("--variants") + 1 :] if "--variants" in arguments else []
    for word in variants:
        if word.startswith("--"):
            break
        for part in word.split("+"):
            assert part == "gce" or (ROOT / config).with_name(f"{part}.yaml").exists(), part
    configure(
        str(ROOT / config), [setting for setting in settings if not setting.startswith(("class_loss.", "box_loss."))]
    )


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 25 and len(SCRIPTS) > 12


# ------------------------------------------------------------------------------------------------ running the commands

CHEAP = [
    "device=cpu",
    "precision=float32",
    "model.backbone=resnet18",
    "model.weights=none",
    "model.norm=bn",
    "model.fpn_channels=32",
    "model.head.width=32",
    "model.head.depth=1",
    "data.short_side=96",
    "data.long_side=128",
    "data.workers=0",
    "solver.batch_size=4",
    "solver.warmup_steps=1",
    "solver.epochs=1",
    "evaluation.every=1",
]


@pytest.fixture(scope="session")
def learnt(tiny, tmp_path_factory):
    """A run for the commands that use one."""
    folder = tmp_path_factory.mktemp("learnt")
    train.train(configure(tiny(folder)), train.pick_device("cpu"))
    yield folder / "runs" / "tiny"
    shutil.rmtree(folder)


@pytest.fixture
def place(demo, folder, monkeypatch):
    """A folder like the reader's copy of the repository, with data where the documents expect them."""
    for name in ("train.py", "eval.py", "scripts", "configs", "results"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs").mkdir()
    (folder / "X").write_text("base: configs/bccd/focal.yaml\n")
    for split in ("train", "val"):
        for source, target in (
            (f"{split}.json", f"datasets/coco/annotations/instances_{split}2017.json"),
            (f"{split}.json", f"datasets/bccd/{split}.json"),
            (split, f"datasets/coco/{split}2017"),
            (split, "datasets/bccd/images"),
            (f"{split}.json", f"datasets/demo_quick/{split}.json"),
            (split, f"datasets/demo_quick/{split}"),
            ("train", "hands_yolo/images"),
            ("val", "hands_yolo/images/test"),
            ("val", "images"),
            ("val", "photos"),
            ("val", "new_photos"),
        ):
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            if (demo / source).is_dir():
                shutil.copytree(demo / source, folder / target, dirs_exist_ok=True)
            else:
                shutil.copy(demo / source, folder / target)
    shutil.copy(demo / "val.json", folder / "annotations.json")
    as_yolo(folder / "hands_yolo", demo)
    photos = sorted((demo / "val").iterdir())
    shutil.copy(photos[0], folder / "photo.jpg")
    film = cv2.VideoWriter(str(folder / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (128, 128))
    for photo in photos:
        film.write(cv2.resize(cv2.imread(str(photo)), (128, 128)))
    film.release()
    monkeypatch.chdir(folder)
    return folder


def as_yolo(folder, demo):
    for split, place in (("train", folder / "labels"), ("val", folder / "labels" / "test")):
        place.mkdir(exist_ok=True)
        document = json.loads((demo / f"{split}.json").read_text())
        label = {entry["id"]: number for number, entry in enumerate(document["categories"])}
        for image in document["images"]:
            width, height = image["width"], image["height"]
            lines = [
                f"{label[entry['category_id']]} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"
                for entry in document["annotations"]
                if entry["image_id"] == image["id"]
                for x, y, w, h in [entry["bbox"]]
            ]
            (place / f"{Path(image['file_name']).stem}.txt").write_text("".join(lines))
    (folder / "classes.txt").write_text("\n".join(entry["name"] for entry in document["categories"]))


def supply(words, learnt):
    """Provide the files that a command uses and no earlier command made: the run of `learnt`, and results."""
    for word in words:
        path = Path(word)
        if path.name in ("best.pt", "last.pt") and not path.exists():
            shutil.copytree(learnt, path.parent)
        if "*" in word and not list(Path().glob(word)):
            path.parent.mkdir(parents=True, exist_ok=True)
            for file in (ROOT / "results" / "laptop").glob("*-s0.json"):
                shutil.copy(file, path.parent)


def runnable(path):
    """A document's commands as words, with their optional parts, without those that other tests run.

    Benchmarks are run by tests/scripts/bench/, torchrun by tests/test_distributed.py, data.demo by tests/data/, and
    write_config_docs.py, which would write into this repository, by tests/test_docs.py.
    """
    elsewhere = ("-m", "scripts/bench/", "scripts/write_config_docs.py")
    printed = [
        shlex.split(re.sub(r"\[(--[^]]*)\]", r"\1", text).replace("...", ""))
        for text in commands(path.read_text(encoding="utf-8"))
    ]
    return [words for words in printed if words[0] == "python" and not words[1].startswith(elsewhere)]


RUN = [path for path in DOCUMENTS if runnable(path)]


@pytest.mark.parametrize("document", RUN, ids=lambda path: path.name)
def test_the_commands_of_a_document_run(document, place, learnt, command, monkeypatch):
    """They run in the order of the document, with the files that the earlier ones made.

    Trainings are small, and scripts/ablate.py ends after its checks.
    """
    for _, script, *arguments in runnable(document):
        supply(arguments, learnt)
        arguments = [
            argument
            for word in arguments
            for argument in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
        ]
        # docs/new_loss.md defines gce, and tests/test_docs.py tests it.
        arguments = [word.replace("gce.yaml", "focal.yaml") for word in arguments if word != "gce"]
        if script == "train.py":
            arguments += ["--set", *CHEAP]
        if script == "scripts/ablate.py":
            arguments += ["--dry-run"]
        if ROOT / script in SCRIPTS:
            loaded = module(ROOT / script)
            if script == "scripts/download.py":  # the data are already there
                monkeypatch.setattr(loaded, "is_unpacked", lambda *_: True)
            code, _, err = command(loaded.main, *arguments)
        else:
            result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
            code, err = result.returncode, result.stderr
        assert code == 0, (script, arguments, err)


def test_make_demo(place, demo, command):
    """The trainings of the Makefile, made small, and its comparison run."""
    printed = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (losses,) = re.findall(r"printf '%s\\n' ([a-z_ ]+) .*xargs", printed)
    assert "train.py --config configs/demo/$0.yaml --resume" in printed and "-m data.demo --quick\n" in printed
    for loss in losses.split():
        code, _, err = command(
            module(ROOT / "train.py").main, "--config", f"configs/demo/{loss}.yaml", "--resume", "--set", *CHEAP
        )
        assert code == 0, err
    (runs,) = re.findall(r"scripts/compare.py (.+)", printed)
    code, out, err = command(module(ROOT / "scripts" / "compare.py").main, *runs.split())
    assert code == 0 and all(f"demo_{loss}" in out for loss in losses.split()), err
