"""Codes of integers above 2048, which fp16 does not hold: numbers of their own that only look-ups and equality read.

A batch port of integers that is only moved, compared for equality and used to look rows up needs no
arithmetic, so each integer may be any number of its own. Integers above 2048 become the fp16 numbers from
2^-4 to 1024 that are no integers, in ascending order: 13313 of them. Neighbours are at least 2^-14 apart, a
normal number, so that comparing by subtraction tells them apart, too.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

#: Integers that fp16 holds without gaps.
EXACT_INTEGERS = 2048

_MOVES = (
    "view _unsafe_view reshape _reshape_alias unsqueeze squeeze permute transpose t expand select slice split "
    "split_with_sizes unbind cat stack constant_pad_nd clone alias detach lift_fresh_copy repeat flip roll "
    "select_scatter slice_scatter getitem"
)
#: Nodes that give the integers on as they are.
MOVES = frozenset(_MOVES.split())


@functools.cache
def _codes() -> NDArray[np.float64]:
    """Code of every integer from 0; its length is the number of integers that have one."""
    bits = np.arange(0x2C00, 0x6400, dtype=np.uint16)
    numbers = bits.view(np.float16).astype(np.float64)
    extra = numbers[numbers != np.floor(numbers)]
    return np.concatenate([np.arange(EXACT_INTEGERS + 1, dtype=np.float64), extra])


def most_rows(dtype: str) -> int:
    """The longest table that integers of a batch port may look up, in a program of this float type."""
    return len(_codes()) if dtype == "fp16" else 2**24


def coded(numbers: torch.Tensor) -> torch.Tensor:
    """The integers (from 0 up to `most_rows`, or negative down to -2048) as a fp16 program sees them."""
    values = numbers.detach().to("cpu", torch.float64).numpy().copy()
    large = values > EXACT_INTEGERS
    values[large] = _codes()[values[large].astype(np.int64)]
    return torch.from_numpy(values)
