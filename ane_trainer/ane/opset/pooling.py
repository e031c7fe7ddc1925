"""Type rules of pooling."""

from __future__ import annotations

from ane_trainer.ane.mil import TensorType
from ane_trainer.ane.opset.registry import Call, Param, const, rule, tensor
from ane_trainer.ane.opset.shapes import spatial_padding, windows

_POOL: tuple[Param, ...] = (
    tensor("x"),
    const("kernel_sizes"),
    const("strides", "int32", None),
    const("pad_type", "string", "valid"),
    const("pad", "int32", None),
    const("ceil_mode", "bool", False),
)


@rule("avg_pool", *_POOL, const("exclude_padding_from_average", "bool", False))
@rule("max_pool l2_pool", *_POOL)
def pool(call: Call) -> tuple[TensorType, ...]:
    """x `[N, C, *spatial]` with 1 to 3 spatial axes."""
    x = call.type("x")
    kernel = call.integers("kernel_sizes")
    if x.rank != len(kernel) + 2:
        raise call.refuse(f"kernel_sizes needs {x.rank - 2} numbers for {x}; got {kernel}")
    strides = call.integers("strides") if call.has("strides") else kernel
    ones = (1,) * len(kernel)
    padding = spatial_padding(call, x.shape[2:], kernel, strides, ones)
    extents = windows(call, x.shape[2:], kernel, strides, ones, padding, ceil_mode=call.flag("ceil_mode"))
    return (TensorType(x.dtype, (*x.shape[:2], *extents)),)
