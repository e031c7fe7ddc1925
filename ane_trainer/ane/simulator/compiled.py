"""Compiled loops: groups of instructions bound to arrays, many loops in one LLVM module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator import fuse, jit
from ane_trainer.ane.simulator.loops import Nest, element_strides, nest

Array = NDArray[Any]
Step = Callable[[], None]

#: Elements below which one thread is faster than two (hand-over costs about 20 us).
PARALLEL_ELEMENTS = 1 << 16

#: Registers' worth of lanes that one round of a loop works on: two independent chains hide the latency of the
#: roundings (Adam's update of 200,000 parameters: 566 us with one, 408 us with two; bench/pointwise.py).
INTERLEAVE = 2

_compiled: dict[str, Callable[..., None]] = {}


class Loops:
    """Collects loops and compiles them together; equal loops are compiled once in a process."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._bodies: dict[tuple[str, int], None] = {}

    def add(
        self, group: fuse.Group, arrays: Sequence[Array], tables: Sequence[Array], targets: Sequence[Array]
    ) -> Step:
        """The step that runs `group` over arrays broadcast to the targets' shape; call `finish` before it."""
        shape = targets[0].shape
        loops = nest(shape, [element_strides(a, shape) for a in (*arrays, *targets)])
        width = _lanes(loops)
        body = fuse.emit("FUNCTION", group, loops, width)
        self._bodies[body, width] = None
        return _step(body, [*arrays, *tables, *targets], loops.extents, self.threads)

    def finish(self) -> None:
        """Compile every loop that this process has not compiled before."""
        missing = [(body, width) for body, width in self._bodies if body not in _compiled]
        if not missing:
            return
        text = fuse.declarations(*{width for _, width in missing})
        names = [f"loop{i}" for i in range(len(missing))]
        for name, (body, _) in zip(names, missing, strict=True):
            text += body.replace("@FUNCTION", f"@{name}", 1)
        functions = jit.compile_ir(text, names)
        for name, (body, _) in zip(names, missing, strict=True):
            _compiled[body] = functions[name]


def _lanes(loops: Nest) -> int:
    """Lanes of one round: two registers' worth, or fewer (a power of two) where the inner loop is shorter."""
    widest: int = INTERLEAVE * jit.host_vector_width()
    return min(widest, 1 << (loops.extents[-1].bit_length() - 1))


def _step(body: str, memory: Sequence[Array], extents: tuple[int, ...], threads: int) -> Step:
    """A step that runs a loop, split over the outermost axis when there is enough to do; keeps `memory`."""
    outer, total = extents[0], int(np.prod(extents))
    parts = threads if total >= PARALLEL_ELEMENTS else 1
    unit = 64 if len(extents) == 1 else 1
    bounds = [min(outer, -(-outer * i // (parts * unit)) * unit) for i in range(parts + 1)]
    pointers = [array.ctypes.data for array in memory]
    pieces = [(*pointers, a, b) for a, b in pairwise(bounds) if a < b]
    return partial(_run, body, pieces, threads, memory)


def _run(body: str, pieces: Sequence[tuple[int, ...]], threads: int, memory: Sequence[Array]) -> None:
    """Call the compiled loop on its pieces; `memory`, which they point into, lives as long as the step."""
    jit.run_parallel(_compiled[body], pieces, threads)


def round_in_place(array: Array, threads: int) -> Step:
    """Turns raw fp32 accumulator values into engine results, where they are: overflow, then rounding."""
    code = (fuse.Instr("load", which=0), fuse.Instr("mac_round", (0,)))
    loops = Loops(threads)
    step = loops.add(fuse.Group(code, 1, 0, (1,)), [array], [], [array])
    loops.finish()
    return step


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
