"""Two results bit for bit: how many differ, by how much, and the first of them."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.weights import Array

#: Differing values that a report shows of one output.
SHOWN = 3

_WORDS = {np.dtype(np.float16): np.int16, np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}


def difference(got: Array, want: Array) -> dict[str, object] | None:
    """None if every bit agrees, else count, largest distance in units in the last place, and examples.

    An example is [flat index, got, wanted], the bit patterns in hexadecimal. `got` is the fingerprint of
    the whole output, so that two reports can be told to agree with each other.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return {"shape": [list(got.shape), list(want.shape)], "dtype": [str(got.dtype), str(want.dtype)]}
    words = _WORDS[got.dtype]
    a, b = (np.ascontiguousarray(x).reshape(-1).view(words) for x in (got, want))
    (places,) = np.nonzero(a != b)
    if not places.size:
        return None
    ulps = np.abs(_ordered(a[places]) - _ordered(b[places]))
    digits = 2 * a.itemsize
    mask = 2 ** (4 * digits) - 1
    examples = [
        [int(i), f"{int(a[i]) & mask:0{digits}x}", f"{int(b[i]) & mask:0{digits}x}"] for i in places[:SHOWN]
    ]
    return {
        "count": int(places.size),
        "of": int(a.size),
        "max_ulp": int(ulps.max()),
        "got": hashlib.sha256(a.tobytes()).hexdigest()[:12],
        "first": examples,
    }


def _ordered(words: Array) -> NDArray[np.int64]:
    """Bit patterns as integers in the order of the numbers, with both zeros at 0."""
    wide = words.astype(np.int64)
    lowest = -(2 ** (8 * words.itemsize - 1))
    return np.where(wide < 0, lowest - wide, wide)
