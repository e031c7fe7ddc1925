"""Gathers and scatters by index tensors, and reductions over groups that an index names: one-hot products.

The engine has neither gather nor scatter. Additions add; of several writes to one place the last wins, as torch's
CPU kernels do. Sums over groups are one-hot products; for the other reductions each group sees all writes, those of
other groups replaced by what changes nothing: `reduce(select(onehot(i), s, neutral))`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import (
    Encoded,
    Operand,
    Shape,
    as_tensor,
    broadcast_shape,
    is_bool,
    shape_of,
)
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules.indexing import (
    MOST_COMPARISONS,
    flat_one_hot,
    move_axis_back,
    one_hot,
    one_per_line,
)
from ane_trainer.ane.compiler.lower.rules.slicing import take
from ane_trainer.ane.compiler.lower.rules.windows import LOWEST
from ane_trainer.ane.mil.program import Value


@dataclass(frozen=True)
class Picks:
    """`x` with the indexed axes next to each other, from axis `first` on.

    `given` are the indices broadcast to the shape `where`; axis k of `x` is axis `order[k]` of the tensor.
    """

    x: Operand
    first: int
    given: tuple[Operand, ...]
    where: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Extents of the indexed axes."""
        return shape_of(self.x)[self.first : self.first + len(self.given)]


def picks(ctx: Context, x: Operand, indices: Sequence[Operand | None]) -> Picks:
    """What the indices mean; axes that are no neighbours come to the front, as torch puts them in the result."""
    indices = _without_masks(ctx, indices)
    axes = [d for d, i in enumerate(indices) if i is not None]
    rank, first = len(shape_of(x)), axes[0]
    order = list(range(rank))
    if axes != list(range(first, first + len(axes))):
        order, first = axes + [d for d in range(rank) if d not in axes], 0
    given: list[Operand] = [i for i in indices if i is not None]
    where = broadcast_shape(*(shape_of(i) for i in given))
    for k, (d, i) in enumerate(zip(axes, given, strict=True)):
        positive = i % shape_of(x)[d] if isinstance(i, torch.Tensor) else i
        given[k] = ctx.broadcast(positive, where)
    return Picks(ctx.transpose(x, order), first, tuple(given), where, tuple(order))


def _without_masks(ctx: Context, indices: Sequence[Operand | None]) -> list[Operand | None]:
    """Each constant mask replaced by the indices of its true elements."""
    result: list[Operand | None] = []
    for index in indices:
        if index is None or not is_bool(index):
            result.append(index)
        elif isinstance(index, Value):
            raise ctx.refuse(
                "needs indices; a computed mask gives a shape that depends on data.",
                "Keep the shape: torch.where, masked_fill, or a product with the mask.",
            )
        else:
            result += torch.as_tensor(index).nonzero(as_tuple=True)
    return result


@lowering("index.Tensor", accepts="encoded")
def index_(ctx: Context, x: Operand, indices: Sequence[Operand | None]) -> Operand:
    """`index(x, [None, i]) -> ` as `index_select`, the index's shape in its place

    Several indices: `y = matmul(onehot(i), x)`, then
    `matmul(reshape(onehot(j), [M, 1, n]), reshape(y, [M, n, rest]))`; all constant, masks too `-> ` slices and
    `concat`. Indexed axes that are no neighbours `-> transpose` first.
    """
    p = picks(ctx, x, indices)
    if not any(isinstance(i, (Value, Encoded)) for i in p.given):
        return _index_constant(ctx, p)
    shape, several = shape_of(p.x), len(p.given) > 1
    lead, count = math.prod(shape[: p.first]), math.prod(p.where)
    inner = math.prod(p.sizes)
    y = ctx.reshape(p.x, (lead, inner, -1))
    if several and lead != 1:
        y = ctx.transpose(y, (1, 0, 2))
    batch = 1 if several else lead
    y = ctx.matmul(
        flat_one_hot(ctx, ctx.reshape(p.given[0], (count,)), p.sizes[0]),
        ctx.reshape(y, (batch, p.sizes[0], -1)),
    )
    for index, size in zip(p.given[1:], p.sizes[1:], strict=True):
        row = ctx.reshape(flat_one_hot(ctx, ctx.reshape(index, (count,)), size), (count, 1, size))
        y = ctx.matmul(row, ctx.reshape(y, (count, size, -1)))
    if several and lead != 1:
        y = ctx.transpose(ctx.reshape(y, (count, lead, -1)), (1, 0, 2))
    return ctx.reshape(y, ctx.shape)


def _index_constant(ctx: Context, p: Picks) -> Operand:
    """Constant indices: the indexed axes are flattened and taken from by one index."""
    shape, inner = shape_of(p.x), math.prod(p.sizes)
    parts = tuple(torch.as_tensor(i) for i in p.given)
    flat_index = torch.arange(inner).reshape(p.sizes)[parts].reshape(-1)
    flat = ctx.reshape(p.x, (*shape[: p.first], inner, *shape[p.first + len(p.given) :]))
    return ctx.reshape(take(ctx, flat, p.first, flat_index), ctx.shape)


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
    flat = (math.prod(shape[:-1]), n)
    if n * math.prod(shape) > MOST_COMPARISONS:
        raise ctx.refuse(
            f"compares {n} writes with each other in {flat[0]} lines, too many.", "Write in parts."
        )
    parts = index.parts if isinstance(index, Encoded) else (index,)
    later: Operand = torch.ones(n, n).triu(1)
    for part in parts:
        same = ctx.binary("equal", ctx.reshape(part, (*flat, 1)), ctx.reshape(part, (flat[0], 1, n)))
        later = ctx.mul(ctx.number(same), later)
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


@lowering("index_put.default", accepts="encoded")
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
