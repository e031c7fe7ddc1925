"""The multiply-accumulate law spelled out in int64 NumPy, slow and plain: the oracle for `mac`.

Shares nothing with the compiled kernel but the law in the docstring of `mac`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def mac_matmul_reference(a: F32, b: F32, bias: F32 | None = None) -> F32:
    """`a` [M, K] @ `b` [K, N] + `bias` (broadcast to [M, N]) on decoded fp16, one k after the other."""
    shape = (a.shape[0], b.shape[1])
    a_significand, a_exponent = significand_and_exponent(a)
    b_significand, b_exponent = significand_and_exponent(b)
    start = np.zeros(shape, np.float32) if bias is None else np.broadcast_to(bias, shape)
    significand, exponent = significand_and_exponent(start)
    accumulator = _units(significand, exponent - 10)
    frozen = np.abs(accumulator) >= 2**31
    for k in range(a.shape[1]):
        exponents = a_exponent[:, k, None] + b_exponent[k]
        product = _units(a_significand[:, k, None] * b_significand[k], exponents - 20)
        product = np.where(exponents <= -17, 0, product)
        accumulator = np.where(frozen, accumulator, accumulator + product)
        frozen |= np.abs(accumulator) >= 2**31
    return np.where(frozen, np.sign(accumulator) * 65536.0, mac_output(accumulator)).astype(np.float32)


def significand_and_exponent(x: F32) -> tuple[I64, I64]:
    """Decoded fp16 as an integer of 11 bits times 2^(exponent - 10); subnormals have exponent -14."""
    exponent = np.maximum(np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1, -14)
    exponent = np.where(x == 0, -14, exponent)
    scaled = np.ldexp(x.astype(np.float64), (10 - exponent).astype(np.int32))
    return scaled.astype(np.int64), exponent


def _units(integer: I64, exponent: I64) -> I64:
    """integer * 2^exponent in units of 2^-16, half away from zero."""
    shift = exponent + 16
    left = np.abs(integer) << np.maximum(shift, 0)
    right = np.minimum(np.maximum(-shift, 0), 60)
    half = np.where(right > 0, np.int64(1) << np.maximum(right - 1, 0), 0)
    return np.sign(integer) * np.where(shift >= 0, left, (left + half) >> right)


def mac_output(accumulator: I64) -> NDArray[np.float64]:
    """Accumulators (units of 2^-16, below 2^31) rounded half away from zero to 11 bits; never -0."""
    size = np.abs(accumulator)
    length = np.frexp(size.astype(np.float64))[1].astype(np.int64)
    shift = np.maximum(length - 11, 0)
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)
    rounded = ((size + half) >> shift) << shift
    return np.asarray(np.sign(accumulator) * rounded * 2.0**-16)
