"""Concatenation and stacking."""

from __future__ import annotations

from collections.abc import Sequence

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering


@lowering("cat.default concat.default")
def cat(ctx: Context, tensors: Sequence[Operand], dim: int = 0) -> Operand:
    """`cat(xs, d) -> concat(xs, axis=d)`"""
    rank = len(ctx.shape)
    return ctx.concat([x for x in tensors if len(shape_of(x)) == rank and 0 not in shape_of(x)], dim)


@lowering("stack.default")
def stack(ctx: Context, tensors: Sequence[Operand], dim: int = 0) -> Operand:
    """`stack(xs, d) -> concat(reshape(xs, [..., 1, ...]), axis=d)`"""
    shape = ctx.shape
    dim %= len(shape)
    one = tuple(1 if i == dim else n for i, n in enumerate(shape))
    return ctx.concat([ctx.reshape(x, one) for x in tensors], dim)
