"""Writes by index: one-hot products instead of scatter, which the engine lacks. Additions add; of several
writes to one place the last wins, as torch's CPU kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS
from ane_trainer.ane.compiler.lower.operands import Operand, Shape, as_tensor, is_bool, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules.indexing import flat_one_hot, move_axis_back, one_hot, one_per_line
from ane_trainer.ane.compiler.lower.rules.picking import picks
from ane_trainer.ane.mil.program import Value


@lowering("scatter_add.default", accepts="encoded")
def scatter_add(ctx: Context, x: Operand, dim: int, index: Operand, source: Operand) -> Operand:
    """`scatter_add(x, d, i, s) -> add(x, matmul(onehot(i), s, transpose_x=True))` with axis d last"""
    return ctx.add(x, scattered(ctx, shape_of(x), dim, index, source))


def scattered(
    ctx: Context, shape: Shape, dim: int, index: Operand, source: Operand, *, last_wins: bool = False
) -> Operand:
    """Zeros of `shape` with the source added at the indices."""
    rank = len(shape)
    dim %= rank
    for axis, extent in enumerate(shape_of(index)):
        if extent != shape_of(source)[axis]:
            source = ctx.slice(source, axis, 0, extent)
    lines = None if last_wins else one_per_line(ctx, dim)
    if lines is not None:
        return _scattered_lines(ctx, shape, dim, lines, source)
    order = [a for a in range(rank) if a != dim] + [dim]
    where, values = ctx.transpose(index, order), ctx.transpose(source, order)
    if last_wins:
        values = ctx.mul(values, _is_last(ctx, where))
    lead, picks = shape_of(where)[:-1], shape_of(where)[-1]
    rows = math.prod(lead)
    mask = one_hot(ctx, ctx.reshape(where, (rows, picks)), shape[dim], 2)
    total = ctx.matmul(mask, ctx.reshape(values, (rows, picks, 1)), tx=True)
    total = move_axis_back(ctx, ctx.reshape(total, (*lead, shape[dim])), dim)
    return ctx.pad(total, [(0, n - have) for n, have in zip(shape, shape_of(total), strict=True)])


def _scattered_lines(ctx: Context, shape: Shape, dim: int, index: Operand, source: Operand) -> Operand:
    """Whole lines added at their places: `matmul(onehot(i), s, transpose_x=True)`, index `[*lead, picks]`."""
    *lead, picks = shape_of(index)
    flat = (math.prod(lead), picks)
    mask = one_hot(ctx, ctx.reshape(index, flat), shape[dim], 2)
    total = ctx.matmul(mask, ctx.reshape(source, (*flat, -1)), tx=True)
    total = ctx.reshape(total, (*lead, shape[dim], *shape_of(source)[dim + 1 :]))
    return ctx.pad(total, [(0, n - have) for n, have in zip(shape, shape_of(total), strict=True)])


def _is_last(ctx: Context, index: Operand) -> Operand:
    """1 where no later index of the last axis is the same, else 0: `n x n` comparisons."""
    shape = shape_of(index)
    n = shape[-1]
    if n == 1:
        return torch.ones(shape)
    if n > EXACT_INTEGERS:
        raise ctx.refuse(f"needs at most {EXACT_INTEGERS} writes along an axis; got {n}.", "Write in parts.")
    flat = (math.prod(shape[:-1]), n)
    same = ctx.binary("equal", ctx.reshape(index, (*flat, 1)), ctx.reshape(index, (flat[0], 1, n)))
    later = ctx.mul(ctx.number(same), torch.ones(n, n).triu(1))
    repeated = ctx.reduce("max", later, [-1]) if isinstance(later, Value) else torch.as_tensor(later).amax(-1)
    return ctx.reshape(ctx.sub(1.0, repeated), shape)


@lowering("scatter.src scatter.value", accepts="encoded")
def scatter(ctx: Context, x: Operand, dim: int, index: Operand, source: Operand) -> Operand:
    """`scatter(x, d, i, s) -> select(hit, scattered s, x)`"""
    number = not isinstance(source, (Value, torch.Tensor)) or not shape_of(source)
    shape = shape_of(x)
    hits = ctx.boolean(scattered(ctx, shape, dim, index, torch.ones(shape_of(index))))
    if number:
        return ctx.where(hits, source, x)
    return ctx.where(hits, scattered(ctx, shape, dim, index, source, last_wins=True), x)


@lowering("index_put.default _unsafe_index_put.default", accepts="encoded")
def index_put(
    ctx: Context, x: Operand, indices: Sequence[Operand | None], values: Operand, accumulate: bool = False
) -> Operand:
    """`index_put(x, [i], v, accumulate=True) -> add(x, matmul(onehot(i), v, transpose_x=True))`

    Several indices: their one-hot rows are multiplied out first. Without accumulate
    `-> select(hit, placed, x)`. A boolean mask and one number `-> select(mask, v, x)`.
    """
    mask = indices[0]
    if len(indices) == 1 and mask is not None and is_bool(mask) and math.prod(shape_of(values)) == 1:
        shape = shape_of(x)
        full = ctx.reshape(mask, (*shape_of(mask), *(1 for _ in shape[len(shape_of(mask)) :])))
        return ctx.where(full, ctx.broadcast(values, shape), x)
    p = picks(ctx, x, indices)
    shape, first = shape_of(p.x), p.first
    count, lead = math.prod(p.where), math.prod(shape[:first])
    rest = shape[first + len(p.given) :]
    full = ctx.broadcast(ctx.number(values), (*shape[:first], *p.where, *rest))
    rows = [flat_one_hot(ctx, ctx.reshape(i, (count,)), n) for i, n in zip(p.given, p.sizes, strict=True)]
    matrix = _multiplied_out(ctx, rows)
    if not accumulate:
        matrix = _only_last(ctx, matrix)
    source = ctx.reshape(full, (lead, count, math.prod(rest)))
    result = ctx.reshape(ctx.matmul(matrix, source, tx=True), shape)
    if accumulate:
        result = ctx.add(p.x, result)
    else:
        hit = ctx.reduce("max", matrix, [0]) if isinstance(matrix, Value) else as_tensor(matrix).amax(0)
        hit = ctx.broadcast(ctx.reshape(hit, (*p.sizes, *(1 for _ in rest))), shape)
        result = ctx.where(ctx.boolean_of_01(hit), result, p.x)
    return ctx.transpose(result, [p.order.index(i) for i in range(len(shape))])


def _multiplied_out(ctx: Context, rows: Sequence[Operand]) -> Operand:
    """One-hot rows `[M, n]`, `[M, m]`, ... -> `[M, n m ...]`."""
    result = rows[0]
    for row in rows[1:]:
        m, n = shape_of(result)
        k = shape_of(row)[1]
        result = ctx.reshape(ctx.mul(ctx.reshape(result, (m, n, 1)), ctx.reshape(row, (m, 1, k))), (m, n * k))
    return result


def _only_last(ctx: Context, matrix: Operand) -> Operand:
    """One-hot rows `[M, n]` with all but the last of equal rows set to 0."""
    m = shape_of(matrix)[0]
    if m == 1:
        return matrix
    same = ctx.mul(ctx.matmul(matrix, matrix, ty=True), torch.ones(m, m).triu(1))
    repeated = (
        ctx.reduce("max", same, [-1], keep=True)
        if isinstance(same, Value)
        else as_tensor(same).amax(-1, True)
    )
    return ctx.mul(matrix, ctx.sub(1.0, repeated))
