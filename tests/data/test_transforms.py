import subprocess
import sys

import numpy as np
import pytest

from data.transforms import EvalTransform, TrainTransform, flip, resize, target_size
from detector.errors import UserError

NO_BOXES = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
PLAIN = {"horizontal_flip": 0.0}


def painted(height, width, box):
    """A bright rectangle on black; box has whole numbers."""
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    return image, np.array([box], np.float32), np.array([3])


def bright(image):
    """The box of the bright pixels, to about half a pixel."""
    rows, columns = np.nonzero(image.max(axis=2) > 100)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def noise(height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# -------------------------------------------------------------------------------------------------- resize


def test_resize_by_hand():
    assert target_size(480, 640, 800, 1333) == (800, 1067)
    assert target_size(640, 480, 800, 1333) == (1067, 800)
    assert target_size(480, 1000, 800, 1333) == (640, 1333)
    assert target_size(1, 10_000, 800, 1333) == (1, 1333)


def test_resize_reaches_one_limit_and_exceeds_none():
    generator = np.random.default_rng(0)
    for height, width in generator.integers(1, 3000, (500, 2)).tolist():
        h, w = target_size(height, width, 800, 1333)
        assert (min(h, w) == 800 and max(h, w) <= 1333) or max(h, w) == 1333
        scale = max(h, w) / max(height, width)
        assert abs(min(h, w) - min(height, width) * scale) <= 1.5 or min(h, w) == 1


def test_boxes_scale_by_the_exact_ratio_of_each_axis():
    image, boxes = resize(noise(3, 7), np.array([[0, 0, 7, 3]], np.float32), 10, 20)
    assert image.shape == (10, 20, 3) and boxes.tolist() == [[0, 0, 20, 10]] and boxes.dtype == np.float32


def test_shrinking_a_lot_averages_areas():
    image = noise(60, 60)
    for side in (29, 20, 7):
        small, _ = resize(image, NO_BOXES[0], side, side)
        cells = image.repeat(side, axis=0).repeat(side, axis=1).reshape(side, 60, side, 60, 3)
        assert np.abs(small - cells.mean(axis=(1, 3))).max() <= 1


def test_an_image_of_the_right_size_is_returned_itself():
    image = noise()
    assert EvalTransform(48, 64)(image, *NO_BOXES)[0] is image


def test_the_cache_keeps_an_image_at_the_size_of_its_largest_sample_or_its_own():
    assert EvalTransform(800, 1333).cache_size(480, 640) == (800, 1067)
    assert TrainTransform(800, 1333).cache_size(480, 640) == (800, 1067)
    for strong, jitter in ((False, (0.5, 1.5)), (True, (1.0, 1.0))):
        transform = TrainTransform(100, 1000, scale_jitter=jitter, strong=strong)
        # Never enlarged, since each sample is resized anyway.
        assert transform.cache_size(90, 120) == (90, 120)
        assert transform.cache_size(300, 600) == (100 * jitter[1], 200 * jitter[1])
    assert TrainTransform(100, 1000, scale_jitter=(1.5, 1.5)).cache_size(90, 120) == (150, 200)


@pytest.mark.parametrize("transform", [EvalTransform(60, 100), TrainTransform(60, 100, **PLAIN)], ids=["eval", "train"])
def test_an_image_of_the_cache_size_is_not_resized(transform):
    for height, width in np.random.default_rng(0).integers(1, 300, (200, 2)).tolist():
        image = noise(*transform.cache_size(height, width))
        assert transform(image, *NO_BOXES, 0)[0] is image


# ------------------------------------------------------------------------------------------- boxes and pixels

KINDS = {
    "eval": EvalTransform(100, 200),
    "shrink": EvalTransform(25, 60),
    "plain": TrainTransform(100, 200, **PLAIN),
    "horizontal": TrainTransform(100, 200, horizontal_flip=1.0),
    "vertical": TrainTransform(100, 200, horizontal_flip=0.0, vertical_flip=1.0),
    "both": TrainTransform(100, 200, horizontal_flip=0.5, vertical_flip=0.5),
    "jitter": TrainTransform(100, 200, scale_jitter=(0.5, 2.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_follow_pixels(kind):
    for seed in range(10):
        for height, width, box in ((60, 90, (10, 20, 40, 50)), (90, 60, (0, 0, 8, 90)), (50, 50, (44, 30, 50, 50))):
            image, boxes, labels = KINDS[kind](*painted(height, width, box), seed)
            assert image.dtype == np.uint8 and boxes.dtype == np.float32 and labels.tolist() == [3]
            assert np.abs(boxes[0] - bright(image)).max() <= 1.5


def test_boxes_stay_tight_under_strong_augmentation():
    transform = TrainTransform(120, 180, strong=True)
    num_kept = 0
    for seed in range(100):
        image, boxes, labels = transform(*painted(120, 180, (30, 40, 120, 70)), seed)
        assert len(boxes) == len(labels)
        height, width = image.shape[:2]
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        if len(boxes):
            num_kept += 1
            excess = (bright(image) - boxes[0]) * [1, 1, -1, -1]  # how far inside the box the pixels end
            # A box rotated by 5 degrees is larger than its content by at most this.
            assert excess.min() >= -1.5 and excess.max() <= 0.2 * max(height, width)
    assert num_kept > 90


@pytest.mark.parametrize("flip, mirror", [("horizontal_flip", 1), ("vertical_flip", 0)])
def test_a_flip_mirrors_and_two_flips_cancel(flip, mirror):
    transform = TrainTransform(48, 64, **{**PLAIN, flip: 1.0})
    image, boxes = noise(), np.array([[3, 5, 20, 48], [0, 0, 1, 1]], np.float32)
    flipped, mirrored_boxes, _ = transform(image, boxes, np.arange(2), 0)
    assert np.array_equal(flipped, np.flip(image, mirror))
    low, high, size = (0, 2, 64) if mirror else (1, 3, 48)
    expected = boxes.copy()
    expected[:, low], expected[:, high] = size - boxes[:, high], size - boxes[:, low]
    assert np.allclose(mirrored_boxes, expected, atol=1e-4)
    restored_image, restored_boxes, labels = transform(flipped, mirrored_boxes, np.arange(2), 1)
    assert (
        np.array_equal(restored_image, image)
        and np.allclose(restored_boxes, boxes, atol=1e-4)
        and labels.tolist() == [0, 1]
    )


def test_the_two_flips_are_independent():
    transform = TrainTransform(48, 64, horizontal_flip=0.5, vertical_flip=0.5)
    image = noise()
    counts = [0, 0, 0, 0]
    for seed in range(200):
        flipped = transform(image, *NO_BOXES, seed)[0]
        kinds = (image, image[:, ::-1], image[::-1], image[::-1, ::-1])
        counts[[np.array_equal(flipped, kind) for kind in kinds].index(True)] += 1
    assert min(counts) > 30  # 50 each expected


@pytest.mark.parametrize("options", [{}, {"scale_jitter": (0.5, 2.0)}, {"strong": True}], ids=str)
def test_flips_come_last_and_are_exact(options):
    boxes = np.array([[3, 5, 20.25, 48], [0, 0, 64, 1], [60, 40, 64, 48]], np.float32)
    plain_transform = TrainTransform(48, 64, **PLAIN, **options)
    for seed in range(10):
        image, moved_boxes, labels = plain_transform(noise(), boxes, np.arange(3), seed)
        height, width = image.shape[:2]
        (x1, y1, x2, y2) = moved_boxes.T
        for flips, pixels, expected in (
            ((1.0, 0.0), image[:, ::-1], [width - x2, y1, width - x1, y2]),
            ((0.0, 1.0), image[::-1], [x1, height - y2, x2, height - y1]),
            ((1.0, 1.0), image[::-1, ::-1], [width - x2, height - y2, width - x1, height - y1]),
        ):
            transform = TrainTransform(48, 64, horizontal_flip=flips[0], vertical_flip=flips[1], **options)
            flipped_image, flipped_boxes, flipped_labels = transform(noise(), boxes, np.arange(3), seed)
            assert np.array_equal(flipped_image, pixels) and np.array_equal(flipped_labels, labels)
            assert np.array_equal(flipped_boxes, np.stack(expected, axis=1)) and flipped_boxes.dtype == np.float32


def test_flip_does_not_change_its_inputs():
    image, boxes = noise(), np.array([[3, 5, 20, 48]], np.float32)
    originals = image.copy(), boxes.copy()
    flip(image, boxes, True, True)
    assert np.array_equal(image, originals[0]) and np.array_equal(boxes, originals[1])


def test_jitter_is_log_uniform():
    transform = TrainTransform(100, 1000, **PLAIN, scale_jitter=(0.5, 2.0))
    sides = [min(transform(noise(10, 10), *NO_BOXES, seed)[0].shape[:2]) for seed in range(300)]
    assert 50 <= min(sides) <= 53 and 190 <= max(sides) <= 200
    assert 90 <= np.median(sides) <= 111  # uniform would have 125


def test_boxes_that_are_mostly_cut_off_are_dropped_with_their_labels():
    transform = TrainTransform(100, 1000, strong=True, horizontal_flip=0.0)
    grid = [(x, y, x + 10, y + 10) for y in range(0, 100, 10) for x in range(0, 100, 10)]
    boxes, num_dropped = np.array(grid, np.float32), 0
    for seed in range(40):
        _, moved_boxes, labels = transform(noise(100, 100), boxes, np.arange(100), seed)
        num_dropped += 100 - len(labels)
        areas = (moved_boxes[:, 2:] - moved_boxes[:, :2]).prod(axis=1)
        assert np.all(areas >= 0.9 * 0.25 * 100 * 0.9**2)  # a crop only enlarges, and no scale is below 0.9
        assert np.all(np.diff(labels) > 0)
        # Rows of the grid stay in order: the label tells which cell the box was.
        centres = (moved_boxes[:, 0] + moved_boxes[:, 2]) / 2
        for row in range(10):
            assert np.all(np.diff(centres[labels // 10 == row]) > 0)
    assert num_dropped > 100


@pytest.mark.parametrize("strong", [False, True])
def test_images_without_boxes_work(strong):
    transform = TrainTransform(64, 128, vertical_flip=0.5, scale_jitter=(0.8, 1.2), strong=strong)
    for seed in range(30):
        image, boxes, labels = transform(noise(), *NO_BOXES, seed)
        assert image.dtype == np.uint8 and boxes.shape == (0, 4) and labels.shape == (0,)
        assert boxes.dtype == np.float32 and labels.dtype == np.int64


def test_only_the_seed_decides_the_sample():
    options = {"vertical_flip": 0.5, "scale_jitter": (0.5, 2.0), "strong": True}
    transform, equal_transform = TrainTransform(64, 128, **options), TrainTransform(64, 128, **options)
    sample = painted(48, 64, (5, 5, 40, 30))
    expected = {seed: transform(*sample, seed) for seed in range(20)}
    for seed in reversed(range(20)):
        np.random.seed(seed)
        for a, b in zip(equal_transform(*sample, seed), expected[seed]):
            assert np.array_equal(a, b)
    assert len({image.tobytes() for image, _, _ in expected.values()}) == 20


def test_transforms_do_not_write_to_their_inputs():
    image, boxes, labels = painted(48, 64, (5, 5, 40, 30))
    originals = boxes.copy(), image.copy()
    for array in (image, boxes, labels):
        array.flags.writeable = False
    for seed in range(10):
        TrainTransform(64, 128, strong=True)(image, boxes, labels, seed)
    assert np.array_equal(boxes, originals[0]) and np.array_equal(image, originals[1])


def test_albumentations_is_only_loaded_where_needed():
    code = (
        "import sys, numpy as np; from data.transforms import EvalTransform, TrainTransform; EvalTransform(8, 9);"
        "transform = TrainTransform(8, 9, horizontal_flip=1.0, vertical_flip=1.0, scale_jitter=(0.5, 2.0));"
        "transform(np.zeros((6, 7, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0), 0);"
        "assert 'albumentations' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "options",
    [{"horizontal_flip": 1.5}, {"vertical_flip": -1}, {"scale_jitter": (0, 1)}, {"scale_jitter": (2, 1)}],
    ids=str,
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        TrainTransform(8, 9, **options)
    with pytest.raises(UserError, match="short"):
        EvalTransform(10, 9)
