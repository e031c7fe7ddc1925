"""Type rules of the normalisations: each keeps its input's type."""

from __future__ import annotations

from ane_trainer.ane.mil.opset.registry import Call, const, rule, tensor
from ane_trainer.ane.mil.opset.shapes import axes
from ane_trainer.ane.mil.program import TensorType


@rule(
    "batch_norm",
    tensor("x"),
    const("mean", "fp16"),
    const("variance", "fp16"),
    const("gamma", "fp16", None),
    const("beta", "fp16", None),
    const("epsilon", "fp16", 1e-5),
    dtypes="x:F mean:F.U variance:F.U gamma:F.U beta:F.U epsilon:F.U",
    family="normalization",
    flops=2,
)
@rule(
    "instance_norm",
    tensor("x"),
    const("gamma", "fp16", None),
    const("beta", "fp16", None),
    const("epsilon", "fp16", 1e-5),
    dtypes="x:F gamma:F.U beta:F.U epsilon:F.U",
    family="normalization",
    flops=8,
)
def per_channel(call: Call) -> tuple[TensorType, ...]:
    """x `[N, C, *spatial]`; mean, variance, gamma and beta `[C]`."""
    x = call.type("x")
    if not 3 <= x.rank <= 5:
        raise call.refuse(f"x needs rank 3 to 5; got {x}")
    for name in ("mean", "variance", "gamma", "beta"):
        if call.has(name) and call.type(name).shape != (x.shape[1],):
            raise call.refuse(f"{name} needs the shape [{x.shape[1]}]; got {call.type(name)}")
    return (x,)


@rule(
    "layer_norm",
    tensor("x"),
    const("axes", "int32", None),
    const("gamma", "fp16", None),
    const("beta", "fp16", None),
    const("epsilon", "fp16", 1e-5),
    dtypes="x:F gamma:F.U beta:F.U epsilon:F.U",
    family="normalization",
    flops=8,
)
def layer_norm(call: Call) -> tuple[TensorType, ...]:
    """gamma and beta have the extents of the normalised axes, in the order of x's axes."""
    x = call.type("x")
    over = axes(call, "axes", x.rank)
    expected = tuple(n for i, n in enumerate(x.shape) if i in over)
    for name in ("gamma", "beta"):
        if call.has(name) and call.type(name).shape != expected:
            raise call.refuse(f"{name} needs the shape {expected}; got {call.type(name)}")
    return (x,)


@rule(
    "l2_norm",
    tensor("x"),
    const("epsilon", "fp16", 1e-6),
    dtypes="x:F epsilon:F",
    family="normalization",
    flops=3,
)
def l2_norm(call: Call) -> tuple[TensorType, ...]:
    """Over the last three axes together."""
    if call.type("x").rank < 3:
        raise call.refuse(f"x needs rank 3 or more; got {call.type('x')}")
    return (call.type("x"),)


@rule(
    "local_response_norm",
    tensor("x"),
    const("size", "int32"),
    const("alpha", "fp16", 1e-4),
    const("beta", "fp16", 0.75),
    const("k", "fp16", 1.0),
    dtypes="x:F alpha:F.U beta:F.U k:F.U",
    family="normalization",
    flops=5,
)
def local_response_norm(call: Call) -> tuple[TensorType, ...]:
    """Over `size` neighbouring channels of x `[N, C, *spatial]`."""
    if call.type("x").rank < 3 or call.integer("size") < 1:
        raise call.refuse(
            f"needs x of rank 3 or more, size 1 or more; got {call.type('x')}, {call.integer('size')}"
        )
    return (call.type("x"),)
