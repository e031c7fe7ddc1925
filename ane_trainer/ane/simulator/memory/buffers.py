"""Memory for values, aligned to cache lines: vectors then never straddle two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

LINE_BYTES = 64


def empty(shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
    """An uninitialised array that starts on a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + LINE_BYTES, np.uint8)
    first = -room.__array_interface__["data"][0] % LINE_BYTES
    array: NDArray[Any] = room[first : first + size].view(dtype).reshape(shape)
    return array


def zeros(shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
    """An array of zeros that starts on a cache line."""
    array = empty(shape, dtype)
    array[...] = 0
    return array
