"""Operations and multiply-accumulates of one MIL op, counted from its types."""

from __future__ import annotations

import math

from ane_trainer.ane.mil.opset import family, op_def
from ane_trainer.ane.mil.program import Literal, Op, Value

#: Families of ops that take no time: names, views, constants, and constants that are decoded beforehand.
FREE = ("view", "constexpr")
#: Families of ops that only move data.
MOVES = ("movement", "select")
#: Families whose work is counted by elements read.
_READS = ("reduction", "arg_reduction", "softmax", "normalization")


def macs(op: Op) -> int:
    """Multiply-accumulates of matmul, linear, conv, conv_transpose, einsum and attention; 0 for other ops."""
    if family(op.kind) != "contraction":
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
    kind = op_def(op.kind)
    if kind.family in (*FREE, *MOVES) or not op.results:
        return 0
    if kind.family == "contraction":
        bias = op.result.type.size if op.arg("bias") is not None else 0
        attention = (
            5 * math.prod(shape_of(op, "query")[:-1]) * shape_of(op, "key")[-2]
            if "attention" in op.kind
            else 0
        )
        return 2 * macs(op) + bias + attention
    if kind.family == "pooling":
        window = constant(op, "kernel_sizes")
        return op.result.type.size * math.prod(window if isinstance(window, tuple) else (1,))
    operands = [value.type.size for value in op.operands()] or [0]
    elements = operands[0] if kind.family in _READS else max(value.type.size for value in op.results)
    return kind.flops * elements


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
