"""One loss a file; none knows another, nor any other part of the detector.

    class_loss(logits (N,C), labels (N,), valid (N,), num_pos) -> scalar      label C = background
    box_loss(deltas (P,4), targets (P,4), num_pos)              -> scalar      P may be 0

A class loss that says `takes_quality` may be given, last, how good each positive anchor's box is (N,); a box loss
that says `takes_boxes` is given decoded boxes and the ground truth in pixels instead of deltas, and one that says
`takes_valid` may be given, last, which rows count (P,).

num_pos is the number of positive anchors over all processes, at least 1. The scalar is this process's share:
summed over processes it is what is minimised.
"""

from detector.losses.asl1 import ASL1
from detector.losses.ciou import CIoU
from detector.losses.cross_entropy import CrossEntropy
from detector.losses.diou import DIoU
from detector.losses.focal import Focal
from detector.losses.ghm import GHMC, GHMR
from detector.losses.giou import GIoU
from detector.losses.l1 import L1
from detector.losses.ohem import OHEM
from detector.losses.qfl import QualityFocal
from detector.losses.smooth_l1 import SmoothL1
from detector.losses.varifocal import Varifocal

__all__ = [
    "ASL1",
    "GHMC",
    "GHMR",
    "L1",
    "OHEM",
    "CIoU",
    "CrossEntropy",
    "DIoU",
    "Focal",
    "GIoU",
    "QualityFocal",
    "SmoothL1",
    "Varifocal",
]
