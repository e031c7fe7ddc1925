"""Compile-time parameters of a call as arrays in simulator storage."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.program import Literal
from ane_trainer.ane.simulator.memory.border import literal_array
from ane_trainer.ane.simulator.memory.fp16 import round_half_away

Array = NDArray[Any]


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
