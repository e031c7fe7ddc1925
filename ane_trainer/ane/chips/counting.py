"""Operations and multiply-accumulates of one MIL op, counted from its types."""

from __future__ import annotations

import math

from ane_trainer.ane.mil.program import Literal, Op, Value


def _kinds(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Ops that take no time: names, views and constants.
FREE = _kinds("const reshape expand_dims squeeze identity flatten2d read_state write_state")
#: Ops that only move data.
MOVES = _kinds(
    "transpose concat split stack slice_by_size slice_by_index tile pad reverse crop cast fill fill_like"
    " select gather depth_to_space space_to_depth pixel_shuffle pixel_unshuffle space_to_batch batch_to_space"
    " upsample_nearest_neighbor resize_nearest_neighbor range_1d coreml_update_state"
)
#: Normalisations.
NORMS = _kinds("layer_norm instance_norm batch_norm l2_norm local_response_norm")
#: Ops of the multiply-accumulate array.
MACS = _kinds("matmul linear conv conv_transpose einsum scaled_dot_product_attention")
#: Floating-point operations an element of the input; pointwise ops that are not named count 1 an element.
_FLOPS_PER_ELEMENT = {
    "softmax": 5, "layer_norm": 8, "instance_norm": 8, "batch_norm": 2, "l2_norm": 3,
    "local_response_norm": 5, "reduce_l2_norm": 2, "reduce_l1_norm": 2, "reduce_sum_square": 2,
    "reduce_log_sum_exp": 3,
}  # fmt: skip


def macs(op: Op) -> int:
    """Multiply-accumulates of matmul, linear, conv, conv_transpose, einsum and attention; 0 for other ops."""
    if op.kind not in MACS:
        return 0
    out = op.result.type
    if op.kind == "matmul":
        shape = shape_of(op, "x")
        transposed = constant(op, "transpose_x")
        return out.size * shape[-2 if transposed and len(shape) > 1 else -1]
    if op.kind == "linear":
        return out.size * shape_of(op, "x")[-1]
    if op.kind == "conv":
        return out.size * math.prod(shape_of(op, "weight")[1:])
    if op.kind == "conv_transpose":
        return math.prod(shape_of(op, "x")) * math.prod(shape_of(op, "weight")[1:])
    if op.kind == "einsum":
        return _einsum_macs(op)
    query, key, value = (shape_of(op, name) for name in ("query", "key", "value"))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def flops(op: Op) -> int:
    """Floating-point operations: 2 a multiply-accumulate, 1 an element for pointwise work, 0 for moving data.

    Reductions and pooling count their input or window; normalisations a fixed number an element.
    """
    if op.kind in FREE or op.kind in MOVES or op.kind.startswith("constexpr_") or not op.results:
        return 0
    if op.kind in MACS:
        bias = op.result.type.size if op.arg("bias") is not None else 0
        attention = (
            5 * math.prod(shape_of(op, "query")[:-1]) * shape_of(op, "key")[-2]
            if "attention" in op.kind
            else 0
        )
        return 2 * macs(op) + bias + attention
    if op.kind in ("avg_pool", "max_pool", "l2_pool"):
        window = constant(op, "kernel_sizes")
        return op.result.type.size * math.prod(window if isinstance(window, tuple) else (1,))
    operands = [value.type.size for value in op.operands()] or [0]
    reads_input = op.kind.startswith("reduce_") or op.kind in _FLOPS_PER_ELEMENT
    elements = operands[0] if reads_input else max(value.type.size for value in op.results)
    return _FLOPS_PER_ELEMENT.get(op.kind, 1) * elements


def _einsum_macs(op: Op) -> int:
    equation = constant(op, "equation")
    values = op.arg("values")
    if not isinstance(equation, str) or not isinstance(values, tuple):
        return 0
    sizes: dict[str, int] = {}
    for term, item in zip(equation.split("->")[0].split(","), values, strict=False):
        sizes.update(zip(term.strip(), item.type.shape, strict=False))
    return math.prod(sizes.values())


def shape_of(op: Op, name: str) -> tuple[int, ...]:
    """The shape of a tensor argument; `(1,)` when it is absent or a tuple."""
    argument = op.arg(name)
    return argument.type.shape if isinstance(argument, (Value, Literal)) else (1,)


def constant(op: Op, name: str) -> object:
    """A constant argument as Python values, or None."""
    argument = op.arg(name)
    return argument.to_python() if isinstance(argument, Literal) else None
