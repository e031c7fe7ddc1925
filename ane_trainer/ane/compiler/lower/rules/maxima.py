"""Maxima over sliding windows and where they are: what max pooling, its gradient and unpooling have in common.

torch's tie rule (the first maximum in row-major order) separates: the first row of the window that holds the
maximum, and in that row the first column. So maxima are taken column-wise, then row-wise (`Maxima.levels`),
and a tap belongs to the maximum if it equals it and no tap before it does. All in channels-last layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS
from ane_trainer.ane.compiler.lower.operands import Absent, Operand, Shape, shape_of
from ane_trainer.ane.compiler.lower.rules import windows
from ane_trainer.ane.compiler.lower.rules.slicing import along, take
from ane_trainer.ane.mil.program import MAX_FP16

#: Stands for minus infinity in a padded border: the least finite fp16.
LOWEST = -MAX_FP16


@dataclass(frozen=True)
class Regular:
    """Along one axis: `count` windows of `kernel` elements, `dilation` apart, every `stride`."""

    count: int
    kernel: int
    stride: int
    dilation: int = 1

    def taps(self, ctx: Context, x: Operand, axis: int) -> list[Operand]:
        """One slice per window element, each with one entry per window."""
        return [
            windows.tap(ctx, x, axis, t * self.dilation, self.count, self.stride) for t in range(self.kernel)
        ]

    def fold(self, ctx: Context, parts: Sequence[Operand], axis: int, extent: int) -> Operand:
        """Add each tap's part where the tap was taken from; the axis has `extent` then."""
        return windows.fold_axis(ctx, parts, axis, self.stride, self.dilation, extent)

    @property
    def apart(self) -> bool:
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
    def apart(self) -> bool:
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
    levels = [windows.pad_spatial(ctx, windows.to_last(ctx, x), borders, LOWEST)]
    for i in reversed(range(len(axes))):
        first, *others = axes[i].taps(ctx, levels[-1], i + 1)
        for tap in others:
            first = ctx.binary("maximum", first, tap)
        levels.append(first)
    return Maxima(tuple(axes), tuple(levels), shape_of(x), tuple(borders))


def highest(ctx: Context, m: Maxima) -> Operand:
    """The maxima, `[N, C, *windows]`."""
    return windows.to_first(ctx, m.levels[-1])


def give(ctx: Context, m: Maxima, g: Operand) -> Operand:
    """`g [N, C, *windows]` added at each window's first maximum, `[N, C, *S]`: the gradient, and unpooling.

    Per axis and tap `e = select(equal(tap, best), rest, 0); rest = sub(rest, e)`; the last tap takes the rest.
    """
    rest = windows.to_last(ctx, g)
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
    return windows.to_first(ctx, windows.pad_spatial(ctx, rest, crop))


def pick(ctx: Context, m: Maxima, y: Operand) -> Operand:
    """The values of `y [N, C, *S]` at each window's first maximum: `select` from the last tap to the first."""
    value = windows.pad_spatial(ctx, windows.to_last(ctx, y), m.borders)
    count = len(m.axes)
    for i in reversed(range(count)):
        best, below = m.levels[count - i], m.levels[count - i - 1]
        keys, values = m.axes[i].taps(ctx, below, i + 1), m.axes[i].taps(ctx, value, i + 1)
        value = values[-1]
        for key, candidate in zip(keys[-2::-1], values[-2::-1], strict=True):
            value = ctx.where(ctx.binary("equal", key, best), candidate, value)
    return windows.to_first(ctx, value)


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
