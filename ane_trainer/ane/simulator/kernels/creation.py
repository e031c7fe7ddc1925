"""Ops that make tensors or change their dtype: fill, range_1d, shape, const, identity, cast."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.program import TensorType
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.arrays import constant, storage_dtype
from ane_trainer.ane.simulator.numbers.fp16 import decode, encode, round_half_away
from ane_trainer.ane.simulator.registry import EngineContext, kernel


def stored(values: ArrayLike, type_: TensorType) -> Array:
    """Numbers as the simulator holds a MIL type; fp16 rounded half away from zero."""
    wide = np.asarray(values)
    return (
        round_half_away(wide.astype(np.float64))
        if type_.dtype == "fp16"
        else wide.astype(storage_dtype(type_))
    )


@kernel(
    "fill fill_like",
    "exact",
    "a constant: ANEForge vocabulary sweep, relative error 3e-4 on M5 (its fp16 value)",
)
def fill(ctx: EngineContext, call: Call, reference: Array | None = None) -> Array:
    """A tensor of one value, of the given shape or the reference's."""
    (type_,) = call.op.infer(call)
    value = constant(call, "value")
    return np.full(type_.shape, stored(0.0, type_) if value is None else value.reshape(()))


@kernel(
    "range_1d",
    "bounded",
    "ANEForge vocabulary sweep: relative error 2.5e-4 on M5",
    "each number rounded once",
)
def range_1d(ctx: EngineContext, call: Call) -> Array:
    """start, start + step, ... below end."""
    (type_,) = call.op.infer(call)
    return stored(call.number("start") + np.arange(type_.size) * call.number("step"), type_)


@kernel("shape", "exact", "no arithmetic; refused on the e5rt path (ANEForge sweep, M5), folded by compilers")
def shape(ctx: EngineContext, call: Call, x: Array) -> Array:
    """x's extents."""
    return np.asarray(x.shape, np.int32)


@kernel("const", "exact", "no arithmetic: folded by the compiler")
def const(ctx: EngineContext, call: Call) -> Array:
    """The constant itself."""
    value = constant(call, "val")
    assert value is not None
    return value


@kernel("identity", "exact", "no arithmetic; refused on the e5rt path (ANEForge sweep, M5)")
def identity(ctx: EngineContext, call: Call, x: Array) -> Array:
    """x itself."""
    return x


@kernel(
    "cast", "assumed",
    "refused on the e5rt path but for uint8 inputs (ANEForge); Core ML converts at the border: ties to even",
)  # fmt: skip
def cast(ctx: EngineContext, call: Call, x: Array) -> Array:
    """fp16 leaves the engine as IEEE numbers (65536 as inf); floats become integers towards zero."""
    source, target = call.type(), call.op.infer(call)[0]
    wide: Array = encode(x).astype(np.float32) if source.dtype == "fp16" else x
    if target.dtype == "fp16":
        with np.errstate(over="ignore"):
            return x if source.dtype == "fp16" else decode(wide.astype(np.float16))
    if target.dtype == "bool":
        return np.asarray(wide != 0)
    kept = np.dtype(storage_dtype(target))
    if kept.kind == "f" or wide.dtype.kind != "f":
        return np.asarray(wide.astype(kept))
    limits = np.iinfo(kept)
    whole = np.nan_to_num(np.trunc(wide.astype(np.float64)))
    return np.asarray(np.clip(whole, limits.min, limits.max).astype(kept))
