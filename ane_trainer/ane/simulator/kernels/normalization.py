"""Normalisations, composed of reductions, tables and products as the engine's compiler composes them.

Every step rounds to fp16. Which steps there are is inferred: with these the error of a layer_norm of 4,096
numbers comes out as ANEForge published it for M1 and M5 Pro, within a few percent (docs/fidelity.md).
"""

from __future__ import annotations

import numpy as np

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.shapes import axes
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.arrays import channel_line, constant, half, per_channel
from ane_trainer.ane.simulator.loops.compiled import Pass, Step, chain, extreme_for, total_for
from ane_trainer.ane.simulator.loops.convert import rounded, table_of
from ane_trainer.ane.simulator.numbers.fp16 import round_half_away
from ane_trainer.ane.simulator.registry import EngineContext, kernel, writes

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


def _normalize_into(
    ctx: EngineContext,
    x: Array,
    over: tuple[int, ...],
    call: Call,
    gamma: Array | None,
    beta: Array | None,
    out: Array,
) -> Step:
    """`_scaled(_normalized(x))` in five loops: sum; mean; squares of differences; factor; products."""
    total, mean, factor = total_for(ctx, x, over), extreme_for(x, over), extreme_for(x, over)
    count = x.size / total.size
    summed, averaged, squared, rooted, last = (Pass(ctx) for _ in range(5))
    difference = squared.add("sub", squared.load(x), squared.load(mean))
    variance = rooted.add("add", rooted.total(total, count), rooted.number(half(call, "epsilon")))
    lines = [None if v is None else last.load(v) for v in (gamma, beta)]
    scaled = _scaling_at_once if ctx.fast else _scaling
    y = scaled(last, last.load(x), last.load(mean), last.load(factor), *lines)
    return chain(
        summed.fold("sum", summed.load(x), total),
        averaged.store(averaged.total(total, count), mean),
        squared.fold("sum_square", difference, total),
        rooted.store(rooted.lookup(variance, "rsqrt"), factor),
        last.store(y, out),
    )


def _scaling(work: Pass, x: int, mean: int, factor: int, gamma: int | None, beta: int | None) -> int:
    """(x - mean) * factor * gamma + beta, every step rounded."""
    y = work.add("mul", work.add("sub", x, mean), factor)
    y = y if gamma is None else work.add("mul", y, gamma)
    return y if beta is None else work.add("add", y, beta)


def _scaling_at_once(work: Pass, x: int, mean: int, factor: int, gamma: int | None, beta: int | None) -> int:
    """The same in float32, rounded once."""
    y = work.add("fma", x, mean, work.number(-1))
    scale = factor if gamma is None else work.add("product", factor, gamma)
    return work.add(
        "round", work.add("product", y, scale) if beta is None else work.add("fma", beta, y, scale)
    )


def _layer_parameters(
    call: Call, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Array | None, Array | None]:
    """The axes of a layer_norm, gamma and beta shaped to broadcast."""
    over = axes(call, "axes", len(shape))
    extents = tuple(n if i in over else 1 for i, n in enumerate(shape))
    gamma, beta = (
        None if (v := constant(call, n)) is None else round_half_away(v).reshape(extents)
        for n in ("gamma", "beta")
    )
    return over, gamma, beta


@kernel("layer_norm", "assumed", _SWEEP + "0.00039" + _COMPOSED)
def layer_norm(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Over `axes`; gamma and beta have the extents of those axes."""
    over, gamma, beta = _layer_parameters(call, x.shape)
    return _scaled(_normalized(x, over, half(call, "epsilon")), gamma, beta)


@writes("layer_norm")
def layer_norm_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `layer_norm`."""
    over, gamma, beta = _layer_parameters(call, x.shape)
    return _normalize_into(ctx, x, over, call, gamma, beta, outputs[0])


@kernel("instance_norm", "assumed", _SWEEP + "0.00076" + _COMPOSED)
def instance_norm(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Over the spatial axes of x `[N, C, *spatial]`; gamma and beta `[C]`."""
    y = _normalized(x, tuple(range(2, x.ndim)), half(call, "epsilon"))
    return _scaled(y, per_channel(call, "gamma", x.ndim), per_channel(call, "beta", x.ndim))


@writes("instance_norm")
def instance_norm_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `instance_norm`."""
    gamma, beta = per_channel(call, "gamma", x.ndim), per_channel(call, "beta", x.ndim)
    gamma, beta = (None if v is None else v[None] for v in (gamma, beta))
    return _normalize_into(ctx, x, tuple(range(2, x.ndim)), call, gamma, beta, outputs[0])


@kernel(
    "batch_norm", "assumed", _SWEEP + "0.00037; folded at compile time to one scale and one offset a channel"
)
def batch_norm(ctx: EngineContext, call: Call, x: Array) -> Array:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta as scale * x + offset, both fp16, one rounding."""
    scale, offset = (v.astype(np.float64) for v in channel_line(call))
    return rounded(x * scale + offset)


@kernel(
    "l2_norm",
    "assumed",
    "ANEForge vocabulary sweep: runs on M5, values not checked; sum of squares, rsqrt table, product",
)
def l2_norm(ctx: EngineContext, call: Call, x: Array) -> Array:
    """x / sqrt(sum of squares + epsilon) over the last three axes."""
    total = np.sum(x.astype(np.float64) ** 2, axis=(-3, -2, -1), keepdims=True)
    root = table_of("rsqrt", rounded(rounded(total) + half(call, "epsilon")))
    return rounded(x * root)


@writes("l2_norm")
def l2_norm_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `l2_norm`."""
    over = range(x.ndim - 3, x.ndim)
    total, root = total_for(ctx, x, over), extreme_for(x, over)
    squared, rooted, last = Pass(ctx), Pass(ctx), Pass(ctx)
    length = rooted.add("add", rooted.total(total), rooted.number(half(call, "epsilon")))
    return chain(
        squared.fold("sum_square", squared.load(x), total),
        rooted.store(rooted.lookup(length, "rsqrt"), root),
        last.store(last.add("mul", last.load(x), last.load(root)), outputs[0]),
    )


@kernel("local_response_norm", "assumed", _SWEEP + "0.00014; log2 and exp2 tables for the power")
def local_response_norm(ctx: EngineContext, call: Call, x: Array) -> Array:
    """x / (k + alpha / size * sum of squares over `size` channels around)^beta."""
    size, channels = call.integer("size"), x.shape[1]
    squares = np.pad(
        x.astype(np.float64) ** 2, ((0, 0), (size // 2, size - 1 - size // 2), *((0, 0),) * (x.ndim - 2))
    )
    total = np.sum([squares[:, i : i + channels] for i in range(size)], axis=0)
    base = rounded(half(call, "k") + rounded(call.number("alpha") / size * total))
    power = table_of("exp2", rounded(-half(call, "beta") * table_of("log2", base)))
    return rounded(x * power)
