"""Look-ups by index: one-hot products instead of gather, which the engine lacks.

Indices are fp16 numbers in the program, exact up to 2048: that bounds the axis that is looked up.
"""

from __future__ import annotations

import math

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices import lookups
from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS, coded, most_rows
from ane_trainer.ane.compiler.lower.operands import Absent, Encoded, Operand, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules.slicing import take
from ane_trainer.ane.compiler.lower.rules.windows import Places, pick
from ane_trainer.ane.mil.program import Value

#: What a one-hot row of a weight look-up holds instead of 1; a power of two.
LOOKUP_SCALE = 64.0

#: Comparisons of elements with each other (lines times elements times elements) that a program holds.
MOST_COMPARISONS = 2**27

#: Stands for a class that no label can equal.
_NEVER = -32768.0


def one_hot(ctx: Context, index: Operand, classes: int, axis: int, *, skip: int | None = None) -> Operand:
    """1 where the class along a new `axis` equals the index, else 0; class `skip` matches nothing.

    `select(equal(reshape(index, [.., 1, ..]), classes), 1, 0)`
    """
    if isinstance(index, Encoded) and index.encoding == "split":
        if not ctx_index_shape(ctx, index):
            raise ctx.refuse("needs an index of rank 1 or more for so many rows.", "Use index.reshape(1).")
        return lookups.one_hot(ctx, index, _pair_numbers(classes, skip), axis)
    shape = ctx_index_shape(ctx, index)
    numbers = _numbers(ctx, index, classes, skip)
    spread = ctx.reshape(_plain(index), (*shape[:axis], 1, *shape[axis:]))
    numbers = numbers.reshape([classes if i == axis else 1 for i in range(len(shape) + 1)])
    return ctx.number(ctx.binary("equal", spread, numbers))


def _numbers(ctx: Context, index: Operand, rows: int, skip: int | None) -> torch.Tensor:
    """What the index is for each row: its number, or its code where fp16 does not hold it."""
    numbers = torch.arange(rows, dtype=torch.float64)
    if isinstance(index, Encoded) or (
        rows > EXACT_INTEGERS + 1 and isinstance(index, Value) and ctx.dtype == "fp16"
    ):
        if not isinstance(index, Encoded):
            raise ctx.refuse(
                f"needs at most {EXACT_INTEGERS} classes or rows, the integers fp16 holds, for an index that is "
                f"computed; got {rows}.",
                "Pass the index as an integer input of its own, or compute this layer on the host.",
            )
        if rows > most_rows(ctx.dtype):
            raise ctx.refuse(
                f"needs a table of at most {most_rows(ctx.dtype)} rows; got {rows}.",
                "Use a smaller vocabulary, or compute this layer on the host.",
            )
        numbers = coded(numbers)
    if skip is not None and 0 <= skip < rows:
        numbers[skip] = _NEVER
    return numbers


def _plain(index: Operand) -> Operand:
    """The one number of integers as codes, or as they are."""
    return index.parts[0] if isinstance(index, Encoded) else index


def _pair_numbers(rows: int, skip: int | None) -> torch.Tensor:
    """The number of each row; -1 for the one that nothing matches."""
    numbers = torch.arange(rows, dtype=torch.float64)
    if skip is not None and 0 <= skip < rows:
        numbers[skip] = -1.0
    return numbers


def ctx_index_shape(ctx: Context, index: Operand) -> tuple[int, ...]:
    """The index's torch shape: a rank-0 index is `()` although the program has `[1]`."""
    shape = shape_of(index)
    node = ctx.node
    if node is not None and shape == (1,):
        for argument in node.args:
            if isinstance(argument, torch.fx.Node) and ctx.operands.get(argument) is index:
                return tuple(argument.meta["val"].shape)
    return shape


@lowering("embedding.default", accepts="encoded")
def embedding(
    ctx: Context,
    weight: Operand,
    index: Operand,
    padding_idx: int = -1,
    scale: bool = False,
    sparse: bool = False,
) -> Operand:
    """`embedding(w, i) -> mul(matmul(select(equal(i, rows), 64, 0), w), 1/64)`: [M, V] @ [V, D]

    The accumulator's step is 2^-16 (M6 notes/numerics.md), which would cut the last bits of weights below
    2^-6. With 64 in the one-hot the look-up is exact for 2^-12 <= |w| < 512. An index in two numbers looks 1024
    rows up at a time, see `lookups.look_up`.
    """
    flat = ctx.reshape(index, (math.prod(shape_of(index)),))
    if isinstance(flat, Encoded) and flat.encoding == "split":
        looked_up = lookups.look_up(ctx, weight, flat, LOOKUP_SCALE)
        return ctx.reshape(ctx.mul(looked_up, 1.0 / LOOKUP_SCALE), ctx.shape)
    picks = flat_one_hot(ctx, flat, shape_of(weight)[0], on=LOOKUP_SCALE)
    return ctx.reshape(ctx.mul(ctx.matmul(picks, weight), 1.0 / LOOKUP_SCALE), ctx.shape)


