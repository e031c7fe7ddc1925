"""Tests of augmentation and background loading: what they compute, and that a resumed pass is the same."""

import threading
import time

import numpy as np
import pytest
import torch

from ane_trainer.ane.errors import DataError
from ane_trainer.data import Batches, DataDescription
from ane_trainer.training.datasets.augment import change_pixels, change_values, parse_augmentations
from ane_trainer.training.datasets.batches import ArrayExamples

ALL = parse_augmentations(["shift,flip,crop,rotate=30,erase", "mixup=0.4"])


def generator(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def batches(augment=(), ahead=4, count=40):
    random = np.random.default_rng(1)
    examples = ArrayExamples(random.integers(0, 256, (count, 3, 8, 8)).astype(np.uint8), np.arange(count) % 5)
    description = DataDescription("d", "image", "classify", (3, 8, 8), tuple("abcde"), (0.5,), (0.25,), 255.0)
    made = Batches(examples, description, batch_size=8, shuffle=True, seed=2, augment=augment)
    made.ahead = ahead
    return made


def test_shift_moves_pixels_exactly_and_fills_with_zero():
    pixels = np.arange(1, 37, dtype=np.uint8).reshape(1, 1, 6, 6).repeat(200, axis=0)
    moved = change_pixels(pixels, parse_augmentations(["shift=2"]), generator())
    seen = set()
    for image in moved[:, 0]:
        matches = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                padded = np.pad(pixels[0, 0], 2)
                if np.array_equal(image, padded[2 - down : 8 - down, 2 - right : 8 - right]):
                    matches.append((down, right))
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) == 25


def test_flip_mirrors_about_half():
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 1, 3, 4).repeat(400, axis=0)
    flipped = change_pixels(pixels, parse_augmentations(["flip"]), generator())
    mirrored = (flipped == pixels[..., ::-1]).all(axis=(1, 2, 3))
    assert np.array_equal(flipped[~mirrored], pixels[~mirrored])
    assert 160 < mirrored.sum() < 240


def test_rotation_by_a_quarter_turn_is_numpys():
    """Angles are uniform; of many, take those nearest 90 degrees and compare with an exact quarter turn."""
    image = np.zeros((1, 9, 9), np.float32)
    image[0, 1:4, 2:8] = 200
    many = change_pixels(image[None].repeat(4000, axis=0), parse_augmentations(["rotate=180"]), generator())
    for turns in (1, 3):
        distance = np.abs(many[:, 0] - np.rot90(image[0], turns)).mean(axis=(1, 2))
        assert distance.min() < 1.5
    assert many.sum(axis=(1, 2, 3)).mean() == pytest.approx(image.sum(), rel=0.06)


def test_crop_scales_a_part_up():
    ramp = np.tile(np.arange(16, dtype=np.float32), (1, 1, 16, 1)).repeat(500, axis=0)
    cropped = change_pixels(ramp, parse_augmentations(["crop=0.5"]), generator())[:, 0, 8]
    slopes = np.median(np.diff(cropped[:, 2:14]), axis=1)
    assert slopes.min() == pytest.approx(0.5, abs=0.02)
    assert slopes.max() == pytest.approx(1.0, abs=0.02)
    assert (np.diff(cropped) > -1e-3).all()


def test_erase_wipes_out_a_rectangle_of_the_stated_size():
    x = np.ones((300, 2, 20, 20), np.float32)
    erased, _ = change_values(x, np.zeros(300), parse_augmentations(["erase=0.5"]), generator(), 2)
    shares = 1 - erased.mean(axis=(1, 2, 3))
    hit = shares > 0
    assert 110 < hit.sum() < 190
    assert shares[hit].min() > 0.01
    assert shares.max() < 0.25


