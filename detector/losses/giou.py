"""GIoU: overlap, and where there is none, how much emptiness lies between."""

from torch import Tensor, nn

from detector.losses.overlap import EPS, overlap


class GIoU(nn.Module):
    """Generalized IoU loss.

        loss = (1 / num_pos) sum 1 - IoU + (E - U) / E,   U union, E the smallest box that encloses both

    Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, arXiv 1902.09630.
    Normalised by num_pos, the positive anchors of all processes. Each box adds 0 to 2. Takes boxes, not deltas.

        box_loss = GIoU()
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
        enclosing = pair.width * pair.height
        return (1 - pair.iou + (enclosing - pair.union) / (enclosing + EPS)).sum() / num_pos
