"""Groups: straight-line pointwise code over broadcast arrays, each op rounded as the engine rounds.

Values in registers are decoded fp16 (see `fp16.py`); add, sub and mul round half away from zero to 11 bits after
every op, exactly like `round_half_away`; every other function of one variable is a gather from its table of 65,536
results, so it cannot differ from the NumPy definition it was built from. `scale` multiplies by a power of two of at
least 1, which rounds nothing. `partial` adds with 11 bits and no limit. `product` and `fma` (acc + x * w) are raw
float32; `mac_...` are steps of a multiply-accumulate (`lanes.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.weights import Array

F32 = NDArray[np.float32]
Memory = Array

#: Codes whose result is a truth value; every other instruction gives floats.
BOOL_CODES = frozenset(["lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor", "not", "load_bool"])

#: Codes whose result may lie beyond the engine's range; loaded NaN patterns decode to more than its inf.
_UNLIMITED = ("load", "partial", "product", "fma", "mac_start", "mac_add")


@dataclass(frozen=True)
class Instr:
    """One step of a group, known by its position: it reads array or table `which`, or is a constant `value`."""

    code: str
    sources: tuple[int, ...] = ()
    which: int = -1
    value: float = 0.0

    @property
    def is_bool(self) -> bool:
        return self.code in BOOL_CODES


@dataclass(frozen=True)
class Group:
    """Straight-line pointwise code over loaded arrays; `stores` lists the positions written out, in order."""

    code: tuple[Instr, ...]
    num_arrays: int
    num_tables: int
    stores: tuple[int, ...]


@dataclass(frozen=True)
class Folds:
    """A group and what is gathered of it: pairs of a fold and a position in the code.

    Folds: `sum` and `sum_square` (of squares, both unrounded) in float64, `sum32` and `sum_square32` in float32,
    `max`, `min`.
    """

    group: Group
    folds: tuple[tuple[str, int], ...]


def within_range(code: Sequence[Instr]) -> list[bool]:
    """Which values are known to lie within the engine's range."""
    known: list[bool] = []
    for instr in code:
        if instr.code in ("select", "copysign"):
            chosen = instr.sources[1:] if instr.code == "select" else instr.sources[:1]
            known.append(all(known[s] for s in chosen))
        elif instr.code == "const":
            known.append(abs(instr.value) <= 65536.0)
        else:
            known.append(not instr.code.startswith(_UNLIMITED))
    return known


class Code:
    """A group's instructions under construction; equal constants and lookups are shared."""

    def __init__(self) -> None:
        self.instrs: list[Instr] = []
        self.arrays: list[Memory] = []
        self.tables: list[F32] = []
        self._seen: dict[tuple[Instr, float], int] = {}

    def add(self, code: str, *sources: int, which: int = -1, value: float = 0.0) -> int:
        """Append an instruction (or find the equal one) and return its position."""
        instr = Instr(code, sources, which, value)
        known = instr, math.copysign(1.0, value)  # 0 and -0 are equal
        if known not in self._seen:
            self._seen[known] = len(self.instrs)
            self.instrs.append(instr)
        return self._seen[known]

    def load(self, array: Memory) -> int:
        """Append a load of an array's elements."""
        kind = "load_bool" if array.dtype == np.bool_ else "load"
        return self.add(kind, which=self.which(array))

    def number(self, value: float | np.floating[Any]) -> int:
        """Append a constant, rounded to float32."""
        return self.add("const", value=float(np.float32(value)))

    def which(self, array: Memory) -> int:
        """The number of an array among those of the group."""
        for number, known in enumerate(self.arrays):
            if known is array:
                return number
        self.arrays.append(array)
        return len(self.arrays) - 1

    def lookup(self, source: int, table: F32) -> int:
        """Append a gather from `table`, float32[65536] indexed by fp16 pattern."""
        for number, known in enumerate(self.tables):
            if known is table or np.array_equal(known.view(np.uint32), table.view(np.uint32)):
                return self.add("lookup", source, which=number)
        self.tables.append(table)
        return self.add("lookup", source, which=len(self.tables) - 1)
