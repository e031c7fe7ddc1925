"""How long each value's memory is read, and a pool that hands memory on when it is not."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from itertools import chain
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
    """Blocks of memory; a value's is reused after `release` of its last reader."""

    def __init__(self, last: Mapping[str, int], end: int) -> None:
        self._last, self._end = last, end
        self._free: list[Array] = []  # from the smallest on
        self._held: dict[int, list[Array]] = {}  # by their last reader
        self._now = -1

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Memory for a value, with any content; its own for a value that is read at the end."""
        if self._last.get(name, -1) >= self._end:
            return empty(shape, dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        place = bisect_left(self._free, size, key=_size)
        fits = place < len(self._free) and _LEAST_FILLED * self._free[place].size <= size
        block = self._free.pop(place) if fits else empty((size,), np.uint8)
        self._held.setdefault(max(self._last.get(name, -1), self._now + 1), []).append(block)
        found: Array = block[:size].view(dtype).reshape(shape)
        return found

    def release(self, index: int) -> None:
        """Take back what was last read by the entry `index`."""
        for block in self._held.pop(index, ()):
            insort(self._free, block, key=_size)
        self._now = index

    def blocks(self) -> list[Array]:
        """All memory that is handed on."""
        return [*self._free, *chain.from_iterable(self._held.values())]


def _size(block: Array) -> int:
    return block.size
