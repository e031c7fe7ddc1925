"""Type rules of the multiply-accumulate ops: matmul, linear, convolutions."""

from __future__ import annotations

from ane_trainer.ane.mil import TensorType
from ane_trainer.ane.opset.registry import Call, const, rule, tensor
from ane_trainer.ane.opset.shapes import broadcast, spatial_padding, windows


@rule("matmul", tensor("x"), tensor("y"), const("transpose_x", "bool", False), const("transpose_y", "bool", False))
def matmul(call: Call) -> tuple[TensorType, ...]:
    """x `[..., M, K]` (or `[..., K, M]` with transpose_x), y `[..., K, N]`; leading axes broadcast."""
    x, y = call.type("x"), call.type("y")
    if min(x.rank, y.rank) < 2:
        raise call.refuse(f"needs x and y of rank 2 or more; got {x} and {y}")
    m, k = x.shape[-2:] if not call.flag("transpose_x") else x.shape[:-3:-1]
    k_y, n = y.shape[-2:] if not call.flag("transpose_y") else y.shape[:-3:-1]
    if k != k_y or x.dtype != y.dtype:
        raise call.refuse(f"needs x and y to agree in the contracted extent and dtype; got {x} and {y}")
    return (TensorType(x.dtype, (*broadcast(call, x.shape[:-2], y.shape[:-2]), m, n)),)


@rule("linear", tensor("x"), const("weight", "fp16"), const("bias", "fp16", None))
def linear(call: Call) -> tuple[TensorType, ...]:
    """x `[..., K]`, weight `[N, K]`, bias `[N]`."""
    x, w = call.type("x"), call.type("weight")
    if w.rank != 2 or x.shape[-1:] != w.shape[1:]:
        raise call.refuse(f"needs weight [N, K] for x [..., K]; got {w} and {x}")
    if call.has("bias") and call.type("bias").shape not in ((w.shape[0],), ()):
        raise call.refuse(f"bias needs the shape [{w.shape[0]}]; got {call.type('bias')}")
    return (TensorType(x.dtype, (*x.shape[:-1], w.shape[0])),)


@rule(
    "conv",
    tensor("x"),
    tensor("weight"),
    tensor("bias", required=False),
    const("strides", "int32", None),
    const("pad_type", "string", "valid"),
    const("pad", "int32", None),
    const("dilations", "int32", None),
    const("groups", "int32", 1),
)
def conv(call: Call) -> tuple[TensorType, ...]:
    """x `[N, Cin, *spatial]`, weight `[Cout, Cin/groups, *kernel]`, bias `[Cout]`; 1 to 3 spatial axes."""
    x, w = call.type("x"), call.type("weight")
    spatial = x.rank - 2
    if w.rank != x.rank or not 1 <= spatial <= 3:
        raise call.refuse(f"needs x and weight of one rank from 3 to 5; got {x} and {w}")
    groups = call.integer("groups")
    if x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        raise call.refuse(f"needs Cin = weight.shape[1] * groups and Cout divisible; got {x}, {w}, groups {groups}")
    strides = call.integers("strides") if call.has("strides") else (1,) * spatial
    dilations = call.integers("dilations") if call.has("dilations") else (1,) * spatial
    padding = spatial_padding(call, x.shape[2:], w.shape[2:], strides, dilations)
    extents = windows(call, x.shape[2:], w.shape[2:], strides, dilations, padding)
    return (TensorType(x.dtype, (x.shape[0], w.shape[0], *extents)),)
