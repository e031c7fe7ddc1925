"""The traversal of program passes: each op is appended, rewritten, or its uses replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, TensorType, Value, literal


class Rewriter:
    """Walks a function once; `op` may be replaced by other ops or its result by an earlier value."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.ops: list[Op] = []
        self.producers: dict[Value, Op] = {}
        self._same: dict[str, Value] = {}
        self._fresh = 0

    def resolve(self, argument: Arg) -> Arg:
        """The argument after the replacements so far."""
        if isinstance(argument, tuple):
            return tuple(self._same.get(a.name, a) if isinstance(a, Value) else a for a in argument)
        return self._same.get(argument.name, argument) if isinstance(argument, Value) else argument

    def append(self, op: Op) -> None:
        """Append an op."""
        self.ops.append(op)
        for result in op.results:
            self.producers[result] = op

    def replace_uses(self, old: Value, new: Value) -> None:
        """Readers of `old` read `new` from here on."""
        self._same[old.name] = new

    def producer(self, argument: Arg | None) -> Op | None:
        """The op that produces a value; None for inputs and literals."""
        return self.producers.get(argument) if isinstance(argument, Value) else None

    @functools.cached_property
    def _names(self) -> set[str]:
        results = {r.name for op in self.function.ops for r in op.results}
        return results | {v.name for v in self.function.inputs}

    def fresh(self, type_: TensorType) -> Value:
        """A new value with a name of its own."""
        while True:
            name = f"p{self._fresh}"
            self._fresh += 1
            if name not in self._names:
                self._names.add(name)
                return Value(name, type_)

    def run(self, visit: Callable[[Rewriter, Op], None]) -> Function:
        """`visit` gets every op with its arguments resolved and appends, rewrites or replaces it."""
        for op in self.function.ops:
            stale = bool(self._same) and any(v.name in self._same for v in op.operands())
            visit(self, replace(op, args=tuple((k, self.resolve(a)) for k, a in op.args)) if stale else op)
        outputs = tuple(self._same.get(v.name, v) for v in self.function.outputs)
        return replace(self.function, ops=tuple(self.ops), outputs=outputs)


def integers(argument: Arg | None) -> tuple[int, ...]:
    """A constant list as Python integers."""
    assert isinstance(argument, Literal)
    value = argument.to_python()
    assert isinstance(value, tuple)
    return tuple(int(n) for n in value)


def int_list(values: Iterable[int]) -> Literal:
    """Integers as a rank-1 literal."""
    return literal(list(values), "int32")
