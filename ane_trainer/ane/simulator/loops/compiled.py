"""Compiled loops: groups of instructions bound to arrays, many loops in one LLVM module.

Composed ops are passes over memory, each a little pointwise code, stored or gathered:

p = Pass(ctx)
e = p.lookup(p.add("sub", p.load(x), p.load(most)), "exp")
step = p.fold("sum", e, total, store=out)       # out = exp(x - most), total = its sum, in one pass
q = Pass(ctx)
inverse = q.store(q.lookup(q.total(total), "inverse"), factor)
chain(step, inverse)                            # both, block by block
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.loops import jit
from ane_trainer.ane.simulator.loops.emit import fold_loop, pointwise_loop
from ane_trainer.ane.simulator.loops.group import Code, Folds, Group, Instr
from ane_trainer.ane.simulator.loops.ir import Definition, module
from ane_trainer.ane.simulator.loops.jit import Stage, Team, Turns, addresses, divided
from ane_trainer.ane.simulator.loops.nest import element_strides, in_strips, layout, nest
from ane_trainer.ane.simulator.numbers.fp16 import empty
from ane_trainer.ane.simulator.numbers.tables import lookup
from ane_trainer.ane.simulator.registry import EngineContext

Step = Callable[[], None]

#: Elements that a chain of loops takes at a time: what one leaves is in the cache when the next reads it.
BLOCK_ELEMENTS = 1 << 13

#: Neighbours that one thread takes at least.
LINE = 32

#: Registers' worth of lanes that one round of a loop works on: two independent chains hide the latency of the
#: roundings (Adam's update of 200,000 parameters with AVX-512: 566 us with one, 408 us with two; bench/ops.py
#: has the update as a row).
INTERLEAVE = 2

_compiled: dict[Definition, int] = {}  # addresses of compiled functions
_waiting: dict[Definition, None] = {}  # those asked for and not compiled yet, in order
_lock = threading.Lock()


@dataclass(eq=False)
class Loop:
    """A step: one loop bound to its arrays, split over the outermost axis when there is enough to do.

    `outer` is the outermost extent, `axes` the axes of the shape that it runs over, `elements` all there is to do.
    """

    body: Definition
    memory: Sequence[Array]
    outer: int
    axes: tuple[int, ...]
    elements: int
    threads: int
    unit: int = 1
    _team: Team | None = None
    _arguments: Any = field(init=False)

    def __post_init__(self) -> None:
        self._arguments = addresses(*(array.ctypes.data for array in self.memory))

    def __call__(self) -> None:
        self.team().run()

    def team(self) -> Team:
        """The loop on its ranges."""
        if self._team is None:
            ranges = divided(self.outer, self.elements, self.threads, self.unit)
            self._team = Team([self.stage()], ranges, self.threads)
        return self._team

    def stage(self, scale: int = 1) -> Stage:
        """The loop as part of a chain."""
        if self.body not in _compiled:
            _compile_waiting()
        return Stage(_compiled[self.body], ctypes.addressof(self._arguments), scale)

    def read_from(self, address: int) -> None:
        """Let the first array be what lies at an address."""
        self._arguments[0] = address


class Chain:
    """Loops one after the other as one step, block by block along the outermost axes that they share."""

    def __init__(self, loops: Sequence[Loop]) -> None:
        self.loops = loops
        self._team: Team | None = None

    def __call__(self) -> None:
        self.team().run()

    def team(self) -> Team:
        """The loops on their ranges."""
        if self._team is None:
            self._team = self._bind()
        return self._team

    def _bind(self) -> Team:
        first = min(self.loops, key=lambda loop: len(loop.axes))
        elements, threads = max(loop.elements for loop in self.loops), first.threads
        stages = [loop.stage(loop.outer // first.outer) for loop in self.loops]
        unit = max(loop.unit for loop in self.loops)
        return Team(stages, divided(first.outer, elements, threads, unit), threads, self.block)

    @property
    def block(self) -> int:
        """Items of the outermost axis at a time; columns that go in vectors stay together."""
        first, elements = (
            min(self.loops, key=lambda loop: len(loop.axes)),
            max(x.elements for x in self.loops),
        )
        unit = max(loop.unit for loop in self.loops)
        return max(unit, BLOCK_ELEMENTS * first.outer // elements // unit * unit)


def chain(*steps: Step) -> Step:
    """The steps in order; as one where all are loops and the outermost axes of one are the first of the others."""
    loops = [step for step in steps if isinstance(step, Loop)]
    shared = min((loop.axes for loop in loops), key=len, default=())
    if shared and len(loops) == len(steps) and all(loop.axes[: len(shared)] == shared for loop in loops):
        return Chain(loops)
    return in_turn(*steps)


class Loops:
    """Makes steps of loops. They are compiled together, by `finish` or when the first of them runs; equal
    loops are compiled once in a process.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def add(
        self, group: Group, arrays: Sequence[Array], tables: Sequence[Array], targets: Sequence[Array]
    ) -> Loop:
        """The step that runs `group` over arrays broadcast to the targets' shape."""
        shape = targets[0].shape
        loops = in_strips(nest(shape, [element_strides(a, shape) for a in (*arrays, *targets)]))
        width = _lanes(loops.extents[-1])
        body = pointwise_loop("FUNCTION", group, loops, width)
        memory, unit = [*arrays, *tables, *targets], LINE if len(loops.extents) == 1 else 1
        return self._loop(body, memory, loops.extents[0], loops.outer, targets[0].size, unit)

    def fold(
        self,
        group: Group,
        arrays: Sequence[Array],
        tables: Sequence[Array],
        targets: Sequence[Array],
        folds: Sequence[tuple[str, int, Array]],
    ) -> Loop:
        """The step that runs `group` and gathers (name of the fold, position, total) on the way.

        A total (float64 or float32, see `group.Folds`) has extent 1 along the axes that it reduces.
        """
        shape = np.broadcast_shapes(*(a.shape for a in (*arrays, *targets)))
        totals = [total for _, _, total in folds]
        axes = [a for a, (n, kept) in enumerate(zip(shape, totals[0].shape, strict=True)) if kept != n]
        strides = [element_strides(a, shape) for a in (*arrays, *targets, *totals)]
        where = layout(shape, axes, strides)
        width = _lanes(where.nest.extents[where.kept - 1 if where.columns else -1])
        kinds = [k + "32" if k.startswith("sum") and t.dtype == np.float32 else k for k, _, t in folds]
        work = Folds(group, tuple((k, position) for k, (_, position, _) in zip(kinds, folds, strict=True)))
        body = fold_loop("FUNCTION", work, where, width)
        memory, unit = [*arrays, *tables, *targets, *totals], LINE if where.kept == 1 and where.columns else 1
        outer = where.nest.extents[0]
        return self._loop(body, memory, outer, where.nest.outer, int(np.prod(shape)), unit)

    def _loop(
        self,
        body: Definition,
        memory: list[Array],
        outer: int,
        axes: tuple[int, ...],
        elements: int,
        unit: int,
    ) -> Loop:
        if body not in _compiled:
            _waiting[body] = None
        return Loop(body, memory, outer, axes, elements, self.threads, unit)

    def finish(self) -> None:
        """Compile every loop that waits."""
        _compile_waiting()


