"""Activation functions and their gradients."""

from __future__ import annotations

import math

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering

#: From here on softplus is the identity in fp16: log(1 + exp(-12)) is below half an ulp of 12.
_SOFTPLUS_LINEAR = 12.0


@lowering("threshold_backward.default")
def threshold_backward(ctx: Context, g: Operand, x: Operand, threshold: float) -> Operand:
    """`threshold_backward(g, x, t) -> select(greater(x, t), g, 0)`"""
    return ctx.where(ctx.binary("greater", x, threshold), g, 0.0)


@lowering("threshold.default")
def threshold(ctx: Context, x: Operand, level: float, value: float) -> Operand:
    """`threshold(x, t, v) -> select(greater(x, t), x, v)`"""
    return ctx.where(ctx.binary("greater", x, level), x, value)


@lowering("sigmoid_backward.default")
def sigmoid_backward(ctx: Context, g: Operand, y: Operand) -> Operand:
    """`sigmoid_backward(g, y) -> mul(g, mul(y, sub(1, y)))`"""
    return ctx.mul(g, ctx.mul(y, ctx.sub(1.0, y)))


@lowering("tanh_backward.default")
def tanh_backward(ctx: Context, g: Operand, y: Operand) -> Operand:
    """`tanh_backward(g, y) -> mul(g, sub(1, mul(y, y)))`"""
    return ctx.mul(g, ctx.sub(1.0, ctx.square(y)))


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


@lowering("silu_backward.default")
def silu_backward(ctx: Context, g: Operand, x: Operand) -> Operand:
    """`silu_backward(g, x) -> g * s * (1 + x (1 - s))`, s = sigmoid(x)"""
    s = ctx.unary("sigmoid", x)
    return ctx.mul(g, ctx.mul(s, ctx.add(ctx.mul(x, ctx.sub(1.0, s)), 1.0)))


@lowering("leaky_relu.default")
def leaky_relu(ctx: Context, x: Operand, negative_slope: float = 0.01) -> Operand:
    """`leaky_relu(x, a) -> leaky_relu(x, alpha=a)`"""
    return ctx.unary("leaky_relu", x, alpha=ctx.scalar(negative_slope))


@lowering("leaky_relu_backward.default")
def leaky_relu_backward(
    ctx: Context, g: Operand, x: Operand, negative_slope: float, is_result: bool
) -> Operand:
    """`leaky_relu_backward(g, x, a) -> select(greater(x, 0), g, mul(g, a))`"""
    return ctx.where(ctx.binary("greater", x, 0.0), g, ctx.mul(g, negative_slope))


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


@lowering("elu_backward.default")
def elu_backward(
    ctx: Context, g: Operand, alpha: float, scale: float, input_scale: float, is_result: bool, x: Operand
) -> Operand:
    """`elu_backward(g, x) -> select(x > 0, g, g * a * exp(min(x, 0)))`; from the result y: `a
    exp(x) = y + a`
    """
    if is_result:
        low = ctx.mul(ctx.add(x, alpha * scale), input_scale)
    else:
        low = ctx.mul(
            ctx.unary("exp", ctx.mul(ctx.binary("minimum", x, 0.0), input_scale)), alpha * scale * input_scale
        )
    return ctx.where(ctx.binary("greater", x, 0.0), ctx.mul(g, scale), ctx.mul(g, low))


@lowering("hardtanh.default")
def hardtanh(ctx: Context, x: Operand, low: float = -1.0, high: float = 1.0) -> Operand:
    """`hardtanh(x, lo, hi) -> minimum(maximum(x, lo), hi)`"""
    return ctx.binary("minimum", ctx.binary("maximum", x, low), high)


@lowering("hardtanh_backward.default")
def hardtanh_backward(ctx: Context, g: Operand, x: Operand, low: float, high: float) -> Operand:
    """`hardtanh_backward(g, x, lo, hi) -> select(greater(x, lo), select(less(x, hi), g, 0), 0)`"""
    inside = ctx.where(ctx.binary("less", x, high), g, 0.0)
    return ctx.where(ctx.binary("greater", x, low), inside, 0.0)


@lowering("softplus.default")
def softplus(ctx: Context, x: Operand, beta: float = 1, threshold: float = 20) -> Operand:
    """`softplus(x) -> add(relu(x), softplus(mul(abs(x), -1)))`, scaled by beta

    torch's switch to the identity above `threshold` is written out only where it shows in fp16.
    The native op returns 0 for x >= 11.09 (exp overflows first, ANEForge on M5), so it sees only x <= 0.
    """
    scaled = x if beta == 1 else ctx.mul(x, beta)
    tail = ctx.unary("softplus", ctx.mul(ctx.unary("abs", scaled), -1.0))
    y = ctx.add(ctx.unary("relu", scaled), tail)
    y = y if beta == 1 else ctx.div(y, beta)
    if threshold >= _SOFTPLUS_LINEAR:
        return y
    return ctx.where(ctx.binary("greater", scaled, threshold), x, y)


@lowering("softplus_backward.default")
def softplus_backward(ctx: Context, g: Operand, x: Operand, beta: float, threshold: float) -> Operand:
    """`softplus_backward(g, x, beta) -> mul(g, sigmoid(mul(x, beta)))`"""
    scaled = x if beta == 1 else ctx.mul(x, beta)
    slope = ctx.mul(g, ctx.unary("sigmoid", scaled))
    if threshold >= _SOFTPLUS_LINEAR:
        return slope
    return ctx.where(ctx.binary("greater", scaled, threshold), g, slope)


