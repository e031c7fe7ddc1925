"""The weight blob beside a MIL text, sub-byte packing, and the way between `Literal` and NumPy arrays.

A blob is a 64-byte header (u32 count, u32 version 2), then for each weight a 64-byte descriptor
{u32 0xDEADBEEF, u32 dtype code, u64 bytes, u64 absolute data offset, u64 padding bits} and its data,
aligned to 64 bytes. The offset that MIL text writes addresses the descriptor (ANEForge `_blob.py`,
Orion; the padding field and the codes: Apple's MILBlob storage format as coremltools writes it).

Layer: between `opset` (2) and `text`, `parser`, `simulator` (3), which may all import it.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from ane_trainer.ane.errors import ProgramError
from ane_trainer.ane.mil.program import DTYPE_BYTES, Literal, TensorType

#: An array of any dtype.
Array = npt.NDArray[Any]

_HEADER = struct.Struct("<II56x")
_DESCRIPTOR = struct.Struct("<IIQQQ32x")
_SENTINEL = 0xDEADBEEF
_ALIGNMENT_BYTES = 64

#: Blob dtype codes; a dtype that is not here cannot be stored in a blob and is written inline.
BLOB_CODES = {
    "fp16": 1, "fp32": 2, "uint8": 3, "int8": 4, "int16": 6, "uint16": 7, "int4": 8, "uint1": 9,
    "uint2": 10, "uint4": 11, "uint3": 12, "uint6": 13, "int32": 14, "uint32": 15,
}  # fmt: skip

#: Bits of one packed element; dtypes that are not here take their whole bytes.
SUB_BYTE_BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}

_NUMPY = {
    "fp16": "<f2", "fp32": "<f4", "fp64": "<f8", "bool": "?", "int4": "i1", "uint1": "u1", "uint2": "u1",
    "uint3": "u1", "uint4": "u1", "uint6": "u1", "int8": "i1", "uint8": "u1", "int16": "<i2",
    "uint16": "<u2", "int32": "<i4", "uint32": "<u4", "int64": "<i8", "uint64": "<u8",
}  # fmt: skip

_FROM_NUMPY = {
    "float16": "fp16", "float32": "fp32", "float64": "fp64", "bool": "bool", "int8": "int8", "uint8": "uint8",
    "int16": "int16", "uint16": "uint16", "int32": "int32", "uint32": "uint32", "int64": "int64",
    "uint64": "uint64",
}  # fmt: skip


def to_array(literal: Literal) -> Array:
    """The constant as a read-only NumPy array of its shape (sub-byte types as (u)int8, strings as `str_`)."""
    if isinstance(literal.data, (str, tuple)):
        return np.asarray(literal.data, dtype=np.str_)
    return np.frombuffer(literal.data, dtype=_NUMPY[literal.type.dtype]).reshape(literal.type.shape)


def from_array(array: npt.ArrayLike, *, dtype: str | None = None, name: str | None = None) -> Literal:
    """A literal with the array's shape and bytes.

    `dtype` is a MIL dtype; by default the array's own. Values that `dtype` cannot hold (an integer out of
    range) are refused with `ProgramError`; floats are rounded to it, ties to even.
    """
    values = np.asarray(array)
    if values.dtype.kind == "U":
        data = str(values) if values.ndim == 0 else tuple(map(str, values.ravel()))
        return Literal(TensorType("string", values.shape), data, name)
    dtype = dtype or _FROM_NUMPY.get(values.dtype.name)
    if dtype not in _NUMPY:
        raise _refuse(f"constant {name or ''}", f"needs a MIL dtype; got {dtype or values.dtype}")
    if values.dtype.kind in "iu" and values.size and dtype[:2] != "fp" and dtype != "bool":
        low, high = integer_range(dtype)
        if int(values.min()) < low or int(values.max()) > high:
            got = f"{values.min()} to {values.max()}"
            raise _refuse(f"constant {name or ''}", f"needs {dtype}, {low} to {high}; got {got}")
    payload = np.ascontiguousarray(values.astype(_NUMPY[dtype], copy=False)).tobytes()
    return Literal(TensorType(dtype, values.shape), payload, name)


def integer_range(dtype: str) -> tuple[int, int]:
    """Smallest and largest value of an integer dtype."""
    bits = SUB_BYTE_BITS.get(dtype, 8 * DTYPE_BYTES[dtype])
    return (0, 2**bits - 1) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def packed_bytes(type_: TensorType) -> int:
    """Bytes that a tensor of this type takes in a blob."""
    bits = SUB_BYTE_BITS.get(type_.dtype, 8 * DTYPE_BYTES[type_.dtype])
    return math.ceil(type_.size * bits / 8)


def pack(data: bytes, dtype: str) -> bytes:
    """Unpacked payload to blob bytes: element i takes bits [i*b, (i+1)*b), least significant first."""
    bits = SUB_BYTE_BITS.get(dtype)
    if bits is None:
        return data
    elements = np.frombuffer(data, dtype=np.uint8)
    planes = (elements[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.ravel(), bitorder="little").tobytes()


def unpack(data: bytes, dtype: str, size: int) -> bytes:
    """The inverse of `pack` for `size` elements; int4 comes back sign-extended in one byte each."""
    bits = SUB_BYTE_BITS.get(dtype)
    if bits is None:
        return data
    planes = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=size * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    values = (planes.reshape(size, bits) * weights).sum(axis=1, dtype=np.uint8)
    if dtype == "int4":
        values = (values ^ 8) - np.uint8(8)
    return bytes(values.tobytes())


class BlobWriter:
    """Collects weights; `add` returns the offset that MIL text writes, equal contents are stored once."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._offsets: dict[tuple[str, bytes], int] = {}
        self._end_bytes = _HEADER.size

    def add(self, literal: Literal) -> int:
        """Store a literal's payload; the offset of its descriptor."""
        if not isinstance(literal.data, bytes) or literal.type.dtype not in BLOB_CODES:
            raise _refuse("weight blob", f"needs a numeric dtype that it can hold; got {literal.type}")
        key = (literal.type.dtype, literal.data)
        if key in self._offsets:
            return self._offsets[key]
        payload, offset = pack(literal.data, literal.type.dtype), self._end_bytes
        bits = SUB_BYTE_BITS.get(literal.type.dtype)
        spare_bits = 8 * len(payload) - literal.type.size * bits if bits else 0
        code = BLOB_CODES[literal.type.dtype]
        descriptor = _DESCRIPTOR.pack(_SENTINEL, code, len(payload), offset + _DESCRIPTOR.size, spare_bits)
        gap_bytes = -len(payload) % _ALIGNMENT_BYTES
        self._parts += [descriptor, payload, bytes(gap_bytes)]
        self._end_bytes += len(descriptor) + len(payload) + gap_bytes
        self._offsets[key] = offset
        return offset

    def finish(self) -> bytes:
        """The whole blob; a header alone when nothing was added."""
        return b"".join([_HEADER.pack(len(self._offsets), 2), *self._parts])


