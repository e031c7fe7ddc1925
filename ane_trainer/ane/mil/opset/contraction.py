"""Type rules of the multiply-accumulate ops: matmul, linear, convolutions, einsum, attention."""

from __future__ import annotations

from ane_trainer.ane.mil.opset.registry import Call, const, rule, tensor, tensors
from ane_trainer.ane.mil.opset.shapes import broadcast, spatial_padding, windows
from ane_trainer.ane.mil.program import TensorType


@rule(
    "matmul",
    tensor("x"),
    tensor("y"),
    const("transpose_x", "bool", False),
    const("transpose_y", "bool", False),
    dtypes="x:FI y:FI",
    family="contraction",
)
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


@rule(
    "linear",
    tensor("x"),
    tensor("weight"),
    tensor("bias", required=False),
    dtypes="x:FI weight:FI.U bias:FI.U",
    family="contraction",
)
def linear(call: Call) -> tuple[TensorType, ...]:
    """x `[..., K]`, weight `[N, K]`, bias `[N]`; weight is a constant or what a constexpr op gives."""
    x, w = call.type("x"), call.type("weight")
    if w.rank != 2 or x.shape[-1:] != w.shape[1:]:
        raise call.refuse(f"needs weight [N, K] for x [..., K]; got {w} and {x}")
    if call.has("bias") and call.type("bias").shape != (w.shape[0],):
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
    dtypes="x:F weight:F.U bias:F.U",
    family="contraction",
)
def conv(call: Call) -> tuple[TensorType, ...]:
    """x `[N, Cin, *spatial]`, weight `[Cout, Cin/groups, *kernel]`, bias `[Cout]`; 1 to 3 spatial axes."""
    x, w = call.type("x"), call.type("weight")
    spatial = x.rank - 2
    if w.rank != x.rank or not 1 <= spatial <= 3:
        raise call.refuse(f"needs x and weight of one rank from 3 to 5; got {x} and {w}")
    groups = call.integer("groups")
    if groups < 1 or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        raise call.refuse(
            f"needs Cin = weight.shape[1] * groups and Cout divisible; got {x}, {w}, groups {groups}"
        )
    if call.has("bias") and call.type("bias").shape != (w.shape[0],):
        raise call.refuse(f"bias needs the shape [{w.shape[0]}]; got {call.type('bias')}")
    strides = call.integers("strides") if call.has("strides") else (1,) * spatial
    dilations = call.integers("dilations") if call.has("dilations") else (1,) * spatial
    padding = spatial_padding(call, x.shape[2:], w.shape[2:], strides, dilations)
    extents = windows(call, x.shape[2:], w.shape[2:], strides, dilations, padding)
    return (TensorType(x.dtype, (x.shape[0], w.shape[0], *extents)),)


@rule(
    "conv_transpose",
    tensor("x"),
    tensor("weight"),
    tensor("bias", required=False),
    const("pad", "int32", None),
    const("output_shape", "int32", None),
    const("pad_type", "string", "valid"),
    const("strides", "int32", None),
    const("dilations", "int32", None),
    const("groups", "int32", 1),
    dtypes="x:F weight:F.U bias:F.U",
    family="contraction",
)
def conv_transpose(call: Call) -> tuple[TensorType, ...]:
    """x `[N, Cin, *spatial]`, weight `[Cin, Cout/groups, *kernel]`, bias `[Cout]`; pad cuts the result."""
    x, w = call.type("x"), call.type("weight")
    spatial, groups = x.rank - 2, call.integer("groups")
    if w.rank != x.rank or not 1 <= spatial <= 3 or x.shape[1] != w.shape[0]:
        raise call.refuse(
            f"needs weight [Cin, Cout/groups, *kernel] for x [N, Cin, *spatial]; got {w} and {x}"
        )
    if groups < 1 or w.shape[0] % groups:
        raise call.refuse(f"groups needs a divisor of {w.shape[0]}; got {groups}")
    out_channels = w.shape[1] * groups
    if call.has("bias") and call.type("bias").shape != (out_channels,):
        raise call.refuse(f"bias needs the shape [{out_channels}]; got {call.type('bias')}")
    if call.has("output_shape"):
        shape = call.integers("output_shape")
        if len(shape) != x.rank or shape[:2] != (x.shape[0], out_channels):
            raise call.refuse(f"output_shape needs [{x.shape[0]}, {out_channels}, *spatial]; got {shape}")
        return (TensorType(x.dtype, shape),)
    return (TensorType(x.dtype, (x.shape[0], out_channels, *_transposed_extents(call, x, w))),)


