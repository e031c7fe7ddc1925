"""The builder: the one mutable thing on the way to a `Function`; its ops have passed their type rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ane_trainer.ane.mil.opset.registry import Param, as_arg, infer, op_def
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, TensorType, Value


def _typed_like_others(kind: str, param: Param, args: Mapping[str, object]) -> Param:
    """`param` with the dtype that a Python number needs there: that of the arguments it must agree with."""
    domains = op_def(kind).domains
    own = domains.get(param.name)
    if own is None:
        return param
    for name, other in domains.items():
        given = args.get(name)
        if own.letter is not None and other.letter == own.letter and isinstance(given, (Value, Literal)):
            return replace(param, dtype=given.type.dtype)
    return param if param.dtype in own.dtypes else replace(param, dtype=own.dtypes[0])


def argument(kind: str, param: Param, args: Mapping[str, object]) -> Arg:
    """The argument `param` of a call with the Python values `args`."""
    return as_arg(_typed_like_others(kind, param, args), args[param.name])


class Builder:
    """Collects operations in order. `source` is attached to the ops added while it is set."""

    def __init__(self, prefix: str = "t") -> None:
        self._prefix = prefix
        self._inputs: list[Value] = []
        self._ops: list[Op] = []
        self._names: set[str] = set()
        self._counter = 0
        self.source: str | None = None

    def input(self, name: str, type_: TensorType) -> Value:
        """Declare a function input."""
        value = Value(self._unique(name), type_)
        self._inputs.append(value)
        return value

    def op(self, kind: str, *, name: str | None = None, **args: object) -> Value:
        """Add a single-result operation; Python scalars and sequences become literals."""
        (value,) = self.multi(kind, name=name, **args)
        return value

    def multi(self, kind: str, *, name: str | None = None, **args: object) -> tuple[Value, ...]:
        """Add an operation with any number of results."""
        definition = op_def(kind)
        bound: dict[str, Arg] = {}
        for param in definition.params:  # in the op's own order, so equal calls give equal programs
            if args.get(param.name) is not None:
                bound[param.name] = argument(kind, param, args)
        for key in args.keys() - {p.name for p in definition.params}:
            raise TypeError(f"{kind} has no parameter {key}")
        types = infer(kind, bound)
        results = tuple(Value(self._unique(name), type_) for type_ in types)
        self._ops.append(Op(kind, tuple(bound.items()), results, self.source))
        return results

    def producer(self, value: Value) -> Op | None:
        """The op that produces `value`; None for an input."""
        return next((op for op in reversed(self._ops) if value in op.results), None)

    def finish(self, outputs: tuple[Value, ...], *, name: str = "main", opset: str = "ios18") -> Function:
        """The function built so far, with `outputs` as its results."""
        return Function(name, tuple(self._inputs), tuple(self._ops), outputs, opset)

    def _unique(self, name: str | None) -> str:
        if name is None:
            name = f"{self._prefix}{self._counter}"
            self._counter += 1
        candidate, number = name, 1
        while candidate in self._names:
            candidate, number = f"{name}_{number}", number + 1
        self._names.add(candidate)
        return candidate
