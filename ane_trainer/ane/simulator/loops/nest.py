"""Loop geometry of pointwise work: which strides each array has, and how few loops it takes.

Arrays that take part in one pointwise computation are broadcast to a common shape; adjacent axes are merged
where every array steps through them evenly, so that a contiguous computation is one loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ane_trainer.ane.mil.weights import Array


@dataclass(frozen=True)
class Nest:
    """A loop nest: `extents` from outermost to innermost, and per array its element strides in that order.

    `outer` lists the axes that the outermost loop runs over.
    """

    extents: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    outer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Loops over kept axes, then over reduced axes; `columns`: the last kept axis runs in vectors."""

    nest: Nest
    kept: int
    columns: bool


def element_strides(array: Array, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of `array` broadcast to `shape`; 0 along broadcast axes."""
    view = np.broadcast_to(array, shape)
    return tuple(
        0 if extent == 1 else s // array.itemsize for s, extent in zip(view.strides, shape, strict=True)
    )


def nest(shape: tuple[int, ...], strides: Sequence[tuple[int, ...]]) -> Nest:
    """Drop axes of extent 1 and merge adjacent axes that every array walks through evenly."""
    kept = [axis for axis, extent in enumerate(shape) if extent != 1]
    if not kept:
        return Nest((1,), tuple((1,) for _ in strides))
    extents = [shape[kept[0]]]
    merged = [[s[kept[0]]] for s in strides]
    outer = kept[:1]
    for axis in kept[1:]:
        extent = shape[axis]
        if all(m[-1] == s[axis] * extent for m, s in zip(merged, strides, strict=True)):
            extents[-1] *= extent
            outer += [axis] * (len(extents) == 1)
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[axis]
        else:
            extents.append(extent)
            for m, s in zip(merged, strides, strict=True):
                m.append(s[axis])
    return Nest(tuple(extents), tuple(map(tuple, merged)), tuple(outer))


#: Floats of a cache line: neighbours that a strip of a blocked loop leaves in the cache for the next ones.
STRIP = 8


def in_strips(loops: Nest) -> Nest:
    """Where some array is dense along another axis than the last, the last in strips of 8 within that axis.

    A plain loop over the rows of a transposed matrix takes one number of each cache line and comes back when the
    line is gone: 1024 x 1024 numbers take 4.0 ms, in strips 1.1 ms (bench/ops.py, AMD EPYC).
    """
    last = len(loops.extents) - 1
    dense = next((a for s in loops.strides for a in range(last) if s[a] == 1 and abs(s[last]) > STRIP), None)
    if dense is None or loops.extents[last] % STRIP or loops.extents[dense] < STRIP:
        return loops
    order = [a for a in range(last) if a != dense]

    def arranged(row: tuple[int, ...], whole: int, part: int) -> tuple[int, ...]:
        return (*(row[a] for a in order), whole, row[dense], part)

    extents = arranged(loops.extents, loops.extents[last] // STRIP, STRIP)
    return Nest(extents, tuple(arranged(s, STRIP * s[last], s[last]) for s in loops.strides))


def layout(shape: tuple[int, ...], axes: Sequence[int], strides: Sequence[tuple[int, ...]]) -> Layout:
    """Order the loops so that vectors run along the axis where the first array lies densest.

    `strides` has a row of element strides per array, output and total (0 along the reduced axes of a total).
    """
    steps = [abs(step) for step in strides[0]]
    order = sorted(range(len(shape)), key=lambda axis: -steps[axis])
    reduced = [a for a in order if a in axes and shape[a] > 1]
    kept = [a for a in order if a not in axes and shape[a] > 1]
    parts = [
        nest(tuple(shape[a] for a in chosen), [tuple(row[a] for a in chosen) for row in strides])
        for chosen in (kept, reduced)
    ]
    dense = [a for a in kept + reduced if steps[a]]
    columns = bool(kept) and (not reduced or (bool(dense) and min(dense, key=lambda a: steps[a]) in kept))
    if not kept:
        parts[0] = Nest((1,), tuple((0,) for _ in strides))
    both = tuple(a + b for a, b in zip(parts[0].strides, parts[1].strides, strict=True))
    outer = tuple(kept[i] for i in parts[0].outer)
    return Layout(Nest(parts[0].extents + parts[1].extents, both, outer), len(parts[0].extents), columns)
