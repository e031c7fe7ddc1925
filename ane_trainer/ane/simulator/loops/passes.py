"""Passes over memory that composed ops are made of: a little pointwise code, stored or gathered, as one loop.

p = Pass(ctx)
e = p.lookup(p.add("sub", p.load(x), p.load(most)), "exp")
step = p.fold("sum", e, total, store=out)       # out = exp(x - most), total = its sum, in one pass
q = Pass(ctx)
inverse = q.store(q.lookup(q.total(total), "inverse"), factor)
chain(step, inverse)                            # both, block by block
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator.kernels.tables import lookup
from ane_trainer.ane.simulator.loops.compiled import Loop, Loops
from ane_trainer.ane.simulator.loops.group import Code, Group
from ane_trainer.ane.simulator.memory.buffers import empty
from ane_trainer.ane.simulator.registry import Context

Array = NDArray[Any]


class Pass:
    """Pointwise code (see `group.py`) over arrays that broadcast together."""

    def __init__(self, ctx: Context) -> None:
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
        """The step that gathers a value into `total` (extent 1 where it reduces), and writes it if told to.

        `kind` is "sum", "sum_square", "max" or "min" (see `group.Folds`); totals as `total_for` makes them.
        """
        group = self._group(() if store is None else (position,))
        targets = [] if store is None else [store]
        return self.loops.fold(group, self.code.arrays, self.code.tables, targets, [(kind, position, total)])

    def _group(self, stores: tuple[int, ...]) -> Group:
        return Group(tuple(self.code.instrs), len(self.code.arrays), len(self.code.tables), stores)


def total_for(ctx: Context, x: Array, axes: Sequence[int]) -> Array:
    """Room for a sum over `axes` of `x`: float64, in fast mode float32."""
    return empty(_reduced(x, axes), np.float32 if ctx.fast else np.float64)


def extreme_for(x: Array, axes: Sequence[int]) -> Array:
    """Room for one float32 number where `axes` of `x` are reduced."""
    return empty(_reduced(x, axes))


def _reduced(x: Array, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 if a in axes else n for a, n in enumerate(x.shape))
