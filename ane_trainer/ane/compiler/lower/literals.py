"""Torch constants and Python numbers as MIL literals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ane_trainer.ane.mil.program import MAX_FP16, Literal, TensorType

_NUMPY = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}

#: Elements from which on a constant filled with one number is built by `tile` instead of stored.
STORED_FILL_ELEMENTS = 16384


#: fp16's smallest number.
SMALLEST = 2.0**-24
#: Ops in which a constant below it is an epsilon: it stands for "not zero", so it must not become zero.
KEEPS_EPSILON = frozenset(("add", "sub", "maximum"))


def keep_epsilon(x: Any) -> Any:
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
