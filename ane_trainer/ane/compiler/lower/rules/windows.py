"""Sliding windows in channels-last layout: unfolding to taps, folding back, matrix products over them.

All shifted slices run over spatial axes of a `[N, *spatial, C]` tensor, never over the last axis: before
A16 a last-axis slice with an offset turns values above 4094 into inf (ANEForge numeric_cliffs), and
concatenating several such slices gave wrong elements (ANEForge issues). Taps are gathered axis by axis,
so a 5x5 window takes 5 + 5 slices, not 25.

Legend: N batch, C channels, O output channels, G groups, K = taps * C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, Shape, shape_of
from ane_trainer.ane.compiler.lower.rules.slicing import zero_insert

#: Largest extent of a matrix axis that every chip takes (M1 to M3; ANE guide app. A).
MATRIX_AXIS = 16384


def to_last(ctx: Context, x: Operand) -> Operand:
    """`[N, C, *spatial]` -> `[N, *spatial, C]`."""
    rank = len(shape_of(x))
    return ctx.transpose(x, (0, *range(2, rank), 1))


def to_first(ctx: Context, x: Operand) -> Operand:
    """`[N, *spatial, C]` -> `[N, C, *spatial]`."""
    rank = len(shape_of(x))
    return ctx.transpose(x, (0, rank - 1, *range(1, rank - 1)))


def pad_spatial(ctx: Context, x: Operand, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Operand:
    """(before, after) per spatial axis of a channels-last tensor; negative crops."""
    return ctx.pad(x, [(0, 0), *pads, (0, 0)], value)


def tap(ctx: Context, x: Operand, axis: int, offset: int, count: int, stride: int) -> Operand:
    """`count` elements of an axis from `offset` on, `stride` apart."""
    return ctx.slice(x, axis, offset, offset + (count - 1) * stride + 1, stride)


def unfold(
    ctx: Context, x: Operand, offsets: Sequence[Sequence[int]], counts: Sequence[int], strides: Sequence[int]
) -> Operand:
    """`[N, *S, C]` -> `[N, *counts, K]`, K ordered as (taps of axis 1, taps of axis 2, ..., C).

    `concat([slice(x, axis, o) for o in offsets[axis]], axis=-1)`, from the last spatial axis to the first.
    """
    for i in reversed(range(len(counts))):
        x = ctx.concat([tap(ctx, x, i + 1, o, counts[i], strides[i]) for o in offsets[i]], -1)
    return x


def fold_axis(
    ctx: Context, parts: Sequence[Operand], axis: int, stride: int, dilation: int, extent: int
) -> Operand:
    """The gradient of taking taps: part i is added at `i * dilation + j * stride`; the result has `extent`.

    Parts that fall between each other are interleaved (concat on a new axis and reshape), only
    overlapping ones are padded and added: `ceil(window / stride) - 1` additions.
    """
    rounds: dict[int, dict[int, Operand]] = {}
    for i, part in enumerate(parts):
        shift, slot = divmod(i * dilation, stride)
        rounds.setdefault(shift, {})[slot] = part
    total: Operand | None = None
    for shift, slots in rounds.items():
        line = _interleave(ctx, slots, axis, stride)
        line = ctx.pad_axis(line, axis, shift * stride, extent - shift * stride - shape_of(line)[axis])
        total = line if total is None else ctx.add(total, line)
    assert total is not None
    return total


def _interleave(ctx: Context, slots: dict[int, Operand], axis: int, stride: int) -> Operand:
    """Slot s of each group of `stride` elements comes from `slots[s]`; missing slots are 0."""
    shape = shape_of(next(iter(slots.values())))
    if len(slots) == 1 and 0 in slots:
        return zero_insert(ctx, slots[0], axis, stride)
    if len(shape) > 4:
        flat = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
        merged = {s: ctx.reshape(p, flat) for s, p in slots.items()}
        line = _interleave(ctx, merged, 1, stride)
        return ctx.reshape(line, (*shape[:axis], shape[axis] * stride, *shape[axis + 1 :]))
    one = (*shape[: axis + 1], 1, *shape[axis + 1 :])
    first, last = min(slots), max(slots)
    zero = torch.zeros(one)
    parts = [ctx.reshape(slots[s], one) if s in slots else zero for s in range(first, last + 1)]
    joined = ctx.pad_axis(ctx.concat(parts, axis + 1), axis + 1, first, stride - 1 - last)
    return ctx.reshape(joined, (*shape[:axis], shape[axis] * stride, *shape[axis + 1 :]))


def rows(ctx: Context, x: Operand) -> Operand:
    """`[N, *S, K]` -> `[B, M, K]`, M at most `MATRIX_AXIS`; `[M, K]` when one matrix is enough."""
    *lead, last_spatial, k = shape_of(x)
    lines = math.prod(lead)
    fitting = (b for b in range(1, lines) if lines % b == 0 and lines // b * last_spatial <= MATRIX_AXIS)
    blocks = next(fitting, lines)
    m = lines // blocks * last_spatial
    return ctx.reshape(x, (m, k) if blocks == 1 else (blocks, m, k))


def apply_weight(ctx: Context, columns: Operand, weight: Operand, groups: int, channels: int) -> Operand:
    """`[N, *S, taps * G * Cg]` times `[G, taps * Cg, Og]` -> `[N, *S, G * Og]`.

    One group: `matmul(rows, weight)`; more: the group axis is moved in front and batches the product.
    """
    lead = shape_of(columns)[:-1]
    out = shape_of(weight)[-1]
    if groups == 1:
        product = ctx.matmul(rows(ctx, columns), ctx.reshape(weight, shape_of(weight)[-2:]))
        return ctx.reshape(product, (*lead, out))
    split = _by_group(ctx, columns, groups, channels)
    if len(shape_of(split)) == 4:
        weight = ctx.reshape(weight, (groups, 1, *shape_of(weight)[-2:]))
    product = ctx.matmul(split, weight)
    rank = len(shape_of(product))
    moved = ctx.transpose(product, (*range(1, rank - 1), 0, rank - 1))
    return ctx.reshape(moved, (*lead, groups * out))


def weight_gradient(ctx: Context, columns: Operand, gradient: Operand, groups: int, channels: int) -> Operand:
    """`columns^T gradient`: `[N, *S, K]`, `[N, *S, G * Og]` -> `[G, taps * Cg, Og]`.

    The contraction runs over all positions in one accumulator; where there are more than `MATRIX_AXIS` of
    them, in equal blocks that `reduce_sum` adds.
    """
    out = shape_of(gradient)[-1] // groups
    if groups == 1:
        product = ctx.matmul(rows(ctx, columns), rows(ctx, gradient), tx=True)
        product = ctx.sum(product, [0]) if len(shape_of(product)) == 3 else product
        return ctx.reshape(product, (1, *shape_of(product)))
    split = _by_group(ctx, columns, groups, channels)
    product = ctx.matmul(split, _by_group(ctx, gradient, groups, groups * out), tx=True)
    return ctx.sum(product, [1]) if len(shape_of(product)) == 4 else product


def _by_group(ctx: Context, x: Operand, groups: int, channels: int) -> Operand:
    """`[N, *S, taps * G * Cg]` -> `[G, M, taps * Cg]` (or `[G, B, M, taps * Cg]`); `channels` is G * Cg."""
    flat = rows(ctx, x)
    *lead, k = shape_of(flat)
    taps, each = k // channels, channels // groups
    if len(lead) == 1:
        split = ctx.transpose(ctx.reshape(flat, (lead[0], taps, groups, each)), (2, 0, 1, 3))
    else:
        split = ctx.transpose(ctx.reshape(flat, (*lead, taps, groups, each)), (3, 0, 1, 2, 4))
    return ctx.reshape(split, (groups, *lead, taps * each))


def weight_matrix(ctx: Context, weight: Operand, groups: int) -> Operand:
    """`[G * Og, Cg, *kernel]` -> `[G, taps * Cg, Og]`, taps outermost."""
    out, each, *kernel = shape_of(weight)
    taps = math.prod(kernel)
    split = ctx.reshape(weight, (groups, out // groups, each, taps))
    return ctx.reshape(ctx.transpose(split, (0, 3, 2, 1)), (groups, taps * each, out // groups))


def weight_matrix_transposed(ctx: Context, weight: Operand, groups: int) -> Operand:
    """`[G * Og, Cg, *kernel]` -> `[G, taps * Og, Cg]`, taps outermost: for gradients of the input."""
    out, each, *kernel = shape_of(weight)
    taps = math.prod(kernel)
    split = ctx.reshape(weight, (groups, out // groups, each, taps))
    return ctx.reshape(ctx.transpose(split, (0, 3, 1, 2)), (groups, taps * (out // groups), each))


def from_weight_matrix(ctx: Context, matrix: Operand, shape: Shape, groups: int) -> Operand:
    """`[G, taps * Cg, Og]` -> `[G * Og, Cg, *kernel]`."""
    out, each, *kernel = shape
    split = ctx.reshape(matrix, (groups, math.prod(kernel), each, out // groups))
    return ctx.reshape(ctx.transpose(split, (0, 3, 2, 1)), shape)
