"""Arrays of the simulator: storage aligned to cache lines, float16 patterns outside and decoded float32 inside,
literals and constant parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.program import Literal, TensorType
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.loops.convert import decode_into, encoded
from ane_trainer.ane.simulator.numbers.fp16 import decode, round_half_away

_STORAGE: dict[str, object] = {
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


def constant(call: Call, name: str) -> Array | None:
    """The constant tensor `name` as given (fp16 decoded), None when it is absent and has no default."""
    argument = call.args.get(name)
    return literal_array(argument) if isinstance(argument, Literal) else None


def half(call: Call, name: str) -> np.float32:
    """A number (or its default) rounded to fp16, as the engine's descriptors hold it."""
    return np.float32(round_half_away(call.number(name)))


def bias(call: Call, name: str) -> np.float32:
    """A number as an activation's bias: a multiple of 2^-16 (half away)."""
    return np.float32(np.floor(call.number(name) * 65536.0 + 0.5) / 65536.0)


def per_channel(call: Call, name: str, rank: int) -> Array | None:
    """A constant `[C]` as decoded fp16, shaped to broadcast along axis 1 of a tensor of `rank`."""
    values = constant(call, name)
    if values is None:
        return None
    return round_half_away(values.astype(np.float64)).reshape(-1, *(1,) * (rank - 2))


def channel_line(call: Call) -> tuple[Array, Array]:
    """Scale and offset `[C, 1, ...]`, decoded fp16, to which the compiler folds a batch_norm's parameters."""
    mean, variance = (np.asarray(constant(call, n), np.float64) for n in ("mean", "variance"))
    gamma, beta = constant(call, "gamma"), constant(call, "beta")
    scale = (1.0 if gamma is None else gamma) / np.sqrt(variance + call.number("epsilon"))
    offset = (0.0 if beta is None else beta) - mean * scale
    shape = (-1, *(1,) * (call.type().rank - 2))
    return round_half_away(scale).reshape(shape), round_half_away(offset).reshape(shape)
