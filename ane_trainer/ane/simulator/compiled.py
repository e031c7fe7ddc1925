"""Compiled loops: groups of instructions bound to arrays, many loops in one LLVM module."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator import fold, fuse, jit
from ane_trainer.ane.simulator.loops import element_strides, nest

Array = NDArray[Any]
Step = Callable[[], None]

#: Elements below which one thread is faster than two (hand-over costs about 20 us).
PARALLEL_ELEMENTS = 1 << 16

#: Registers' worth of lanes that one round of a loop works on: two independent chains hide the latency of the
#: roundings (Adam's update of 200,000 parameters with AVX-512: 566 us with one, 408 us with two; bench/ops.py
#: has the update as a row).
INTERLEAVE = 2

_compiled: dict[str, Callable[..., None]] = {}


_waiting: dict[str, int] = {}  # bodies asked for and not compiled yet, with their lanes
_lock = threading.Lock()


class Loops:
    """Makes steps of loops. They are compiled together, by `finish` or when the first of them runs; equal
    loops are compiled once in a process.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def add(
        self, group: fuse.Group, arrays: Sequence[Array], tables: Sequence[Array], targets: Sequence[Array]
    ) -> Step:
        """The step that runs `group` over arrays broadcast to the targets' shape."""
        shape = targets[0].shape
        loops = nest(shape, [element_strides(a, shape) for a in (*arrays, *targets)])
        width = _lanes(loops.extents[-1])
        body = fuse.emit("FUNCTION", group, loops, width)
        _want(body, width)
        return _step(body, [*arrays, *tables, *targets], loops.extents, self.threads)

    def fold(
        self,
        group: fuse.Group,
        arrays: Sequence[Array],
        tables: Sequence[Array],
        targets: Sequence[Array],
        folds: Sequence[tuple[str, int, Array]],
    ) -> Step:
        """The step that runs `group` and gathers (name of the fold, position, total) on the way.

        A total (float64 for sums, else float32) has extent 1 along the axes that it reduces.
        """
        shape = np.broadcast_shapes(*(a.shape for a in (*arrays, *targets)))
        totals = [total for _, _, total in folds]
        axes = [a for a, (n, kept) in enumerate(zip(shape, totals[0].shape, strict=True)) if kept != n]
        strides = [element_strides(a, shape) for a in (*arrays, *targets, *totals)]
        where = fold.layout(shape, axes, strides)
        extent = where.nest.extents[where.kept - 1 if where.columns else -1]
        width = _lanes(extent)
        work = fold.Folds(group, tuple((kind, position) for kind, position, _ in folds))
        body = fold.emit("FUNCTION", work, where, width)
        _want(body, width)
        memory = [*arrays, *tables, *targets, *totals]
        kept = where.nest.extents[: where.kept]
        return _step(body, memory, kept, self.threads, int(np.prod(shape)), whole_lines=where.columns)

    def finish(self) -> None:
        """Compile every loop that waits."""
        _compile_waiting()


def _want(body: str, width: int) -> None:
    if body not in _compiled:
        _waiting[body] = width


def _compile_waiting() -> None:
    with _lock:
        missing = list(_waiting.items())
        if not missing:
            return
        widths = {width for _, width in missing}
        text = fuse.declarations(*widths) + fold.declarations(*widths)
        names = [f"loop{i}" for i in range(len(missing))]
        for name, (body, _) in zip(names, missing, strict=True):
            text += body.replace("@FUNCTION", f"@{name}", 1)
        functions = jit.compile_ir(text, names, vectorize=False)
        for name, (body, _) in zip(names, missing, strict=True):
            _compiled[body] = functions[name]
            del _waiting[body]


def _lanes(extent: int) -> int:
    """Lanes of one round: two registers' worth, or fewer (a power of two) where the inner loop is shorter."""
    widest: int = INTERLEAVE * jit.host_vector_width()
    return min(widest, 1 << (extent.bit_length() - 1))


def _step(
    body: str,
    memory: Sequence[Array],
    extents: tuple[int, ...],
    threads: int,
    total: int | None = None,
    *,
    whole_lines: bool = True,
) -> partial[None]:
    """A step that runs a loop, split over the outermost axis when there is enough to do; keeps `memory`."""
    outer, total = extents[0], int(np.prod(extents)) if total is None else total
    parts = threads if total >= PARALLEL_ELEMENTS else 1
    unit = 64 if len(extents) == 1 and whole_lines else 1
    bounds = [min(outer, -(-outer * i // (parts * unit)) * unit) for i in range(parts + 1)]
    pointers = [array.ctypes.data for array in memory]
    pieces = [(*pointers, a, b) for a, b in pairwise(bounds) if a < b]
    return partial(_run, body, pieces, threads, memory)


def _run(body: str, pieces: Sequence[tuple[int, ...]], threads: int, memory: Sequence[Array]) -> None:
    """Call the compiled loop on its pieces; `memory`, which they point into, lives as long as the step."""
    if body not in _compiled:
        _compile_waiting()
    if len(pieces) == 1:
        _compiled[body](*pieces[0])
    else:
        jit.run_parallel(_compiled[body], pieces, threads)


def round_in_place(array: Array, threads: int) -> Step:
    """Turns raw fp32 accumulator values into engine results, where they are: overflow, then rounding."""
    return Loops(threads).add(_MAC_ROUND, [array], [], [array])


def round_into(out: Array, threads: int) -> Callable[[int], None]:
    """`finish(address)` rounds as many raw fp32 accumulator values as `out` (contiguous) holds from there to it."""
    body = fuse.emit("FUNCTION", _MAC_ROUND, nest((out.size,), [(1,), (1,)]), _lanes(out.size))
    _want(body, _lanes(out.size))
    step = _step(body, [out, out], (out.size,), threads)
    pieces, to = step.args[1], out.ctypes.data

    def finish(address: int) -> None:
        _run(body, [(address, to, first, last) for _, _, first, last in pieces], threads, [out])

    return finish


_MAC_ROUND = fuse.Group((fuse.Instr("load", which=0), fuse.Instr("mac_round", (0,))), 1, 0, (1,))


def copies(pairs: Sequence[tuple[Array, Array]], threads: int) -> Step:
    """Copies each source to its target (float32, same shape, any strides)."""
    group = fuse.Group((fuse.Instr("load", which=0),), 1, 0, (0,))
    loops = Loops(threads)
    steps = [loops.add(group, [source], [], [target]) for target, source in pairs]
    loops.finish()

    def step() -> None:
        for copy in steps:
            copy()

    return step
