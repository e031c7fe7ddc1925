"""Weights of an inference program in 8 or 4 bits: symmetric, one scale per channel or block.

    before: conv(x, weight=<fp16 constant>)
    after:  constexpr_blockwise_shift_scale(data=<int8>, scale=<fp16>) -> w; conv(x, weight=w)

int8 has one scale per output channel; int4 one per 32 weights along the contracted axis where that divides.
Core ML unpacks such weights when it loads a model (iOS 18, macOS 15).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, TensorType, Value
from ane_trainer.ane.mil.quantization import LEVELS, MIN_ELEMENTS, quantize
from ane_trainer.ane.mil.weights import from_array, to_array

WEIGHTS = ("fp16", *LEVELS)

#: Parameters that hold weights, by op.
_PARAMETERS = {"matmul": ("x", "y"), "linear": ("weight",), "conv": ("weight",)}


def compress(function: Function, weights: str) -> Function:
    """The function with its large weights as `weights` ("fp16" changes nothing).

    Raises: UsageError for an unknown kind.
    """
    if weights not in WEIGHTS:
        raise UsageError(
            f"weights: needs one of {', '.join(WEIGHTS)}; got {weights!r}. Choose one of them.", code="ANE118"
        )
    if weights == "fp16":
        return function
    ops: list[Op] = []
    for op in function.ops:
        args: list[tuple[str, Arg]] = []
        for key, arg in op.args:
            large = isinstance(arg, Literal) and arg.type.size >= MIN_ELEMENTS and arg.type.rank >= 2
            if large and key in _PARAMETERS.get(op.kind, ()):
                ops.append(_packed(op, key, arg, weights))
                args.append((key, ops[-1].result))
            else:
                args.append((key, arg))
        ops.append(replace(op, args=tuple(args)))
    return replace(function, ops=tuple(ops))


def _packed(op: Op, key: str, weight: Arg, kind: str) -> Op:
    assert isinstance(weight, Literal)
    values = to_array(weight).astype(np.float32)
    data, scale = quantize(values, kind, _contracted(op, key, values.ndim))
    result = Value(f"{op.name}_{key}_unpacked", TensorType(weight.type.dtype, weight.type.shape))
    literals = (
        ("data", from_array(data, dtype=kind, name=weight.name)),
        ("scale", from_array(scale, dtype=weight.type.dtype)),
    )
    return Op("constexpr_blockwise_shift_scale", literals, (result,), op.source)


def _contracted(op: Op, key: str, rank: int) -> tuple[int, ...]:
    """Axes of a weight that are summed over."""
    if op.kind == "conv":
        return tuple(range(1, rank))
    if op.kind == "linear":
        return (1,)
    flag = op.arg(f"transpose_{key}")
    transposed = isinstance(flag, Literal) and bool(flag.to_python())
    return (rank - 1,) if (key == "x") != transposed else (rank - 2,)