def _compile_waiting() -> None:
    with _lock:
        missing = list(_waiting)
        if not missing:
            return
        names = [f"loop{i}" for i in range(len(missing))]
        named = [
            replace(body, text=body.text.replace("@FUNCTION", f"@{name}", 1))
            for name, body in zip(names, missing, strict=True)
        ]
        functions = jit.compile_ir(module(named), names, vectorize=False)
        for name, body in zip(names, missing, strict=True):
            _compiled[body] = jit.address(functions[name])
            del _waiting[body]


def _lanes(extent: int) -> int:
    """Lanes of one round: two registers' worth, or fewer (a power of two) where the inner loop is shorter."""
    widest: int = INTERLEAVE * jit.host_vector_width()
    return min(widest, 1 << (extent.bit_length() - 1))


def round_in_place(array: Array, threads: int, bias: Array | None = None) -> Step:
    """Turns raw fp32 accumulator values into engine results, where they are: bias, overflow, then rounding."""
    if bias is None:
        return Loops(threads).add(_MAC_ROUND, [array], [], [array])
    return Loops(threads).add(_MAC_ROUND_BIAS, [array, bias], [], [array])


def round_into(out: Array, threads: int) -> Callable[[int], None]:
    """`finish(address)` rounds as many raw fp32 accumulator values as `out` (contiguous) holds from there to it."""
    flat = out.reshape(-1)
    loop = Loops(threads).add(_MAC_ROUND, [flat], [], [flat])

    def finish(address: int) -> None:
        loop.read_from(address)
        loop()

    return finish


_MAC_ROUND = Group((Instr("load", which=0), Instr("mac_round", (0,))), 1, 0, (1,))

_MAC_ROUND_BIAS = Group(
    (
        Instr("load", which=0),
        Instr("load", which=1),
        Instr("const", value=1.0),
        Instr("fma", (1, 0, 2)),
        Instr("mac_round", (3,)),
    ),
    2,
    0,
    (4,),
)


