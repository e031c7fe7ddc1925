"""What macOS's compiler makes of a program on its way to the engine, where that differs from the text.

Measured by ANEForge 0.4.0 on M5 with macOS 26.5, assumed on the other chips. Texts that ANEForge writes avoid
both; texts by hand meet them here as they would on a Mac.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ane_trainer.ane.errors import Finding
from ane_trainer.ane.mil.program import Function, Literal, Op, Program, Value, literal

_ROUNDING = ("floor", "ceil", "round")


def compiled(program: Program) -> Program:
    """The program whose lost factors are lost (`_compile._e_mul_full_const`, ANEForge issue 112):

        mul(floor(x), 2.0) -> floor(x)

    A scalar factor goes into the scale slot of the `floor`, `ceil` or `round` before it, whose kernel drops it. A
    factor of full shape stays.
    """
    rounded = {op.result.name for op in program.main.ops if op.kind in _ROUNDING}
    if not rounded:
        return program
    main = replace(program.main, ops=tuple(_without_factor(op, rounded) for op in program.main.ops))
    return replace(program, functions=tuple(main if f is program.main else f for f in program.functions))


def refused(function: Function) -> Iterator[Finding]:
    """Products of a reduction and 0, at which the compiler fails (`_compile._e_muls`)."""
    reduced = {op.result.name for op in function.ops if op.kind.startswith("reduce_")}
    for op in function.ops:
        value, factor = _scaled(op)
        if value is not None and value.name in reduced and not any(_numbers(factor)):
            yield Finding(
                op.source or f"op {op.name}", op.kind, "a reduction times 0 does not compile.",
                "Subtract the reduction from itself.",
            )  # fmt: skip


def _without_factor(op: Op, rounded: set[str]) -> Op:
    value, _ = _scaled(op)
    if value is None or value.name not in rounded:
        return op
    shape = literal(list(op.result.type.shape), "int32")
    return Op("reshape", (("x", value), ("shape", shape)), op.results, op.source)


def _scaled(op: Op) -> tuple[Value | None, Literal | None]:
    """Value and scalar factor of a product that has the value's shape; None where it is no such product."""
    if op.kind == "mul":
        x, y = (arg for _, arg in op.args)
        for value, factor in ((x, y), (y, x)):
            scalar = isinstance(factor, Literal) and factor.type.size == 1
            if isinstance(value, Value) and scalar and value.type == op.result.type:
                return value, factor  # type: ignore[return-value]
    return None, None


def _numbers(factor: Literal | None) -> tuple[object, ...]:
    if factor is None:
        return ()
    numbers = factor.to_python()
    return numbers if isinstance(numbers, tuple) else (numbers,)
