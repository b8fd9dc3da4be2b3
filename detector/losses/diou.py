"""DIoU: overlap, and how far the centres are apart."""

from torch import Tensor, nn

from detector.losses.overlap import EPS, overlap


class DIoU(nn.Module):
    """Distance IoU loss.

        loss = (1 / num_pos) sum 1 - IoU + d^2 / c^2,   d between the centres, c the enclosing box's diagonal

    Zheng et al., "Distance-IoU Loss", AAAI 2020, arXiv 1911.08287.
    Normalised by num_pos, the positive anchors of all processes. Each box adds 0 to 2. Takes boxes, not deltas.

        box_loss = DIoU()
        boxes = decode(deltas[positive], anchors[positive])  # (P, 4) x1, y1, x2, y2
        loss = box_loss(boxes, gt_boxes[gt_index[positive]], positive.sum().clamp(min=1))

    Raises nothing of its own.
    """

    takes_boxes = True

    def __init__(self) -> None:  # so that its signature says that there is nothing to set
        super().__init__()

    def forward(self, boxes: Tensor, targets: Tensor, num_pos: Tensor | float) -> Tensor:
        """boxes, targets (P, 4) x1, y1, x2, y2 in pixels; P may be 0 -> scalar."""
        pair = overlap(boxes, targets)
        diagonal = pair.width.square() + pair.height.square()
        return (1 - pair.iou + pair.distance / (diagonal + EPS)).sum() / num_pos
