"""Normalisations, composed of reductions, tables and products as the engine's compiler composes them.

Every step rounds to fp16. Which steps there are is inferred: with these the error of a layer_norm of 4,096
numbers comes out as ANEForge published it for M1 and M5 Pro, within a few percent (docs/fidelity.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.opset import Call
from ane_trainer.ane.opset.shapes import axes
from ane_trainer.ane.simulator.constants import constant, half, per_channel
from ane_trainer.ane.simulator.fp16 import round_half_away
from ane_trainer.ane.simulator.registry import Context, kernel
from ane_trainer.ane.simulator.rounding import rounded, table_of

Array = NDArray[Any]

_SWEEP = "ANEForge vocabulary sweep (M5): relative error "
_COMPOSED = "; composed: mean, difference, mean of squares, rsqrt table, products"


def _mean(x: Array, over: tuple[int, ...]) -> Array:
    return rounded(np.asarray(np.mean(x, axis=over, dtype=np.float64, keepdims=True)))


def _normalized(x: Array, over: tuple[int, ...], epsilon: np.float32) -> Array:
    """(x - mean) * rsqrt(variance + epsilon) over the given axes; squares are summed unrounded."""
    centred = rounded(x - _mean(x, over))
    variance = _mean(np.square(centred), over)  # a square of fp16 is exact in fp32
    return rounded(centred * table_of("rsqrt", rounded(variance + epsilon)))


def _scaled(y: Array, gamma: Array | None, beta: Array | None) -> Array:
    y = y if gamma is None else rounded(y * gamma)
    return y if beta is None else rounded(y + beta)


@kernel("layer_norm", "assumed", _SWEEP + "0.00039" + _COMPOSED)
def layer_norm(ctx: Context, call: Call, x: Array) -> Array:
    """Over `axes`; gamma and beta have the extents of those axes."""
    over = axes(call, "axes", x.ndim)
    shape = tuple(n if i in over else 1 for i, n in enumerate(x.shape))
    gamma, beta = (
        None if (v := constant(call, n)) is None else round_half_away(v).reshape(shape)
        for n in ("gamma", "beta")
    )
    return _scaled(_normalized(x, over, half(call, "epsilon")), gamma, beta)


@kernel("instance_norm", "assumed", _SWEEP + "0.00076" + _COMPOSED)
def instance_norm(ctx: Context, call: Call, x: Array) -> Array:
    """Over the spatial axes of x `[N, C, *spatial]`; gamma and beta `[C]`."""
    y = _normalized(x, tuple(range(2, x.ndim)), half(call, "epsilon"))
    return _scaled(y, per_channel(call, "gamma", x.ndim), per_channel(call, "beta", x.ndim))


@kernel(
    "batch_norm", "assumed", _SWEEP + "0.00037; folded at compile time to one scale and one offset a channel"
)
def batch_norm(ctx: Context, call: Call, x: Array) -> Array:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta as scale * x + offset, both fp16, one rounding."""
    mean, variance = (np.asarray(constant(call, n), np.float64) for n in ("mean", "variance"))
    gamma, beta = constant(call, "gamma"), constant(call, "beta")
    scale = (1.0 if gamma is None else gamma) / np.sqrt(variance + call.number("epsilon"))
    offset = (0.0 if beta is None else beta) - mean * scale
    shape = (-1, *(1,) * (x.ndim - 2))
    scale, offset = (round_half_away(v).astype(np.float64).reshape(shape) for v in (scale, offset))
    return rounded(x * scale + offset)


@kernel(
    "l2_norm",
    "assumed",
    "ANEForge vocabulary sweep: runs on M5, values not checked; sum of squares, rsqrt table, product",
)
def l2_norm(ctx: Context, call: Call, x: Array) -> Array:
    """x / sqrt(sum of squares + epsilon) over the last three axes."""
    total = np.sum(x.astype(np.float64) ** 2, axis=(-3, -2, -1), keepdims=True)
    root = table_of("rsqrt", rounded(rounded(total) + half(call, "epsilon")))
    return rounded(x * root)


@kernel("local_response_norm", "assumed", _SWEEP + "0.00014; log2 and exp2 tables for the power")
def local_response_norm(ctx: Context, call: Call, x: Array) -> Array:
    """x / (k + alpha / size * sum of squares over `size` channels around)^beta."""
    size, channels = call.integer("size"), x.shape[1]
    squares = np.pad(
        x.astype(np.float64) ** 2, ((0, 0), (size // 2, size - 1 - size // 2), *((0, 0),) * (x.ndim - 2))
    )
    total = np.sum([squares[:, i : i + channels] for i in range(size)], axis=0)
    base = rounded(half(call, "k") + rounded(call.number("alpha") / size * total))
    power = table_of("exp2", rounded(-half(call, "beta") * table_of("log2", base)))
    return rounded(x * power)