@lowering("embedding_renorm.default", accepts="encoded")
def embedding_renorm(
    ctx: Context, weight: Operand, index: Operand, max_norm: float, norm_type: float
) -> Operand:
    """`embedding_renorm(w, i) -> mul(w, select(greater(norms, max), max / norms, 1))` for rows that are looked up"""
    if norm_type not in (1, 2):
        raise ctx.refuse(f"needs norm_type 1 or 2; got {norm_type}.", "Use one of them.")
    rows = shape_of(weight)[0]
    flat = ctx.reshape(index, (math.prod(shape_of(index)),))
    looked_up = ctx.reshape(ctx.reduce("max", flat_one_hot(ctx, flat, rows), [0]), (rows, 1))
    norms = ctx.reduce(f"l{int(norm_type)}_norm", weight, [1], keep=True)
    over = ctx.mul(ctx.number(ctx.binary("greater", norms, max_norm)), looked_up)
    shrunk = ctx.where(ctx.boolean_of_01(over), ctx.div(max_norm, ctx.add(norms, 1e-7)), 1.0)
    return ctx.mul(weight, shrunk)


@lowering("embedding_dense_backward.default", accepts="encoded")
def embedding_backward(
    ctx: Context, g: Operand, index: Operand, rows: int, padding_idx: int, scale_grad_by_freq: bool
) -> Operand:
    """`embedding_dense_backward(g, i) -> matmul(onehot(i), g, transpose_x=True)`; the padding row stays 0

    With scale_grad_by_freq divided by how often the row is looked up.
    """
    count = math.prod(shape_of(index))
    flat = ctx.reshape(index, (count,))
    gradient = ctx.reshape(g, (count, shape_of(g)[-1]))
    if isinstance(flat, Encoded) and flat.encoding == "split":
        if scale_grad_by_freq:
            raise ctx.refuse(
                "needs a smaller table for scale_grad_by_freq.", "Create the embedding without it."
            )
        return lookups.add_up(ctx, gradient, flat, rows, padding_idx)
    picks = flat_one_hot(ctx, flat, rows, skip=padding_idx)
    added = ctx.matmul(picks, gradient, tx=True)
    if not scale_grad_by_freq:
        return added
    times = ctx.reshape(ctx.sum(picks, [0]), (rows, 1))
    return ctx.div(added, ctx.binary("maximum", times, 1.0))


def flat_one_hot(ctx: Context, flat: Operand, rows: int, skip: int | None = None, on: float = 1.0) -> Operand:
    """`[M]` -> `[M, rows]` of `on` and 0; row `skip` matches nothing."""
    if isinstance(flat, Encoded) and flat.encoding == "split":
        return ctx.mul(lookups.one_hot(ctx, flat, _pair_numbers(rows, skip), 1), on)
    numbers = _numbers(ctx, flat, rows, skip)
    column = ctx.reshape(_plain(flat), (shape_of(flat)[0], 1))
    return ctx.where(ctx.binary("equal", column, numbers.reshape(1, rows)), on, 0.0)


@lowering("index_select.default", accepts="encoded")
def index_select(ctx: Context, x: Operand, dim: int, index: Operand) -> Operand:
    """`index_select(x, d, i) -> matmul(onehot(i), x)` along the axis; constant i `-> ` slices and `concat`"""
    if not isinstance(index, Value):
        return take(ctx, x, dim, torch.as_tensor(index).reshape(-1))
    shape = shape_of(x)
    dim %= len(shape)
    matrix = flat_one_hot(ctx, index, shape[dim])
    lead, n, rest = math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])
    picked = ctx.matmul(matrix, ctx.reshape(x, (lead, n, rest)))
    return ctx.reshape(picked, ctx.shape)


@lowering("gather.default", accepts="absent encoded")
def gather(
    ctx: Context, x: Operand, dim: int, index: Operand | Absent, *, sparse_grad: bool = False
) -> Operand:
    """`gather(x, d, i) -> reduce_sum(mul(x, onehot(i)))`, an axis of x's length per picked element

    One pick along the axis: `reduce_sum(mul(x, onehot), axes=d)`, no extra axis. Whole lines, by an index that is
    expanded along the axes behind d: `matmul(onehot(i), x)`. By a pooling's indices `-> select` of the windows'
    elements.
    """
    if isinstance(index, Absent):
        return _gather_maxima(ctx, x, dim, index)
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
            else flat_one_hot(ctx, index, shape[dim])
        )
        return ctx.reshape(ctx.sum(ctx.mul(x, ctx.reshape(mask, shape_of(x))), [dim], keep=True), ctx.shape)
    lines = one_per_line(ctx, dim)
    if lines is not None:
        flat = (math.prod(picked[:dim]), picked[dim])
        mask = one_hot(ctx, ctx.reshape(lines, flat), shape[dim], 2)
        return ctx.reshape(ctx.matmul(mask, ctx.reshape(x, (flat[0], shape[dim], -1))), ctx.shape)
    mask, lines = _gather_mask(ctx, x, dim, index)
    product = ctx.matmul(mask, lines)
    order = (*(n for axis, n in enumerate(picked) if axis != dim), picked[dim])
    return move_axis_back(ctx, ctx.reshape(product, order), dim)


