"""The border of the simulator: float16 bit patterns outside, decoded float32 inside; literals as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.program import Literal, TensorType
from ane_trainer.ane.simulator.loops.convert import decode_into, encoded
from ane_trainer.ane.simulator.memory.fp16 import decode

Array = NDArray[Any]

_STORAGE: dict[str, Any] = {
    "fp16": np.float32, "fp32": np.float32, "bool": np.bool_,
    "int8": np.int8, "uint8": np.uint8, "int16": np.int16, "uint16": np.uint16, "int32": np.int32,
    "uint32": np.uint32, "int64": np.int64, "uint64": np.uint64, "fp64": np.float64,
    "int4": np.int8, "uint1": np.uint8, "uint2": np.uint8, "uint3": np.uint8, "uint4": np.uint8,
    "uint6": np.uint8,
}  # fmt: skip

_PAYLOAD: dict[str, Any] = {**_STORAGE, "fp16": np.float16}


def storage_dtype(type_: TensorType) -> Any:
    """The NumPy dtype in which the simulator holds a MIL type (fp16 as decoded float32)."""
    try:
        return _STORAGE[type_.dtype]
    except KeyError:
        raise SimulationError(f"simulator: needs a tensor dtype; got {type_.dtype}.", code="SIM105") from None


def from_border(array: Array, type_: TensorType, out: Array, threads: int = 1) -> None:
    """Write a border array into simulator storage.

    fp16 takes float16 patterns; other floats are cast to float16 first (ties to even, as a host converts).
    """
    if type_.dtype != "fp16":
        out[...] = array
        return
    half = np.ascontiguousarray(array if array.dtype == np.float16 else _to_half(array))
    if out.flags.c_contiguous and out.dtype == np.float32:
        decode_into(half, out, threads)
    else:
        out[...] = decode(half)


def _to_half(array: Array) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return array.astype(np.float16)


def to_border(array: Array, type_: TensorType, threads: int = 1) -> Array:
    """A copy of simulator storage as the caller sees it: float16 patterns for fp16."""
    return encoded(array, threads) if type_.dtype == "fp16" else array.copy()


def literal_array(literal: Literal) -> Array:
    """A literal's payload in simulator storage."""
    if not isinstance(literal.data, bytes):
        raise SimulationError(f"simulator: needs a numeric constant; got {literal.type}.", code="SIM105")
    dtype = np.dtype(_PAYLOAD[literal.type.dtype]).newbyteorder("<")
    array = np.frombuffer(literal.data, dtype).reshape(literal.type.shape)
    return decode(array) if literal.type.dtype == "fp16" else array
