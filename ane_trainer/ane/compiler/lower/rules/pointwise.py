"""Arithmetic and elementary functions, element by element."""

from __future__ import annotations

import math
from typing import Any

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, as_tensor
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.mil.program import Value

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


@lowering("rsub.Tensor rsub.Scalar")
def rsub(ctx: Context, x: Operand, y: Operand, alpha: float = 1) -> Operand:
    """`rsub(x, y, alpha=a) -> sub(y, mul(x, a))`"""
    return ctx.sub(y, x if alpha == 1 else ctx.mul(x, alpha))


@lowering("mul.Tensor mul.Scalar")
def mul(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`mul(x, y) -> mul(x, y)`"""
    return ctx.mul(x, y)


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


@lowering("floor_divide.default")
def floor_divide(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`floor_divide(x, y) -> floor(real_div(x, y))`"""
    return div_mode(ctx, x, y, "floor")


@lowering("remainder.Tensor remainder.Scalar remainder.Scalar_Tensor")
def remainder(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`remainder(x, y) -> sub(x, mul(floor(real_div(x, y)), y))` (no `mod` on the engine)"""
    return ctx.sub(x, ctx.mul(div_mode(ctx, x, y, "floor"), y))


@lowering("fmod.Tensor fmod.Scalar")
def fmod(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`fmod(x, y) -> sub(x, mul(trunc(real_div(x, y)), y))`"""
    return ctx.sub(x, ctx.mul(div_mode(ctx, x, y, "trunc"), y))


@lowering("abs.default")
def abs_(ctx: Context, x: Operand) -> Operand:
    """`abs(x) -> abs(x)`"""
    return ctx.unary("abs", x)


@lowering("neg.default")
def neg(ctx: Context, x: Operand) -> Operand:
    """`neg(x) -> mul(x, -1)`"""
    return ctx.mul(x, -1.0)


@lowering("sqrt.default")
def sqrt(ctx: Context, x: Operand) -> Operand:
    """`sqrt(x) -> sqrt(x)`"""
    return ctx.unary("sqrt", x)


@lowering("rsqrt.default")
def rsqrt(ctx: Context, x: Operand) -> Operand:
    """`rsqrt(x) -> rsqrt(x, epsilon=0)`"""
    return ctx.unary("rsqrt", x, epsilon=ctx.scalar(0.0))


@lowering("reciprocal.default")
def reciprocal(ctx: Context, x: Operand) -> Operand:
    """`reciprocal(x) -> inverse(x, epsilon=0)`"""
    return ctx.unary("inverse", x, epsilon=ctx.scalar(0.0))


@lowering("exp.default")
def exp(ctx: Context, x: Operand) -> Operand:
    """`exp(x) -> exp(x)`"""
    return ctx.unary("exp", x)


@lowering("exp2.default")
def exp2(ctx: Context, x: Operand) -> Operand:
    """`exp2(x) -> exp2(x)`"""
    return ctx.unary("exp2", x)


@lowering("expm1.default")
def expm1(ctx: Context, x: Operand) -> Operand:
    """`expm1(x) -> sub(exp(x), 1)`; below |x| about 2^-10 the exp table's last place decides."""
    return ctx.sub(exp(ctx, x), 1.0)


@lowering("log.default")
def log(ctx: Context, x: Operand) -> Operand:
    """`log(x) -> log(x, epsilon=0)`; `log(x + 1e-9) -> maximum(log(x, epsilon=0), log(1e-9))`

    The same for `clamp(x, min=1e-9)`: fp16 does not hold the sum, but the logarithm; they differ by log 2 at most, at
    x = epsilon.
    """
    inner, epsilon = _epsilon(ctx)
    if epsilon is None:
        return ctx.unary("log", x, epsilon=ctx.scalar(0.0))
    return ctx.binary("maximum", ctx.unary("log", inner, epsilon=ctx.scalar(0.0)), math.log(epsilon))


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
    """`log1p(x) -> log(add(x, 1))`; loses x below half an ulp of 1 (2^-11)."""
    return log(ctx, ctx.add(x, 1.0))


@lowering("erf.default")
def erf(ctx: Context, x: Operand) -> Operand:
    """`erf(x) -> erf(x)`"""
    return ctx.unary("erf", x)


@lowering("erfc.default")
def erfc(ctx: Context, x: Operand) -> Operand:
    """`erfc(x) -> sub(1, erf(x))`"""
    return ctx.sub(1.0, erf(ctx, x))


@lowering("sin.default")
def sin(ctx: Context, x: Operand) -> Operand:
    """`sin(x) -> sin(x)` (native from A15 on)"""
    return ctx.unary("sin", x)


@lowering("cos.default")
def cos(ctx: Context, x: Operand) -> Operand:
    """`cos(x) -> cos(x)` (native from A15 on)"""
    return ctx.unary("cos", x)


@lowering("tan.default")
def tan(ctx: Context, x: Operand) -> Operand:
    """`tan(x) -> real_div(sin(x), cos(x))`"""
    return ctx.div(sin(ctx, x), cos(ctx, x))


@lowering("atan.default")
def atan(ctx: Context, x: Operand) -> Operand:
    """`atan(x) -> atan(x)`"""
    return ctx.unary("atan", x)


@lowering("asin.default")
def asin(ctx: Context, x: Operand) -> Operand:
    """`asin(x) -> atan(mul(x, rsqrt(sub(1, mul(x, x)))))` (no `asin` on the engine)"""
    return ctx.unary("atan", ctx.mul(x, rsqrt(ctx, ctx.sub(1.0, ctx.square(x)))))


@lowering("acos.default")
def acos(ctx: Context, x: Operand) -> Operand:
    """`acos(x) -> sub(pi/2, asin(x))`"""
    return ctx.sub(math.pi / 2, asin(ctx, x))


@lowering("sinh.default")
def sinh(ctx: Context, x: Operand) -> Operand:
    """`sinh(x) -> mul(sub(exp(x), exp(-x)), 0.5)`"""
    return ctx.mul(ctx.sub(exp(ctx, x), exp(ctx, neg(ctx, x))), 0.5)


@lowering("cosh.default")
def cosh(ctx: Context, x: Operand) -> Operand:
    """`cosh(x) -> mul(add(exp(x), exp(-x)), 0.5)`"""
    return ctx.mul(ctx.add(exp(ctx, x), exp(ctx, neg(ctx, x))), 0.5)


@lowering("atanh.default")
def atanh(ctx: Context, x: Operand) -> Operand:
    """`atanh(x) -> mul(log(real_div(1 + x, 1 - x)), 0.5)`"""
    return ctx.mul(log(ctx, ctx.div(ctx.add(x, 1.0), ctx.sub(1.0, x))), 0.5)


@lowering("asinh.default")
def asinh(ctx: Context, x: Operand) -> Operand:
    """`asinh(x) -> sign(x) * log(|x| + sqrt(x x + 1))`"""
    size = abs_(ctx, x)
    return ctx.mul(sign(ctx, x), log(ctx, ctx.add(size, sqrt(ctx, ctx.add(ctx.square(x), 1.0)))))


@lowering("acosh.default")
def acosh(ctx: Context, x: Operand) -> Operand:
    """`acosh(x) -> log(x + sqrt(x x - 1))`"""
    return log(ctx, ctx.add(x, sqrt(ctx, ctx.sub(ctx.square(x), 1.0))))


@lowering("sign.default sgn.default")
def sign(ctx: Context, x: Operand) -> Operand:
    """`sign(x) -> sign(x)`"""
    return ctx.unary("sign", x)


@lowering("floor.default")
def floor(ctx: Context, x: Operand) -> Operand:
    """`floor(x) -> floor(x)`"""
    return ctx.unary("floor", x)


@lowering("ceil.default")
def ceil(ctx: Context, x: Operand) -> Operand:
    """`ceil(x) -> ceil(x)`"""
    return ctx.unary("ceil", x)


@lowering("trunc.default")
def trunc(ctx: Context, x: Operand) -> Operand:
    """`trunc(x) -> mul(sign(x), floor(abs(x)))`"""
    return ctx.mul(sign(ctx, x), floor(ctx, abs_(ctx, x)))


@lowering("frac.default")
def frac(ctx: Context, x: Operand) -> Operand:
    """`frac(x) -> sub(x, trunc(x))`"""
    return ctx.sub(x, trunc(ctx, x))


@lowering("round.default")
def round_(ctx: Context, x: Operand) -> Operand:
    """`round(x) -> 2 floor(x/2) + rest`, where rest in {0, 1, 2} rounds `x - 2 floor(x/2)` half to even.

    MIL's `round` rounds half away from zero and is wrong from 1024 on (ANEForge, M5).
    """
    even = ctx.mul(floor(ctx, ctx.mul(x, 0.5)), 2.0)
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
        return sqrt(ctx, x) if exponent > 0 else rsqrt(ctx, x)
    if exponent in (-1, -2):
        return reciprocal(ctx, x if exponent == -1 else ctx.square(x))
    return ctx.binary("pow", x, float(exponent))


@lowering("pow.Tensor_Tensor")
def pow_tensor(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`pow(x, y) -> pow(x, y)`"""
    return ctx.binary("pow", x, y)


@lowering("pow.Scalar")
def pow_of_scalar(ctx: Context, base: float, y: Operand) -> Operand:
    """`pow(c, y) -> exp(mul(y, ln c))` for c > 0"""
    if base <= 0:
        raise ctx.refuse(f"needs a positive base; got {base}.", "Write the power with a tensor base.")
    return exp(ctx, ctx.mul(y, math.log(base)))


@lowering("maximum.default")
def maximum(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`maximum(x, y) -> maximum(x, y)`"""
    return ctx.binary("maximum", x, y)


@lowering("minimum.default")
def minimum(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`minimum(x, y) -> minimum(x, y)`"""
    return ctx.binary("minimum", x, y)


@lowering("clamp.default clamp.Tensor clamp_min.default clamp_min.Tensor")
def clamp(ctx: Context, x: Operand, min: Operand | None = None, max: Operand | None = None) -> Operand:
    """`clamp(x, lo, hi) -> minimum(maximum(x, lo), hi)`"""
    low = x if min is None else ctx.binary("maximum", x, min)
    return low if max is None else ctx.binary("minimum", low, max)


@lowering("clamp_max.default clamp_max.Tensor")
def clamp_max(ctx: Context, x: Operand, max: Operand) -> Operand:
    """`clamp_max(x, hi) -> minimum(x, hi)`"""
    return ctx.binary("minimum", x, max)


@lowering("addcmul.default")
def addcmul(ctx: Context, x: Operand, a: Operand, b: Operand, *, value: float = 1) -> Operand:
    """`addcmul(x, a, b, value=c) -> add(x, mul(mul(a, b), c))`"""
    product = ctx.mul(a, b)
    return ctx.add(x, product if value == 1 else ctx.mul(product, value))


@lowering("addcdiv.default")
def addcdiv(ctx: Context, x: Operand, a: Operand, b: Operand, *, value: float = 1) -> Operand:
    """`addcdiv(x, a, b, value=c) -> add(x, mul(real_div(a, b), c))`: the ratio first, it is the
    best scaled.
    """
    ratio = ctx.div(a, b)
    return ctx.add(x, ratio if value == 1 else ctx.mul(ratio, value))


@lowering("lerp.Scalar lerp.Tensor")
def lerp(ctx: Context, x: Operand, end: Operand, weight: Operand) -> Operand:
    """`lerp(x, y, w) -> add(x, mul(sub(y, x), w))`"""
    return ctx.add(x, ctx.mul(ctx.sub(end, x), weight))


@lowering("_to_copy.default to.dtype convert_element_type.default")
def to_copy(ctx: Context, x: Operand, dtype: torch.dtype | None = None, **_: Any) -> Operand:
    """`_to_copy(x, dtype) -> x`; float to bool `-> not_equal(x, 0)`, float to integer `-> trunc(x)`"""
    target = dtype or ctx.meta.dtype
    if target == torch.bool:
        return ctx.boolean(x)
    source = getattr(ctx.node.args[0], "meta", {}).get("val") if ctx.node is not None else None
    truncates = source is not None and source.dtype.is_floating_point and not target.is_floating_point
    return trunc(ctx, x) if truncates else ctx.number(x)


@lowering(
    "clone.default alias.default detach.default lift_fresh_copy.default lift_fresh.default contiguous.default"
    " lift.default _conj.default positive.default"
)
def same(ctx: Context, x: Operand, **_: Any) -> Operand:
    """`clone(x) -> x`"""
    return x


@lowering("copy.default")
def copy(ctx: Context, x: Operand, source: Operand, non_blocking: bool = False) -> Operand:
    """`copy(x, source) -> source`, broadcast to x's shape"""
    return ctx.broadcast(ctx.number(source), ctx.shape)


@lowering("fmax.default")
def fmax(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`fmax(x, y) -> maximum(x, y)`: the engine has no NaN"""
    return ctx.binary("maximum", x, y)


@lowering("fmin.default")
def fmin(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`fmin(x, y) -> minimum(x, y)`: the engine has no NaN"""
    return ctx.binary("minimum", x, y)


@lowering("hypot.default")
def hypot(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`hypot(x, y) -> sqrt(add(mul(x, x), mul(y, y)))`; squares leave fp16 from 256 on"""
    return sqrt(ctx, ctx.add(ctx.square(x), ctx.square(y)))


@lowering("copysign.Tensor copysign.Scalar")
def copysign(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`copysign(x, y) -> select(less(y, 0), -|x|, |x|)`; -0 counts as positive"""
    size = abs_(ctx, x)
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
    return ctx.where(ctx.binary("equal", x, 0.0), ctx.mul(sign(ctx, y), math.pi / 2), turned)


@lowering("round.decimals")
def round_decimals(ctx: Context, x: Operand, *, decimals: int) -> Operand:
    """`round(x, decimals=d) -> mul(round(mul(x, 10^d)), 10^-d)`"""
    return ctx.mul(round_(ctx, ctx.mul(x, 10.0**decimals)), 10.0**-decimals)
