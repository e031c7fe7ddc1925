"""Look-ups by index: one-hot products instead of gather and scatter, which the engine lacks.

Indices are fp16 numbers in the program, exact up to 2048: that bounds the axis that is looked up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ane_trainer.ane.lower.context import Context, Operand, as_tensor, shape_of
from ane_trainer.ane.lower.registry import lowering
from ane_trainer.ane.lower.slicing import take
from ane_trainer.ane.mil import Value

#: Integers that fp16 holds without gaps.
EXACT_INTEGERS = 2048

#: Stands for a class that no label can equal.
_NEVER = -32768.0


def one_hot(ctx: Context, index: Operand, classes: int, axis: int, *, skip: int | None = None) -> Operand:
    """1 where the class along a new `axis` equals the index, else 0; class `skip` matches nothing.

    `select(equal(reshape(index, [.., 1, ..]), classes), 1, 0)`
    """
    if classes > EXACT_INTEGERS:
        raise ctx.refuse(
            f"needs at most {EXACT_INTEGERS} classes or rows, the integers fp16 holds; got {classes}.",
            "Use fewer classes, or compute this layer on the host.",
        )
    shape = ctx_index_shape(ctx, index)
    spread = ctx.reshape(index, (*shape[:axis], 1, *shape[axis:]))
    numbers = torch.arange(classes, dtype=torch.float64)
    if skip is not None and 0 <= skip < classes:
        numbers[skip] = _NEVER
    numbers = numbers.reshape([classes if i == axis else 1 for i in range(len(shape) + 1)])
    return ctx.number(ctx.binary("equal", spread, numbers))


def ctx_index_shape(ctx: Context, index: Operand) -> tuple[int, ...]:
    """The index's torch shape: a rank-0 index is `()` although the program has `[1]`."""
    shape = shape_of(index)
    node = ctx.node
    if node is not None and shape == (1,):
        for argument in node.args:
            if isinstance(argument, torch.fx.Node) and ctx.operands.get(argument) is index:
                return tuple(argument.meta["val"].shape)
    return shape


@lowering("one_hot.default")
def one_hot_(ctx: Context, index: Operand, num_classes: int = -1) -> Operand:
    """`one_hot(i, n) -> select(equal(reshape(i), arange), 1, 0)`"""
    return one_hot(ctx, index, ctx.shape[-1], len(ctx.shape) - 1)


@lowering("embedding.default")
def embedding(
    ctx: Context,
    weight: Operand,
    index: Operand,
    padding_idx: int = -1,
    scale: bool = False,
    sparse: bool = False,
) -> Operand:
    """`embedding(w, i) -> matmul(onehot(i), w)`: [M, V] @ [V, D], exact (one product x * 1 per sum)"""
    rows = shape_of(weight)[0]
    flat = ctx.reshape(index, (math.prod(shape_of(index)),))
    return ctx.reshape(ctx.matmul(_flat_one_hot(ctx, flat, rows), weight), ctx.shape)


@lowering("embedding_dense_backward.default")
def embedding_backward(
    ctx: Context, g: Operand, index: Operand, rows: int, padding_idx: int, scale_grad_by_freq: bool
) -> Operand:
    """`embedding_dense_backward(g, i) -> matmul(onehot(i), g, transpose_x=True)`; the padding row stays 0"""
    if scale_grad_by_freq:
        raise ctx.refuse("scale_grad_by_freq is not supported.", "Create the embedding without it.")
    count = math.prod(shape_of(index))
    flat = ctx.reshape(index, (count,))
    gradient = ctx.reshape(g, (count, shape_of(g)[-1]))
    return ctx.matmul(_flat_one_hot(ctx, flat, rows, skip=padding_idx), gradient, tx=True)


def _flat_one_hot(ctx: Context, flat: Operand, rows: int, skip: int | None = None) -> Operand:
    """`[M]` -> `[M, rows]`; wide tables are refused by `one_hot`."""
    column = ctx.reshape(flat, (shape_of(flat)[0], 1))
    if rows > EXACT_INTEGERS:
        raise ctx.refuse(
            f"needs a table of at most {EXACT_INTEGERS} rows, the integers fp16 holds; got {rows}.",
            "Use a smaller vocabulary, or compute this layer on the host.",
        )
    numbers = torch.arange(rows, dtype=torch.float64)
    if skip is not None and 0 <= skip < rows:
        numbers[skip] = _NEVER
    return ctx.number(ctx.binary("equal", column, numbers.reshape(1, rows)))


