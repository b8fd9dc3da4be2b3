"""TensorBoard opens the runs of a comparison together, with data in each of its tabs."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

import train
from detector.configure import configure

LOSSES = {"ce": ("ce", "smooth_l1"), "ghm": ("ghm_c", "ghm_r")}


@pytest.fixture(scope="module")
def address(tiny, tmp_path_factory):
    """The address of a TensorBoard server that shows two runs."""
    folder = tmp_path_factory.mktemp("tensorboard")
    for name, (class_loss, box_loss) in LOSSES.items():
        losses = {"class_loss": {"name": class_loss}, "box_loss": {"name": box_loss}}
        logging_options = {"tensorboard": {"every": 1, "images": 1, "gradients": 2}}
        train.train(configure(tiny(folder, run=name, **losses, **logging_options)), torch.device("cpu"))
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "runs"), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--load_fast", "false"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            if set(json.load(urllib.request.urlopen(f"{url}/data/runs"))) == set(LOSSES):
                break
        except OSError:
            pass
        time.sleep(0.2)
    yield url
    server.terminate()
    server.wait()
    shutil.rmtree(folder)


def data(address, path, **body):
    request = urllib.request.Request(f"{address}/data/plugin/{path}")
    if body:
        request = urllib.request.Request(
            f"{address}/data/plugin/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
    return json.load(urllib.request.urlopen(request))


def test_all_runs_have_the_same_tags(address):
    tags = data(address, "scalars/tags")
    assert tags["ce"].keys() == tags["ghm"].keys() >= {"eval/AP", "loss/total", "diagnostics/true_class_probability"}
    tag_prefixes = {"images": "validation/0", "histograms": "gradient_class/count_log10", "text": "config"}
    for plugin, tag in (tag_prefixes | {"pr_curves": "eval/precision_recall"}).items():
        plugin_tags = data(address, f"{plugin}/tags")
        assert all(any(name.startswith(tag) for name in plugin_tags[run]) for run in LOSSES), plugin


def test_charts_hold_all_runs(address):
    (category,) = data(address, "custom_scalars/layout")["category"]
    patterns = [tag for chart in category["chart"] for tag in chart["multiline"]["tag"]]
    assert category["chart"][0]["title"] == "AP"
    for run in LOSSES:
        scalars = data(address, f"custom_scalars/scalars?run={run}&tag=%5Eeval%2FAP%24")
        assert len(scalars["tag_to_events"]["eval/AP"]) >= 1
    known_tags = data(address, "scalars/tags")["ghm"]
    assert all(pattern.strip("^$") in known_tags for pattern in patterns)


def test_the_table_of_runs_has_the_losses_and_ap(address):
    experiment = data(address, "hparams/experiment", experimentName="")
    parameters = {info["name"] for info in experiment["hparamInfos"]}
    assert {"class_loss.name", "box_loss.name", "seed"} <= parameters and len(parameters) < 40
    assert "eval/AP" in {info["name"]["tag"] for info in experiment["metricInfos"]}


def test_the_page_loads_in_a_browser_with_data(address, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium here to open pages with: apt-get install chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--window-size=1400,1000"]
    options += ["--virtual-time-budget=20000", "--dump-dom", f"{address}/#timeseries"]
    page = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120).stdout
    for expected in (*LOSSES, "diagnostics", "eval", "gradient", "CUSTOM SCALARS", "HPARAMS", "IMAGES"):
        assert expected.lower() in page.lower(), expected
    assert "No dashboards are active" not in page
