"""Compressed weights against coremltools' own decompression, and their way through a program."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Literal, Program, TensorType
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.simulator import make_context, prepare, simulate
from ane_trainer.ane.simulator.numbers.fp16 import decode, round_half_away

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    pytest.importorskip("coremltools")
    from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as old
    from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as new

    logging.disable(logging.NOTSET)

seeds = st.integers(0, 2**32 - 1)


def decoded(kind: str, **params: object) -> tuple[np.ndarray, ...]:
    """What the program's constants are decoded to (a program needs an input, which is not used)."""
    b = Builder()
    x = b.input("x", TensorType("fp16", (1,)))
    results = b.multi(kind, **params)
    function = b.finish((*results, b.op("add", x=x, y=x)))
    outputs = simulate(Program((function,)), {"x": np.zeros(1, np.float16)}, chip="m4", path=None)
    return tuple(outputs[v.name] for v in results)


def bits(array: np.ndarray, dtype: str) -> Literal:
    return Literal(TensorType(dtype, array.shape), array.astype(np.uint8).tobytes())


def half(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.uniform(0.01, 2, shape).astype(np.float16)


def close(got: np.ndarray, want: np.ndarray) -> bool:
    """Equal but for ties: coremltools rounds them to even."""
    return bool(
        (
            np.abs(got.astype(np.float64) - want.astype(np.float64))
            <= np.spacing(np.abs(want).astype(np.float16))
        ).all()
    )


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_affine(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data, scale, zero = (
        rng.integers(-128, 128, (4, 6)).astype(np.int8),
        half(rng, 4),
        rng.integers(-9, 9, 4).astype(np.int8),
    )
    (got,) = decoded(
        "constexpr_affine_dequantize",
        quantized_data=from_array(data),
        scale=from_array(scale),
        zero_point=from_array(zero),
        axis=0,
    )
    assert close(got, old.constexpr_affine_dequantize.decompress(data, zero, scale, 0))


def test_blockwise_scales_of_rows_of_a_convolution() -> None:
    """As ANEForge writes them: scale [OUT, blocks] for a weight [OUT, IN, kH, kW]."""
    rng = np.random.default_rng(0)
    data, scale = rng.integers(-128, 128, (4, 2, 3, 3)).astype(np.int8), half(rng, 4, 3)
    (got,) = decoded("constexpr_blockwise_shift_scale", data=from_array(data), scale=from_array(scale))
    want = data.reshape(4, 3, 6) * scale[:, :, None].astype(np.float64)
    assert close(got, want.reshape(data.shape))


def test_affine_is_rounded_once_whatever_the_scale() -> None:
    """Scales from the smallest number to beyond what fits, of both signs, every byte: as in double precision."""
    scale = np.concatenate([[2.0**-24, 3 * 2.0**-24, 2.0**-14, 65504], 2.0 ** np.arange(-20, 15) * 1.2373])
    scale = np.concatenate([scale, -scale]).astype(np.float16)
    data = np.tile(np.arange(-128, 128).astype(np.int8), (len(scale), 1))
    zero = np.arange(len(scale)).astype(np.int8) - 30
    (got,) = decoded(
        "constexpr_affine_dequantize",
        quantized_data=from_array(data),
        scale=from_array(scale),
        zero_point=from_array(zero),
        axis=0,
    )
    exact = scale.astype(np.float64)[:, None] * (data.astype(np.float64) - zero[:, None])
    assert np.array_equal(decode(got), round_half_away(exact))


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_blockwise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data, scale = rng.integers(-128, 128, (4, 6)).astype(np.int8), half(rng, 2, 3)
    offset = rng.integers(-9, 9, (2, 3)).astype(np.int8) if rng.integers(2) else None
    params = {} if offset is None else {"offset": from_array(offset)}
    (got,) = decoded(
        "constexpr_blockwise_shift_scale", data=from_array(data), scale=from_array(scale), **params
    )
    assert close(got, new.constexpr_blockwise_shift_scale.decompress(data, scale, offset))


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_lut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    indices, vector = rng.integers(0, 16, (4, 6)), int(rng.integers(1, 3))
    lut = half(rng, 2, 3, 16, vector)
    params = {"vector_axis": 0} if vector > 1 else {}
    (got,) = decoded("constexpr_lut_to_dense", indices=bits(indices, "uint4"), lut=from_array(lut), **params)
    want = new.constexpr_lut_to_dense.decompress(indices.astype(np.uint8), lut, 0 if vector > 1 else None)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("count", [2, 4, 16, 64, 256])
def test_packed_lut_of_ios16(count: int) -> None:
    rng = np.random.default_rng(count)
    width = count.bit_length() - 1
    indices, lut = rng.integers(0, count, (3, 5)), half(rng, count)
    flat = ((indices.reshape(-1, 1) >> np.arange(width)) & 1).astype(np.uint8).reshape(-1)
    packed = np.packbits(flat, bitorder="little")
    shape = from_array(np.array([3, 5], np.uint32))
    (got,) = decoded("constexpr_lut_to_dense", indices=from_array(packed), lut=from_array(lut), shape=shape)
    assert np.array_equal(
        got, old.constexpr_lut_to_dense.decompress(lut, packed, np.array([3, 5], np.uint32))
    )
    assert np.array_equal(got, lut[indices])


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_sparse(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (3, 5))
    mask[0, 0] = 1
    values = half(rng, int(mask.sum()))
    (got,) = decoded("constexpr_sparse_to_dense", nonzero_data=from_array(values), mask=bits(mask, "uint1"))
    assert np.array_equal(got, new.constexpr_sparse_to_dense.decompress(values, mask.astype(np.uint8)))
    packed = from_array(np.packbits(mask.astype(np.uint8).reshape(-1), bitorder="little"))
    shape = from_array(np.array([3, 5], np.uint32))
    (again,) = decoded("constexpr_sparse_to_dense", nonzero_data=from_array(values), mask=packed, shape=shape)
    assert np.array_equal(got, again)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_sparse_tables_and_scales(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (4, 6))
    mask[0, 0] = 1
    indices, lut = rng.integers(0, 4, int(mask.sum())), half(rng, 1, 1, 4, 1)
    got_mask, got = decoded(
        "constexpr_lut_to_sparse",
        indices_mask=bits(mask, "uint1"),
        indices_nonzero_data=bits(indices, "uint2"),
        lut=from_array(lut),
    )
    want_mask, want = new.constexpr_lut_to_sparse.decompress(
        mask.astype(np.uint8), indices.astype(np.uint8), lut, None
    )
    assert np.array_equal(got, want)
    assert np.array_equal(got_mask, want_mask)
    data, scale = rng.integers(-99, 99, int(mask.sum())).astype(np.int8), half(rng, 2, 1)
    _, scaled = decoded(
        "constexpr_sparse_blockwise_shift_scale",
        data_mask=bits(mask, "uint1"),
        nonzero_data=from_array(data),
        scale=from_array(scale),
    )
    _, theirs = new.constexpr_sparse_blockwise_shift_scale.decompress(
        mask.astype(np.uint8), data, scale, None
    )
    assert close(scaled, theirs)


def test_cast() -> None:
    values = np.array([1.5, -2.25], np.float16)
    (got,) = decoded("constexpr_cast", source_val=from_array(values), output_dtype="fp32")
    assert got.dtype == np.float32
    assert got.tolist() == [1.5, -2.25]


def test_weights_are_decoded_once_when_the_plan_is_made() -> None:
    """decode -> add 0 -> conv: one step is left, and its result is that of the decoded weight."""
    data, scale = np.arange(-6, 6, dtype=np.int8).reshape(3, 4, 1, 1), np.full((3, 1, 1, 1), 0.25, np.float16)
    b = Builder()
    x = b.input("x", TensorType("fp16", (1, 4, 2, 2)))
    weight = b.op("constexpr_blockwise_shift_scale", data=from_array(data), scale=from_array(scale))
    out = b.op("conv", x=x, weight=b.op("add", x=weight, y=0.0))
    plan = prepare(b.finish((out,)), make_context("m1"))
    assert len(plan.steps) == 1
    (got,) = plan.run({"x": np.ones((1, 4, 2, 2), np.float16)}).values()
    assert got[0, :, 0, 0].tolist() == (data.reshape(3, 4) * 0.25).sum(1).tolist()
