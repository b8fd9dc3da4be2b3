"""Anchors + ground truth -> what each anchor is taught."""

import torch
from torch import Tensor

from detector import boxes as box_ops
from detector.structures import Assignment


class IoUAssigner:
    """RetinaNet's rule: an anchor belongs to the box it overlaps most.

    Positive where that IoU >= `fg_iou`, background where it is < `bg_iou`, ignored between. Besides, for
    every box, all anchors that reach the box's best IoU are positive for the box that *they* overlap most,
    whatever the IoU, if it is above 0 and at least `min_iou`; without this, boxes far from all anchor shapes
    are never learnt (+0.7 AP on COCO). `min_iou` = `fg_iou` switches this off.

    Source: Lin et al., Focal Loss, 2017, section 4; the low-quality matches are Faster R-CNN's (Ren et al.,
    2015, section 3.1.2). Same result as torchvision's Matcher, but where a box overlaps no anchor at all:
    there torchvision makes every anchor positive.
    """

    def __init__(self, fg_iou: float = 0.5, bg_iou: float = 0.4, min_iou: float = 0.0):
        if not 0 < bg_iou <= fg_iou <= 1:
            raise ValueError(f"bg_iou {bg_iou} and fg_iou {fg_iou}: need 0 < bg_iou <= fg_iou <= 1")
        if not 0 <= min_iou <= fg_iou:
            raise ValueError(f"min_iou {min_iou}: must be between 0 and fg_iou ({fg_iou})")
        self.fg_iou, self.bg_iou, self.min_iou = fg_iou, bg_iou, min_iou

    @torch.no_grad()
    def __call__(self, anchors: Tensor, gt_boxes: Tensor) -> Assignment:
        """Anchors (A, 4), boxes of one image (G, 4); G may be 0 -> Assignment."""
        # A running maximum over boxes: the (A, G) matrix of a crowd never exists.
        best_iou = anchors.new_zeros(len(anchors))
        gt_index = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        best_of_some_box = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
        for index, box in enumerate(gt_boxes):
            iou = box_ops.iou_with_one(anchors, box)
            closer = iou > best_iou
            best_iou = torch.where(closer, iou, best_iou)
            gt_index.masked_fill_(closer, index)
            highest = iou.max()
            best_of_some_box |= (iou == highest) & (highest > 0) & (highest >= self.min_iou)
        positive = (best_iou >= self.fg_iou) | best_of_some_box
        ignored = (best_iou >= self.bg_iou) & ~positive
        return Assignment(gt_index, positive, ignored)
