"""Batch, layer and group normalisation with their gradients.

Written on the normalised input xhat = (x - mean) rstd, and with means instead of sums inside, so that every
intermediate has the size of its operands and large batches do not leave fp16's range:

    dx = w rstd (g - mean(g) - xhat mean(g xhat)),   dw = sum(g xhat),   db = sum(g)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, Shape, mil_shape, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules.reduction import moments

_Optional = Operand | None


def _rstd(ctx: Context, variance: Operand, eps: float) -> Operand:
    return ctx.unary("rsqrt", ctx.add(variance, eps), epsilon=ctx.scalar(0.0))


def _affine(ctx: Context, y: Operand, weight: _Optional, bias: _Optional, shape: Shape) -> Operand:
    """`y * weight + bias`, both reshaped to broadcast against y."""
    y = y if weight is None else ctx.mul(y, ctx.reshape(weight, shape))
    return y if bias is None else ctx.add(y, ctx.reshape(bias, shape))


def _input_gradient(ctx: Context, g: Operand, xhat: Operand, rstd: Operand, axes: Sequence[int]) -> Operand:
    """`rstd * (g - mean(g) - xhat * mean(g * xhat))`; g already carries the weight."""
    centred = ctx.sub(g, ctx.mean(g, axes, keep=True))
    along = ctx.mul(xhat, ctx.mean(ctx.mul(g, xhat), axes, keep=True))
    return ctx.mul(ctx.sub(centred, along), rstd)


def _channel(rank: int, channels: int) -> Shape:
    return tuple(channels if i == 1 else 1 for i in range(rank))


def _batch_axes(x: Operand) -> list[int]:
    return [i for i in range(len(shape_of(x))) if i != 1]


def _batch_norm(
    ctx: Context, x: Operand, weight: _Optional, bias: _Optional, mean: Operand, rstd: Operand
) -> Operand:
    shape = _channel(len(shape_of(x)), shape_of(x)[1])
    xhat = ctx.mul(ctx.sub(x, ctx.reshape(mean, shape)), ctx.reshape(rstd, shape))
    return _affine(ctx, xhat, weight, bias, shape)


def _batch_statistics(ctx: Context, x: Operand, eps: float) -> tuple[Operand, Operand, Operand]:
    """Mean, variance and 1 / standard deviation per channel, each `[C]`."""
    variance, mean = moments(ctx, x, _batch_axes(x), 0.0)
    channels = (shape_of(x)[1],)
    variance, mean = ctx.reshape(variance, channels), ctx.reshape(mean, channels)
    return mean, variance, _rstd(ctx, variance, eps)


@lowering(
    "_native_batch_norm_legit_functional.default native_batch_norm.default _native_batch_norm_legit.default"
)
def batch_norm(
    ctx: Context,
    x: Operand,
    weight: _Optional,
    bias: _Optional,
    running_mean: _Optional,
    running_var: _Optional,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Operand | None, ...]:
    """`batch_norm(x) -> mul(sub(x, reduce_mean(x)), rsqrt(add(var, eps)))`, weight, bias, and in training

    `running' = add(running, mul(sub(batch, running), momentum))`, the variance with n / (n - 1)
    """
    functional = len(ctx.meta) == 5
    if not training:
        assert running_mean is not None
        assert running_var is not None
        y = _batch_norm(ctx, x, weight, bias, running_mean, _rstd(ctx, running_var, eps))
        return (y, None, None, *((running_mean, running_var) if functional else ()))
    mean, variance, rstd = _batch_statistics(ctx, x, eps)
    y = _batch_norm(ctx, x, weight, bias, mean, rstd)
    if not functional:
        return y, mean, rstd
    assert running_mean is not None
    assert running_var is not None
    n = math.prod(shape_of(x)) // shape_of(x)[1]
    unbiased = ctx.mul(variance, n / max(n - 1, 1))
    moved = [
        ctx.add(old, ctx.mul(ctx.sub(new, old), momentum))
        for old, new in ((running_mean, mean), (running_var, unbiased))
    ]
    return y, mean, rstd, *moved


@lowering("_native_batch_norm_legit_no_training.default")
def batch_norm_eval(
    ctx: Context, x: Operand, weight: _Optional, bias: _Optional, running_mean: Operand, running_var: Operand,
    momentum: float, eps: float,
) -> tuple[Operand | None, ...]:  # fmt: skip
    """`batch_norm(x) -> mul(sub(x, running_mean), rsqrt(add(running_var, eps)))`, weight, bias"""
    return _batch_norm(ctx, x, weight, bias, running_mean, _rstd(ctx, running_var, eps)), None, None


@lowering("native_batch_norm_backward.default")
def batch_norm_backward(
    ctx: Context, g: Operand, x: Operand, weight: _Optional, running_mean: _Optional, running_var: _Optional,
    save_mean: _Optional, save_rstd: _Optional, train: bool, eps: float, output_mask: Sequence[bool],
) -> tuple[Operand | None, ...]:  # fmt: skip
    """`native_batch_norm_backward(g, x) -> ` the formulas of this file's head, over all axes but the
    channel's
    """
    axes, shape = _batch_axes(x), _channel(len(shape_of(x)), shape_of(x)[1])
    if train:
        assert save_mean is not None
        assert save_rstd is not None
        mean, rstd = save_mean, save_rstd
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, rstd = running_mean, _rstd(ctx, running_var, eps)
    rstd = ctx.reshape(rstd, shape)
    xhat = ctx.mul(ctx.sub(x, ctx.reshape(mean, shape)), rstd)
    weighted = g if weight is None else ctx.mul(g, ctx.reshape(weight, shape))
    dx = None
    if output_mask[0]:
        dx = _input_gradient(ctx, weighted, xhat, rstd, axes) if train else ctx.mul(weighted, rstd)
    dw = ctx.sum(ctx.mul(g, xhat), axes) if output_mask[1] else None
    return dx, dw, ctx.sum(g, axes) if output_mask[2] else None


@lowering("native_layer_norm.default")
def layer_norm(
    ctx: Context, x: Operand, normalized: Sequence[int], weight: _Optional, bias: _Optional, eps: float
) -> tuple[Operand, Operand, Operand]:
    """`native_layer_norm(x) -> mul(sub(x, reduce_mean(x)), rsqrt(add(var, eps)))`, weight, bias;
    mean; rstd
    """
    axes = list(range(-len(normalized), 0))
    variance, mean = moments(ctx, x, axes, 0.0)
    rstd = _rstd(ctx, variance, eps)
    xhat = ctx.mul(ctx.sub(x, mean), rstd)
    return _affine(ctx, xhat, weight, bias, tuple(normalized)), mean, rstd


@lowering("native_layer_norm_backward.default")
def layer_norm_backward(
    ctx: Context,
    g: Operand,
    x: Operand,
    normalized: Sequence[int],
    mean: Operand,
    rstd: Operand,
    weight: _Optional,
    bias: _Optional,
    output_mask: Sequence[bool],
) -> tuple[Operand | None, ...]:
    """`native_layer_norm_backward(g, x) -> ` the formulas of this file's head, over the normalised axes"""
    inner = len(normalized)
    outer = list(range(len(shape_of(x)) - inner))
    xhat = ctx.mul(ctx.sub(x, mean), rstd)
    weighted = g if weight is None else ctx.mul(g, weight)
    dx = _input_gradient(ctx, weighted, xhat, rstd, list(range(-inner, 0))) if output_mask[0] else None
    product = ctx.mul(g, xhat)
    dw = (ctx.sum(product, outer) if outer else product) if output_mask[1] else None
    return dx, dw, (ctx.sum(g, outer) if outer else g) if output_mask[2] else None


