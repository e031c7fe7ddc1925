"""Weights of an inference program in 8 or 4 bits: symmetric, one scale per channel or block.

    before: conv(x, weight=<fp16 constant>)
    after:  constexpr_blockwise_shift_scale(data=<int8>, scale=<fp16>) -> w; conv(x, weight=w)

int8 has one scale per output channel; int4 one per 32 weights along the contracted axis where that divides.
Core ML unpacks such weights when it loads a model (iOS 18, macOS 15).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import UsageError
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, TensorType, Value
from ane_trainer.ane.mil.weights import from_array, to_array

#: Kinds of weights and their largest magnitude as an integer.
LEVELS = {"int8": 127, "int4": 7}
WEIGHTS = ("fp16", *LEVELS)
#: Smaller constants (biases, scales) stay as they are.
MIN_ELEMENTS = 512
BLOCK = 32

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


def quantize(
    values: NDArray[np.float32], kind: str, contracted: tuple[int, ...]
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """(integers, scales): scales have the values' rank, extent 1 or number of blocks on contracted axes."""
    top, axis = LEVELS[kind], contracted[0]
    blocks = values.shape[axis] // BLOCK if kind == "int4" and values.shape[axis] % BLOCK == 0 else 1
    split = (*values.shape[:axis], blocks, values.shape[axis] // blocks, *values.shape[axis + 1 :])
    within = (axis + 1, *(a + 1 for a in contracted[1:]))
    grouped = values.reshape(split)
    peak = np.abs(grouped).max(axis=within, keepdims=True)
    scale = np.maximum(peak / top, 2.0**-24).astype(np.float16).astype(np.float32)
    data = np.clip(np.rint(grouped / scale), -top, top).astype(np.int8).reshape(values.shape)
    shape = tuple(blocks if a == axis else 1 if a in contracted else n for a, n in enumerate(values.shape))
    return data, scale.reshape(shape).astype(np.float16)
