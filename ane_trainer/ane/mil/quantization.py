"""Weights as symmetric integers with scales, one a channel or block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Kinds of integers and their largest magnitude.
LEVELS = {"int8": 127, "int4": 7}
#: Smaller weights (biases, scales) stay as they are.
MIN_ELEMENTS = 512
BLOCK = 32


def quantize(
    values: NDArray[np.float32], kind: str, contracted: tuple[int, ...]
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """(integers, scales): scales have the values' rank, extent 1 or number of blocks on contracted axes.

    What they stand for, integer times scale in float32, gives the same integers and scales again.
    """
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
