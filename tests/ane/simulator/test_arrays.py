"""Ops that make constants, and what a plan does with them."""

from __future__ import annotations

import numpy as np

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.simulator import simulate
from ane_trainer.ane.simulator.numbers.fp16 import encode, round_half_away


def made(kind: str, **params: object) -> np.ndarray:
    b = Builder()
    x = b.input("x", TensorType("fp16", (1,)))
    result = b.op(kind, **params)
    function = b.finish((result, b.op("add", x=x, y=x)))
    return simulate(Program((function,)), {"x": np.zeros(1, np.float16)}, chip="m5", path=None)[result.name]


def test_fill_holds_the_fp16_value() -> None:
    got = made("fill", shape=[2, 3], value=from_array(np.array(0.1, np.float16)))
    assert got.dtype == np.float16
    assert np.array_equal(got, np.full((2, 3), 0.1, np.float16))


def test_range_1d_rounds_each_number_once() -> None:
    start, end, step = (from_array(np.array(v, np.float16)) for v in (1.0, 3.0, 0.3))
    got = made("range_1d", start=start, end=end, step=step)
    want = 1.0 + np.arange(7) * float(np.float16(0.3))
    assert np.array_equal(got, encode(round_half_away(want)))


def test_const_and_non_zero() -> None:
    values = np.array([[0, 2], [3, 0]], np.float16)
    assert np.array_equal(made("const", val=from_array(values)), values)
    assert made("non_zero", x=from_array(values)).tolist() == [[0, 1], [1, 0]]


def test_reshape_like_takes_extents_of_references() -> None:
    b = Builder()
    x, reference = b.input("x", TensorType("fp16", (6,))), b.input("r", TensorType("fp16", (3, 2)))
    scalars = {"begins": (0,), "ends": (2,)}
    args = {k: tuple(from_array(np.array(v, np.int32)) for v in values) for k, values in scalars.items()}
    masks = (from_array(np.array(False)),)
    out = b.op("reshape_like", x=x, ref_tensors=(reference,), **args, end_masks=masks)
    feeds = {"x": np.arange(6, dtype=np.float16), "r": np.zeros((3, 2), np.float16)}
    got = simulate(Program((b.finish((out,)),)), feeds, chip="m4", path=None)[out.name]
    assert got.tolist() == [[0, 1], [2, 3], [4, 5]]
