"""`as_strided` and its like: what strides show of a tensor's memory, as slices and transposes.

Memory that is shown twice (overlapping windows) is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, Shape, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules.slicing import slice_scatter


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


def _box(ctx: Context, x: Operand, grid: _Grid) -> Operand:
    """The memory from the offset on as the grid's box."""
    flat = ctx.reshape(x, (math.prod(shape_of(x)),))
    flat = ctx.slice(flat, 0, grid.offset, shape_of(flat)[0])
    return ctx.reshape(ctx.pad_axis(flat, 0, 0, grid.missing), grid.shape)


@lowering("as_strided.default as_strided_copy.default")
def as_strided(
    ctx: Context, x: Operand, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Operand:
    """`as_strided(x) -> transpose(slice_by_size(reshape(x)))`, or `reshape` for the whole tensor in order"""
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
def empty_strided(ctx: Context, *_: Any, **__: Any) -> Operand:
    """`new_empty_strided(x, size) -> ` zeros (any content is allowed)"""
    return torch.zeros(ctx.shape)
