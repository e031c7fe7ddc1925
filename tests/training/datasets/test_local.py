"""Tests of ane_trainer/training/datasets/local.py: the IDX format."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from ane_trainer.training.datasets.local import build_idx, parse_idx


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)))
def test_round_trip(array):
    again = parse_idx(build_idx(array))
    assert again.shape == array.shape
    assert np.array_equal(again, array)


def test_the_header_is_big_endian_as_in_the_published_format():
    raw = build_idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert raw == bytes.fromhex("00000802 00000002 00000003 000102030405")


@pytest.mark.parametrize(
    "raw",
    [b"", b"<html></html>", bytes.fromhex("00000d0100000000"), bytes.fromhex("0000080100"),
     bytes.fromhex("000008010000000201"), bytes.fromhex("0000080100000001aabb")],
)  # fmt: skip
def test_what_is_not_idx_is_refused(raw):
    with pytest.raises(ValueError, match="IDX"):
        parse_idx(raw)


def test_other_types_are_not_written():
    with pytest.raises(ValueError, match="needs uint8; got int64"):
        build_idx(np.zeros(3, dtype=np.int64))
