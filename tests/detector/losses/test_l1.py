import torch

from detector.losses import L1


def test_l1_is_the_sum_of_absolute_errors_over_positives(boxes):
    deltas, targets, num_pos = boxes()
    torch.testing.assert_close(L1()(deltas, targets, num_pos), (deltas - targets).abs().sum() / num_pos)