@lowering("index_select.default")
def index_select(ctx: Context, x: Operand, dim: int, index: Operand) -> Operand:
    """`index_select(x, d, i) -> matmul(onehot(i), x)` along the axis; constant i `-> ` slices and `concat`"""
    if not isinstance(index, Value):
        return take(ctx, x, dim, torch.as_tensor(index).reshape(-1))
    shape = shape_of(x)
    dim %= len(shape)
    matrix = _flat_one_hot(ctx, index, shape[dim])
    lead, n, rest = math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])
    picked = ctx.matmul(matrix, ctx.reshape(x, (lead, n, rest)))
    return ctx.reshape(picked, ctx.shape)


@lowering("index.Tensor")
def index_(ctx: Context, x: Operand, indices: Sequence[Operand | None]) -> Operand:
    """`index(x, [None, i]) -> ` as `index_select` on the one indexed axis, the index's shape in its place"""
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or (isinstance(given[0][1], torch.Tensor) and given[0][1].dtype == torch.bool):
        return _index_constant(ctx, x, given)
    dim, index = given[0]
    shape = shape_of(x)
    count = math.prod(shape_of(index))
    flat = ctx.reshape(index, (count,))
    if not isinstance(flat, Value):
        return ctx.reshape(take(ctx, x, dim, torch.as_tensor(flat)), ctx.shape)
    matrix = _flat_one_hot(ctx, flat, shape[dim])
    lead, rest = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    return ctx.reshape(ctx.matmul(matrix, ctx.reshape(x, (lead, shape[dim], rest))), ctx.shape)


def _index_constant(ctx: Context, x: Operand, given: Sequence[tuple[int, Operand]]) -> Operand:
    """Several constant indices on leading axes: the axes are flattened and taken from by one index."""
    if any(isinstance(i, Value) for _, i in given) or [d for d, _ in given] != list(range(len(given))):
        raise ctx.refuse(
            "needs one index tensor, or constant indices of the first axes.", "Use gather or select."
        )
    shape = shape_of(x)
    lead = shape[: len(given)]
    parts = [torch.as_tensor(i) for _, i in given]
    where = torch.arange(math.prod(lead)).reshape(lead)[tuple(parts)].reshape(-1)
    flat = ctx.reshape(x, (math.prod(lead), *shape[len(given) :]))
    return ctx.reshape(take(ctx, flat, 0, where), ctx.shape)


@lowering("gather.default")
def gather(ctx: Context, x: Operand, dim: int, index: Operand, *, sparse_grad: bool = False) -> Operand:
    """`gather(x, d, i) -> reduce_sum(mul(x, onehot(i)))`, an axis of x's length per picked element

    One pick along the axis: `reduce_sum(mul(x, onehot), axes=d)`, no extra axis.
    """
    shape, picked = shape_of(x), shape_of(index)
    dim %= len(shape)
    for axis, extent in enumerate(picked):
        if axis != dim and extent != shape[axis]:
            x = ctx.slice(x, axis, 0, extent)
    if picked[dim] == 1:
        rest = tuple(n for a, n in enumerate(picked) if a != dim)
        mask = (
            one_hot(ctx, ctx.reshape(index, rest), shape[dim], dim)
            if rest
            else _flat_one_hot(ctx, index, shape[dim])
        )
        return ctx.reshape(ctx.sum(ctx.mul(x, ctx.reshape(mask, shape_of(x))), [dim], keep=True), ctx.shape)
    mask, moved = _gather_mask(ctx, x, dim, index)
    product = ctx.matmul(mask, ctx.reshape(moved, (*shape_of(moved), 1)))
    back = ctx.reshape(product, shape_of(product)[:-1])
    return _move_axis_back(ctx, back, dim)


def _gather_mask(ctx: Context, x: Operand, dim: int, index: Operand) -> tuple[Operand, Operand]:
    """One-hot `[rest, picks, n]` and x as `[rest, n]` with axis `dim` last."""
    rank = len(shape_of(x))
    order = [a for a in range(rank) if a != dim] + [dim]
    moved, where = ctx.transpose(x, order), ctx.transpose(index, order)
    return one_hot(ctx, where, shape_of(moved)[-1], rank), moved


def _move_axis_back(ctx: Context, x: Operand, dim: int) -> Operand:
    rank = len(shape_of(x))
    order = list(range(rank - 1))
    order.insert(dim, rank - 1)
    return ctx.transpose(x, order)


@lowering("scatter_add.default")
def scatter_add(ctx: Context, x: Operand, dim: int, index: Operand, source: Operand) -> Operand:
    """`scatter_add(x, d, i, s) -> add(x, matmul(onehot(i), s, transpose_x=True))` with axis d last"""
    return ctx.add(x, _scattered(ctx, shape_of(x), dim, index, source))


