"""What the documents show runs."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[1]


def test_the_losses_example_trains_a_foreign_detector():
    """Its loop with the smallest stand-ins for what it takes from elsewhere."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "losses.md").read_text(encoding="utf-8"), re.S)
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 3 + 4)
    anchors, features = torch.rand(30, 4), torch.rand(30, 2)

    def model(_images):
        both = layer(features)
        return both[:, :3], both[:, 3:], anchors

    def assign(_anchors, _gt):
        number = torch.arange(30)
        return torch.zeros_like(number), number < 4, (number >= 4) & (number < 7)

    gt = SimpleNamespace(boxes=torch.rand(1, 4), labels=torch.tensor([2]))
    names = {
        "model": model,
        "assign": assign,
        "encode": lambda boxes, anchors: boxes - anchors,
        "loader": [(None, gt)] * 60,
        "optimizer": torch.optim.Adam(layer.parameters(), lr=0.02),
    }
    values = []
    exec(code.replace("loss.backward()", "record(loss.item()); loss.backward()"), names | {"record": values.append})
    assert len(values) == 60 and sum(values[-10:]) < sum(values[:10])
