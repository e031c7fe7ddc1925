"""Type rules of ops that make tensors: fill, range, shape, random numbers; and of Core ML states."""

from __future__ import annotations

import math

from ane_trainer.ane.mil.opset.registry import Call, const, rule, state, tensor
from ane_trainer.ane.mil.program import TensorType

_SEED = const("seed", "int32", -1)


def _dtype(call: Call, name: str) -> str:
    """The dtype of a constant parameter; fp32 when it is left out (its default is a plain number)."""
    return call.type(name).dtype if call.has(name) else "fp32"


@rule("fill", const("shape"), const("value", "fp16", 0.0), dtypes="value:FIB", family="movement")
@rule("random_bernoulli", const("shape"), const("prob", "fp16", 0.5), _SEED, dtypes="prob:F", family="random")
@rule(
    "random_normal",
    const("shape"),
    const("mean", "fp16", 0.0),
    const("stddev", "fp16", 1.0),
    _SEED,
    dtypes="mean:F.T stddev:F.T",
    family="random",
)
@rule(
    "random_uniform",
    const("shape"),
    const("low", "fp16", 0.0),
    const("high", "fp16", 1.0),
    _SEED,
    dtypes="low:F.T high:F.T",
    family="random",
)
def of_shape(call: Call) -> tuple[TensorType, ...]:
    """A tensor of the constant `shape`, of the dtype of its value."""
    names = {"fill": ("value",), "random_bernoulli": ("prob",), "random_normal": ("mean", "stddev")}
    typed = names.get(call.op.kind, ("low", "high"))
    dtypes = {_dtype(call, name) for name in typed}
    if len(dtypes) != 1:
        raise call.refuse(f"needs {' and '.join(typed)} of one dtype; got {' and '.join(sorted(dtypes))}")
    return (TensorType(dtypes.pop(), call.integers("shape")),)


@rule(
    "fill_like",
    tensor("ref_tensor"),
    const("value", "fp16", 0.0),
    dtypes="ref_tensor:FIB value:FIB",
    family="movement",
)
def fill_like(call: Call) -> tuple[TensorType, ...]:
    """A tensor of the reference's shape, of the value's dtype."""
    return (TensorType(_dtype(call, "value"), call.type("ref_tensor").shape),)


@rule(
    "random_categorical",
    tensor("x"),
    const("mode", "string", "logits"),
    const("size", "int32", 1),
    _SEED,
    dtypes="x:F",
    family="random",
)
def random_categorical(call: Call) -> tuple[TensorType, ...]:
    """`size` samples for each row of x."""
    if not call.type("x").rank:
        raise call.refuse("x needs rank 1 or more; got a scalar")
    return (TensorType(call.type("x").dtype, (*call.type("x").shape[:-1], call.integer("size"))),)


@rule(
    "range_1d",
    const("end", "fp16"),
    const("start", "fp16"),
    const("step", "fp16"),
    dtypes="end:FI.T start:FI.T step:FI.T",
    family="movement",
)
def range_1d(call: Call) -> tuple[TensorType, ...]:
    """start, start + step, ... below end: ceil((end - start) / step) numbers."""
    start, end, step = (call.number(n) for n in ("start", "end", "step"))
    if step == 0 or not math.isfinite((end - start) / step):
        raise call.refuse(f"needs finite numbers and a step other than 0; got {start}, {end}, {step}")
    return (TensorType(call.type("start").dtype, (math.ceil((end - start) / step),)),)


@rule("shape", tensor("x"), dtypes="x:FIB")
def shape(call: Call) -> tuple[TensorType, ...]:
    """x's extents as int32 `[rank]`."""
    return (TensorType("int32", (call.type("x").rank,)),)


@rule("read_state", state("input"), family="view")
def read_state(call: Call) -> tuple[TensorType, ...]:
    """The state's tensor."""
    held = call.type("input")
    return (TensorType(held.dtype, held.shape),)


@rule("write_state", state("input"), tensor("data"), dtypes="data:ALL", family="view")
@rule("coreml_update_state", state("state"), tensor("value"), dtypes="value:ALL", family="movement")
def write_state(call: Call) -> tuple[TensorType, ...]:
    """Stores a value; `coreml_update_state` also returns it (coremlc makes it write_state, read_state)."""
    names = ("input", "data") if call.op.kind == "write_state" else ("state", "value")
    held, value = call.type(names[0]), call.type(names[1])
    if (held.dtype, held.shape) != (value.dtype, value.shape):
        raise call.refuse(f"{names[1]} needs the state's type {held}; got {value}")
    return () if call.op.kind == "write_state" else (value,)
