"""Type rules of compressed weights (constexpr ops) and of quantize and dequantize."""

from __future__ import annotations

import math

from ane_trainer.ane.mil.opset.registry import Call, const, rule, tensor
from ane_trainer.ane.mil.opset.shapes import axis
from ane_trainer.ane.mil.program import Literal, TensorType

_INDEX_BITS = {"uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6, "uint8": 8}


@rule(
    "constexpr_affine_dequantize",
    const("quantized_data", "int8"),
    const("zero_point", "int8"),
    const("scale", "fp16"),
    const("axis"),
    dtypes="quantized_data:Q zero_point:fp32|int8|uint8 scale:F",
    family="constexpr",
)
def affine_dequantize(call: Call) -> tuple[TensorType, ...]:
    """scale * (quantized_data - zero_point); scale and zero_point are scalars or have the axis' extent."""
    data, scale = call.type("quantized_data"), call.type("scale")
    along = axis(call, call.integer("axis"), data.rank)
    for name in ("scale", "zero_point"):
        if call.type(name).shape not in ((), (data.shape[along],)):
            raise call.refuse(
                f"{name} needs a scalar or the shape [{data.shape[along]}]; got {call.type(name)}"
            )
    return (TensorType(scale.dtype, data.shape),)


@rule(
    "constexpr_cast",
    const("source_val", "fp16"),
    const("output_dtype", "string"),
    dtypes="source_val:fp16",
    family="constexpr",
)
def constexpr_cast(call: Call) -> tuple[TensorType, ...]:
    """A constant fp16 weight as fp32."""
    if call.text("output_dtype") != "fp32":
        raise call.refuse(f"output_dtype needs fp32; got {call.text('output_dtype')!r}")
    return (TensorType("fp32", call.type("source_val").shape),)


@rule(
    "constexpr_lut_to_dense",
    tensor("indices", "uint4"),
    tensor("lut"),
    const("vector_axis", "int32", None),
    const("shape", "uint32", None),
    dtypes="indices:P lut:L",
    family="constexpr",
)
def lut_to_dense(call: Call) -> tuple[TensorType, ...]:
    """indices and lut of rank + 2 (iOS 18); with `shape`, packed uint8 indices and a lut vector (iOS 16)."""
    indices, lut = call.type("indices"), call.type("lut")
    if not call.has("shape"):
        return (TensorType(lut.dtype, _looked_up(call, indices.shape, indices.dtype)),)
    shape = call.integers("shape")
    if lut.rank != 1 or lut.size not in (2, 4, 16, 64, 256) or indices.rank != 1 or indices.dtype != "uint8":
        raise call.refuse(
            f"needs a lut of 2, 4, 16, 64 or 256 entries and uint8 indices; got {lut}, {indices}"
        )
    needed = math.ceil((lut.size.bit_length() - 1) * math.prod(shape) / 8)
    if indices.size != needed:
        raise call.refuse(f"indices needs {needed} bytes for {shape}; got {indices.size}")
    return (TensorType(lut.dtype, shape),)


def _looked_up(call: Call, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """The shape of table entries for indices of `shape`: a vector entry lengthens `vector_axis`."""
    lut = call.type("lut")
    if not shape or lut.rank != len(shape) + 2 or any(n % m for n, m in zip(shape, lut.shape, strict=False)):
        raise call.refuse(f"lut needs rank {len(shape) + 2} and extents that divide {shape}; got {lut}")
    if lut.shape[-2] != 2 ** _INDEX_BITS[dtype]:
        raise call.refuse(f"lut needs {2 ** _INDEX_BITS[dtype]} entries for {dtype}; got {lut.shape[-2]}")
    if call.has("vector_axis"):
        along = axis(call, call.integer("vector_axis"), len(shape))
        return (*shape[:along], shape[along] * lut.shape[-1], *shape[along + 1 :])
    if lut.shape[-1] > 1:
        raise call.refuse(f"needs vector_axis for entries of {lut.shape[-1]} numbers")
    return shape


@rule(
    "constexpr_sparse_to_dense",
    tensor("nonzero_data"),
    tensor("mask", "uint1"),
    const("shape", "uint32", None),
    dtypes="nonzero_data:W mask:uint1|uint8",
    family="constexpr",
)
def sparse_to_dense(call: Call) -> tuple[TensorType, ...]:
    """A mask of the result's shape (iOS 18); with `shape`, a packed uint8 mask, lowest bit first."""
    data, mask = call.type("nonzero_data"), call.args["mask"]
    if not call.has("shape"):
        _check_mask(call, "nonzero_data", "mask")
        return (TensorType(data.dtype, call.type("mask").shape),)
    shape = call.integers("shape")
    if data.rank != 1 or call.type("mask").shape != (math.ceil(math.prod(shape) / 8),):
        raise call.refuse(f"needs rank-1 nonzero_data and a bit of mask for each element of {shape}")
    if isinstance(mask, Literal) and isinstance(mask.data, bytes):
        bits = int.from_bytes(mask.data, "little")
        if bits.bit_count() != data.size or bits >> math.prod(shape):
            raise call.refuse(
                f"mask needs {data.size} bits set, none beyond the last; got {bits.bit_count()}"
            )
    return (TensorType(data.dtype, shape),)


def _check_mask(call: Call, data: str, mask: str) -> None:
    given = call.args[mask]
    if call.type(data).rank != 1 or call.type(mask).dtype != "uint1":
        raise call.refuse(f"needs rank-1 {data} and a uint1 {mask}; got {call.type(data)}, {call.type(mask)}")
    if (
        isinstance(given, Literal)
        and isinstance(given.data, bytes)
        and given.data.count(1) != call.type(data).size
    ):
        raise call.refuse(f"{mask} needs {call.type(data).size} bits set; got {given.data.count(1)}")


@rule(
    "constexpr_lut_to_sparse",
    tensor("indices_mask", "uint1"),
    tensor("indices_nonzero_data", "uint4"),
    tensor("lut"),
    const("vector_axis", "int32", None),
    dtypes="indices_mask:uint1 indices_nonzero_data:P lut:L",
    family="constexpr",
)
def lut_to_sparse(call: Call) -> tuple[TensorType, ...]:
    """A mask and the values at its bits, for `constexpr_sparse_to_dense`."""
    _check_mask(call, "indices_nonzero_data", "indices_mask")
    mask, indices, lut = call.type("indices_mask"), call.type("indices_nonzero_data"), call.type("lut")
    shape = _looked_up(call, mask.shape, indices.dtype)
    return (TensorType("uint1", shape), TensorType(lut.dtype, (indices.size * lut.shape[-1],)))


_SCALES = (tensor("scale"), tensor("offset", "int8", required=False))


@rule(
    "constexpr_blockwise_shift_scale",
    tensor("data", "int8"),
    *_SCALES,
    dtypes="data:W scale:F offset:W",
    family="constexpr",
)
def blockwise_shift_scale(call: Call) -> tuple[TensorType, ...]:
    """(data - offset) * scale, each scale for a block of data.

    A scale of rank 2 goes with the rows of data as a matrix [axis 0, all others]: ANEForge 0.4.0 writes it for
    convolutions too ("data has the weight's shape and scale is [OUT, nblocks]", developer/compile-pipeline),
    which coremltools refuses.
    """
    data, scale = call.type("data"), call.type("scale")
    rows = data if data.rank < 3 or scale.rank != 2 else TensorType(data.dtype, as_rows(data.shape))
    _check_blocks(call, rows, data.dtype)
    return (TensorType(scale.dtype, data.shape),)


def as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape as a matrix: the first axis, and all others."""
    return shape[0], math.prod(shape[1:])


@rule(
    "constexpr_sparse_blockwise_shift_scale",
    tensor("data_mask", "uint1"),
    tensor("nonzero_data", "int8"),
    *_SCALES,
    dtypes="data_mask:uint1 nonzero_data:W scale:F offset:W",
    family="constexpr",
)
def sparse_blockwise_shift_scale(call: Call) -> tuple[TensorType, ...]:
    """As `constexpr_blockwise_shift_scale`, for the values at a mask's bits."""
    _check_mask(call, "nonzero_data", "data_mask")
    _check_blocks(call, call.type("data_mask"), call.type("nonzero_data").dtype)
    return (call.type("data_mask"), TensorType(call.type("scale").dtype, call.type("nonzero_data").shape))


def _check_blocks(call: Call, data: TensorType, dtype: str) -> None:
    scale = call.type("scale")
    if (
        not data.rank
        or data.rank != scale.rank
        or any(n % m for n, m in zip(data.shape, scale.shape, strict=True))
    ):
        raise call.refuse(f"scale needs data's rank and extents that divide it; got {scale} for {data}")
    if call.has("offset"):
        offset = call.type("offset")
        if offset.shape != scale.shape or (not offset.dtype.startswith("fp") and offset.dtype != dtype):
            raise call.refuse(
                f"offset needs scale's shape and data's dtype; got {offset} for {scale}, {dtype}"
            )


@rule(
    "quantize",
    tensor("input"),
    const("zero_point", "int8", None),
    const("scale", "fp16"),
    const("axis", "int32", None),
    const("output_dtype", "string"),
    dtypes="input:F.S zero_point:Q scale:F.S",
)
def quantize(call: Call) -> tuple[TensorType, ...]:
    """round(input / scale) + zero_point, clipped to int8 or uint8."""
    dtype = call.text("output_dtype")
    if dtype not in ("int8", "uint8"):
        raise call.refuse(f"output_dtype needs int8 or uint8; got {dtype!r}")
    if call.has("zero_point") and call.type("zero_point").dtype != dtype:
        raise call.refuse(f"zero_point needs {dtype}; got {call.type('zero_point')}")
    scales = call.const("scale")
    if not any(scales if isinstance(scales, tuple) else (scales,)):
        raise call.refuse("scale needs numbers other than 0")
    _check_scales(call)
    return (TensorType(dtype, call.type("input").shape),)


@rule(
    "dequantize",
    tensor("input", "int8"),
    const("zero_point", "int8", None),
    const("scale", "fp16"),
    const("axis", "int32", None),
    dtypes="input:Q.S zero_point:Q.S scale:F",
)
def dequantize(call: Call) -> tuple[TensorType, ...]:
    """(input - zero_point) * scale."""
    _check_scales(call)
    return (TensorType(call.type("scale").dtype, call.type("input").shape),)


def _check_scales(call: Call) -> None:
    """Scalars without an axis, or vectors with one."""
    x, scale = call.type("input"), call.type("scale")
    expected: tuple[int, ...] = ()
    if scale.rank:
        if not call.has("axis"):
            raise call.refuse("needs an axis when scale is a vector")
        expected = (x.shape[axis(call, call.integer("axis"), x.rank)],)
    elif call.has("axis"):
        raise call.refuse("needs no axis when scale is a scalar")
    for name in ("scale", "zero_point"):
        if call.has(name) and call.type(name).shape != expected:
            raise call.refuse(f"{name} needs the shape {list(expected)}; got {call.type(name)}")
