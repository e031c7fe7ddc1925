"""Compressed weights: decoded to fp16 once, at plan time, before the multiply-accumulate unit sees them.

Affine int8, 4-bit and other tables, sparse masks, blockwise scales (ANE guide chapters 7 and 25: whatever the
storage, the engine multiplies fp16). A decoded number is rounded half away from zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.compression import as_rows
from ane_trainer.ane.mil.program import TensorType
from ane_trainer.ane.simulator.memory.constants import constant
from ane_trainer.ane.simulator.memory.fp16 import round_half_away
from ane_trainer.ane.simulator.registry import Context, kernel

Array = NDArray[Any]

_SWEEP = "ANEForge vocabulary sweep: relative error "
_FOLD = "; weights are decoded to fp16 (ANE guide ch. 3, 7)"
_RUNS = "ANEForge vocabulary sweep: runs on M5, values not checked" + _FOLD


def _number(values: NDArray[Any], type_: TensorType) -> Array:
    """Decoded numbers in the storage of a floating type."""
    return round_half_away(values) if type_.dtype == "fp16" else values.astype(np.float32)


@kernel(
    "constexpr_affine_dequantize",
    "bounded",
    _SWEEP + "5e-4 on M5" + _FOLD,
    "1 unit in the last place of a weight",
)
def affine_dequantize(ctx: Context, call: Call) -> Array:
    """scale * (data - zero_point); vectors run along `axis`."""
    data, scale, zero = (
        np.asarray(constant(call, n), np.float64) for n in ("quantized_data", "scale", "zero_point")
    )
    shape = [1] * data.ndim
    shape[call.integer("axis")] = -1
    scale, zero = (v.reshape(shape) if v.ndim else v for v in (scale, zero))
    return _number(scale * (data - zero), call.op.infer(call)[0])


@kernel("constexpr_cast", "exact", _SWEEP + "0 on M5")
def constexpr_cast(ctx: Context, call: Call) -> Array:
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
def blockwise_shift_scale(ctx: Context, call: Call, data: Array, scale: Array, offset: Array | None) -> Array:
    """(data - offset) * scale, each scale for a block of data."""
    return _number(_shifted(data, data.shape, scale, offset), call.op.infer(call)[0])


def _spread(values: Array, mask: Array) -> Array:
    """Values at a mask's bits, zero elsewhere, in the mask's shape."""
    dense = np.zeros(mask.shape, values.dtype)
    dense[mask.astype(np.bool_)] = values
    return dense


@kernel("constexpr_sparse_blockwise_shift_scale", "assumed", _RUNS)
def sparse_blockwise_shift_scale(
    ctx: Context, call: Call, mask: Array, nonzero: Array, scale: Array, offset: Array | None
) -> tuple[Array, Array]:
    """The mask, and the decoded values at its bits."""
    dense = _shifted(_spread(nonzero, mask), mask.shape, scale, offset)
    return mask, _number(dense[mask.astype(np.bool_)], call.op.infer(call)[1])


@kernel("constexpr_sparse_to_dense", "exact", _SWEEP + "0 on M5")
def sparse_to_dense(ctx: Context, call: Call, nonzero: Array, mask: Array) -> Array:
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
def lut_to_dense(ctx: Context, call: Call, indices: Array, lut: Array) -> Array:
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
def lut_to_sparse(ctx: Context, call: Call, mask: Array, nonzero: Array, lut: Array) -> tuple[Array, Array]:
    """The mask (lengthened along a vector's axis) and the table entries at its bits."""
    along = _vector_axis(call)
    dense = _looked_up(_spread(nonzero, mask), lut, along)
    wide = mask if along is None else np.repeat(mask, lut.shape[-1], axis=along)
    return wide, dense[wide.astype(np.bool_)]
