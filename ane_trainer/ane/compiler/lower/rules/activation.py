"""Activation functions and their gradients."""

from __future__ import annotations

import math

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand
from ane_trainer.ane.compiler.lower.registry import lowering

#: From here on softplus is the identity in fp16: log(1 + exp(-12)) is below half an ulp of 12.
_SOFTPLUS_LINEAR = 12.0
#: Below, the engine's table of softplus is coarse.
_TABLE_END = -3.0


@lowering("threshold_backward.default")
def threshold_backward(ctx: Context, g: Operand, x: Operand, threshold: float) -> Operand:
    """`threshold_backward(g, x, t) -> select(greater(x, t), g, 0)`"""
    return ctx.where(ctx.binary("greater", x, threshold), g, 0.0)


@lowering("gelu.default")
def gelu(ctx: Context, x: Operand, *, approximate: str = "none") -> Operand:
    """`gelu(x) -> mul(x, add(mul(erf(x/sqrt 2), 0.5), 0.5))`; "tanh": tanh(k (x + 0.044715 x^3)) for erf

    MIL's own gelu is a table of the engine whose error near 0 is a fifteenth of the value (8 % at 0.05), and
    its backward needs the erf anyway: here |x| < 1 keeps 0.2 % and no error is above 0.0011.
    """
    return ctx.mul(x, ctx.add(ctx.mul(_gelu_wave(ctx, x, approximate), 0.5), 0.5))


def _gelu_wave(ctx: Context, x: Operand, approximate: str) -> Operand:
    """erf(x/sqrt 2), or the tanh that is near it."""
    if approximate == "none":
        return ctx.unary("erf", ctx.mul(x, math.sqrt(0.5)))
    k = math.sqrt(2.0 / math.pi)
    return ctx.unary("tanh", ctx.mul(x, ctx.add(ctx.mul(ctx.square(x), k * 0.044715), k)))


@lowering("gelu_backward.default")
def gelu_backward(ctx: Context, g: Operand, x: Operand, *, approximate: str = "none") -> Operand:
    """`gelu_backward(g, x) -> g * (cdf + x * pdf)`, cdf = (1 + erf(x/sqrt 2))/2, pdf = exp(-x x/2)/sqrt(2
    pi);

    for "tanh": cdf = (1 + t)/2, t = tanh(k (x + 0.044715 x^3)), pdf = (1 - t t) k (1 + 3 * 0.044715 x x)/2
    """
    square = ctx.square(x)
    wave = _gelu_wave(ctx, x, approximate)
    if approximate == "none":
        density = ctx.mul(ctx.unary("exp", ctx.mul(square, -0.5)), 1.0 / math.sqrt(2.0 * math.pi))
    else:
        k = math.sqrt(2.0 / math.pi)
        slope = ctx.add(ctx.mul(square, 1.5 * k * 0.044715), 0.5 * k)
        density = ctx.mul(ctx.sub(1.0, ctx.square(wave)), slope)
    cumulative = ctx.add(ctx.mul(wave, 0.5), 0.5)
    return ctx.mul(g, ctx.add(cumulative, ctx.mul(x, density)))


@lowering("silu.default")
def silu(ctx: Context, x: Operand) -> Operand:
    """`silu(x) -> mul(x, sigmoid(x))`

    The engine's silu table is 10 % off at 0.05 and has the wrong sign at 0.001; the sigmoid keeps a thousandth,
    and the backward needs it anyway.
    """
    return ctx.mul(x, ctx.unary("sigmoid", x))


@lowering("leaky_relu.default")
def leaky_relu(ctx: Context, x: Operand, negative_slope: float = 0.01) -> Operand:
    """`leaky_relu(x, a) -> leaky_relu(x, alpha=a)`"""
    return ctx.unary("leaky_relu", x, alpha=ctx.scalar(negative_slope))