@lowering("native_group_norm.default")
def group_norm(
    ctx: Context,
    x: Operand,
    weight: _Optional,
    bias: _Optional,
    n: int,
    channels: int,
    extent: int,
    groups: int,
    eps: float,
) -> tuple[Operand, Operand, Operand]:
    """`native_group_norm(x) -> ` on `reshape(x, [N, G, C/G * S])`, rank 3; weight and bias per channel"""
    flat = ctx.reshape(x, (n, groups, channels // groups * extent))
    variance, mean = moments(ctx, flat, [2], 0.0)
    rstd = _rstd(ctx, variance, eps)
    xhat = ctx.reshape(ctx.mul(ctx.sub(flat, mean), rstd), shape_of(x))
    y = _affine(ctx, xhat, weight, bias, _channel(len(shape_of(x)), channels))
    return y, ctx.reshape(mean, mil_shape(ctx.meta[1])), ctx.reshape(rstd, mil_shape(ctx.meta[2]))


@lowering("native_group_norm_backward.default")
def group_norm_backward(
    ctx: Context,
    g: Operand,
    x: Operand,
    mean: Operand,
    rstd: Operand,
    weight: _Optional,
    n: int,
    channels: int,
    extent: int,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Operand | None, ...]:
    """`native_group_norm_backward(g, x) -> ` the formulas of this file's head on `[N, G, C/G * S]`"""
    flat = (n, groups, channels // groups * extent)
    per_group = (n, groups, 1)
    rstd = ctx.reshape(rstd, per_group)
    xhat = ctx.mul(ctx.sub(ctx.reshape(x, flat), ctx.reshape(mean, per_group)), rstd)
    shape = _channel(len(shape_of(x)), channels)
    weighted = ctx.reshape(g if weight is None else ctx.mul(g, ctx.reshape(weight, shape)), flat)
    dx = ctx.reshape(_input_gradient(ctx, weighted, xhat, rstd, [2]), shape_of(x)) if output_mask[0] else None
    product, axes = ctx.mul(g, ctx.reshape(xhat, shape_of(x))), _batch_axes(x)
    dw = ctx.sum(product, axes) if output_mask[1] else None
    return dx, dw, ctx.sum(g, axes) if output_mask[2] else None
