"""quantize, dequantize, and the int8 x int8 path of convolutions, linear and matmul (W8A8).

When both operands of a multiply-accumulate op are int8 behind a dequantization, the engine multiplies
integers: int32 accumulator, inf once a partial sum leaves it, scales applied at the end, no limit at 32768
(M6 notes/numerics.md H50, measured with quantize -> dequantize -> conv of a constexpr_blockwise_shift_scale
weight). Before A16 there is no such gain (M3 Pro: ANE-Training), so there the operands are decoded to fp16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.simulator.loops.convert import rounded
from ane_trainer.ane.simulator.memory.constants import constant
from ane_trainer.ane.simulator.memory.fp16 import INF, round_half_away
from ane_trainer.ane.simulator.registry import Context, kernel

Array = NDArray[Any]

INT32_LIMIT = 2**31


def _along(values: Array | None, call: Call, rank: int, absent: float) -> NDArray[np.float64]:
    """A scale or zero point as float64, shaped to broadcast along the call's axis."""
    if values is None:
        return np.asarray(absent, np.float64)
    wide = values.astype(np.float64)
    if not wide.ndim:
        return wide
    shape = [1] * rank
    shape[call.integer("axis")] = -1
    return wide.reshape(shape)


@kernel(
    "quantize",
    "exact",
    "cadamcat/llms-on-apple-neural-engine article 3: half away, all finite fp16 values on M5 Pro",
)
def quantize(ctx: Context, call: Call, x: Array) -> Array:
    """round(x / scale) + zero_point, half away from zero, clipped to int8 or uint8."""
    scale = _along(constant(call, "scale"), call, x.ndim, 1.0)
    ratio = x.astype(np.float64) / scale
    rounded = np.copysign(np.floor(np.abs(ratio) + 0.5), ratio) + _along(
        constant(call, "zero_point"), call, x.ndim, 0.0
    )
    low, high = (-128, 127) if call.text("output_dtype") == "int8" else (0, 255)
    return np.clip(rounded, low, high).astype(np.int8 if low else np.uint8)


@kernel("dequantize", "bounded", "ANEForge vocabulary sweep: relative error 2.7e-4 on M5", "one rounding")
def dequantize(ctx: Context, call: Call, x: Array) -> Array:
    """(x - zero_point) * scale."""
    zero = _along(constant(call, "zero_point"), call, x.ndim, 0.0)
    value = (x - zero) * _along(constant(call, "scale"), call, x.ndim, 1.0)
    return rounded(value) if call.op.infer(call)[0].dtype == "fp16" else value.astype(np.float32)


def integer_product(a: Array, b: Array, scale: NDArray[np.float64], bias: Array | None) -> Array:
    """`a` `[..., M, K]` @ `b` `[..., K, N]` of integers in int32, times scale, plus bias, rounded once to
    fp16.

        A partial sum (in ascending k) outside int32 is inf of its sign, for good.
    """
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)  # exact: sums stay far below 2^53
    total = wide_a @ wide_b
    bound = np.abs(wide_a) @ np.abs(wide_b)
    result = round_half_away(total * scale + (0.0 if bias is None else bias))
    if bound.size and bound.max() >= INT32_LIMIT:
        result = np.where(bound >= INT32_LIMIT, _in_order(wide_a, wide_b, result), result)
    return result


def _in_order(a: NDArray[np.float64], b: NDArray[np.float64], result: Array) -> Array:
    """`result` with inf where a partial sum overflows."""
    total = np.zeros(result.shape, np.float64)
    sign = np.zeros(result.shape, np.float64)
    for k in range(a.shape[-1]):
        total += a[..., :, k, None] * b[..., k, None, :]
        first = (sign == 0) & ((total >= INT32_LIMIT) | (total < -INT32_LIMIT))
        sign = np.where(first, np.sign(total), sign)
    return np.where(sign != 0, sign * float(INF), result).astype(np.float32)
