import time

import torch

from detector.stopwatch import Stopwatch


def test_seconds_add_up_by_stage():
    watch = Stopwatch(torch.device("cpu"))
    for _ in watch.each("loading", (time.sleep(0.02) for _ in range(3))):
        with watch("network"):
            time.sleep(0.01)
    assert list(watch.seconds) == ["loading", "network"]
    assert 0.06 <= watch.seconds["loading"] < 0.5 and 0.03 <= watch.seconds["network"] < 0.3


def test_each_gives_every_item_once():
    assert list(Stopwatch().each("x", iter([1, None, 3]))) == [1, None, 3]