def _scattered(ctx: Context, shape: tuple[int, ...], dim: int, index: Operand, source: Operand) -> Operand:
    """Zeros of `shape` with the source added at the indices."""
    dim %= len(shape)
    picked = shape_of(index)
    for axis, extent in enumerate(picked):
        if extent != shape_of(source)[axis]:
            source = ctx.slice(source, axis, 0, extent)
    rank = len(shape)
    order = [a for a in range(rank) if a != dim] + [dim]
    where, values = ctx.transpose(index, order), ctx.transpose(source, order)
    if picked[dim] == 1:
        total = ctx.mul(
            ctx.reshape(one_hot(ctx, where, shape[dim], rank), (*shape_of(where)[:-1], shape[dim])), values
        )
    else:
        mask = one_hot(ctx, where, shape[dim], rank)
        product = ctx.matmul(mask, ctx.reshape(values, (*shape_of(values), 1)), tx=True)
        total = ctx.reshape(product, shape_of(product)[:-1])
    total = _move_axis_back(ctx, total, dim)
    return ctx.pad(total, [(0, n - have) for n, have in zip(shape, shape_of(total), strict=True)])


@lowering("scatter.src scatter.value")
def scatter(ctx: Context, x: Operand, dim: int, index: Operand, source: Operand) -> Operand:
    """`scatter(x, d, i, s) -> select(hit, scattered s, x)`; an index twice in a row is summed (torch:
    undefined)
    """
    full = source if isinstance(source, (Value, torch.Tensor)) else torch.full(shape_of(index), float(source))
    if isinstance(full, torch.Tensor) and full.dim() == 0:
        full = full.expand(shape_of(index))
    shape = shape_of(x)
    hits = _scattered(ctx, shape, dim, index, torch.ones(shape_of(index)))
    placed = _scattered(ctx, shape, dim, index, full)
    if isinstance(source, (int, float)):
        return ctx.where(ctx.boolean(hits), float(source), x)
    return ctx.where(ctx.boolean(hits), placed, x)


@lowering("index_put.default _unsafe_index_put.default")
def index_put(
    ctx: Context, x: Operand, indices: Sequence[Operand | None], values: Operand, accumulate: bool = False
) -> Operand:
    """`index_put(x, [i], v, accumulate=True) -> add(x, matmul(onehot(i), v, transpose_x=True))`"""
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1:
        raise ctx.refuse("needs one index tensor.", "Index one axis at a time.")
    dim, index = given[0]
    shape = shape_of(x)
    count, lead, rest = math.prod(shape_of(index)), math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    full = ctx.broadcast(values, (*shape[:dim], *shape_of(index), *shape[dim + 1 :]))
    matrix = _flat_one_hot(ctx, ctx.reshape(index, (count,)), shape[dim])
    placed = ctx.reshape(ctx.matmul(matrix, ctx.reshape(full, (lead, count, rest)), tx=True), shape)
    if accumulate:
        return ctx.add(x, placed)
    hit = ctx.reduce("max", matrix, [0]) if isinstance(matrix, Value) else as_tensor(matrix).amax(0)
    hit = ctx.reshape(hit, (shape[dim], *(1 for _ in shape[dim + 1 :])))
    return ctx.where(ctx.boolean_of_01(ctx.broadcast(hit, shape)), placed, x)


@lowering("tril.default")
def tril(ctx: Context, x: Operand, diagonal: int = 0) -> Operand:
    """`tril(x, k) -> mul(x, triangle)`, the triangle a constant"""
    return ctx.mul(x, torch.ones(shape_of(x)[-2:]).tril(diagonal))


@lowering("triu.default")
def triu(ctx: Context, x: Operand, diagonal: int = 0) -> Operand:
    """`triu(x, k) -> mul(x, triangle)`"""
    return ctx.mul(x, torch.ones(shape_of(x)[-2:]).triu(diagonal))


@lowering("diagonal.default diagonal_copy.default")
def diagonal(ctx: Context, x: Operand, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Operand:
    """`diagonal(x) -> reduce_sum(mul(x, eye))`, then slices"""
    shape = shape_of(x)
    rank = len(shape)
    a, b = dim1 % rank, dim2 % rank
    moved = ctx.transpose(x, [i for i in range(rank) if i not in (a, b)] + [a, b])
    rows, cols = shape[a], shape[b]
    mask = torch.zeros(rows, cols, dtype=torch.float64)
    for i in range(ctx.shape[-1]):
        mask[i - min(offset, 0), i + max(offset, 0)] = 1
    summed = ctx.sum(ctx.mul(moved, mask), [-1])
    start = max(0, -offset)
    return ctx.reshape(ctx.slice(summed, -1, start, start + ctx.shape[-1]), ctx.shape)
