"""`as_strided` and its like, where they show a box of a contiguous tensor; other memory patterns
are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ane_trainer.ane.lower.context import Context, Operand, Shape, shape_of
from ane_trainer.ane.lower.registry import lowering
from ane_trainer.ane.lower.slicing import slice_scatter


def _contiguous(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _box(
    ctx: Context, shape: Shape, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> list[int]:
    """The first index per axis of the box that the strides show."""
    strides = _contiguous(shape)
    same = len(size) == len(shape) and all(
        n == 1 or s == t for n, s, t in zip(size, stride, strides, strict=True)
    )
    begin, rest = [], offset or 0
    for t in strides:
        begin.append(rest // t)
        rest %= t
    if not same or any(b + n > m for b, n, m in zip(begin, size, shape, strict=True)):
        raise ctx.refuse(
            f"needs a box of a tensor; got strides {list(stride)} over {list(shape)}.", "Use slices."
        )
    return begin


@lowering("as_strided.default as_strided_copy.default")
def as_strided(
    ctx: Context, x: Operand, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Operand:
    """`as_strided(x) -> slice_by_size(x)` per axis, or `reshape` when it shows the whole tensor in order"""
    shape = shape_of(x)
    if math.prod(size) == math.prod(shape) and list(stride) == _contiguous(size) and not storage_offset:
        return ctx.reshape(x, tuple(size))
    begin = _box(ctx, shape, size, stride, storage_offset)
    for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
        x = ctx.slice(x, axis, start, start + count)
    return x


@lowering("as_strided_scatter.default")
def as_strided_scatter(
    ctx: Context, x: Operand, source: Operand, size: Sequence[int], stride: Sequence[int],
    storage_offset: int | None = None,
) -> Operand:  # fmt: skip
    """`as_strided_scatter(x, s) -> ` the box replaced: slices and `concat`, from the outer axis to
    the inner
    """
    shape = shape_of(x)
    if math.prod(size) == math.prod(shape) and list(stride) == _contiguous(size) and not storage_offset:
        return ctx.reshape(source, shape)
    begin = _box(ctx, shape, size, stride, storage_offset)
    return _replaced(ctx, x, source, begin, size, 0)


def _replaced(
    ctx: Context, x: Operand, source: Operand, begin: Sequence[int], size: Sequence[int], axis: int
) -> Operand:
    """x with `source` at the box, axes from `axis` on."""
    if axis == len(begin):
        return source
    inner = ctx.slice(x, axis, begin[axis], begin[axis] + size[axis])
    filled = _replaced(ctx, inner, source, begin, size, axis + 1)
    return slice_scatter(ctx, x, filled, axis, begin[axis], begin[axis] + size[axis])


@lowering("new_empty_strided.default empty_strided.default")
def empty_strided(ctx: Context, *_: Any, **__: Any) -> Operand:
    """`new_empty_strided(x, size) -> ` zeros (any content is allowed)"""
    return torch.zeros(ctx.shape)
