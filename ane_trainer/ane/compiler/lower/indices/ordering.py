"""Extrema of integers in two numbers: of the quotients first, then of the remainders that have that quotient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices import arithmetic as exact
from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS
from ane_trainer.ane.compiler.lower.operands import Encoded, Operand, broadcast_shape, shape_of
from ane_trainer.ane.compiler.lower.registry import RULES
from ane_trainer.ane.stages import PAIR

_Axes = int | Sequence[int] | None


def whole(ctx: Context, x: Operand) -> Encoded:
    """Integers in two numbers, both of the whole shape."""
    both = exact.as_pair(ctx, x)
    shape = broadcast_shape(*(shape_of(part) for part in both.parts))
    return both.each(lambda part: ctx.broadcast(part, shape))


def best(ctx: Context, kind: str, x: Encoded, axes: Sequence[int] | None) -> Encoded:
    """The largest ("max") or smallest integers over axes, which stay with extent 1.

    `h = reduce_max(high); l = reduce_max(select(equal(high, h), low, -1))`
    """
    low, high = x.parts
    top = ctx.reduce(kind, high, axes, keep=True)
    beyond = -1.0 if kind == "max" else float(PAIR)
    return exact.pair(
        ctx.reduce(kind, ctx.where(ctx.binary("equal", high, top), low, beyond), axes, keep=True), top
    )


def extremum(kind: str) -> Callable[..., Operand | tuple[Operand, Operand]]:
    """The rule of `amax`, `max` over all elements, and `max` along an axis with its places."""

    def rule(ctx: Context, integers: object, x: Operand, dim: _Axes = None, keepdim: bool = False) -> object:
        both = whole(ctx, x)
        rank = len(shape_of(both))
        axes = list(range(rank)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
        found = best(ctx, kind, both, axes)
        if not isinstance(ctx.meta, (list, tuple)):
            return found.each(lambda part: ctx.reshape(part, ctx.shape))
        shape = tuple(int(n) for n in ctx.meta[0].shape) or (1,)
        places = _place(ctx, both, found, axes[0]) if ctx.used(1) else torch.zeros(shape)
        return found.each(lambda part: ctx.reshape(part, shape)), _reshaped(ctx, places, shape)

    return rule  # type: ignore[return-value]


def place_of_extremum(kind: str) -> Callable[..., Operand]:
    """The rule of `argmax` and `argmin`."""

    def rule(
        ctx: Context, integers: object, x: Operand, dim: int | None = None, keepdim: bool = False
    ) -> Operand:
        both = whole(ctx, x)
        if dim is None:
            count = math.prod(shape_of(both))
            both, dim = both.each(lambda part: ctx.reshape(part, (count,))), 0
        return _reshaped(ctx, _place(ctx, both, best(ctx, kind, both, [dim]), dim), ctx.shape)

    return rule


def _place(ctx: Context, x: Encoded, found: Encoded, axis: int) -> Operand:
    """Where along an axis the integers that were found are first; the axis stays with extent 1."""
    equal = [ctx.number(ctx.binary("equal", a, b)) for a, b in zip(x.parts, found.parts, strict=True)]
    places = exact.first_place(ctx, "max", ctx.mul(*equal), axis)[1]
    return exact.joined(ctx, places) if shape_of(x)[axis] <= EXACT_INTEGERS else places


def _reshaped(ctx: Context, x: Operand, shape: tuple[int, ...]) -> Operand:
    return x.each(lambda part: ctx.reshape(part, shape)) if isinstance(x, Encoded) else ctx.reshape(x, shape)


def in_order(ctx: Context, integers: object, x: Operand, *args: object, **keywords: object) -> object:
    """The rule of `sort`, `topk` and the like: that of floats, which compares both numbers."""
    assert ctx.node is not None
    return RULES[str(ctx.node.target)](ctx, whole(ctx, x), *args, **keywords)