def _transposed_extents(call: Call, x: TensorType, w: TensorType) -> tuple[int, ...]:
    """strides * (size - 1) + (kernel - 1) * dilation + 1 - padding; strides * size for pad_type same."""
    ones = (1,) * (x.rank - 2)
    strides = call.integers("strides") if call.has("strides") else ones
    dilations = call.integers("dilations") if call.has("dilations") else ones
    if call.text("pad_type") == "same":
        return tuple(s * n for s, n in zip(strides, x.shape[2:], strict=True))
    if call.text("pad_type") == "same_lower":
        raise call.refuse("pad_type needs valid, custom or same; got 'same_lower'")
    padding = spatial_padding(call, x.shape[2:], w.shape[2:], strides, dilations)
    rows = zip(x.shape[2:], w.shape[2:], strides, dilations, padding, strict=True)
    return tuple(s * (n - 1) + (k - 1) * d + 1 - sum(p) for n, k, s, d, p in rows)


@rule("einsum", tensors("values"), const("equation", "string"), family="contraction")
def einsum(call: Call) -> tuple[TensorType, ...]:
    """The two equations that MIL takes: `nchw,nwhu->nchu` and `chw,whu->chu`; n and h broadcast."""
    types = call.types("values")
    if len(types) != 2 or types[0].rank != types[1].rank or types[0].dtype != types[1].dtype:
        raise call.refuse(f"values needs two tensors of one rank and dtype; got {', '.join(map(str, types))}")
    x, y = types
    letters: dict[str, str] = {}
    for letter in call.text("equation").replace(" ", ""):
        if letter not in ",->":
            letters.setdefault(letter, chr(ord("a") + len(letters)))
    shape = "".join(letters.get(c, c) for c in call.text("equation").replace(" ", ""))
    if shape != {4: "abcd,adce->abce", 3: "abc,cbd->abd"}.get(x.rank):
        raise call.refuse(f"equation needs nchw,nwhu->nchu or chw,whu->chu; got {call.text('equation')!r}")
    if x.shape[-1] != y.shape[-3]:
        raise call.refuse(f"needs the contracted extents to agree; got {x} and {y}")
    (h,) = broadcast(call, x.shape[-2:-1], y.shape[-2:-1])
    batch = broadcast(call, x.shape[:-3], y.shape[:-3])
    return (TensorType(x.dtype, (*batch, x.shape[-3], h, y.shape[-1])),)


@rule(
    "scaled_dot_product_attention",
    tensor("query"),
    tensor("key"),
    tensor("value"),
    tensor("attn_mask", required=False),
    dtypes="query:F.T key:F.T value:F.T attn_mask:bool|fp16|fp32",
    family="contraction",
)
def attention(call: Call) -> tuple[TensorType, ...]:
    """query `[*B, L, E]`, key `[*B, S, E]`, value `[*B, S, V]`, mask `[..., L or 1, S]` -> `[*B, L, V]`."""
    q, k, v = call.type("query"), call.type("key"), call.type("value")
    agree = q.rank == k.rank == v.rank >= 3 and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if not agree or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise call.refuse(f"needs query [*B, L, E], key [*B, S, E], value [*B, S, V]; got {q}, {k}, {v}")
    if call.has("attn_mask"):
        mask = call.type("attn_mask")
        if mask.rank < 1 or mask.shape[-1] != k.shape[-2]:
            raise call.refuse(f"attn_mask needs {k.shape[-2]} entries a row; got {mask}")
        broadcast(call, q.shape[:-1], mask.shape[:-1])
    return (TensorType(q.dtype, (*q.shape[:-1], v.shape[-1])),)
