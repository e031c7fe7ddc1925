"""A chain of dispatched programs as one function on values with the step's names.

For the simulator, which has no limit on a program's length: what one program hands to the next needs no copy then, and
what is a view of memory (windows of an image, a transposed matrix) remains one.
"""

from __future__ import annotations

from collections.abc import Iterator

from ane_trainer.ane.dispatch.devices.chain import number
from ane_trainer.ane.dispatch.devices.protocol import Floats
from ane_trainer.ane.mil.program import Arg, Function, Op, Value
from ane_trainer.ane.stages import Chain, Dispatch


def joined(step: Function, chain: Chain) -> tuple[Function, dict[str, Floats]]:
    """The dispatches of `step` as one function, and the numbers of the inputs that it has beside those of `step`.

    What several of them decode or make of constants alone is there once.
    """
    constants: dict[str, Floats] = {}
    added: list[Value] = []
    ops: list[Op] = []
    made: dict[tuple[str, tuple[tuple[str, Arg], ...]], Op] = {}
    for index, (each, compiled) in enumerate(zip(chain.dispatches, chain.in_turn, strict=True)):
        program = compiled.program.main
        names = {value.name: f"dispatch {index}, {value.name}" for value in _values(program)}
        names |= dict((*each.inputs, *each.outputs))
        constants |= {names[port]: number(literal) for port, literal in each.constants}
        added += [Value(names[v.name], v.type) for v in program.inputs if v.name in _ports(each)]
        results = {value for _, value in each.outputs}
        for op in program.ops:
            alone = next(op.operands(), None) is None and results.isdisjoint(
                names[v.name] for v in op.results
            )
            first = made.get((op.kind, op.args)) if alone else None
            if first is not None:
                names |= {v.name: f.name for v, f in zip(op.results, first.results, strict=True)}
                continue
            ops.append(op.renamed(names))
            if alone:
                made[op.kind, op.args] = ops[-1]
    return Function(step.name, (*step.inputs, *added), tuple(ops), step.outputs, step.opset), constants


def _values(program: Function) -> Iterator[Value]:
    yield from program.inputs
    for op in program.ops:
        yield from op.results


def _ports(each: Dispatch) -> set[str]:
    return {port for port, _ in each.constants}
