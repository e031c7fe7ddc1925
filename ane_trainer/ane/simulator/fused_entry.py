"""Fused entries of a plan: from MIL ops to one compiled loop bound to its arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil import Arg, Literal, Op, Value
from ane_trainer.ane.opset import bind
from ane_trainer.ane.simulator import fuse, jit
from ane_trainer.ane.simulator.border import literal_array
from ane_trainer.ane.simulator.loops import element_strides, nest
from ane_trainer.ane.simulator.pointwise_code import Code, write
from ane_trainer.ane.simulator.registry import Context
from ane_trainer.ane.simulator.tabulate import tabulate

Array = NDArray[Any]

#: Elements below which one thread is faster than two (hand-over costs about 20 us).
PARALLEL_ELEMENTS = 1 << 16

#: Registers' worth of lanes that one round of a loop works on: two independent chains hide the latency of the
#: roundings (Adam's update of 200,000 parameters: 566 us with one, 408 us with two; bench/pointwise.py).
INTERLEAVE = 2

_compiled: dict[str, Callable[..., None]] = {}


class Compiler:
    """Collects the fused loops of one plan and compiles them as one module; equal loops are compiled once."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._bodies: dict[str, str] = {}  # body -> function name

    def add(
        self, ops: Sequence[Op], outputs: Sequence[Value], array_of: Callable[[Arg], Array]
    ) -> Callable[[], None]:
        """The step that computes `outputs` from the ops; callable once `finish` has been called."""
        group, arrays, tables = self._translate(ops, outputs, array_of)
        shape = ops[0].result.type.shape
        targets = [array_of(value) for value in outputs]
        loops = nest(shape, [element_strides(a, shape) for a in (*arrays, *targets)])
        body = fuse.emit("FUNCTION", group, loops, _lanes())
        self._bodies.setdefault(body, f"fused{len(self._bodies)}")
        memory = [*arrays, *tables, *targets]
        return _step(body, memory, loops.extents, self.context.threads)

    def finish(self) -> None:
        """Compile every loop that this process has not compiled before."""
        missing = [body for body in self._bodies if body not in _compiled]
        if not missing:
            return
        names = [f"fused{i}" for i in range(len(missing))]
        text = fuse.declarations(_lanes())
        for name, body in zip(names, missing, strict=True):
            text += body.replace("@FUNCTION", f"@{name}", 1)
        functions = jit.compile_ir(text, names)
        for name, body in zip(names, missing, strict=True):
            _compiled[body] = functions[name]

    def _translate(
        self, ops: Sequence[Op], outputs: Sequence[Value], array_of: Callable[[Arg], Array]
    ) -> tuple[fuse.Group, list[Array], list[Array]]:
        """The fused group, its arrays and its tables."""
        code = Code()
        arrays: list[Array] = []
        positions: dict[str, int] = {}

        def operand(argument: Arg) -> int:
            if isinstance(argument, Value) and argument.name in positions:
                return positions[argument.name]
            if isinstance(argument, Literal):
                constant = literal_array(argument)
                if constant.size == 1 and constant.dtype == np.float32:
                    return code.add("const", value=float(constant.reshape(-1)[0]))
                array: Array = np.ascontiguousarray(constant)
            else:
                array = array_of(argument)
            arrays.append(array)
            kind = "load_bool" if array.dtype == np.bool_ else "load"
            position = code.add(kind, which=len(arrays) - 1)
            if isinstance(argument, Value):
                positions[argument.name] = position
            return position

        for op in ops:
            call = bind(op.kind, dict(op.args))
            tensors = [p.name for p in call.op.params if p.role == "tensor"]
            sources = tuple(operand(call.args[name]) for name in tensors if name in call.args)
            positions[op.result.name] = write(code, self.context, call, sources)
        stores = tuple(positions[value.name] for value in outputs)
        group = fuse.Group(tuple(code.instrs), len(arrays), len(code.tables), stores)
        group, tables = tabulate(group, code.tables)
        return group, arrays, tables


def _lanes() -> int:
    return INTERLEAVE * jit.host_vector_width()


def _step(body: str, memory: Sequence[Array], extents: tuple[int, ...], threads: int) -> Callable[[], None]:
    """A callable that runs the loop, split over the outermost axis when there is enough to do; it keeps `memory`."""
    outer, total = extents[0], int(np.prod(extents))
    parts = threads if total >= PARALLEL_ELEMENTS else 1
    unit = 64 if len(extents) == 1 else 1
    bounds = [min(outer, -(-outer * i // (parts * unit)) * unit) for i in range(parts + 1)]
    pointers = [array.ctypes.data for array in memory]
    pieces = [(*pointers, a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]

    return partial(_run, body, pieces, threads, memory)


def _run(body: str, pieces: Sequence[tuple[int, ...]], threads: int, memory: Sequence[Array]) -> None:
    """Call the compiled loop on its pieces; `memory` is what the pieces point to, held while the step lives."""
    jit.run_parallel(_compiled[body], pieces, threads)


def round_in_place(array: Array, context: Context) -> Callable[[], None]:
    """A step that turns raw fp32 accumulator values into engine results, where they are: overflow, then rounding."""
    code = Code()
    rounded = code.add("mac_round", code.add("load", which=0))
    group = fuse.Group(tuple(code.instrs), 1, 0, (rounded,))
    strides = element_strides(array, array.shape)
    loops = nest(array.shape, [strides, strides])
    body = fuse.emit("FUNCTION", group, loops, _lanes())
    if body not in _compiled:
        text = fuse.declarations(_lanes()) + body.replace("@FUNCTION", "@fused0", 1)
        _compiled[body] = jit.compile_ir(text, ["fused0"])["fused0"]
    return _step(body, [array, array], loops.extents, context.threads)
