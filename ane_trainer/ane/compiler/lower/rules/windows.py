"""Sliding windows in channels-last layout: taps, folding back, matrix products over them, and their maxima.

All shifted slices run over spatial axes of a `[N, *spatial, C]` tensor, never over the last axis: before
A16 a last-axis slice with an offset turns values above 4094 into inf (ANEForge numeric_cliffs), and
concatenating several such slices gave wrong elements (ANEForge issues). Taps are gathered axis by axis,
so a 5x5 window takes 5 + 5 slices, not 25.

torch's tie rule (the first maximum in row-major order) separates: the first row of the window that holds the
maximum, and in that row the first column. So maxima are taken column-wise, then row-wise (`Maxima.levels`),
and a tap belongs to the maximum if it equals it and no tap before it does. All in channels-last layout.

Legend: N batch, C channels, O output channels, G groups, K = taps * C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS
from ane_trainer.ane.compiler.lower.operands import Absent, Operand, Shape, shape_of
from ane_trainer.ane.compiler.lower.rules.slicing import along, take, zero_insert
from ane_trainer.ane.mil.program import MAX_FP16

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
    """`count` elements of an axis from `offset` on, every `stride`."""
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


#: Stands for minus infinity in a padded border: the least finite fp16.
LOWEST = -MAX_FP16


@dataclass(frozen=True)
class Regular:
    """Along one axis: `count` windows of `kernel` elements with this `dilation`, every `stride`."""

    count: int
    kernel: int
    stride: int
    dilation: int = 1

    def taps(self, ctx: Context, x: Operand, axis: int) -> list[Operand]:
        """One slice per window element, each with one entry per window."""
        return [tap(ctx, x, axis, t * self.dilation, self.count, self.stride) for t in range(self.kernel)]

    def fold(self, ctx: Context, parts: Sequence[Operand], axis: int, extent: int) -> Operand:
        """Add each tap's part where the tap was taken from; the axis has `extent` then."""
        return fold_axis(ctx, parts, axis, self.stride, self.dilation, extent)

    @property
    def disjoint(self) -> bool:
        """No element is in two windows."""
        return self.stride > (self.kernel - 1) * self.dilation


