"""Type rules of reductions and softmax."""

from __future__ import annotations

from ane_trainer.ane.mil.opset.registry import Call, const, rule, tensor
from ane_trainer.ane.mil.opset.shapes import axes, axis
from ane_trainer.ane.mil.program import TensorType


@rule(
    "reduce_sum reduce_mean reduce_max reduce_min reduce_prod reduce_log_sum",
    tensor("x"),
    const("axes", "int32", None),
    const("keep_dims", "bool", False),
    dtypes="x:FI",
    family="reduction",
)
@rule(
    "reduce_l1_norm reduce_l2_norm reduce_sum_square",
    tensor("x"),
    const("axes", "int32", None),
    const("keep_dims", "bool", False),
    dtypes="x:FI",
    family="reduction",
    flops=2,
)
@rule(
    "reduce_log_sum_exp",
    tensor("x"),
    const("axes", "int32", None),
    const("keep_dims", "bool", False),
    dtypes="x:FI",
    family="reduction",
    flops=3,
)
def reduce(call: Call) -> tuple[TensorType, ...]:
    """Reduces the given axes, all when absent."""
    x = call.type("x")
    gone = axes(call, "axes", x.rank)
    if call.flag("keep_dims"):
        return (TensorType(x.dtype, tuple(1 if i in gone else n for i, n in enumerate(x.shape))),)
    return (TensorType(x.dtype, tuple(n for i, n in enumerate(x.shape) if i not in gone)),)


@rule(
    "reduce_argmax reduce_argmin",
    tensor("x"),
    const("axis", "int32", -1),
    const("keep_dims", "bool", False),
    const("output_dtype", "string", "int32"),
    dtypes="x:FI",
    family="arg_reduction",
)
def reduce_arg(call: Call) -> tuple[TensorType, ...]:
    """Index of the largest or smallest along an axis."""
    x = call.type("x")
    gone = axis(call, call.integer("axis"), x.rank)
    kept = tuple(1 if i == gone else n for i, n in enumerate(x.shape) if i != gone or call.flag("keep_dims"))
    dtype = call.text("output_dtype")
    if dtype not in ("int32", "uint16"):
        raise call.refuse(f"output_dtype needs int32 or uint16; got {dtype!r}")
    return (TensorType(dtype, kept),)


@rule("softmax", tensor("x"), const("axis", "int32", -1), dtypes="x:F", family="softmax", flops=5)
def softmax(call: Call) -> tuple[TensorType, ...]:
    """Over one axis; the result has x's type."""
    axis(call, call.integer("axis"), call.type("x").rank)
    return (call.type("x"),)