def read_weight(blob: bytes, offset: int, type_: TensorType) -> bytes:
    """The unpacked payload of the weight whose descriptor is at `offset`.

    Refused with `ProgramError`: a descriptor outside the blob or without its mark, data outside the blob,
    or a byte count that is not what `type_` takes. The stored dtype code is not compared: writers differ.
    A data offset of 0 means "right after the descriptor", its byte count unset (maderix/ANE's benchmarks).
    """
    where = f"weight blob at offset {offset}"
    if not 0 <= offset <= len(blob) - _DESCRIPTOR.size:
        raise _refuse(where, f"needs a descriptor; the blob has {len(blob)} bytes", "MIL105")
    sentinel, _, nbytes, start, _ = _DESCRIPTOR.unpack_from(blob, offset)
    if sentinel != _SENTINEL:
        raise _refuse(where, f"needs the mark {_SENTINEL:#x}; got {sentinel:#x}", "MIL105")
    expected = packed_bytes(type_)
    if start == 0:
        start, nbytes = offset + _DESCRIPTOR.size, expected
    if nbytes != expected:
        raise _refuse(where, f"needs {expected} bytes for {type_}; got {nbytes}", "MIL105")
    if start + nbytes > len(blob):
        raise _refuse(where, f"needs bytes {start} to {start + nbytes}; the blob has {len(blob)}", "MIL105")
    return unpack(bytes(memoryview(blob)[start : start + nbytes]), type_.dtype, type_.size)


def _refuse(where: str, reason: str, code: str = "MIL106") -> ProgramError:
    return ProgramError(f"{where}: {reason}.", code=code)