@dataclass(frozen=True)
class Adaptive:
    """Along one axis, window i of `count` runs from floor(i n / count) to ceil((i + 1) n / count), n the axis' extent.

    Shorter windows repeat their last element, which changes neither the maximum nor the first that has it.
    """

    extent: int
    count: int

    def _index(self) -> torch.Tensor:
        """`[taps, count]`: where each tap is taken."""
        bounds = [
            (i * self.extent // self.count, -(-(i + 1) * self.extent // self.count))
            for i in range(self.count)
        ]
        longest = max(end - start for start, end in bounds)
        return torch.tensor([[min(start + t, end - 1) for start, end in bounds] for t in range(longest)])

    def taps(self, ctx: Context, x: Operand, axis: int) -> list[Operand]:
        """As `Regular.taps`."""
        return [take(ctx, x, axis, index) for index in self._index()]

    def fold(self, ctx: Context, parts: Sequence[Operand], axis: int, extent: int) -> Operand:
        """As `Regular.fold`, by one product with a constant."""
        places = torch.nn.functional.one_hot(self._index().reshape(-1), extent).double()
        return along(ctx, ctx.concat(parts, axis), axis, places.T)

    @property
    def disjoint(self) -> bool:
        """No element is in two windows."""
        return self.extent % self.count == 0


@dataclass(frozen=True)
class Maxima:
    """`levels[k]`: the input with its last k spatial axes reduced to the windows' maxima, `[N, *S, C]`.

    `shape` is the input's, `[N, C, *S]`; `borders` the padding (before, after) per axis that the levels have.
    """

    axes: tuple[Regular | Adaptive, ...]
    levels: tuple[Operand, ...]
    shape: Shape
    borders: tuple[tuple[int, int], ...]


def maxima(
    ctx: Context, x: Operand, axes: Sequence[Regular | Adaptive], borders: Sequence[tuple[int, int]]
) -> Maxima:
    """`maximum` of shifted slices, axis by axis from the last; x is `[N, C, *S]`."""
    levels = [pad_spatial(ctx, to_last(ctx, x), borders, LOWEST)]
    for i in reversed(range(len(axes))):
        first, *others = axes[i].taps(ctx, levels[-1], i + 1)
        for tap in others:
            first = ctx.binary("maximum", first, tap)
        levels.append(first)
    return Maxima(tuple(axes), tuple(levels), shape_of(x), tuple(borders))


def highest(ctx: Context, m: Maxima) -> Operand:
    """The maxima, `[N, C, *windows]`."""
    return to_first(ctx, m.levels[-1])


def give(ctx: Context, m: Maxima, g: Operand) -> Operand:
    """`g [N, C, *windows]` added at each window's first maximum, `[N, C, *S]`: the gradient, and unpooling.

    Per axis and tap `e = select(equal(tap, best), rest, 0); rest = sub(rest, e)`; the last tap takes the rest.
    """
    rest = to_last(ctx, g)
    count = len(m.axes)
    for i in range(count):
        best, below = m.levels[count - i], m.levels[count - i - 1]
        parts = []
        *taps, _ = m.axes[i].taps(ctx, below, i + 1)
        for tap in taps:
            part = ctx.where(ctx.binary("equal", tap, best), rest, 0.0)
            rest = ctx.sub(rest, part)
            parts.append(part)
        rest = m.axes[i].fold(ctx, [*parts, rest], i + 1, shape_of(below)[i + 1])
    crop = [(-before, -after) for before, after in m.borders]
    return to_first(ctx, pad_spatial(ctx, rest, crop))


def pick(ctx: Context, m: Maxima, y: Operand) -> Operand:
    """The values of `y [N, C, *S]` at each window's first maximum: `select` from the last tap to the first."""
    value = pad_spatial(ctx, to_last(ctx, y), m.borders)
    count = len(m.axes)
    for i in reversed(range(count)):
        best, below = m.levels[count - i], m.levels[count - i - 1]
        keys, values = m.axes[i].taps(ctx, below, i + 1), m.axes[i].taps(ctx, value, i + 1)
        value = values[-1]
        for key, candidate in zip(keys[-2::-1], values[-2::-1], strict=True):
            value = ctx.where(ctx.binary("equal", key, best), candidate, value)
    return to_first(ctx, value)


@dataclass(frozen=True)
class Places(Absent):
    """A pooling's indices as the maxima they stand for; their numbers only where fp16 holds them.

    `shape` is the pooling's, or what views made of it.
    """

    maxima: Maxima | None = None
    shape: Shape = ()

    def numbers(self, ctx: Context) -> Operand | None:
        """The indices, exact up to 2048."""
        if self.maxima is None or math.prod(self.maxima.shape[2:]) > EXACT_INTEGERS + 1:
            return None
        spatial = self.maxima.shape[2:]
        order = torch.arange(math.prod(spatial), dtype=torch.float64).reshape(1, 1, *spatial)
        found = pick(ctx, self.maxima, order)
        full = (*self.maxima.shape[:2], *shape_of(found)[2:])
        return ctx.reshape(ctx.broadcast(found, full), self.shape)

    def viewed(self, shape: Shape) -> Places:
        """The same indices in another shape."""
        return replace(self, shape=shape)


def places(m: Maxima, shape: Shape) -> Places:
    """Indices of the shape that the pooling returns."""
    n = math.prod(m.shape[2:])
    return Places(
        f"needs at most {EXACT_INTEGERS} places, the integers fp16 holds, for indices that are computed with; "
        f"got {n}.",
        "Give the indices to max_unpool only, which needs no numbers.",
        m, shape,
    )  # fmt: skip