def _gather_maxima(ctx: Context, x: Operand, dim: int, index: Absent) -> Operand:
    """The gradient of unpooling: what x `[N, C, places]` has where the pooling found its maxima."""
    m = index.maxima if isinstance(index, Places) else None
    shape = shape_of(x)
    if m is not None and dim % len(shape) == len(shape) - 1 and math.prod(shape) == math.prod(m.shape):
        return ctx.reshape(pick(ctx, m, ctx.reshape(x, m.shape)), ctx.shape)
    numbers = index.numbers(ctx) if isinstance(index, Places) else None
    if numbers is None:
        raise ctx.refuse(index.reason, index.fix)
    return gather(ctx, x, dim, numbers)


def one_per_line(ctx: Context, dim: int) -> Operand | None:
    """The index of the present node (its third argument) up to axis `dim`, if the axes behind only repeat it."""
    assert ctx.node is not None
    index = ctx.node.args[2]
    if not isinstance(index, torch.fx.Node) or str(index.target) not in (
        "aten.expand.default",
        "aten.repeat.default",
    ):
        return None
    source, full = index.args[0], tuple(index.meta["val"].shape)
    assert isinstance(source, torch.fx.Node)
    given = tuple(source.meta["val"].shape)
    given = (1,) * (len(full) - len(given)) + given
    dim %= len(full)
    if dim == len(full) - 1 or given[: dim + 1] != full[: dim + 1] or math.prod(given[dim + 1 :]) != 1:
        return None
    return ctx.reshape(ctx.operands[source], full[: dim + 1])


def _gather_mask(ctx: Context, x: Operand, dim: int, index: Operand) -> tuple[Operand, Operand]:
    """One-hot `[rest, picks, n]` and x as `[rest, n, 1]`, all axes but `dim` merged."""
    rank = len(shape_of(x))
    order = [a for a in range(rank) if a != dim] + [dim]
    moved, where = ctx.transpose(x, order), ctx.transpose(index, order)
    (*lead, n), picks = shape_of(moved), shape_of(where)[-1]
    rows = math.prod(lead)
    mask = one_hot(ctx, ctx.reshape(where, (rows, picks)), n, 2)
    return mask, ctx.reshape(moved, (rows, n, 1))


def move_axis_back(ctx: Context, x: Operand, dim: int) -> Operand:
    """The last axis moved to position `dim`."""
    rank = len(shape_of(x))
    order = list(range(rank - 1))
    order.insert(dim, rank - 1)
    return ctx.transpose(x, order)


@lowering("diagonal.default")
def diagonal(ctx: Context, x: Operand, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Operand:
    """`diagonal(x) -> reduce_sum(mul(x, eye))`, then slices"""
    shape = shape_of(x)
    rank = len(shape)
    a, b = dim1 % rank, dim2 % rank
    moved = ctx.transpose(x, [i for i in range(rank) if i not in (a, b)] + [a, b])
    rows, cols = shape[a], shape[b]
    mask = _diagonal_mask(rows, cols, offset, ctx.shape[-1])
    summed = ctx.sum(ctx.mul(moved, mask), [-1])
    start = max(0, -offset)
    return ctx.reshape(ctx.slice(summed, -1, start, start + ctx.shape[-1]), ctx.shape)


def _diagonal_mask(rows: int, cols: int, offset: int, count: int) -> torch.Tensor:
    mask = torch.zeros(rows, cols, dtype=torch.float64)
    places = torch.arange(count)
    mask[places - min(offset, 0), places + max(offset, 0)] = 1
    return mask


@lowering("diagonal_scatter.default")
def diagonal_scatter(
    ctx: Context, x: Operand, source: Operand, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Operand:
    """`diagonal_scatter(x, s) -> add(mul(x, 1 - eye), mul(reshape(pad(s)), eye))`"""
    shape = shape_of(x)
    rank = len(shape)
    a, b = dim1 % rank, dim2 % rank
    order = [i for i in range(rank) if i not in (a, b)] + [a, b]
    count = shape_of(source)[-1]
    mask = _diagonal_mask(shape[a], shape[b], offset, count)
    start = max(0, -offset)
    column = ctx.pad_axis(source, -1, start, shape[a] - start - count)
    placed = ctx.mul(ctx.reshape(column, (*shape_of(column), 1)), mask)
    moved = ctx.add(ctx.mul(ctx.transpose(x, order), 1 - mask), placed)
    return ctx.transpose(moved, [order.index(i) for i in range(rank)])
