"""The logarithm of the gamma function and its derivative for positive numbers, by Stirling's series.

Below 8 the series is taken 4 further up, and what lies between is taken off again. In fp16 the results are good to
about 0.004 absolute, or three digits where they are large. The densities of Beta, Dirichlet, Student's t, Poisson
and the negative binomial distribution use them.
"""

from __future__ import annotations

import math

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand
from ane_trainer.ane.compiler.lower.registry import lowering

#: From here on the series needs no help.
_FAR = 8.0
_STEPS = 4


def _raised(ctx: Context, x: Operand) -> tuple[Operand, Operand, Operand]:
    """(x + 4 below 8 else x, x but at most 8, whether x is below 8 as 1 or 0)"""
    near = ctx.number(ctx.binary("less", x, _FAR))
    return ctx.add(x, ctx.mul(near, float(_STEPS))), ctx.binary("minimum", x, _FAR), near


def _log(ctx: Context, x: Operand) -> Operand:
    return ctx.unary("log", x, epsilon=ctx.scalar(0.0))


@lowering("lgamma.default")
def lgamma(ctx: Context, x: Operand) -> Operand:
    """`lgamma(x) -> (z - 1/2) log z - z + log(2 pi) / 2 + 1/(12 z) - log(x (x+1) (x+2) (x+3))`, z = x + 4; x > 0

    From 8 on z = x without the last term.
    """
    z, low, near = _raised(ctx, x)
    series = ctx.sub(ctx.mul(ctx.sub(z, 0.5), ctx.sub(_log(ctx, z), 1.0)), 0.5 - 0.5 * math.log(2 * math.pi))
    series = ctx.add(series, ctx.mul(ctx.inverse(z), 1.0 / 12.0))
    between = ctx.add(
        _log(ctx, ctx.mul(low, ctx.add(low, 1.0))), _log(ctx, ctx.mul(ctx.add(low, 2.0), ctx.add(low, 3.0)))
    )
    return ctx.sub(series, ctx.mul(near, between))


@lowering("digamma.default")
def digamma(ctx: Context, x: Operand) -> Operand:
    """`digamma(x) -> log z - 1/(2 z) - 1/(12 z^2) - 1/x - 1/(x+1) - 1/(x+2) - 1/(x+3)`, z = x + 4; x > 0

    From 8 on z = x without the last four terms.
    """
    z, low, near = _raised(ctx, x)
    inverse = ctx.inverse(z)
    tail = ctx.mul(inverse, ctx.add(ctx.mul(inverse, 1.0 / 12.0), 0.5))
    between: Operand = ctx.inverse(low)
    for step in range(1, _STEPS):
        between = ctx.add(between, ctx.inverse(ctx.add(low, float(step))))
    return ctx.sub(ctx.sub(_log(ctx, z), tail), ctx.mul(near, between))
