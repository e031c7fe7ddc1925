"""Fused entries of a plan: from MIL ops to one compiled loop bound to its arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import bind
from ane_trainer.ane.mil.program import Arg, Literal, Op, Value
from ane_trainer.ane.simulator.loops.compiled import Loops
from ane_trainer.ane.simulator.loops.group import Code, Group
from ane_trainer.ane.simulator.loops.pointwise_code import write
from ane_trainer.ane.simulator.loops.tabulate import tabulate
from ane_trainer.ane.simulator.memory.border import literal_array
from ane_trainer.ane.simulator.registry import Context

Array = NDArray[Any]


class Compiler:
    """Turns the fused entries of one plan into compiled loops."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._loops = Loops(context.threads)

    def add(
        self, ops: Sequence[Op], outputs: Sequence[Value], array_of: Callable[[Arg], Array]
    ) -> Callable[[], None]:
        """The step that computes `outputs` from the ops; callable once `finish` has been called."""
        group, arrays, tables = self._translate(ops, outputs, array_of)
        return self._loops.add(group, arrays, tables, [array_of(value) for value in outputs])

    def finish(self) -> None:
        """Compile the loops."""
        self._loops.finish()

    def _translate(
        self, ops: Sequence[Op], outputs: Sequence[Value], array_of: Callable[[Arg], Array]
    ) -> tuple[Group, list[Array], list[Array]]:
        """The fused group, its arrays and its tables."""
        code = Code()
        positions: dict[str, int] = {}

        def operand(argument: Arg) -> int:
            if isinstance(argument, Value) and argument.name in positions:
                return positions[argument.name]
            if isinstance(argument, Literal):
                constant = literal_array(argument)
                if constant.size == 1 and constant.dtype == np.float32:
                    return code.add("const", value=float(constant.reshape(-1)[0]))
                position = code.load(np.ascontiguousarray(constant))
            else:
                position = code.load(array_of(argument))
            if isinstance(argument, Value):
                positions[argument.name] = position
            return position

        for op in ops:
            call = bind(op.kind, dict(op.args))
            tensors = [p.name for p in call.op.params if p.role == "tensor"]
            sources = tuple(operand(call.args[name]) for name in tensors if name in call.args)
            positions[op.result.name] = write(code, self.context, call, sources)
        stores = tuple(positions[value.name] for value in outputs)
        group = Group(tuple(code.instrs), len(code.arrays), len(code.tables), stores)
        group, tables = tabulate(group, code.tables)
        return group, code.arrays, tables