def copies(pairs: Sequence[tuple[Array, Array]], threads: int) -> Step:
    """Copies each source to its target (same dtype; the source broadcasts); numbers of four bytes as loops."""
    if any(target.itemsize != 4 for target, _ in pairs):
        return in_turn(*(partial(np.copyto, target, source) for target, source in pairs))
    group = Group((Instr("load", which=0),), 1, 0, (0,))
    loops = Loops(threads)
    steps = [
        loops.add(group, [source.view(np.float32)], [], [target.view(np.float32)])
        for target, source in pairs
        if target.size
    ]
    return in_turn(*steps)


class Row:
    """Loops and chains one after the other, in one call where each is the work of one thread."""

    def __init__(self, parts: Sequence[Loop | Chain]) -> None:
        self.parts = parts
        self._run: Step | None = None

    def __call__(self) -> None:
        if self._run is None:
            teams = [part.team() for part in self.parts]
            alone = all(team.alone for team in teams)
            self._run = Turns(teams).run if alone else partial(_each_of, [team.run for team in teams])
        self._run()


def _each_of(steps: Sequence[Step]) -> None:
    for step in steps:
        step()


def in_rows(steps: Sequence[Step]) -> list[Step]:
    """The steps in order, loops that follow each other as one."""
    flat: list[Step] = []
    for step in steps:
        flat += step.parts if isinstance(step, Row) else [step]
    found: list[Step] = []
    for loops, group in groupby(flat, lambda step: isinstance(step, Loop | Chain)):
        several = list(group)
        found += [Row(several)] if loops and len(several) > 1 else several  # type: ignore[arg-type]
    return found


def in_turn(*steps: Step) -> Step:
    """The steps one after the other."""
    found = in_rows(steps)
    return found[0] if len(found) == 1 else partial(_each_of, found)


class Pass:
    """Pointwise code (see `group.py`) over arrays that broadcast together."""

    def __init__(self, ctx: EngineContext) -> None:
        self.code = Code()
        self.loops = Loops(ctx.threads)

    def load(self, array: Array) -> int:
        """The elements of a float32 or bool array; every array of a pass has the same rank."""
        return self.code.load(array)

    def load_of_four(self, array: Array, offset: int) -> int:
        """The elements `offset` float32 after those of an array that takes each fourth along an axis."""
        return self.code.add("load_of_four", which=self.code.which(array), value=offset)

    def total(self, array: Array, count: float = 1) -> int:
        """What a fold has gathered, over `count`, rounded."""
        if array.dtype == np.float64:
            return self.add("round", self.code.add("load_wide", which=self.code.which(array), value=count))
        total = self.load(array)
        return self.add("round", total) if count == 1 else self.add("mul", total, self.number(1 / count))

    def number(self, value: float | np.floating[Any]) -> int:
        """A constant, rounded to float32."""
        return self.code.number(value)

    def add(self, code: str, *sources: int, value: float = 0.0) -> int:
        """One instruction on earlier values, rounded as `group.py` says."""
        return self.code.add(code, *sources, value=value)

    def lookup(self, source: int, table: str) -> int:
        """An engine table of a value."""
        return self.code.lookup(source, lookup(table))

    def store(self, position: int, target: Array) -> Loop:
        """The step that writes a value to `target`."""
        return self.loops.add(self._group((position,)), self.code.arrays, self.code.tables, [target])

    def fold(self, kind: str, position: int, total: Array, store: Array | None = None) -> Loop:
        """The step that gathers a value into `total` (extent 1 where it reduces), and writes it if asked to.

        `kind` is "sum", "sum_square", "max" or "min" (see `group.Folds`); totals as `total_for` makes them.
        """
        group = self._group(() if store is None else (position,))
        targets = [] if store is None else [store]
        return self.loops.fold(group, self.code.arrays, self.code.tables, targets, [(kind, position, total)])

    def _group(self, stores: tuple[int, ...]) -> Group:
        return Group(tuple(self.code.instrs), len(self.code.arrays), len(self.code.tables), stores)


def total_for(ctx: EngineContext, x: Array, axes: Sequence[int]) -> Array:
    """Room for a sum over `axes` of `x`: float64, in fast mode float32."""
    return empty(_reduced(x, axes), np.float32 if ctx.fast else np.float64)


def extreme_for(x: Array, axes: Sequence[int]) -> Array:
    """Room for one float32 number where `axes` of `x` are reduced."""
    return empty(_reduced(x, axes))


def _reduced(x: Array, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 if a in axes else n for a, n in enumerate(x.shape))
