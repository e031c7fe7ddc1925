"""The int8 path: found where both operands are int8, exact in int32, scaled at the end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType, Value
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.simulator import simulate
from ane_trainer.ane.simulator.kernels.integer import integer_operands
from ane_trainer.ane.simulator.numbers.fp16 import encode, round_half_away


def program(
    q: np.ndarray, w: np.ndarray, scales: np.ndarray, kind: str = "conv", zero: int = 0, **params: object
) -> tuple[Program, Value]:
    """dequantize of an int8 input, times an int8 weight with a scale a row."""
    b = Builder()
    integers = b.input("q", TensorType("int8", q.shape))
    x = b.op("dequantize", input=integers, scale=2.0**-6, zero_point=from_array(np.array(zero, np.int8)))
    weight = b.op("constexpr_blockwise_shift_scale", data=from_array(w), scale=from_array(scales))
    out = b.op(kind, x=x, weight=weight, **params)
    return Program((b.finish((out,)),)), out


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_integer_convolution_is_exact_with_one_rounding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, w = (
        rng.integers(-128, 128, (2, 4, 5, 5)).astype(np.int8),
        rng.integers(-128, 128, (6, 2, 3, 3)).astype(np.int8),
    )
    scales, bias = (
        rng.uniform(0.001, 0.02, (6, 1, 1, 1)).astype(np.float16),
        rng.uniform(-9, 9, 6).astype(np.float16),
    )
    made, out = program(
        q,
        w,
        scales,
        zero=3,
        groups=2,
        bias=from_array(bias),
        pad_type="custom",
        pad=[1, 1, 1, 1],
        strides=[2, 1],
    )
    got = simulate(made, {"q": q}, chip="m5")[out.name]
    x = np.pad(q.astype(np.int64) - 3, ((0, 0), (0, 0), (1, 1), (1, 1)))
    total = np.zeros((2, 6, 3, 5), np.int64)
    for co in range(6):
        for ci in range(2):
            for i in range(3):
                for j in range(3):
                    total[:, co] += (
                        w[co, ci, i, j].astype(np.int64) * x[:, 2 * (co // 3) + ci, i : i + 5 : 2, j : j + 5]
                    )
    exact = total * (scales.reshape(-1, 1, 1).astype(np.float64) * 2.0**-6) + bias.reshape(-1, 1, 1).astype(
        np.float64
    )
    assert np.array_equal(got, encode(round_half_away(exact)))


def test_linear_takes_the_path_too() -> None:
    q, w = np.full((2, 4096), 127, np.int8), np.full((3, 4096), 127, np.int8)
    made, out = program(q, w, np.full((3, 1), 2.0**-6, np.float16), kind="linear")
    assert np.unique(simulate(made, {"q": q}, chip="m6")[out.name]).tolist() == [16128.0]


def test_no_limit_at_32768_on_a16_and_the_fp16_limit_before() -> None:
    """64,516 comes out (as 64,512) where integers are multiplied; M3 decodes to fp16 and overflows."""
    q, w = np.full((1, 16384, 1, 1), 127, np.int8), np.full((1, 16384, 1, 1), 127, np.int8)
    made, out = program(q, w, np.full((1, 1, 1, 1), 2.0**-6, np.float16))
    assert simulate(made, {"q": q}, chip="m4")[out.name].item() == 64512.0
    assert np.isinf(simulate(made, {"q": q}, chip="m3", path=None)[out.name].item())


@pytest.mark.parametrize(
    ("q", "channels", "taps", "expected"),
    [
        (-128, 65536, 2, np.inf),
        (-128, 65535, 2, 8192.0 - 0.125),
        (127, 65536, 2, 8064.5),
        (-127, 1024, 1, 63.0),
    ],
)
def test_overflow_at_two_to_the_31(q: int, channels: int, taps: int, expected: float) -> None:
    data = np.full((1, channels, taps, 1), q, np.int8)
    made, out = program(data, data, np.full((1, 1, 1, 1), 2.0**-12, np.float16))
    got = simulate(made, {"q": data}, chip="m6")[out.name].item()
    assert got == pytest.approx(expected, rel=2.0**-10)


def test_overflow_sticks_when_later_terms_cancel() -> None:
    q = np.full((1, 65536, 4, 1), -128, np.int8)
    q[:, 40000:] = 127
    weight = np.full((1, 65536, 4, 1), -128, np.int8)
    made, out = program(q, weight, np.full((1, 1, 1, 1), 2.0**-12, np.float16))
    assert np.isposinf(simulate(made, {"q": q}, chip="m6")[out.name].item())


def test_only_row_scales_and_int8_weights_qualify() -> None:
    q, w = np.ones((1, 4, 1, 1), np.int8), np.ones((2, 4, 1, 1), np.int8)
    per_row, _ = program(q, w, np.ones((2, 1, 1, 1), np.float16))
    grouped, _ = program(q, w, np.ones((2, 2, 1, 1), np.float16))
    assert len(integer_operands(per_row.main, 17)) == 1
    assert not integer_operands(grouped.main, 17)
    assert not integer_operands(per_row.main, 15)
