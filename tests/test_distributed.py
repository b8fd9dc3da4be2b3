"""Several processes give the results of one. The tests that interrupt them start torchrun, as users do."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from detector import checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(warm_start):
    def with_torchruns_variables(*command: object, processes: int = 1) -> None:
        with socket.socket() as free_socket:
            free_socket.bind(("localhost", 0))
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_socket.getsockname()[1])}
        ranks = []
        for rank in range(processes):
            rank_variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), **address}
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **(rank_variables if processes > 1 else {})}
            ranks.append(warm_start([sys.executable, *command], cwd=ROOT, env=environment))
        for process in ranks:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-3000:]

    return with_torchruns_variables


def read(path: Path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def runs(rectangles, tmp_path_factory, run):
    """A folder with the config and two runs: `one` by one process, and `two` by two processes."""
    # The images differ in size, so processes must pad alike. GroupNorm, as BatchNorm sees only a process's share.
    folder = tmp_path_factory.mktemp("runs")
    boxes = [[(i % 2, [6 + 4 * i, 10, 20 + 3 * i, 30])] for i in range(5)]
    annotations, images = rectangles(folder, boxes, classes=2)
    files = {"annotations": annotations, "images": images}
    values = {
        "output": str(folder),
        "device": "cpu",
        "precision": "float32",  # in bfloat16 the order of a sum changes it
        "data": {
            "train": files,
            "val": files,
            "short_side": 64,
            "long_side": 64,
            "workers": 0,
            "scale_jitter": [0.5, 1.5],
        },
        "model": {
            "backbone": "resnet18",
            "weights": "none",
            "norm": "gn",
            "fpn_channels": 64,
            "head": {"width": 64, "depth": 1},
        },
        "class_loss": {"name": "ghm_c"},
        "box_loss": {"name": "ghm_r"},
        "solver": {"batch_size": 4, "lr_batch_size": None, "lr": 0.01, "epochs": 1, "warmup_steps": 0, "ema": 0.9},
        "tensorboard": {"enabled": False},
        "postprocess": {"score_threshold": 0.0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    for processes, name in ((1, "one"), (2, "two")):
        run("train.py", "--config", folder / "config.yaml", "--set", f"run={name}", processes=processes)
    yield folder
    shutil.rmtree(folder)


def test_two_processes_train_as_one(runs):
    one, two = (checkpoint.read(runs / name / "last.pt") for name in ("one", "two"))
    for part in ("model", "criterion"):
        for name, value in one["run"][part].items():
            torch.testing.assert_close(two["run"][part][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert one["run"]["criterion"]["class_loss.updates"] == 2
    metrics = [read(runs / name / "metrics.json") for name in ("one", "two")]
    assert metrics[0]["images"] == metrics[1]["images"] == 5


def test_one_two_and_three_processes_score_the_same(runs, rectangles, run):
    """Seven images make the shares differ. A fixed batch size keeps the batches equal."""
    boxes = [[(i % 2, [3 * i, 10, 20 + 3 * i, 30])] for i in range(7)]
    data = rectangles(runs / "other", boxes, classes=2)
    outputs = []
    for processes in (1, 2, 3):
        folder = runs / f"by {processes}"
        arguments = ("--checkpoint", runs / "one" / "last.pt", "--data", *data, "--output", folder)
        run("eval.py", *arguments, "--set", "evaluation.batch_size=2", processes=processes)
        rows = [(result["image_id"], *result["bbox"], result["score"]) for result in read(folder / "detections.json")]
        outputs.append((read(folder / "metrics.json"), sorted(rows)))
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0][0]["images"] == 7 and len(outputs[0][1]) > 500


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes as Linux shows them")
def test_a_killed_process_is_restarted_and_continues(runs):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    settings = ["run=killed", "checkpoint.every=1", "solver.epochs=4", "evaluation.every=4"]
    command = [*launcher, "train.py", "--config", runs / "config.yaml", "--resume", "--set", *settings]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (runs / "killed" / "last.pt").exists():
            time.sleep(0.02)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert ", from step " in output
    assert checkpoint.read(runs / "killed" / "last.pt")["run"]["solver"]["step"] == 8


def begin(*settings: object, folder: Path, processes: int = 2) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [sys.executable, *launcher, "train.py", "--config", folder / "config.yaml", "--set", *settings]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, words)), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)  # fmt: skip


def test_a_signal_to_all_processes_saves_and_ends_the_run(runs):
    """torchrun and its processes get the signal, and the processes get it again from torchrun."""
    process = begin("run=asked", "solver.epochs=500", "checkpoint.every=1", "data.workers=2", folder=runs)
    last = runs / "asked" / "last.pt"
    while not last.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    if Path("/proc/self/task").exists():
        for rank in children(process.pid):
            os.killpg(os.getpgid(rank), signal.SIGTERM)  # their process groups differ from that of torchrun
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("stopped by SIGTERM; continue with the same command and --resume") == 2, err
    assert 'train.py", line' not in err  # the only traceback is that of torchrun
    assert checkpoint.read(last)["run"]["solver"]["step"] > 0


def test_an_image_that_one_process_cannot_read_saves_and_ends_the_run(runs, rectangles):
    annotations, images = rectangles(runs / "broken", [[(0, [6, 10, 20, 30])]] * 12, classes=2)
    (Path(images) / "7.png").write_bytes(b"broken")
    process = begin("run=broken", f"data.train.annotations={annotations}", f"data.train.images={images}", folder=runs)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("7.png: cannot read the image") == 2 and err.count("continue with --resume") == 2, err
    assert 'train.py", line' not in err
    assert checkpoint.read(runs / "broken" / "last.pt")["run"]["solver"]["step"] in (0, 1, 2)


def test_the_slurm_script_saves_and_requeues_its_job(runs, tmp_path):
    """The script in docs/distributed.md gets Slurm's signal. Stand-ins replace Slurm's commands and torchrun."""
    document = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    script = next(block for block in document.split("```") if "#SBATCH" in block).removeprefix("bash\n")
    (tmp_path / "job.sh").write_text(script)
    programs = {
        "scontrol": f'[ "$1" = show ] && echo node0 || echo "$@" >> {tmp_path}/requeued',
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
        "torchrun": 'while [ "$1" != train.py ]; do shift; done\n'
        '[ "$*" = "train.py --config configs/coco/focal.yaml --resume" ] || exit 9\n'
        f"cd {ROOT}; exec {sys.executable} train.py --config {runs}/config.yaml --resume --set run=slurm $SETTINGS",
        ".venv/bin/activate": f"PATH={tmp_path}:$PATH",
    }
    for name, content in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-1]",
             "SLURM_NNODES": "2", "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}  # fmt: skip

    def submit(settings: str) -> subprocess.Popen:
        environment = {**os.environ, **slurm, "SETTINGS": settings}
        return subprocess.Popen(["bash", tmp_path / "job.sh"], env=environment, stderr=subprocess.PIPE, text=True)

    job = submit("checkpoint.every=1 solver.epochs=500")
    last = runs / "slurm" / "last.pt"
    while not last.exists():
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=120)
    assert job.returncode == 0 and "stopped by SIGTERM" in err, err
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    step = checkpoint.read(last)["run"]["solver"]["step"]

    # Slurm starts the job again. Now it ends by itself and is not requeued.
    job = submit(f"solver.epochs=500 solver.max_steps={step + 1}")
    _, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert checkpoint.read(last)["run"]["solver"]["step"] == step + 1
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
