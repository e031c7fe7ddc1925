"""Numbers in fewer bits: stored weights (constexpr ops), quantize, dequantize, and the law of int8 products.

Stored weights are decoded to fp16 once, at plan time, before the multiply-accumulate unit sees them: affine
int8, 4-bit and other tables, sparse masks, blockwise scales (ANE guide chapters 7 and 25: whatever the storage, the
engine multiplies fp16). A decoded number is rounded half away from zero.

When both operands of a multiply-accumulate op are int8 behind a dequantization, the engine multiplies
integers: int32 accumulator, inf once a partial sum leaves it, scales applied at the end, no limit at 32768
(M6 notes/numerics.md H50, measured with quantize -> dequantize -> conv of a constexpr_blockwise_shift_scale
weight). Before A16 there is no such gain (M3 Pro: ANE-Training), so there the operands are decoded to fp16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.compression import as_rows
from ane_trainer.ane.mil.program import TensorType
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.arrays import constant
from ane_trainer.ane.simulator.loops.convert import rounded
from ane_trainer.ane.simulator.numbers.fp16 import INF, round_half_away
from ane_trainer.ane.simulator.registry import EngineContext, kernel

_SWEEP = "ANEForge vocabulary sweep: relative error "
_FOLD = "; weights are decoded to fp16 (ANE guide ch. 3, 7)"
_RUNS = "ANEForge vocabulary sweep: runs on M5, values not checked" + _FOLD


def _number(values: NDArray[Any], type_: TensorType) -> Array:
    """Decoded numbers in the storage of a floating type."""
    if type_.dtype != "fp16":
        return values.astype(np.float32)
    return rounded(values) if values.dtype == np.float64 else round_half_away(values)


@kernel(
    "constexpr_affine_dequantize",
    "bounded",
    _SWEEP + "5e-4 on M5" + _FOLD,
    "1 unit in the last place of a weight",
)
def affine_dequantize(ctx: EngineContext, call: Call) -> Array:
    """scale * (data - zero_point); vectors run along `axis`."""
    data, scale, zero = (np.asarray(constant(call, n)) for n in ("quantized_data", "scale", "zero_point"))
    shape = [1] * data.ndim
    shape[call.integer("axis")] = -1
    scale, zero = (v.reshape(shape) if v.ndim else v for v in (scale, zero))
    (type_,) = call.op.infer(call)
    if (
        type_.dtype == "fp16" and zero.dtype.kind in "iu"
    ):  # 11 bits times a difference of bytes: exact in float32
        return rounded(scale * np.subtract(data, zero, dtype=np.float32))
    return _number(scale.astype(np.float64) * (data.astype(np.float64) - zero), type_)


@kernel("constexpr_cast", "exact", _SWEEP + "0 on M5")
def constexpr_cast(ctx: EngineContext, call: Call) -> Array:
    """An fp16 weight as fp32."""
    return np.asarray(constant(call, "source_val"), np.float32)


def _blocks(values: Array, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Values of blocks repeated to the full shape."""
    wide = values.astype(np.float64)
    for axis, (full, count) in enumerate(zip(shape, values.shape, strict=True)):
        wide = np.repeat(wide, full // count, axis)
    return wide


def _shifted(data: Array, shape: tuple[int, ...], scale: Array, offset: Array | None) -> NDArray[np.float64]:
    """(data - offset) * scale over the full shape; scales of rank 2 go with the rows of data as a matrix."""
    if scale.ndim == 2 < data.ndim:
        rows = as_rows(shape)
        return _shifted(data.reshape(rows), rows, scale, offset).reshape(shape)
    wide = data.astype(np.float64) - (0.0 if offset is None else _blocks(offset, shape))
    return np.asarray(wide * _blocks(scale, shape))


@kernel(
    "constexpr_blockwise_shift_scale",
    "bounded",
    _SWEEP + "3.8e-4 on M5" + _FOLD,
    "1 unit in the last place of a weight",
)
def blockwise_shift_scale(
    ctx: EngineContext, call: Call, data: Array, scale: Array, offset: Array | None
) -> Array:
    """(data - offset) * scale, each scale for a block of data."""
    return _number(_shifted(data, data.shape, scale, offset), call.op.infer(call)[0])


def _spread(values: Array, mask: Array) -> Array:
    """Values at a mask's bits, zero elsewhere, in the mask's shape."""
    dense = np.zeros(mask.shape, values.dtype)
    dense[mask.astype(np.bool_)] = values
    return dense


@kernel("constexpr_sparse_blockwise_shift_scale", "assumed", _RUNS)
def sparse_blockwise_shift_scale(
    ctx: EngineContext, call: Call, mask: Array, nonzero: Array, scale: Array, offset: Array | None
) -> tuple[Array, Array]:
    """The mask, and the decoded values at its bits."""
    dense = _shifted(_spread(nonzero, mask), mask.shape, scale, offset)
    return mask, _number(dense[mask.astype(np.bool_)], call.op.infer(call)[1])


@kernel("constexpr_sparse_to_dense", "exact", _SWEEP + "0 on M5")
def sparse_to_dense(ctx: EngineContext, call: Call, nonzero: Array, mask: Array) -> Array:
    """The values at a mask's bits; the older form packs the mask into bytes, lowest bit first."""
    if call.has("shape"):
        shape = call.integers("shape")
        mask = np.unpackbits(mask, bitorder="little")[: int(np.prod(shape))].reshape(shape)
    return _spread(nonzero, mask)


def _looked_up(indices: Array, lut: Array, vector_axis: int | None) -> Array:
    """Table entries for indices: lut `[*blocks, entries, vector]`, one table for each block of indices."""
    which = [
        np.arange(full).reshape(-1, *(1,) * (indices.ndim - 1 - axis)) // (full // count)
        for axis, (full, count) in enumerate(zip(indices.shape, lut.shape, strict=False))
    ]
    entries = lut[(*which, indices.astype(np.int64))]  # [*indices.shape, vector]
    if vector_axis is None:
        return np.asarray(entries[..., 0])
    along = vector_axis % indices.ndim
    joined = np.moveaxis(entries, -1, along + 1)
    shape = list(indices.shape)
    shape[along] *= lut.shape[-1]
    return np.asarray(joined.reshape(shape))


@kernel("constexpr_lut_to_dense", "exact", _SWEEP + "0 on M5")
def lut_to_dense(ctx: EngineContext, call: Call, indices: Array, lut: Array) -> Array:
    """Table look-up; the older form packs the indices into bytes, lowest bits first."""
    if not call.has("shape"):
        return _looked_up(indices, lut, _vector_axis(call))
    shape, bits = call.integers("shape"), lut.size.bit_length() - 1
    count = int(np.prod(shape))
    unpacked = np.unpackbits(indices, bitorder="little")[: count * bits].reshape(count, bits)
    return np.asarray(lut[(unpacked.astype(np.int64) << np.arange(bits)).sum(axis=1)].reshape(shape))


def _vector_axis(call: Call) -> int | None:
    return call.integer("vector_axis") if call.has("vector_axis") else None


@kernel("constexpr_lut_to_sparse", "assumed", _RUNS)
def lut_to_sparse(
    ctx: EngineContext, call: Call, mask: Array, nonzero: Array, lut: Array
) -> tuple[Array, Array]:
    """The mask (lengthened along a vector's axis) and the table entries at its bits."""
    along = _vector_axis(call)
    dense = _looked_up(_spread(nonzero, mask), lut, along)
    wide = mask if along is None else np.repeat(mask, lut.shape[-1], axis=along)
    return wide, dense[wide.astype(np.bool_)]


INT32_LIMIT = 2**31


def _along(values: Array | None, call: Call, rank: int, absent: float) -> NDArray[np.float64]:
    """A scale or zero point as float64, shaped to broadcast along the call's axis."""
    if values is None:
        return np.asarray(absent, np.float64)
    wide = values.astype(np.float64)
    if not wide.ndim:
        return wide
    shape = [1] * rank
    shape[call.integer("axis")] = -1
    return wide.reshape(shape)


@kernel(
    "quantize",
    "exact",
    "cadamcat/llms-on-apple-neural-engine article 3: half away, all finite fp16 values on M5 Pro",
)
def quantize(ctx: EngineContext, call: Call, x: Array) -> Array:
    """round(x / scale) + zero_point, half away from zero, clipped to int8 or uint8."""
    scale = _along(constant(call, "scale"), call, x.ndim, 1.0)
    ratio = x.astype(np.float64) / scale
    rounded = np.copysign(np.floor(np.abs(ratio) + 0.5), ratio) + _along(
        constant(call, "zero_point"), call, x.ndim, 0.0
    )
    low, high = (-128, 127) if call.text("output_dtype") == "int8" else (0, 255)
    return np.clip(rounded, low, high).astype(np.int8 if low else np.uint8)


@kernel("dequantize", "bounded", "ANEForge vocabulary sweep: relative error 2.7e-4 on M5", "one rounding")
def dequantize(ctx: EngineContext, call: Call, x: Array) -> Array:
    """(x - zero_point) * scale."""
    zero = _along(constant(call, "zero_point"), call, x.ndim, 0.0)
    value = (x - zero) * _along(constant(call, "scale"), call, x.ndim, 1.0)
    return rounded(value) if call.op.infer(call)[0].dtype == "fp16" else value.astype(np.float32)


def integer_product(a: Array, b: Array, scale: NDArray[np.float64], bias: Array | None) -> Array:
    """`a` `[..., M, K]` @ `b` `[..., K, N]` of integers in int32, times scale, plus bias, rounded once to
    fp16.

        A partial sum (in ascending k) outside int32 is inf of its sign, for good.
    """
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)  # exact: sums stay far below 2^53
    total = wide_a @ wide_b
    bound = np.abs(wide_a) @ np.abs(wide_b)
    result = round_half_away(total * scale + (0.0 if bias is None else bias))
    if bound.size and bound.max() >= INT32_LIMIT:
        result = np.where(bound >= INT32_LIMIT, _in_order(wide_a, wide_b, result), result)
    return result


def _in_order(a: NDArray[np.float64], b: NDArray[np.float64], result: Array) -> Array:
    """`result` with inf where a partial sum overflows."""
    total = np.zeros(result.shape, np.float64)
    sign = np.zeros(result.shape, np.float64)
    for k in range(a.shape[-1]):
        total += a[..., :, k, None] * b[..., k, None, :]
        first = (sign == 0) & ((total >= INT32_LIMIT) | (total < -INT32_LIMIT))
        sign = np.where(first, np.sign(total), sign)
    return np.where(sign != 0, sign * float(INF), result).astype(np.float32)
