"""Compressed weights, quantize and dequantize in double precision."""

from __future__ import annotations

import numpy as np

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.compression import as_rows
from ane_trainer.ane.mil.semantics.registry import along, constant, half_away, meaning
from ane_trainer.ane.mil.weights import Array


def _vector(call: Call, name: str, rank: int) -> Array:
    """A scale or zero point shaped to broadcast; 0 when absent."""
    found = along(constant(call, name), call.integer("axis") if call.has("axis") else 0, rank)
    return np.zeros(()) if found is None else found


@meaning("quantize")
def quantize(call: Call, x: Array) -> Array:
    """round(x / scale) + zero_point, clipped to int8 or uint8."""
    low, high = (-128, 127) if call.text("output_dtype") == "int8" else (0, 255)
    whole = half_away(x / _vector(call, "scale", x.ndim)) + _vector(call, "zero_point", x.ndim)
    return np.asarray(np.clip(np.nan_to_num(whole), low, high))


@meaning("dequantize")
def dequantize(call: Call, x: Array) -> Array:
    """(x - zero_point) * scale."""
    return np.asarray((x - _vector(call, "zero_point", x.ndim)) * _vector(call, "scale", x.ndim))


@meaning("constexpr_affine_dequantize")
def affine_dequantize(call: Call) -> Array:
    """scale * (quantized_data - zero_point)."""
    data = np.asarray(constant(call, "quantized_data"))
    return np.asarray(_vector(call, "scale", data.ndim) * (data - _vector(call, "zero_point", data.ndim)))


@meaning("constexpr_cast")
def constexpr_cast(call: Call) -> Array | None:
    """An fp16 weight, as it is."""
    return constant(call, "source_val")


def _spread(values: Array, mask: Array) -> Array:
    """Values at a mask's bits, zero elsewhere."""
    dense = np.zeros(mask.shape, values.dtype)
    dense[mask != 0] = values
    return dense


def _shifted(data: Array, scale: Array, offset: Array | None) -> Array:
    """(data - offset) * scale, each scale for a block of data; of rank 2, for a block of its rows."""
    if scale.ndim == 2 < data.ndim:
        return _shifted(data.reshape(as_rows(data.shape)), scale, offset).reshape(data.shape)
    for axis, (full, count) in enumerate(zip(data.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, full // count, axis)
        offset = None if offset is None else np.repeat(offset, full // count, axis)
    return (data if offset is None else data - offset) * scale


@meaning("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(call: Call, data: Array, scale: Array, offset: Array | None) -> Array:
    """(data - offset) * scale, by blocks."""
    return _shifted(data, scale, offset)


@meaning("constexpr_sparse_blockwise_shift_scale")
def sparse_blockwise_shift_scale(
    call: Call, mask: Array, nonzero: Array, scale: Array, offset: Array | None
) -> tuple[Array, Array]:
    """The mask, and the decoded values at its bits."""
    return mask, _shifted(_spread(nonzero, mask), scale, offset)[mask != 0]


def _bits(packed: Array, count: int, width: int) -> Array:
    """Numbers of `width` bits from packed bytes, lowest bits first."""
    bits = np.unpackbits(packed.astype(np.uint8), bitorder="little")[: count * width]
    return np.asarray(bits.reshape(count, width).astype(np.int64) @ (1 << np.arange(width)))


@meaning("constexpr_sparse_to_dense")
def sparse_to_dense(call: Call, nonzero: Array, mask: Array) -> Array:
    """The values at a mask's bits; with `shape` the mask is packed."""
    if call.has("shape"):
        shape = call.integers("shape")
        mask = _bits(mask, int(np.prod(shape)), 1).reshape(shape)
    return _spread(nonzero, mask)


def _looked_up(call: Call, indices: Array, lut: Array) -> Array:
    """Entries of lut `[*blocks, entries, vector]`; a vector lies along `vector_axis`."""
    for axis, full in enumerate(indices.shape):
        lut = np.repeat(lut, full // lut.shape[axis], axis)
    entries = np.take_along_axis(lut, indices.astype(np.int64)[..., None, None], axis=-2)[..., 0, :]
    if not call.has("vector_axis"):
        return np.asarray(entries[..., 0])
    at = call.integer("vector_axis") % indices.ndim
    shape = [n * (lut.shape[-1] if i == at else 1) for i, n in enumerate(indices.shape)]
    return np.moveaxis(entries, -1, at + 1).reshape(shape)


@meaning("constexpr_lut_to_dense")
def lut_to_dense(call: Call, indices: Array, lut: Array) -> Array:
    """Table look-up; with `shape` the indices are packed."""
    if not call.has("shape"):
        return _looked_up(call, indices, lut)
    shape = call.integers("shape")
    return np.asarray(lut[_bits(indices, int(np.prod(shape)), lut.size.bit_length() - 1)].reshape(shape))


@meaning("constexpr_lut_to_sparse")
def lut_to_sparse(call: Call, mask: Array, nonzero: Array, lut: Array) -> tuple[Array, Array]:
    """The mask (lengthened along a vector's axis) and the table entries at its bits."""
    dense = _looked_up(call, _spread(nonzero, mask), lut)
    if call.has("vector_axis"):
        mask = np.repeat(mask, lut.shape[-1], call.integer("vector_axis"))
    return mask, dense[mask != 0]
