"""Which state outputs may share memory with their inputs: those whose old value has no later reader.

An engine's compiler orders operations as it likes within their dependencies. So an output is safe on its
input's memory only if every operation that reads the input (or a view of it) has to come before the
operation that makes the output, or is that operation and works element by element.
"""

from __future__ import annotations

from collections.abc import Iterable

from ane_trainer.ane.mil.program import Function, Op
from ane_trainer.ane.simulator.schedule import VIEWS
from ane_trainer.ane.stages import Alias

#: Operations that read each element before they write it, when operand and result have one shape.
ELEMENTWISE = frozenset(("add", "sub", "mul", "real_div", "maximum", "minimum", "select"))


def ordered(function: Function, aliases: Iterable[Alias]) -> frozenset[Alias]:
    """The aliases whose output can only be written after the last read of its input.

    Two inputs that an output's views would connect, outputs that are views, and outputs that are inputs are
    not among them. What one operation's own tiles overlap is the engine's matter: operations count as units.
    """
    producers = {value.name: index for index, op in enumerate(function.ops) for value in op.results}
    before = _ancestors(function.ops, producers)
    safe = set()
    for alias in aliases:
        last = producers.get(alias.output)
        if last is None or function.ops[last].kind in VIEWS:
            continue
        readers = _readers(function.ops, alias.input)
        if alias.input not in producers and all(
            before[last] >> reader & 1 or (reader == last and _in_step(function.ops[last], alias))
            for reader in readers
        ):
            safe.add(alias)
    return frozenset(safe)


def _ancestors(ops: tuple[Op, ...], producers: dict[str, int]) -> list[int]:
    """For each operation, a bit for each operation that must have run before it."""
    before: list[int] = []
    for op in ops:
        mask = 0
        for value in op.operands():
            if value.name in producers:
                mask |= before[producers[value.name]] | 1 << producers[value.name]
        before.append(mask)
    return before


def _readers(ops: tuple[Op, ...], name: str) -> set[int]:
    """Operations that read a value's memory, also through views of it."""
    shown, readers = {name}, set()
    for index, op in enumerate(ops):
        if any(value.name in shown for value in op.operands()):
            readers.add(index)
            if op.kind in VIEWS:
                shown.update(value.name for value in op.results)
    return readers


def _in_step(op: Op, alias: Alias) -> bool:
    """The operation reads the input itself, element by element with its result."""
    if op.kind not in ELEMENTWISE:
        return False
    shapes = [value.type.shape for value in op.operands() if value.name == alias.input]
    return bool(shapes) and all(shape == op.results[0].type.shape for shape in shapes)