@lowering("elu.default")
def elu(
    ctx: Context, x: Operand, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Operand:
    """`elu(x, a) -> elu(x, alpha=a)`, times scale; with an input scale `-> select(x > 0, x, a (exp(c x) -
    1))`
    """
    if input_scale == 1:
        y = ctx.unary("elu", x, alpha=ctx.scalar(alpha))
        return y if scale == 1 else ctx.mul(y, scale)
    # the negative side is fed min(x, 0), so that exp cannot overflow where it is not selected
    low = ctx.unary("exp", ctx.mul(ctx.binary("minimum", x, 0.0), input_scale))
    return ctx.where(
        ctx.binary("greater", x, 0.0), ctx.mul(x, scale), ctx.mul(ctx.sub(low, 1.0), alpha * scale)
    )


@lowering("hardtanh.default")
def hardtanh(ctx: Context, x: Operand, low: float = -1.0, high: float = 1.0) -> Operand:
    """`hardtanh(x, lo, hi) -> minimum(maximum(x, lo), hi)`"""
    return ctx.binary("minimum", ctx.binary("maximum", x, low), high)


@lowering("softplus.default")
def softplus(ctx: Context, x: Operand, beta: float = 1, threshold: float = 20) -> Operand:
    """`softplus(x) -> add(relu(x), t)`, scaled by beta; a = mul(abs(x), -1), e = exp(a),
    t = select(less(a, -3), mul(e, sub(1, mul(e, 0.5))), softplus(a))

    The engine's table is 11 to 23 % off at -6 and -7 and 0 from -8 on, where deviations written as a softplus are; the
    first two terms of log(1 + e) are 8e-4 off at -3. torch's switch to the identity above `threshold` is written out
    only where it shows in fp16.
    The native op returns 0 for x >= 11.09 (exp overflows first, ANEForge on M5), so it sees only x <= 0.
    """
    scaled = x if beta == 1 else ctx.mul(x, beta)
    below = ctx.mul(ctx.unary("abs", scaled), -1.0)
    tail: Operand = ctx.unary("softplus", below)
    if ctx.dtype == "fp16":
        power = ctx.unary("exp", below)
        series = ctx.mul(power, ctx.sub(1.0, ctx.mul(power, 0.5)))
        tail = ctx.where(ctx.binary("less", below, _TABLE_END), series, tail)
    y = ctx.add(ctx.unary("relu", scaled), tail)
    y = y if beta == 1 else ctx.div(y, beta)
    if threshold >= _SOFTPLUS_LINEAR:
        return y
    return ctx.where(ctx.binary("greater", scaled, threshold), x, y)


@lowering("_softmax.default")
def softmax(ctx: Context, x: Operand, dim: int, half_to_float: bool) -> Operand:
    """`_softmax(x, d) -> softmax(x, axis=d)`"""
    return ctx.unary("softmax", x, axis=dim % len(ctx.shape))


@lowering("_log_softmax.default")
def log_softmax(ctx: Context, x: Operand, dim: int, half_to_float: bool) -> Operand:
    """`_log_softmax(x, d) -> sub(z, log(reduce_sum(exp(z), axes=d)))`, z = sub(x, reduce_max(x, axes=d))"""
    z = ctx.sub(x, ctx.reduce("max", x, [dim], keep=True))
    total = ctx.sum(ctx.unary("exp", z), [dim], keep=True)
    return ctx.sub(z, ctx.unary("log", total, epsilon=ctx.scalar(0.0)))


@lowering("_log_softmax_backward_data.default")
def log_softmax_backward(ctx: Context, g: Operand, y: Operand, dim: int, input_dtype: object) -> Operand:
    """`_log_softmax_backward_data(g, y, d) -> sub(g, mul(softmax(x, d), reduce_sum(g, axes=d)))`

    x is the input of the forward `_log_softmax` where that is at hand, so the gradient does not see the
    log table's error (up to 6.6e-3, M6 numerics); otherwise softmax(y), which is the same function.
    """
    source = ctx.node.args[1] if ctx.node is not None else None
    if getattr(source, "target", None) is not None and str(source.target) == "aten._log_softmax.default":  # type: ignore[union-attr]
        y = ctx.operands[source.args[0]]  # type: ignore[union-attr, index]
    axis = dim % len(ctx.shape)
    return ctx.sub(g, ctx.mul(ctx.unary("softmax", y, axis=axis), ctx.sum(g, [dim], keep=True)))


@lowering("hardshrink_backward.default softshrink_backward.default")
def shrink_backward(ctx: Context, g: Operand, x: Operand, lambd: float) -> Operand:
    """`hardshrink_backward(g, x, l) -> select(greater(abs(x), l), g, 0)`"""
    return ctx.where(ctx.binary("greater", ctx.unary("abs", x), lambd), g, 0.0)
