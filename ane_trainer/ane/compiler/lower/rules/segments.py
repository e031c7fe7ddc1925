"""Reductions over groups that an index names: `scatter_reduce`, `index_reduce`.

Sums are the one-hot products of `scattering`; for the others each group sees all writes, those of other groups
replaced by what changes nothing: `reduce(select(onehot(i), s, neutral))`, an axis of the result's extent per write.
"""

from __future__ import annotations

import math

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, Shape, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules.indexing import move_axis_back, one_hot
from ane_trainer.ane.compiler.lower.rules.maxima import LOWEST
from ane_trainer.ane.compiler.lower.rules.scattering import scattered

#: torch's name -> MIL's reduction, its neutral element, the op that takes in the tensor's own value
_REDUCTIONS = {
    "amax": ("max", LOWEST, "maximum"), "amin": ("min", -LOWEST, "minimum"), "prod": ("prod", 1.0, "mul"),
}  # fmt: skip


@lowering("scatter_reduce.two")
def scatter_reduce(
    ctx: Context, x: Operand, dim: int, index: Operand, source: Operand, reduce: str, *, include_self: bool = True
) -> Operand:  # fmt: skip
    """`scatter_reduce(x, d, i, s, amax) -> maximum(x, reduce_max(select(onehot(i), s, lowest)))`

    sum `-> ` as `scatter_add`, mean divides it by the counts, prod and amin as amax. Without include_self
    `-> select(hit, reduced, x)`.
    """
    shape = shape_of(x)
    dim %= len(shape)
    if reduce in ("sum", "mean"):
        return _summed(ctx, x, dim, index, source, include_self, mean=reduce == "mean")
    kind, neutral, take_in = _REDUCTIONS[reduce]
    reduced, hit = _grouped(ctx, shape, dim, index, source, kind, neutral)
    return ctx.binary(take_in, x, reduced) if include_self else ctx.where(hit, reduced, x)


def _summed(
    ctx: Context, x: Operand, dim: int, index: Operand, source: Operand, include_self: bool, *, mean: bool
) -> Operand:
    shape = shape_of(x)
    total = scattered(ctx, shape, dim, index, source)
    if include_self and not mean:
        return ctx.add(x, total)
    count = scattered(ctx, shape, dim, index, torch.ones(shape_of(index)))
    if include_self:
        return ctx.div(ctx.add(x, total), ctx.add(count, 1.0))
    if mean:
        total = ctx.div(total, ctx.binary("maximum", count, 1.0))
    return ctx.where(ctx.boolean(count), total, x)


def _grouped(
    ctx: Context, shape: Shape, dim: int, index: Operand, source: Operand, kind: str, neutral: float
) -> tuple[Operand, Operand]:
    """(reduced writes, whether there is one), of the given shape."""
    for axis, extent in enumerate(shape_of(index)):
        if extent != shape_of(source)[axis]:
            source = ctx.slice(source, axis, 0, extent)
    order = [a for a in range(len(shape)) if a != dim] + [dim]
    where, values = ctx.transpose(index, order), ctx.transpose(source, order)
    lead, picks = shape_of(where)[:-1], shape_of(where)[-1]
    rows = math.prod(lead)
    mask = one_hot(ctx, ctx.reshape(where, (rows, picks)), shape[dim], 2)
    spread = ctx.where(ctx.boolean_of_01(mask), ctx.reshape(values, (rows, picks, 1)), neutral)
    results = []
    for part, empty in ((ctx.reduce(kind, spread, [1]), neutral), (ctx.reduce("max", mask, [1]), 0.0)):
        back = move_axis_back(ctx, ctx.reshape(part, (*lead, shape[dim])), dim)
        missing = [(0, n - have) for n, have in zip(shape, shape_of(back), strict=True)]
        results.append(ctx.pad(back, missing, empty))
    return results[0], ctx.boolean(results[1])


@lowering("index_reduce.default")
def index_reduce(
    ctx: Context, x: Operand, dim: int, index: Operand, source: Operand, reduce: str, *, include_self: bool = True
) -> Operand:  # fmt: skip
    """`index_reduce(x, d, i, s, r) -> ` as `scatter_reduce`, the index the same for all lines"""
    shape = shape_of(source)
    dim %= len(shape)
    column = ctx.reshape(index, tuple(n if a == dim else 1 for a, n in enumerate(shape)))
    return scatter_reduce(
        ctx, x, dim, ctx.broadcast(column, shape), source, reduce, include_self=include_self
    )
