"""Operands of lowering rules; those known at compile time become MIL literals.

An *operand* is a MIL value, a torch tensor that is known at compile time, a Python number, or integers in another
encoding (`Encoded`). Shapes are MIL shapes: rank 0 is `[1]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ane_trainer.ane.compiler.lower.registry import Refusal
from ane_trainer.ane.mil.program import MAX_FP16, Literal, TensorType, Value

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """Integers beyond what one fp16 number holds: as codes (one part), or split into remainder and quotient by 1024.

    Only movement, comparisons, look-ups and the rules of `indices` take them.
    """

    parts: tuple[Value | torch.Tensor, ...]
    encoding: str

    def each(self, function: Callable[[Any], Any]) -> Encoded:
        """The integers after a movement that acts on every part alike."""
        return Encoded(tuple(function(part) for part in self.parts), self.encoding)


Operand = Value | torch.Tensor | Encoded | bool | int | float


@dataclass(frozen=True)
class Absent:
    """A result that a rule does not compute; an op that reads it is refused for `reason`."""

    reason: str
    fix: str = ""


def mil_shape(tensor: Any) -> Shape:
    """A torch tensor's shape as the program has it: rank 0 is `[1]`."""
    return tuple(int(n) for n in tensor.shape) or (1,)


def shape_of(x: Operand) -> Shape:
    """The MIL shape of an operand; Python numbers are `()`."""
    if isinstance(x, Encoded):
        return shape_of(x.parts[0])
    if isinstance(x, Value):
        return x.type.shape
    return mil_shape(x) if isinstance(x, torch.Tensor) else ()


def broadcast_shape(*shapes: Shape) -> Shape:
    """The common shape under NumPy's rule."""
    first = shapes[0]
    if all(shape == first for shape in shapes):
        return first
    return np.broadcast_shapes(*shapes)  # not torch's, which imports SymPy


def is_bool(x: Operand) -> bool:
    """True for a boolean value, tensor or Python bool."""
    if isinstance(x, Value):
        return x.type.dtype == "bool"
    return x.dtype == torch.bool if isinstance(x, torch.Tensor) else isinstance(x, bool)


def as_tensor(x: Operand) -> torch.Tensor:
    """A constant operand as a float64 (or bool) tensor.

    Raises: Refusal for integers in two numbers, which the op that asks has no rule for.
    """
    if isinstance(x, Encoded):
        raise Refusal(
            "needs integers up to 2048, which fp16 holds; these can be larger.",
            "Keep them below 2048: take the remainder or the difference earlier, or do this on the host.",
        )
    assert not isinstance(x, Value)
    tensor = torch.as_tensor(x)
    return tensor if tensor.dtype == torch.bool else tensor.to(torch.float64)


_NUMPY = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}

#: Elements from which on a constant filled with one number is built by `tile` instead of stored.
STORED_FILL_ELEMENTS = 16384


#: fp16's smallest number.
SMALLEST = 2.0**-24
#: Ops in which a constant below it is an epsilon: it stands for "not zero", so it must not become zero.
KEEPS_EPSILON = frozenset(("add", "sub", "maximum"))


def keep_epsilon(x: object) -> Any:
    """A constant operand with its numbers below half of SMALLEST, which fp16 rounds to zero, at +-SMALLEST.

    `x / (norm(x) + 1e-8)` is 0 for x = 0 in fp32 and stays so; with an epsilon of 0 it would be 0 / 0.
    """
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return math.copysign(SMALLEST, x) if 0 < abs(x) <= SMALLEST / 2 else x
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
        return x
    tiny = (x != 0) & (x.abs() <= SMALLEST / 2)
    return torch.where(tiny, torch.sign(x) * SMALLEST, x) if bool(tiny.any()) else x


def encode(array: np.ndarray, dtype: str) -> Literal:
    """A literal of `array`'s shape. Finite numbers beyond fp16 become +-65504, infinities stay."""
    if array.dtype == np.bool_:
        return Literal(TensorType("bool", array.shape), array.astype("?").tobytes())
    values = array.astype(np.float64)
    if dtype == "fp16":
        values = np.where(np.isfinite(values), np.clip(values, -MAX_FP16, MAX_FP16), values)
    data = values.astype(_NUMPY[dtype]).astype(np.dtype(_NUMPY[dtype]).newbyteorder("<")).tobytes()
    return Literal(TensorType(dtype, array.shape), data)


def of_number(value: float, dtype: str) -> Literal:
    """A rank-0 literal."""
    return encode(np.array(float(value)), dtype)


def of_tensor(tensor: torch.Tensor, dtype: str) -> Literal:
    """A literal of the tensor's shape; rank 0 becomes `[1]`."""
    array = tensor.detach().cpu()
    array = array.to(torch.bool) if array.dtype == torch.bool else array.to(torch.float64)
    return encode(array.numpy().reshape(tuple(array.shape) or (1,)), dtype)


def fill_value(tensor: torch.Tensor) -> float | None:
    """The number that fills a non-bool tensor, None when its elements differ."""
    if tensor.dtype == torch.bool or tensor.numel() == 0:
        return None
    flat = tensor.reshape(-1)
    first = flat[0]
    return float(first) if bool((flat == first).all()) else None
