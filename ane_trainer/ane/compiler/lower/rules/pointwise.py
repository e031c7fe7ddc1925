"""Arithmetic and elementary functions, element by element."""

from __future__ import annotations

import math

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, as_tensor
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.mil.opset import family
from ane_trainer.ane.mil.program import Value

#: ATen overloads that are one MIL op of the same operands; an epsilon that the op has is 0.
PASS_THROUGH = {
    "abs.default": "abs", "atan.default": "atan", "ceil.default": "ceil", "cos.default": "cos", "erf.default": "erf",
    "exp.default": "exp", "exp2.default": "exp2", "floor.default": "floor", "reciprocal.default": "inverse",
    "relu.default": "relu",
    "sigmoid.default": "sigmoid", "sign.default": "sign", "sin.default": "sin", "sqrt.default": "sqrt",
    "tanh.default": "tanh", "fmax.default": "maximum", "fmin.default": "minimum", "maximum.default": "maximum",
    "minimum.default": "minimum", "mul.Scalar": "mul", "mul.Tensor": "mul", "pow.Tensor_Tensor": "pow",
}  # fmt: skip
_HAVE_EPSILON = ("inverse", "log", "rsqrt")


def _pass_through(overload: str, kind: str) -> None:
    """Register `aten.x(operands) -> kind(operands)`."""

    def rule(ctx: Context, x: Operand, *others: Operand) -> Operand:
        return ctx.binary(kind, x, *others) if others else function(ctx, kind, x)

    operands = "x, y" if family(kind) == "binary" else "x"
    zero = ", epsilon=0" if kind in _HAVE_EPSILON else ""
    rule.__doc__ = f"`{overload.partition('.')[0]}({operands}) -> {kind}({operands}{zero})`"
    lowering(overload)(rule)


def function(ctx: Context, kind: str, x: Operand) -> Value:
    """`kind(x)`, without the epsilon that some ops add to x."""
    return ctx.unary(kind, x, **({"epsilon": ctx.scalar(0.0)} if kind in _HAVE_EPSILON else {}))


for _overload, _kind in PASS_THROUGH.items():
    _pass_through(_overload, _kind)

#: Below this magnitude log1p is its series.
_SERIES = 0.125


@lowering("rsqrt.default")
def rsqrt(ctx: Context, x: Operand) -> Operand:
    """`rsqrt(x) -> add(r, mul(sub(1/2, mul(mul(x, r), mul(r, 1/2))), r))`, r = rsqrt(x): one step of Newton's

    The table is up to 2.1 units off, all one way near 1, where variances are. A norm's backward takes off what lies
    along the row by the same root twice: 1e-3 too much of it left 4 % of a gradient that cancels over 1,000 rows.
    """
    root = function(ctx, "rsqrt", x)
    product = ctx.mul(ctx.mul(x, root), ctx.mul(root, 0.5))  # root * root may be beyond fp16
    return ctx.add(root, ctx.mul(ctx.sub(0.5, product), root))


#: An epsilon under a logarithm below this is not left to fp16, which has 16 steps up to it.
LEAST_EPSILON = 2.0**-20


@lowering("add.Tensor add.Scalar")
def add(ctx: Context, x: Operand, y: Operand, alpha: float = 1) -> Operand:
    """`add(x, y, alpha=a) -> add(x, mul(y, a))`"""
    return ctx.add(x, y if alpha == 1 else ctx.mul(y, alpha))


@lowering("sub.Tensor sub.Scalar")
def sub(ctx: Context, x: Operand, y: Operand, alpha: float = 1) -> Operand:
    """`sub(x, y, alpha=a) -> sub(x, mul(y, a))`"""
    return ctx.sub(x, y if alpha == 1 else ctx.mul(y, alpha))


