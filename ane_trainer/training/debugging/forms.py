"""What rewrites are made of: a program's makers and readers, ops put behind others, values in the place of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ane_trainer.ane.compiler.lower.passes.rewriting import Rewriter
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Value
from ane_trainer.ane.verify.accuracy import OpAccuracy


@dataclass(frozen=True)
class Rewritten:
    """A program in another form: the rewrite's name, and how a user writes it."""

    name: str
    how: str
    function: Function


@dataclass(frozen=True)
class Graph:
    """A function with who makes and who reads each value, and what was measured of it."""

    function: Function
    measured: Mapping[str, OpAccuracy]

    @property
    def makers(self) -> dict[str, Op]:
        return {v.name: op for op in self.function.ops for v in op.results}

    @property
    def readers(self) -> dict[str, list[Op]]:
        found: dict[str, list[Op]] = {}
        for op in self.function.ops:
            for value in op.operands():
                found.setdefault(value.name, []).append(op)
        return found


class Replay:
    """A function with ops put before others, and values in the place of others."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.before: dict[str, Callable[[Maker], Mapping[str, Value]]] = {}

    def at(self, op: Op, make: Callable[[Maker], Mapping[str, Value]]) -> None:
        """After `op`, `make` adds ops; it returns old value names -> the values that stand for them from there on."""
        self.before[op.name] = make

    def result(self) -> Function:
        rewriter = Rewriter(self.function)
        known: dict[str, Value] = {}

        def visit(rewriter: Rewriter, op: Op) -> None:
            rewriter.append(op)
            make = self.before.get(op.name)
            if make is not None:
                for old, new in make(Maker(rewriter, op.source, known)).items():
                    value = next(v for each in self.function.ops for v in each.results if v.name == old)
                    rewriter.replace_uses(value, new)

        return rewriter.run(visit)


class Maker:
    """Adds ops of checked types to a walk; `known` keeps values between places."""

    def __init__(self, rewriter: Rewriter, source: str | None, known: dict[str, Value]) -> None:
        self.rewriter, self.source, self.known = rewriter, source, known

    def op(self, kind: str, **args: object) -> Value:
        """One op with one result."""
        return new_op(self.rewriter, self.source, kind, **args)


def new_op(rewriter: Rewriter, source: str | None, kind: str, **args: object) -> Value:
    """The result of one more op; its type rule is asked. ProgramError where it refuses."""
    builder = Builder("new")
    builder.multi(kind, name=None, **args)
    (made,) = builder.finish(()).ops
    new = replace(made, results=(rewriter.fresh(made.result.type),), source=source)
    rewriter.append(new)
    return new.result


def is_square(op: Op) -> bool:
    """Whether an op is x * x."""
    if op.kind == "square":
        return True
    if op.kind == "mul":
        return op.arg("x") == op.arg("y")
    return op.kind == "pow" and number_of(op.arg("y")) == 2.0


def number_of(argument: Arg | None) -> float | None:
    """A constant of one number."""
    if not isinstance(argument, Literal) or argument.type.size != 1 or not isinstance(argument.data, bytes):
        return None
    found = argument.to_python()
    value = found[0] if isinstance(found, tuple) else found
    return float(value) if isinstance(value, (int, float)) else None