def test_mixup_mixes_images_and_labels_alike():
    x = np.arange(8, dtype=np.float32).reshape(8, 1, 1, 1)
    mixed, soft = change_values(x.copy(), np.arange(8), parse_augmentations(["mixup=1"]), generator(3), 8)
    assert soft.sum(axis=1) == pytest.approx(np.ones(8))
    assert mixed[:, 0, 0, 0] == pytest.approx(soft @ np.arange(8))
    assert soft.dtype == np.float32


@pytest.mark.parametrize("stop", [0, 2, 5, 7])
@pytest.mark.parametrize("ahead", [0, 3])
def test_a_resumed_pass_draws_the_same_changes(stop, ahead):
    one = batches(ALL, ahead)
    taken = []
    while len(taken) < 10:
        for pair in one:
            taken.append(pair)
            if len(taken) == stop:
                state = one.state_dict()
            if len(taken) == 10:
                break
    state = batches(ALL).state_dict() if stop == 0 else state
    again = batches(ALL, ahead)
    again.load_state_dict(state)
    rest = [pair for _ in range(2) for pair in again][: 10 - stop]
    for (x, y), (x_again, y_again) in zip(taken[stop:], rest, strict=False):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    assert not torch.equal(taken[0][0], taken[5][0])
    assert y.shape == (8, 5)


def test_state_of_other_changes_or_other_targets_is_refused():
    state = batches(ALL).state_dict()
    with pytest.raises(DataError, match="augment"):
        batches().load_state_dict(state)
    with pytest.raises(DataError, match="targets_crc32"):
        batches(ALL).load_state_dict({**state, "targets_crc32": 1})
    for wrong in ({"batch": 99}, {"epoch": -1}, {"batch": "three"}):
        with pytest.raises(DataError, match="epoch and batch"):
            batches(ALL).load_state_dict({**state, **wrong})
    old = {
        key: value for key, value in batches().state_dict().items() if key not in ("augment", "targets_crc32")
    }
    batches().load_state_dict(old)


class Slow:
    """Examples that take time, count what was taken, and fail at one row."""

    draws = False

    def __init__(self, fail_at=None):
        self.taken, self.fail_at = [], fail_at

    def __len__(self):
        return 10

    def take(self, rows):
        if self.fail_at in rows:
            raise DataError("row 5: broken", code="DATA115")
        time.sleep(0.01)
        self.taken += rows.tolist()
        return np.zeros((len(rows), 1)), np.zeros(len(rows), np.int64)

    def targets(self):
        return np.zeros(10, np.int64)


def loading(examples, ahead):
    made = Batches(examples, DataDescription("d", "array", "classify", (1,), ("a",)), batch_size=1)
    made.ahead = ahead
    return made


def wait_until(true):
    """Until threads have done something, however busy the machine is."""
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.002)


def test_batches_are_made_ahead_while_a_step_runs_and_never_further():
    examples = Slow()
    reader = iter(loading(examples, 3))
    next(reader)
    wait_until(lambda: len(examples.taken) >= 4)
    time.sleep(0.05)
    assert sorted(examples.taken) == [0, 1, 2, 3]
    assert len(list(reader)) == 9


def test_a_pass_that_is_broken_off_ends_its_threads():
    before = threading.active_count()
    reader = iter(loading(Slow(), 3))
    next(reader)
    assert before < threading.active_count() <= before + 2
    reader.close()
    assert threading.active_count() == before


def test_an_error_comes_out_at_its_own_batch():
    reader = iter(loading(Slow(fail_at=5), 3))
    for _ in range(5):
        next(reader)
    with pytest.raises(DataError, match="row 5: broken"):
        next(reader)


def test_waiting_is_measured():
    slow = loading(Slow(), 0)
    list(slow)
    assert slow.seconds_waited > 0.09
    examples = Slow()
    ahead = loading(examples, 4)
    for number, _ in enumerate(ahead, 1):
        wait_until(lambda number=number: len(examples.taken) >= min(number + 2, 10))
    assert ahead.seconds_waited < slow.seconds_waited
