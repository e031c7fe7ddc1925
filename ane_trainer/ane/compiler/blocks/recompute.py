"""Activations of blocks computed again in the backward pass, so that they need not be kept until then.

    before   forward 1: a = f(x)  y = g(a)    forward 2: ..    backward 2: ..    backward 1: dx = h(dy, a)
    after    forward 1: a = f(x)  y = g(a)    forward 2: ..    backward 2: ..    backward 1: a' = f(x)  dx = h(dy, a')

What is kept is what goes from block to block (`x`, `y`); the operations and their operands are the same, so the bits
are too. Dropout's masks and other draws are inputs of the step: they are not drawn again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ane_trainer.ane.compiler.blocks.places import BACKWARD, FORWARD, REST, SUMS, origins_of, readers_of
from ane_trainer.ane.mil.program import Function, Op, Program, Value
from ane_trainer.ane.stages import Lowered


def recomputed(lowered: Lowered, blocks: Mapping[str, str]) -> Lowered:
    """The step with activations computed again. `blocks`: module path -> the name of the block that it is in."""
    function = _Again(lowered, blocks).function()
    program = Program((function,), lowered.program.version, lowered.program.attributes)
    return replace(lowered, program=program)


class _Again:
    """Goes over the operations in order, and puts copies of a block's forward in front of its backward."""

    def __init__(self, lowered: Lowered, blocks: Mapping[str, str]) -> None:
        self.whole = lowered.program.main
        self.ops = self.whole.ops
        self.places = origins_of(lowered, blocks)
        self.maker = {value.name: i for i, op in enumerate(self.ops) for value in op.results}
        self.readers = readers_of(self.ops)
        self.results = {value.name for value in self.whole.outputs}
        self.taken = {value.name for value in self.whole.inputs} | set(self.maker)
        self.kept: dict[int, bool] = {}
        self.names: dict[str, str] = {}  # of values that were computed again

    def function(self) -> Function:
        """The function with its copies, without what nothing reads any more."""
        ops: list[Op] = []
        for op, place in zip(self.ops, self.places, strict=True):
            if place.key[0] == BACKWARD and place.block != REST:
                ops += map(self._copy, self._missing(op, place.block))
                op = self._rewired(op, place.block)
            ops.append(op)
        return replace(self.whole, ops=tuple(_read(ops, self.results)))

    def _again(self, name: str, block: str) -> int | None:
        """The operation that makes a value of this block's forward pass, if it is to be computed again."""
        index = self.maker.get(name)
        if index is None or self.places[index].block != block or self.places[index].key[0] != FORWARD:
            return None
        if index not in self.kept:
            self.kept[index] = self._is_kept(index)
        return None if self.kept[index] else index

    def _is_kept(self, index: int) -> bool:
        """Whether a result goes to other blocks; or takes part in a sum that the engine merges with its factor.

        A factor is merged with the sum before it where nothing else reads that (`places`), which changes bits: a copy
        must leave the number of a sum's readers as it was, and so reads a sum of its own, or none.
        """
        op, key = self.ops[index], self.places[index].key
        readers = [i for value in op.results for i in self.readers.get(value.name, ())]
        outside = any(self.places[i].key[0] == FORWARD and self.places[i].key != key for i in readers)
        if outside or any(value.name in self.results for value in op.results):
            return True
        if op.kind in SUMS and len(readers) > 1:
            return True
        return any(
            self._is_lone_sum(value.name) and self._stays(value.name, index) for value in op.operands()
        )

    def _is_lone_sum(self, name: str) -> bool:
        maker = self.maker.get(name)
        return maker is not None and self.ops[maker].kind in SUMS and len(self.readers[name]) == 1

    def _stays(self, name: str, reader: int) -> bool:
        return self._again(name, self.places[reader].block) is None

    def _missing(self, op: Op, block: str) -> Iterable[Op]:
        """The operations to be copied for `op`, in order; those that were copied before are not among them."""
        found: set[int] = set()
        waiting = [op]
        while waiting:
            for value in waiting.pop().operands():
                index = self._again(value.name, block)
                if index is not None and index not in found and value.name not in self.names:
                    found.add(index)
                    waiting.append(self.ops[index])
        return [self.ops[index] for index in sorted(found)]

    def _copy(self, op: Op) -> Op:
        block = self.places[self.maker[op.results[0].name]].block
        copy = self._rewired(op, block)
        for value in op.results:
            self.names[value.name] = self._fresh(value.name)
        return replace(copy, results=tuple(Value(self.names[v.name], v.type) for v in op.results))

    def _rewired(self, op: Op, block: str) -> Op:
        """The operation on copies of this block's values."""
        read = [value.name for value in op.operands()]
        again = {name for name in read if name in self.names and self._again(name, block) is not None}
        if not again:
            return op
        names = {name: self.names[name] if name in again else name for name in read}
        return op.renamed(names | {value.name: value.name for value in op.results})

    def _fresh(self, name: str) -> str:
        name += "_again"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _read(ops: list[Op], results: set[str]) -> list[Op]:
    """The operations of which something is read, in order."""
    read, found = set(results), list[Op]()
    for op in reversed(ops):
        if any(value.name in read for value in op.results):
            read.update(value.name for value in op.operands())
            found.append(op)
    return found[::-1]