@lowering("div.Tensor div.Scalar")
def div(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`div(x, y) -> real_div(x, y)`; `div(x, 8) -> mul(x, 0.125)` for a constant (see `Context.div`)."""
    return ctx.div(x, y)


@lowering("div.Tensor_mode div.Scalar_mode")
def div_mode(ctx: Context, x: Operand, y: Operand, rounding_mode: str | None = None) -> Operand:
    """`div(x, y, rounding_mode="floor") -> floor(real_div(x, y))`, "trunc" likewise"""
    quotient = ctx.binary("real_div", x, y)
    if rounding_mode == "floor":
        return ctx.unary("floor", quotient)
    return quotient if rounding_mode is None else trunc(ctx, quotient)


@lowering("remainder.Tensor remainder.Scalar remainder.Scalar_Tensor")
def remainder(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`remainder(x, y) -> sub(x, mul(floor(real_div(x, y)), y))` (no `mod` on the engine)"""
    return ctx.sub(x, ctx.mul(div_mode(ctx, x, y, "floor"), y))


@lowering("fmod.Tensor fmod.Scalar")
def fmod(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`fmod(x, y) -> sub(x, mul(trunc(real_div(x, y)), y))`"""
    return ctx.sub(x, ctx.mul(div_mode(ctx, x, y, "trunc"), y))


@lowering("neg.default")
def neg(ctx: Context, x: Operand) -> Operand:
    """`neg(x) -> mul(x, -1)`"""
    return ctx.mul(x, -1.0)


@lowering("expm1.default")
def expm1(ctx: Context, x: Operand) -> Operand:
    """`expm1(x) -> sub(exp(x), 1)`; below |x| about 2^-10 the exp table's last place decides."""
    return ctx.sub(function(ctx, "exp", x), 1.0)


@lowering("log.default")
def log(ctx: Context, x: Operand) -> Operand:
    """`log(x) -> log(x, epsilon=0)`; `log(x + 1e-9) -> maximum(log(x, epsilon=0), log(1e-9))`

    The same for `clamp(x, min=1e-9)`: fp16 does not hold the sum, but the logarithm; they differ by log 2 at most, at
    x = epsilon.
    """
    inner, epsilon = _epsilon(ctx)
    if epsilon is None:
        return function(ctx, "log", x)
    return ctx.binary("maximum", function(ctx, "log", inner), math.log(epsilon))


def _epsilon(ctx: Context) -> tuple[Operand, float | None]:
    """(x, epsilon) if the node's argument is x plus, or x clamped to, an epsilon too small for fp16."""
    source = ctx.node.args[0] if ctx.node is not None and ctx.node.args else None
    if ctx.dtype != "fp16" or not isinstance(source, torch.fx.Node) or len(source.args) < 2:
        return 0.0, None
    name = str(source.target).partition(".")[2]
    number = source.args[1]
    plain = name in ("add.Tensor", "add.Scalar", "clamp_min.default") or (
        name == "clamp.default" and (len(source.args) < 3 or source.args[2] is None)
    )
    if not plain or not isinstance(number, (int, float)) or not 0 < number < LEAST_EPSILON:
        return 0.0, None
    assert isinstance(source.args[0], torch.fx.Node)
    inner = ctx.operands[source.args[0]]
    return (inner, float(number)) if isinstance(inner, Value) else (0.0, None)


@lowering("log2.default")
def log2(ctx: Context, x: Operand) -> Operand:
    """`log2(x) -> mul(log(x), 1/ln 2)`"""
    return ctx.mul(log(ctx, x), 1.0 / math.log(2.0))


@lowering("log10.default")
def log10(ctx: Context, x: Operand) -> Operand:
    """`log10(x) -> mul(log(x), 1/ln 10)`"""
    return ctx.mul(log(ctx, x), 1.0 / math.log(10.0))


@lowering("log1p.default")
def log1p(ctx: Context, x: Operand) -> Operand:
    """`log1p(x) -> select(less(abs(x), 1/8), mul(x, sub(1, mul(x, sub(1/2, mul(x, 1/3))))), log(add(x, 1)))`

    In fp16: the sum with 1 loses x below half an ulp (2^-11); three terms of the series are 5e-4 off at 1/8.
    """
    whole = log(ctx, ctx.add(x, 1.0))
    if ctx.dtype != "fp16":
        return whole
    series = ctx.mul(x, ctx.sub(1.0, ctx.mul(x, ctx.sub(0.5, ctx.mul(x, 1.0 / 3.0)))))
    small = ctx.binary("less", ctx.unary("abs", x), _SERIES)
    return ctx.where(small, series, whole)


@lowering("erfc.default")
def erfc(ctx: Context, x: Operand) -> Operand:
    """`erfc(x) -> sub(1, erf(x))`"""
    return ctx.sub(1.0, function(ctx, "erf", x))


@lowering("tan.default")
def tan(ctx: Context, x: Operand) -> Operand:
    """`tan(x) -> real_div(sin(x), cos(x))`"""
    return ctx.div(function(ctx, "sin", x), function(ctx, "cos", x))


@lowering("asin.default")
def asin(ctx: Context, x: Operand) -> Operand:
    """`asin(x) -> atan(mul(x, rsqrt(sub(1, mul(x, x)))))` (no `asin` on the engine)"""
    return ctx.unary("atan", ctx.mul(x, function(ctx, "rsqrt", ctx.sub(1.0, ctx.square(x)))))


@lowering("acos.default")
def acos(ctx: Context, x: Operand) -> Operand:
    """`acos(x) -> sub(pi/2, asin(x))`"""
    return ctx.sub(math.pi / 2, asin(ctx, x))


@lowering("sinh.default")
def sinh(ctx: Context, x: Operand) -> Operand:
    """`sinh(x) -> mul(sub(exp(x), exp(-x)), 0.5)`"""
    return ctx.mul(ctx.sub(function(ctx, "exp", x), function(ctx, "exp", neg(ctx, x))), 0.5)


@lowering("cosh.default")
def cosh(ctx: Context, x: Operand) -> Operand:
    """`cosh(x) -> mul(add(exp(x), exp(-x)), 0.5)`"""
    return ctx.mul(ctx.add(function(ctx, "exp", x), function(ctx, "exp", neg(ctx, x))), 0.5)


@lowering("atanh.default")
def atanh(ctx: Context, x: Operand) -> Operand:
    """`atanh(x) -> mul(log(real_div(1 + x, 1 - x)), 0.5)`"""
    return ctx.mul(log(ctx, ctx.div(ctx.add(x, 1.0), ctx.sub(1.0, x))), 0.5)


@lowering("asinh.default")
def asinh(ctx: Context, x: Operand) -> Operand:
    """`asinh(x) -> sign(x) * log(|x| + sqrt(x x + 1))`"""
    size = function(ctx, "abs", x)
    return ctx.mul(
        function(ctx, "sign", x), log(ctx, ctx.add(size, function(ctx, "sqrt", ctx.add(ctx.square(x), 1.0))))
    )


@lowering("acosh.default")
def acosh(ctx: Context, x: Operand) -> Operand:
    """`acosh(x) -> log(x + sqrt(x x - 1))`"""
    return log(ctx, ctx.add(x, function(ctx, "sqrt", ctx.sub(ctx.square(x), 1.0))))


@lowering("trunc.default")
def trunc(ctx: Context, x: Operand) -> Operand:
    """`trunc(x) -> mul(sign(x), floor(abs(x)))`"""
    return ctx.mul(function(ctx, "sign", x), function(ctx, "floor", function(ctx, "abs", x)))


@lowering("round.default")
def round_(ctx: Context, x: Operand) -> Operand:
    """`round(x) -> 2 floor(x/2) + rest`, where rest in {0, 1, 2} rounds `x - 2 floor(x/2)` half to even.

    MIL's `round` rounds half away from zero and is wrong from 1024 on (ANEForge, M5).
    """
    even = ctx.mul(function(ctx, "floor", ctx.mul(x, 0.5)), 2.0)
    rest = ctx.sub(x, even)
    above = ctx.number(ctx.binary("greater", rest, 0.5))
    return ctx.add(even, ctx.add(above, ctx.number(ctx.binary("greater_equal", rest, 1.5))))


@lowering("pow.Tensor_Scalar")
def pow_scalar(ctx: Context, x: Operand, exponent: float) -> Operand:
    """`pow(x, 2) -> mul(x, x)`; 3, 4, 1/2, -1/2, -1, -2 likewise; any other `-> pow(x, e)`"""
    if exponent == 0:
        return torch.ones(ctx.shape)
    if exponent == 1:
        return x
    if exponent in (2, 3, 4):
        square = ctx.square(x)
        return square if exponent == 2 else ctx.mul(square, x if exponent == 3 else square)
    if exponent in (0.5, -0.5):
        return function(ctx, "sqrt", x) if exponent > 0 else rsqrt(ctx, x)
    if exponent in (-1, -2):
        return function(ctx, "inverse", x if exponent == -1 else ctx.square(x))
    return ctx.binary("pow", x, float(exponent))


@lowering("pow.Scalar")
def pow_of_scalar(ctx: Context, base: float, y: Operand) -> Operand:
    """`pow(c, y) -> exp(mul(y, ln c))` for c > 0"""
    if base <= 0:
        raise ctx.refuse(f"needs a positive base; got {base}.", "Write the power with a tensor base.")
    return function(ctx, "exp", ctx.mul(y, math.log(base)))


@lowering("clamp.default clamp.Tensor")
def clamp(ctx: Context, x: Operand, min: Operand | None = None, max: Operand | None = None) -> Operand:
    """`clamp(x, lo, hi) -> minimum(maximum(x, lo), hi)`"""
    low = x if min is None else ctx.binary("maximum", x, min)
    return low if max is None else ctx.binary("minimum", low, max)


@lowering("_to_copy.default")
def to_copy(ctx: Context, x: Operand, dtype: torch.dtype | None = None, **_: object) -> Operand:
    """`_to_copy(x, dtype) -> x`; float to bool `-> not_equal(x, 0)`, float to integer `-> trunc(x)`"""
    target = dtype or ctx.meta.dtype
    if target == torch.bool:
        return ctx.boolean(x)
    source = getattr(ctx.node.args[0], "meta", {}).get("val") if ctx.node is not None else None
    truncates = source is not None and source.dtype.is_floating_point and not target.is_floating_point
    return trunc(ctx, x) if truncates else ctx.number(x)


@lowering("clone.default alias.default lift_fresh_copy.default lift.default _conj.default")
def same(ctx: Context, x: Operand, **_: object) -> Operand:
    """`clone(x) -> x`"""
    return x


@lowering("hypot.default")
def hypot(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`hypot(x, y) -> sqrt(add(mul(x, x), mul(y, y)))`; squares leave fp16 from 256 on"""
    return function(ctx, "sqrt", ctx.add(ctx.square(x), ctx.square(y)))


@lowering("copysign.Tensor copysign.Scalar")
def copysign(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`copysign(x, y) -> select(less(y, 0), -|x|, |x|)`; -0 counts as positive"""
    size = function(ctx, "abs", x)
    return ctx.where(ctx.binary("less", y, 0.0), ctx.mul(size, -1.0), size)


@lowering("signbit.default")
def signbit(ctx: Context, x: Operand) -> Operand:
    """`signbit(x) -> less(x, 0)`; -0 counts as positive"""
    return ctx.binary("less", x, 0.0)


@lowering("ldexp.Tensor")
def ldexp(ctx: Context, x: Operand, exponent: Operand) -> Operand:
    """`ldexp(x, e) -> mul(x, exp2(e))`"""
    power = ctx.unary("exp2", exponent) if isinstance(exponent, Value) else torch.exp2(as_tensor(exponent))
    return ctx.mul(x, power)


@lowering("atan2.default")
def atan2(ctx: Context, y: Operand, x: Operand) -> Operand:
    """`atan2(y, x) -> atan(y / x)`, plus pi or minus pi where x < 0; +-pi/2 where x = 0"""
    safe = ctx.where(ctx.binary("equal", x, 0.0), 1.0, x)
    angle = ctx.unary("atan", ctx.div(y, safe))
    turn = ctx.where(ctx.binary("less", y, 0.0), -math.pi, math.pi)
    turned = ctx.where(ctx.binary("less", x, 0.0), ctx.add(angle, turn), angle)
    return ctx.where(ctx.binary("equal", x, 0.0), ctx.mul(function(ctx, "sign", y), math.pi / 2), turned)


@lowering("round.decimals")
def round_decimals(ctx: Context, x: Operand, *, decimals: int) -> Operand:
    """`round(x, decimals=d) -> mul(round(mul(x, 10^d)), 10^-d)`"""
    return ctx.mul(round_(ctx, ctx.mul(x, 10.0**decimals)), 10.0**-decimals)
