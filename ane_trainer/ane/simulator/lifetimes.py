"""How long each value's memory is read, and a pool that hands memory on when it is not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ane_trainer.ane.mil.program import Function
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.numbers.fp16 import empty
from ane_trainer.ane.simulator.schedule import VIEWS, Entry

#: A free block is taken for a value of at least this part of its size.
_LEAST_FILLED = 0.5


def last_uses(function: Function, entries: Sequence[Entry], hidden: Mapping[str, str]) -> dict[str, int]:
    """For each value the index of the last entry that reads its memory: itself, or a view or concatenation of it.

    Outputs are read at the very end. `hidden` names a value that an op reads beside its operands (by op name).
    """
    last = {value.name: len(entries) for value in function.outputs}
    for index in reversed(range(len(entries))):
        for op in reversed(entries[index].ops):
            shown = max(last.get(value.name, index) for value in op.results)
            read = shown if op.kind in VIEWS or op.kind == "concat" else index
            names = [value.name for value in op.operands()]
            for name in (*names, *(hidden[n] for n in (op.name,) if n in hidden)):
                last[name] = max(last.get(name, -1), read)
    return last


class Pool:
    """Blocks of memory; a value's is reused after `release` of its last reader.

    `free`: blocks that pools share whose users never run at one time.
    """

    def __init__(self, last: Mapping[str, int], end: int, free: list[Array] | None = None) -> None:
        self._last, self._end = last, end
        self._free: list[Array] = [] if free is None else free
        self._held: dict[str, Array] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Memory for a value, with any content; its own for a value that is read at the end."""
        if self._last.get(name, -1) >= self._end:
            return empty(shape, dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        fitting = [b for b in self._free if size <= b.size and _LEAST_FILLED * b.size <= size]
        block = min(fitting, key=lambda b: b.size) if fitting else empty((size,), np.uint8)
        self._free[:] = [b for b in self._free if b is not block]
        self._held[name] = block
        found: Array = block[:size].view(dtype).reshape(shape)
        return found

    def release(self, index: int) -> None:
        """Take back what was last read by the entry `index`."""
        for name in [n for n in self._held if self._last.get(n, -1) <= index]:
            self._free.append(self._held.pop(name))

    def blocks(self) -> list[Array]:
        """All memory that is handed on."""
        return [*self._free, *self._held.values()]
