"""Parts of tensors and their gradients: slices, selections, splits, pads, flips, rolls.

Of memory that strides show (`as_strided` and its like), the part shown becomes slices and transposes; memory that is
shown twice (overlapping windows) is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, Shape, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.mil.program import Value


def _range(extent: int, start: int | None, end: int | None, step: int) -> tuple[int, int]:
    """A slice's start and stop in `[0, extent]`."""
    begin, stop, _ = slice(start, end, step).indices(extent)
    return begin, max(begin, stop)


@lowering("slice.Tensor slice_copy.Tensor")
def slice_(
    ctx: Context, x: Operand, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Operand:
    """`slice(x, d, a, b) -> slice_by_size(x)`; with a step `-> slice_by_index(x)`"""
    begin, stop = _range(shape_of(x)[dim], start, end, step)
    return ctx.slice(x, dim, begin, stop, step)


@lowering("select.int select_copy.int")
def select(ctx: Context, x: Operand, dim: int, index: int) -> Operand:
    """`select(x, d, i) -> reshape(slice_by_size(x))`"""
    index %= shape_of(x)[dim]
    return ctx.reshape(ctx.slice(x, dim, index, index + 1), ctx.shape)


@lowering("narrow_copy.default")
def narrow(ctx: Context, x: Operand, dim: int, start: int, length: int) -> Operand:
    """`narrow(x, d, a, n) -> slice_by_size(x)`"""
    start %= shape_of(x)[dim]
    return ctx.slice(x, dim, start, start + length)


def spread(ctx: Context, g: Operand, axis: int, extent: int, start: int, step: int) -> Operand:
    """Put `g` at `start, start + step, ...` of an axis of zeros: the gradient of a strided slice.

    step 1: `pad(g)`; else `reshape [.., n, 1, ..] -> pad [.., n, step, ..] -> reshape [.., n step, ..] ->
    pad`
    """
    shape = shape_of(g)
    axis %= len(shape)
    g = zero_insert(ctx, g, axis, step)
    length = shape_of(g)[axis]  # with the zeros behind the last element, which may be cropped again
    return ctx.pad_axis(g, axis, start, extent - start - length)


def zero_insert(ctx: Context, g: Operand, axis: int, step: int) -> Operand:
    """`step - 1` zeros behind each element of an axis (also behind the last)."""
    if step == 1:
        return g
    shape = shape_of(g)
    lead, rest = shape[:axis], shape[axis + 1 :]
    if len(shape) > 4:  # rank 5 is the engine's last: merge the other axes
        merged = ctx.reshape(g, (math.prod(lead), shape[axis], math.prod(rest)))
        return ctx.reshape(zero_insert(ctx, merged, 1, step), (*lead, shape[axis] * step, *rest))
    padded = ctx.pad_axis(ctx.reshape(g, (*lead, shape[axis], 1, *rest)), axis + 1, 0, step - 1)
    return ctx.reshape(padded, (*lead, shape[axis] * step, *rest))


@lowering("slice_scatter.default")
def slice_scatter(
    ctx: Context,
    x: Operand,
    source: Operand,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Operand:
    """`slice_scatter(x, s) -> concat(x before, s, x behind)`; with a step `-> x * kept + spread(s)`"""
    extent = shape_of(x)[dim]
    begin, stop = _range(extent, start, end, step)
    if step == 1:
        parts = [ctx.slice(x, dim, 0, begin)] if begin else []
        parts.append(source)
        parts += [ctx.slice(x, dim, stop, extent)] if stop < extent else []
        return ctx.concat(parts, dim)
    kept = torch.ones(extent)
    kept[begin:stop:step] = 0
    rank = len(shape_of(x))
    kept = kept.reshape([extent if i == dim % rank else 1 for i in range(rank)])
    return ctx.add(ctx.mul(x, kept), spread(ctx, source, dim % rank, extent, begin, step))


@lowering("select_scatter.default")
def select_scatter(ctx: Context, x: Operand, source: Operand, dim: int, index: int) -> Operand:
    """`select_scatter(x, s, d, i) -> concat(x before, s, x behind)`"""
    shape = shape_of(x)
    dim, index = dim % len(shape), index % shape[dim]
    kept = ctx.reshape(source, tuple(1 if i == dim else n for i, n in enumerate(shape)))
    return slice_scatter(ctx, x, kept, dim, index, index + 1)


@lowering("split_with_sizes.default")
def split(ctx: Context, x: Operand, sizes: int | Sequence[int], dim: int = 0) -> list[Operand]:
    """`split(x, n, d) -> slice_by_size(x)` for each part"""
    parts, start = [], 0
    for meta in ctx.meta:
        stop = start + int(meta.shape[dim])
        parts.append(ctx.slice(x, dim, start, stop))
        start = stop
    return parts


@lowering("unbind_copy.int")
def unbind(ctx: Context, x: Operand, dim: int = 0) -> list[Operand]:
    """`unbind(x, d) -> reshape(slice_by_size(x))` for each part"""
    shape = shape_of(x)
    rest = tuple(n for i, n in enumerate(shape) if i != dim % len(shape))
    return [ctx.reshape(ctx.slice(x, dim, i, i + 1), rest) for i in range(shape[dim])]


@lowering("constant_pad_nd.default")
def constant_pad(ctx: Context, x: Operand, pad: Sequence[int], *options: object, **_: object) -> Operand:
    """`constant_pad_nd(x, p, v) -> pad(x, p, constant_val=v)`; negative pads are slices"""
    value = float(options[-1]) if options and isinstance(options[-1], (int, float)) else 0.0
    rank = len(shape_of(x))
    pairs = [(0, 0)] * rank
    for i in range(len(pad) // 2):
        pairs[rank - 1 - i] = (pad[2 * i], pad[2 * i + 1])
    return ctx.pad(x, pairs, value)


@lowering("flip.default")
def flip(ctx: Context, x: Operand, dims: Sequence[int]) -> Operand:
    """`flip(x, d) -> concat` of single slices in reverse; axes longer than 16 `-> matmul` with a
    permutation
    """
    for dim in dims:
        x = _reversed(ctx, x, dim % len(shape_of(x)))
    return x


#: Axes longer than the first are reversed in blocks of the second; constants of more elements are refused.
_LONGEST_REVERSED, _BLOCK, _MOST_ELEMENTS = 2048, 256, 2**26


def _reversed(ctx: Context, x: Operand, dim: int) -> Operand:
    shape = shape_of(x)
    n, rank = shape[dim], len(shape)
    if n <= _LONGEST_REVERSED or not isinstance(x, Value):
        return take(ctx, x, dim, torch.arange(n - 1, -1, -1))
    blocks, lines = -(-n // _BLOCK), math.prod(shape) // n
    order = [*(a for a in range(rank) if a != dim), dim]
    flat = ctx.reshape(ctx.transpose(x, order), (lines, n))
    rows = ctx.reshape(ctx.pad_axis(flat, 1, blocks * _BLOCK - n, 0), (lines, blocks, _BLOCK))
    turned = _reversed(ctx, _reversed(ctx, rows, 2), 1)
    flat = ctx.slice(ctx.reshape(turned, (lines, blocks * _BLOCK)), 1, 0, n)
    back = ctx.reshape(flat, tuple(shape[a] for a in order))
    return ctx.transpose(back, [order.index(a) for a in range(rank)])


@lowering("roll.default")
def roll(ctx: Context, x: Operand, shifts: Sequence[int], dims: Sequence[int] = ()) -> Operand:
    """`roll(x, s, d) -> concat(slice_by_size(x, tail), slice_by_size(x, head))`"""
    if not dims:
        shape = shape_of(x)
        return ctx.reshape(roll(ctx, ctx.reshape(x, (-1,)), shifts, [0]), shape)
    for shift, dim in zip(shifts, dims, strict=True):
        extent = shape_of(x)[dim]
        cut = (extent - shift) % extent
        if cut:
            x = ctx.concat([ctx.slice(x, dim, cut, extent), ctx.slice(x, dim, 0, cut)], dim)
    return x


#: Runs of consecutive indices up to which `take` slices and concatenates; beyond, it multiplies by one-hot.
SLICED_RUNS = 16


def take(ctx: Context, x: Operand, dim: int, index: torch.Tensor) -> Operand:
    """`x` at the constant indices of one axis, as slices and `concat`, or as a product with a one-hot
    constant.

    The product keeps x to a multiple of 2^-16 (the accumulator's step) below 32768 (its range): exact from
    2^-6 on.
    """
    shape = shape_of(x)
    dim %= len(shape)
    if not isinstance(x, Value):
        return torch.as_tensor(x).index_select(dim, index)
    wanted = [int(i) % shape[dim] for i in index]
    runs = _runs(wanted)
    if len(runs) <= SLICED_RUNS:
        return ctx.concat([ctx.slice(x, dim, a, b) for a, b in runs], dim)
    if len(wanted) * shape[dim] > _MOST_ELEMENTS:
        raise ctx.refuse(
            f"picks {len(wanted)} of {shape[dim]} elements in an order of which the program would hold "
            f"{len(wanted)} x {shape[dim]} numbers.", "Pick fewer, or order them on the host.",
        )  # fmt: skip
    chosen = torch.nn.functional.one_hot(torch.tensor(wanted), shape[dim]).double()
    return along(ctx, x, dim, chosen)


def _runs(index: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for i in index:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def along(ctx: Context, x: Operand, dim: int, matrix: torch.Tensor) -> Operand:
    """A constant linear map `[m, n]` applied along one axis of extent n.

    last axis: `matmul(x, matrix, transpose_y)`; second last: `matmul(matrix, x)`; others are transposed
    there.
    """
    shape = shape_of(x)
    rank, dim = len(shape), dim % len(shape)
    x = ctx.number(x)
    if rank == 1:
        column = ctx.matmul(ctx.reshape(x, (1, *shape)), matrix, ty=True)
        return ctx.reshape(column, (matrix.shape[0],))
    if dim == rank - 1:
        flat = ctx.reshape(x, (-1, *shape[-2:])) if rank > 4 else x
        return ctx.reshape(ctx.matmul(flat, matrix, ty=True), (*shape[:-1], matrix.shape[0]))
    before, after = shape[:dim], shape[dim + 1 :]
    lead = 1
    for n in before:
        lead *= n
    flat = ctx.reshape(x, (lead, shape[dim], -1))
    return ctx.reshape(ctx.matmul(matrix, flat), (*before, matrix.shape[0], *after))


@lowering("unfold.default")
def unfold(ctx: Context, x: Operand, dim: int, size: int, step: int) -> Operand:
    """`unfold(x, d, n, s) -> concat` of n shifted slices on a new last axis"""
    shape = shape_of(x)
    dim %= len(shape)
    count = (shape[dim] - size) // step + 1
    parts = [ctx.slice(x, dim, t, t + (count - 1) * step + 1, step) for t in range(size)]
    return ctx.reshape(ctx.concat([ctx.reshape(part, (*shape_of(part), 1)) for part in parts], -1), ctx.shape)


@dataclass(frozen=True)
class _Grid:
    """The memory as a box of `shape`, of which the view is the first `taken` of each axis, then permuted.

    The box begins `offset` into the memory of `numel` elements; a box that is larger than the rest of the
    memory has `missing` elements more, none of which the view shows.
    """

    offset: int
    missing: int
    shape: Shape
    taken: Shape
    permutation: tuple[int, ...]
    size: Shape


def _grid(ctx: Context, numel: int, size: Sequence[int], stride: Sequence[int], offset: int | None) -> _Grid:
    """Axes by falling stride; each stride a multiple of the next and not less than what the next axis spans."""
    start = offset or 0
    axes = sorted((i for i, n in enumerate(size) if n > 1), key=lambda i: -stride[i])
    kept = [size[i] for i in axes]
    steps = [stride[i] for i in axes] + [1]
    spans = [n * s for n, s in zip(kept, steps, strict=False)]
    whole = all(s and s % t == 0 for s, t in itertools.pairwise(steps))
    if not whole or any(s < span for s, span in zip(steps, spans[1:], strict=False)):
        raise ctx.refuse(
            f"needs strides that show each element once; got {list(stride)} of {numel} elements as {list(size)}.",
            "Use slices, or unfold for windows.",
        )
    shape = [kept[0] if kept else 1, *(s // t for s, t in itertools.pairwise(steps))]
    taken = [*(kept or [1]), *([1] if kept else [])]
    missing = math.prod(shape) - (numel - start)
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    return _Grid(start, missing, tuple(shape), tuple(taken), tuple(order), tuple(size))


def _window_step(shape: Shape, size: Sequence[int], stride: Sequence[int]) -> int:
    """The step of windows [..., n, w] that overlap along the last axis of [..., T]; 0 where there are none."""
    if (
        len(size) < 2
        or len(shape) != len(size) - 1
        or tuple(size[:-2]) != tuple(shape[:-1])
        or stride[-1] != 1
    ):
        return 0
    step, whole = stride[-2], [math.prod(shape[i + 1 :]) for i in range(len(shape) - 1)]
    fits = 0 < step < size[-1] and (size[-2] - 1) * step + size[-1] <= shape[-1]
    return step if fits and list(stride[:-2]) == whole else 0


def _box(ctx: Context, x: Operand, grid: _Grid) -> Operand:
    """The memory from the offset on as the grid's box."""
    flat = ctx.reshape(x, (math.prod(shape_of(x)),))
    flat = ctx.slice(flat, 0, grid.offset, shape_of(flat)[0])
    return ctx.reshape(ctx.pad_axis(flat, 0, 0, grid.missing), grid.shape)


@lowering("as_strided.default as_strided_copy.default")
def as_strided(
    ctx: Context, x: Operand, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Operand:
    """`as_strided(x) -> transpose(slice_by_size(reshape(x)))`, or `reshape` for the whole tensor in order

    Windows that overlap along the last axis, as `torch.stft` takes them, are those of `unfold`.
    """
    shape = shape_of(x)
    if not storage_offset and (step := _window_step(shape, size, stride)):
        return unfold(
            ctx, ctx.slice(x, len(shape) - 1, 0, (size[-2] - 1) * step + size[-1]), -1, size[-1], step
        )
    grid = _grid(ctx, math.prod(shape_of(x)), size, stride, storage_offset)
    box = _box(ctx, x, grid)
    for axis, count in enumerate(grid.taken):
        box = ctx.slice(box, axis, 0, count)
    ordered = ctx.reshape(box, grid.taken[: len(grid.permutation)] or (1,))
    return ctx.reshape(ctx.transpose(ordered, grid.permutation or (0,)), ctx.shape)


@lowering("as_strided_scatter.default")
def as_strided_scatter(
    ctx: Context, x: Operand, source: Operand, size: Sequence[int], stride: Sequence[int],
    storage_offset: int | None = None,
) -> Operand:  # fmt: skip
    """`as_strided_scatter(x, s) -> ` the box of x with s in place: slices and `concat` per axis"""
    shape = shape_of(x)
    grid = _grid(ctx, math.prod(shape), size, stride, storage_offset)
    flat = ctx.reshape(x, (math.prod(shape),))
    box = _box(ctx, x, grid)
    kept = [n for n in size if n > 1] or [1]
    back = [grid.permutation.index(i) for i in range(len(grid.permutation))] or [0]
    placed = ctx.reshape(ctx.transpose(ctx.reshape(source, tuple(kept)), back), grid.taken)
    full = ctx.reshape(_replaced(ctx, box, placed, 0), (math.prod(grid.shape),))
    parts = [] if grid.offset == 0 else [ctx.slice(flat, 0, 0, grid.offset)]
    parts.append(ctx.slice(full, 0, 0, math.prod(grid.shape) - max(0, grid.missing)))
    if grid.missing < 0:  # the memory behind the box stays as it is
        parts.append(ctx.slice(flat, 0, grid.offset + math.prod(grid.shape), math.prod(shape)))
    return ctx.reshape(ctx.concat(parts, 0), shape)


def _replaced(ctx: Context, x: Operand, source: Operand, axis: int) -> Operand:
    """x with `source` in its first corner, axes from `axis` on."""
    if axis == len(shape_of(x)):
        return source
    count = shape_of(source)[axis]
    filled = _replaced(ctx, ctx.slice(x, axis, 0, count), source, axis + 1)
    return slice_scatter(ctx, x, filled, axis, 0, count)


@lowering("new_empty_strided.default empty_strided.default")
def empty_strided(ctx: Context, *_: object, **__: object) -> Operand:
    """`new_empty_strided(x, size) -> ` zeros (any content is allowed)"""
    return torch.zeros(ctx.shape)