@lowering("log_sigmoid_forward.default")
def log_sigmoid_forward(ctx: Context, x: Operand) -> tuple[Operand, Operand]:
    """`log_sigmoid(x) -> mul(softplus(mul(x, -1)), -1)`; the second result (a buffer) is not needed"""
    return ctx.mul(softplus(ctx, ctx.mul(x, -1.0)), -1.0), x


@lowering("log_sigmoid_backward.default")
def log_sigmoid_backward(ctx: Context, g: Operand, x: Operand, buffer: Operand) -> Operand:
    """`log_sigmoid_backward(g, x) -> mul(g, sub(1, sigmoid(x)))`"""
    return ctx.mul(g, ctx.unary("sigmoid", ctx.mul(x, -1.0)))


@lowering("hardsigmoid.default")
def hardsigmoid(ctx: Context, x: Operand) -> Operand:
    """`hardsigmoid(x) -> sigmoid_hard(x, alpha=1/6, beta=1/2)`"""
    return ctx.unary("sigmoid_hard", x, alpha=ctx.scalar(1.0 / 6.0), beta=ctx.scalar(0.5))


@lowering("hardsigmoid_backward.default")
def hardsigmoid_backward(ctx: Context, g: Operand, x: Operand) -> Operand:
    """`hardsigmoid_backward(g, x) -> mul(g inside (-3, 3), 1/6)`"""
    return ctx.mul(hardtanh_backward(ctx, g, x, -3.0, 3.0), 1.0 / 6.0)


@lowering("hardswish.default")
def hardswish(ctx: Context, x: Operand) -> Operand:
    """`hardswish(x) -> mul(x, sigmoid_hard(x))`"""
    return ctx.mul(x, hardsigmoid(ctx, x))


@lowering("hardswish_backward.default")
def hardswish_backward(ctx: Context, g: Operand, x: Operand) -> Operand:
    """`hardswish_backward(g, x) -> g` for x >= 3, `g (x/3 + 1/2)` inside, 0 below"""
    inside = ctx.mul(g, ctx.add(ctx.mul(x, 1.0 / 3.0), 0.5))
    low = ctx.where(ctx.binary("greater", x, -3.0), inside, 0.0)
    return ctx.where(ctx.binary("greater_equal", x, 3.0), g, low)


@lowering("mish.default")
def mish(ctx: Context, x: Operand) -> Operand:
    """`mish(x) -> mul(x, tanh(softplus(x)))`"""
    return ctx.mul(x, ctx.unary("tanh", softplus(ctx, x)))


@lowering("mish_backward.default")
def mish_backward(ctx: Context, g: Operand, x: Operand) -> Operand:
    """`mish_backward(g, x) -> g (t + x sigmoid(x) (1 - t t))`, t = tanh(softplus(x))"""
    t = ctx.unary("tanh", softplus(ctx, x))
    slope = ctx.mul(ctx.mul(x, ctx.unary("sigmoid", x)), ctx.sub(1.0, ctx.square(t)))
    return ctx.mul(g, ctx.add(t, slope))


@lowering("_softmax.default")
def softmax(ctx: Context, x: Operand, dim: int, half_to_float: bool) -> Operand:
    """`_softmax(x, d) -> softmax(x, axis=d)`"""
    return ctx.unary("softmax", x, axis=dim % len(ctx.shape))


@lowering("_softmax_backward_data.default")
def softmax_backward(ctx: Context, g: Operand, y: Operand, dim: int, input_dtype: object) -> Operand:
    """`_softmax_backward_data(g, y, d) -> mul(y, sub(g, reduce_sum(mul(g, y), axes=d)))`"""
    return ctx.mul(y, ctx.sub(g, ctx.sum(ctx.mul(g, y), [dim], keep=True)))


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


@lowering("prelu.default _prelu_kernel.default")
def prelu(ctx: Context, x: Operand, weight: Operand) -> Operand:
    """`prelu(x, w) -> add(relu(x), mul(minimum(x, 0), w))` (the native op needs a constant weight)"""
    shape = shape_of(weight)
    rank = len(ctx.shape)
    if len(shape) == 1 and shape[0] != 1 and rank > 1:
        weight = ctx.reshape(weight, tuple(shape[0] if i == 1 else 1 for i in range(rank)))
    return ctx.add(ctx.unary("relu", x), ctx.mul(ctx.binary("minimum", x, 0.0), weight))


@lowering("_prelu_kernel_backward.default")
def prelu_backward(ctx: Context, g: Operand, x: Operand, weight: Operand) -> tuple[Operand, Operand]:
    """`_prelu_kernel_backward(g, x, w) -> select(x > 0, g, g w), mul(g, minimum(x, 0))`"""
    dx = ctx.where(ctx.binary("greater", x, 0.0), g, ctx.mul(g, weight))
    return dx, ctx.mul(g, ctx.binary("minimum", x, 0.0))


@lowering("hardshrink.default")
def hardshrink(ctx: Context, x: Operand, lambd: float = 0.5) -> Operand:
    """`hardshrink(x, l) -> select(greater(abs(x), l), x, 0)`"""
    return ctx.where(ctx.binary("greater", ctx.unary("abs", x), lambd), x, 0.0)


@lowering("hardshrink_backward.default softshrink_backward.default")
def shrink_backward(ctx: Context, g: Operand, x: Operand, lambd: float) -> Operand:
    """`hardshrink_backward(g, x, l) -> select(greater(abs(x), l), g, 0)`"""
    return ctx.where(ctx.binary("greater", ctx.unary("abs", x), lambd), g, 0.0)


@lowering("softshrink.default")
def softshrink(ctx: Context, x: Operand, lambd: float = 0.5) -> Operand:
    """`softshrink(x, l) -> sub(x, minimum(maximum(x, -l), l))`"""
    return ctx.sub(x, hardtanh(ctx, x, -lambd, lambd))
