"""The registry of meanings: what each MIL op computes in double precision, from MIL's documentation.

A meaning is `(Call, *operands) -> array | tuple of arrays`. Operands arrive in the order of the op's tensor
parameters (None for an absent optional one, a tuple for a variadic one): float64 for floats, int64 for
integers, bool for bool. Compile-time parameters are read from the call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.program import Literal, TensorType
from ane_trainer.ane.mil.weights import Array

F64 = NDArray[np.float64]
Meaning = Callable[..., object]

MEANINGS: dict[str, Meaning] = {}

_PAYLOAD = {
    "fp16": "<f2", "fp32": "<f4", "fp64": "<f8", "bool": "?", "int4": "i1", "int8": "i1", "int16": "<i2",
    "int32": "<i4", "int64": "<i8", "uint1": "u1", "uint2": "u1", "uint3": "u1", "uint4": "u1", "uint6": "u1",
    "uint8": "u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8",
}  # fmt: skip


def meaning(kinds: str) -> Callable[[Meaning], Meaning]:
    """Register the meaning of the space-separated op `kinds`."""

    def register(function: Meaning) -> Meaning:
        for kind in kinds.split():
            if kind in MEANINGS:
                raise ValueError(f"meaning of {kind} is registered twice")
            MEANINGS[kind] = function
        return function

    return register


def wide_dtype(dtype: str) -> type:
    """The NumPy type that holds a MIL dtype here: float64, int64 or bool."""
    if dtype == "bool":
        return np.bool_
    return np.float64 if dtype.startswith("fp") else np.int64


def literal_array(literal: Literal) -> Array:
    """A literal's numbers, widened; `SimulationError` for strings."""
    if not isinstance(literal.data, bytes):
        raise SimulationError(f"reference: needs a numeric constant; got {literal.type}.", code="SIM105")
    array = np.frombuffer(literal.data, _PAYLOAD[literal.type.dtype]).reshape(literal.type.shape)
    return array.astype(wide_dtype(literal.type.dtype))


def constant(call: Call, name: str) -> Array | None:
    """The compile-time tensor `name`, widened; None when it is absent."""
    argument = call.args.get(name)
    return literal_array(argument) if isinstance(argument, Literal) else None


def along(values: Array | None, axis: int, rank: int) -> Array | None:
    """A vector shaped to broadcast along `axis` of a tensor of `rank`; numbers and None as they are."""
    if values is None or not values.ndim:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def result_type(call: Call) -> TensorType:
    """The type of the call's first result."""
    return call.op.infer(call)[0]


def half_away(x: Array) -> Array:
    """The nearest whole number, halves away from zero (MIL leaves halves open; the engine rounds so)."""
    return np.asarray(np.copysign(np.floor(np.abs(x) + 0.5), x))
