"""Comparisons, logic and choice. Booleans are compared, selected, or turned into 1 and 0; never cast."""

from __future__ import annotations

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, as_tensor
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.mil.program import MAX_FP16, Value

_COMPARISONS = {
    "eq": "equal",
    "ne": "not_equal",
    "gt": "greater",
    "ge": "greater_equal",
    "lt": "less",
    "le": "less_equal",
}


def _comparison(kind: str) -> None:
    @lowering(f"{kind}.Tensor {kind}.Scalar")
    def rule(ctx: Context, x: Operand, y: Operand) -> Operand:
        """`gt(x, y) -> greater(x, y)` and so on; a constant that fp16 lacks is rounded so that the answer stays"""
        up, down = ("ge", "lt"), ("gt", "le")
        if ctx.dtype == "fp16" and kind in up + down:
            x = x if isinstance(x, Value) else _directed(x, upward=kind in down)
            y = y if isinstance(y, Value) else _directed(y, upward=kind in up)
        return ctx.binary(_COMPARISONS[kind], x, y)


def _directed(constant: Operand, *, upward: bool) -> torch.Tensor:
    """The least fp16 number that is not below the constant, or the largest that is not above it.

    `x > 0.9999` is `x > 0.9995` for fp16 numbers x: as 1.0, to which it rounds, it would never hold.
    """
    exact = as_tensor(constant).double()
    nearest = exact.half()
    bound = torch.tensor(torch.inf if upward else -torch.inf, dtype=torch.float16)
    wrong = nearest.double() < exact if upward else nearest.double() > exact
    return torch.where(wrong, torch.nextafter(nearest, bound), nearest).double()


for _kind in _COMPARISONS:
    _comparison(_kind)


@lowering("logical_not.default bitwise_not.default")
def logical_not(ctx: Context, x: Operand) -> Operand:
    """`logical_not(x) -> logical_not(x)`"""
    x = ctx.boolean(x)
    return ctx.emit("logical_not", x=x) if isinstance(x, Value) else torch.logical_not(torch.as_tensor(x))


def _both(ctx: Context, x: Operand, y: Operand) -> tuple[Operand, Operand]:
    return ctx.number(ctx.boolean(x)), ctx.number(ctx.boolean(y))


@lowering("logical_and.default bitwise_and.Tensor bitwise_and.Scalar")
def logical_and(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`logical_and(x, y) -> not_equal(mul(x01, y01), 0)` (no `logical_and` on the engine)"""
    return ctx.boolean_of_01(ctx.mul(*_both(ctx, x, y)))


@lowering("logical_or.default bitwise_or.Tensor bitwise_or.Scalar")
def logical_or(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`logical_or(x, y) -> not_equal(maximum(x01, y01), 0)`"""
    return ctx.boolean_of_01(ctx.binary("maximum", *_both(ctx, x, y)))


@lowering("logical_xor.default bitwise_xor.Tensor bitwise_xor.Scalar")
def logical_xor(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`logical_xor(x, y) -> not_equal(abs(sub(x01, y01)), 0)`"""
    return ctx.boolean_of_01(ctx.unary("abs", ctx.sub(*_both(ctx, x, y))))


@lowering(
    "__lshift__.Scalar __rshift__.Scalar __lshift__.Tensor __rshift__.Tensor bitwise_left_shift.Tensor"
    " bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar"
)
def shift(ctx: Context, x: Operand, y: Operand) -> Operand:
    """`x >> k -> floor(mul(x, 2^-k))`, in two numbers (`indices.arithmetic`)"""
    raise ctx.refuse(
        "needs a number of bits that is known when compiling.", "Multiply or divide by a power of two."
    )


@lowering("where.self")
def where(ctx: Context, cond: Operand, a: Operand, b: Operand) -> Operand:
    """`where(c, a, b) -> select(cond=c, a, b)`; a constant condition becomes arithmetic (see
    `Context.where`)
    """
    return ctx.where(ctx.boolean(cond), a, b)


@lowering("isnan.default")
def isnan(ctx: Context, x: Operand) -> Operand:
    """`isnan(x) -> ` false: the engine has no NaN (exponent field 31 is an ordinary exponent, M6 numerics)"""
    return torch.zeros(ctx.shape, dtype=torch.bool)


@lowering("isinf.default")
def isinf(ctx: Context, x: Operand) -> Operand:
    """`isinf(x) -> greater(abs(x), 65504)`: inf is read as 65536"""
    return ctx.binary("greater", ctx.unary("abs", x), MAX_FP16)


@lowering("any.default any.dim any.dims")
def any_(ctx: Context, x: Operand, dim: int | list[int] | None = None, keepdim: bool = False) -> Operand:
    """`any(x, dim) -> not_equal(reduce_max(x01, axes), 0)`"""
    return ctx.boolean_of_01(_reduced(ctx, "max", x, dim, keepdim))


def _reduced(ctx: Context, kind: str, x: Operand, dim: int | list[int] | None, keepdim: bool) -> Operand:
    axes = None if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return ctx.reduce(kind, ctx.number(ctx.boolean(x)), axes, keep=keepdim)
