"""Type rules of reductions, softmax, pooling and normalisations."""

from __future__ import annotations

from ane_trainer.ane.mil.opset.registry import Call, Param, const, rule, tensor
from ane_trainer.ane.mil.opset.shapes import axes, axis, spatial_padding, windows
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


_POOL: tuple[Param, ...] = (
    tensor("x"),
    const("kernel_sizes"),
    const("strides", "int32", None),
    const("pad_type", "string"),
    const("pad", "int32", None),
    const("ceil_mode", "bool", False),
)


@rule(
    "avg_pool", *_POOL, const("exclude_padding_from_average", "bool", False), dtypes="x:F", family="pooling"
)
@rule("max_pool l2_pool", *_POOL, dtypes="x:F", family="pooling")
def pool(call: Call) -> tuple[TensorType, ...]:
    """x `[N, C, *spatial]` with 1 to 3 spatial axes; absent strides are 1 (not the kernel's size)."""
    x = call.type("x")
    kernel = call.integers("kernel_sizes")
    if x.rank != len(kernel) + 2:
        raise call.refuse(f"kernel_sizes needs {x.rank - 2} numbers for {x}; got {kernel}")
    ones = (1,) * len(kernel)
    strides = call.integers("strides") if call.has("strides") else ones
    padding = spatial_padding(call, x.shape[2:], kernel, strides, ones)
    ceil_mode = call.flag("ceil_mode")
    if ceil_mode and (len(kernel) > 2 or call.text("pad_type") == "same"):
        raise call.refuse("ceil_mode needs 1 or 2 spatial axes and a pad_type other than same")
    pad = call.integers("pad") if call.has("pad") else ()
    if ceil_mode and pad[::2] != pad[1::2]:
        raise call.refuse(f"ceil_mode needs symmetric padding; got {pad}")
    extents = windows(call, x.shape[2:], kernel, strides, ones, padding, ceil_mode=ceil_mode)
    return (TensorType(x.dtype, (*x.shape[:2], *extents)),)


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
