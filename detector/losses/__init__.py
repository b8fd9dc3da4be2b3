"""Each file holds one loss or one family, such as GHM-C and GHM-R. No loss imports another one; of the detector's other
parts they use only distributed.py.

    class_loss(logits (N,C), labels (N,), valid (N,), num_pos) -> scalar      label C = background
    box_loss(deltas (P,4), targets (P,4), num_pos)              -> scalar      P may be 0

With `takes_quality = True`, a class loss gets a last argument `quality` (N,): the IoU of each positive box with its
object. With `takes_boxes = True`, a box loss gets decoded boxes and the ground truth in pixels instead of deltas. With
`takes_valid = True` and `scope` "level", it gets a last argument: which rows count (P,).

num_pos is the number of positive anchors over all processes, at least 1. The scalar is this process's share: training
minimises its sum over the processes. docs/new_loss.md adds a loss.
"""

from detector.losses.asl1 import ASL1
from detector.losses.balanced_l1 import BalancedL1
from detector.losses.cross_entropy import CrossEntropy
from detector.losses.focal import Focal
from detector.losses.ghm import GHMC, GHMR
from detector.losses.iou import CIoU, DIoU, GIoU
from detector.losses.l1 import L1
from detector.losses.ohem import OHEM
from detector.losses.qfl import QualityFocal
from detector.losses.rank_sort import RankSort
from detector.losses.smooth_l1 import SmoothL1
from detector.losses.varifocal import Varifocal

# The names for config files. Every command accepts a loss that is listed here, and test_laws.py tests it.
CLASS_LOSSES = {
    "ce": CrossEntropy,
    "ohem": OHEM,
    "focal": Focal,
    "ghm_c": GHMC,
    "ghm_c_released": GHMC.released,
    "qfl": QualityFocal,
    "varifocal": Varifocal,
    "rank_sort": RankSort,
}
BOX_LOSSES = {
    "smooth_l1": SmoothL1,
    "l1": L1,
    "asl1": ASL1,
    "balanced_l1": BalancedL1,
    "ghm_r": GHMR,
    "ghm_r_released": GHMR.released,
    "giou": GIoU,
    "diou": DIoU,
    "ciou": CIoU,
}
