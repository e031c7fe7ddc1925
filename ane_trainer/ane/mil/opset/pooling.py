"""Type rules of pooling."""

from __future__ import annotations

from ane_trainer.ane.mil.opset.registry import Call, Param, const, rule, tensor
from ane_trainer.ane.mil.opset.shapes import spatial_padding, windows
from ane_trainer.ane.mil.program import TensorType

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
