"""The engine's half precision: decode, encode, rounding half away from zero, and aligned storage for its values.

A *decoded* array is a float32 array whose every value is what the engine sees for some fp16 bit
pattern. The engine has no inf and no NaN: exponent field 31 is an ordinary exponent, so the pattern of
inf (0x7C00) is 65536.0, the usual NaN (0x7E00) 98304.0 and 0x7FFF 131008.0 (measured on M4 and M6: M6
notes/numerics.md). Decoding maps the 65536 patterns one to one onto float32 values; -0.0 keeps its sign.

Arithmetic on decoded values is one float32 operation and one `round_half_away`. For `+`, `-` and `*`
this is the correctly rounded result: a product of two 11-bit significands is exact in float32, and a
float32 sum is inexact only where the smaller operand lies far below half a unit of the larger
(tests/ane/simulator/numbers/test_fp16.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ane_trainer.ane.mil.weights import Array

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]

INF = np.float32(65536.0)
"""Decoded value of the inf pattern, and the magnitude at which every rounded result saturates."""

LARGEST_FINITE = np.float32(65504.0)
SMALLEST_NORMAL = np.float32(2.0**-14)
SMALLEST_SUBNORMAL = np.float32(2.0**-24)

_DECODED_OF_PATTERN: F32


def decode(bits: ArrayLike) -> F32:
    """Return the values the engine sees for fp16 patterns (uint16 or float16, any shape) as float32."""
    array = np.asarray(bits)
    if array.dtype == np.float16:
        array = array.view(np.uint16)
    if array.dtype != np.uint16:
        raise TypeError(f"decode: needs uint16 patterns or float16; got {array.dtype}. Use round_half_away.")
    return np.asarray(_DECODED_OF_PATTERN[array])


def encode(decoded: ArrayLike) -> F16:
    """Return the float16 array with the bit patterns of a decoded float32 array (65536.0 -> the inf pattern).

    A value that no fp16 pattern decodes to is refused: round it first.
    """
    x = np.asarray(decoded, dtype=np.float32)
    bits = x.view(np.uint32)
    sign = (bits >> 16) & np.uint32(0x8000)
    magnitude = np.abs(x)
    subnormal = (np.fmin(magnitude, SMALLEST_NORMAL) * np.float32(2.0**24)).astype(np.uint32)
    rebias = np.uint32((127 - 15) << 10)
    normal = np.maximum((bits & np.uint32(0x7FFFFFFF)) >> 13, rebias) - rebias
    patterns = (sign | np.where(magnitude < SMALLEST_NORMAL, subnormal, normal)).astype(np.uint16)
    if not np.array_equal(_DECODED_OF_PATTERN[patterns], x):
        bad = x[_DECODED_OF_PATTERN[patterns] != x].flat[0]
        raise ValueError(f"encode: needs decoded fp16 values; got {bad!r}. Apply round_half_away first.")
    return np.asarray(patterns).view(np.float16)


def round_half_away(x: ArrayLike) -> F32:
    """Round float32 or float64 numbers to decoded fp16: 11 significant bits, ties away from zero.

    Below 2^-14 the result is a multiple of 2^-24; a magnitude of 65520 or more becomes 65536.0 (the inf
    pattern); the sign is kept, that of zero too. Any other dtype is taken as float64.
    Source: PE and MAC output rounding, M6 notes/numerics.md (2048 + 1 -> 2050, 2^-24 kept, 256 * 256 -> inf).
    """
    array = np.asarray(x)
    if array.dtype == np.float32:
        return _round_float32(array)
    return _round_float64(np.asarray(array, dtype=np.float64))


def to_11_bits(x: F32) -> F32:
    """Round float32 sums of decoded fp16 numbers half away from zero to 11 bits, with no limit to their size."""
    return np.asarray(((x.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32))


def _round_float32(x: F32) -> F32:
    bits = np.abs(x).view(np.uint32)
    kept = np.uint32(0xFFFFE000)
    rounded = np.minimum((bits + np.uint32(1 << 12)) & kept, np.uint32(0x47800000)).view(np.float32)
    small = bits < np.uint32(0x38800000)  # below 2^-14
    if small.any():
        rounded = np.where(small, _round_to_multiple(np.abs(x), np.float32(2.0**24)), rounded)
    return np.asarray(np.copysign(rounded, x), dtype=np.float32)


def _round_float64(x: NDArray[np.float64]) -> F32:
    bits = np.abs(x).view(np.uint64)
    kept = ~np.uint64((1 << 42) - 1)
    rounded = np.minimum((bits + np.uint64(1 << 41)) & kept, np.uint64(0x40F0000000000000)).view(np.float64)
    small = bits < np.uint64(0x3F10000000000000)
    if small.any():
        rounded = np.where(small, _round_to_multiple(np.abs(x), np.float64(2.0**24)), rounded)
    return np.asarray(np.copysign(rounded, x), dtype=np.float32)


def _round_to_multiple(magnitude: Array, scale: np.floating[Any]) -> Array:
    """Round magnitudes to multiples of 1/scale, ties up; exact because the fraction is separated first."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = magnitude * scale
        whole = np.floor(scaled)
        return np.asarray((whole + (scaled - whole >= 0.5)) / scale)


def _decoded_of_every_pattern() -> F32:
    pattern = np.arange(1 << 16, dtype=np.int64)
    field, fraction = (pattern >> 10) & 31, pattern & 1023
    significand = np.where(field == 0, fraction, fraction + 1024)
    magnitude = np.ldexp(significand.astype(np.float64), np.maximum(field, 1) - 25)
    values: F32 = np.where(pattern >> 15 == 1, -magnitude, magnitude).astype(np.float32)
    values.setflags(write=False)
    return values


_DECODED_OF_PATTERN = _decoded_of_every_pattern()


LINE_BYTES = 64


def empty(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    """An uninitialised array that starts on a cache line."""
    return _on_a_line(np.empty, shape, dtype)


def zeros(shape: tuple[int, ...], dtype: object = np.float32) -> Array:
    """An array of zeros that starts on a cache line."""
    return _on_a_line(np.zeros, shape, dtype)


def _on_a_line(make: Callable[..., Array], shape: tuple[int, ...], dtype: Any) -> Array:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = make(size + LINE_BYTES, np.uint8)
    first = -room.__array_interface__["data"][0] % LINE_BYTES
    array: Array = room[first : first + size].view(dtype).reshape(shape)
    return array
