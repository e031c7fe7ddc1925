"""A prepared program: buffers laid out, pointwise work fused and compiled, ready to run many times.

Every value has its place in memory from the start; views (`reshape`, `transpose`, slices) cost nothing.
Inputs that an alias feeds are resident: a run reads them and leaves the next state in the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.inputs import check_array, find_input, missing_input
from ane_trainer.ane.mil.opset import Call, bind
from ane_trainer.ane.mil.program import Arg, Function, Literal, Op, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.arrays import (
    from_border,
    literal_array,
    storage_dtype,
    to_border,
)
from ane_trainer.ane.simulator.kernel_steps import kernel_step
from ane_trainer.ane.simulator.kernels import fused, unfolding
from ane_trainer.ane.simulator.kernels.integer import (
    bind_integer,
    encoded_products,
    integer_operands,
    with_encoding,
)
from ane_trainer.ane.simulator.kernels.movement import offset_on_last_axis, view_of
from ane_trainer.ane.simulator.kernels.reduction import scaled_sum_into
from ane_trainer.ane.simulator.lifetimes import Pool, last_uses
from ane_trainer.ane.simulator.loops.compiled import copies, in_rows
from ane_trainer.ane.simulator.numbers.fp16 import empty, zeros
from ane_trainer.ane.simulator.registry import EngineContext
from ane_trainer.ane.simulator.schedule import VIEWS, Entry, lazy_values, schedule
from ane_trainer.ane.simulator.states import without_states

Step = Callable[[], None]


@dataclass
class Plan:
    """A function bound to memory. `run` executes it; `write` and `read` reach resident inputs.

    `step_ops` names the ops that each step works out (none for copies of state); views, and what depends on no input,
    need no step. `buffers` has every value; after a run only inputs, outputs and constants still hold theirs, the
    others have shared the blocks `shared`.
    """

    function: Function
    context: EngineContext
    buffers: dict[str, Array]
    steps: list[Step]
    resident: frozenset[str]
    results: tuple[Value, ...]
    step_ops: tuple[tuple[str, ...], ...] = ()
    shared: tuple[Array, ...] = ()
    _rows: list[Step] | None = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Execute once. `feeds` gives every input that is not resident; returns the outputs that are not
        aliased.
        """
        for value in self.function.inputs:
            if value.name in feeds:
                self.write(value.name, feeds[value.name])
            elif value.name not in self.resident:
                raise missing_input(value)
        if self._rows is None:
            self._rows = in_rows(self.steps)
        for step in self._rows:
            step()
        threads = self.context.threads
        return {
            value.name: to_border(self.buffers[value.name], value.type, threads) for value in self.results
        }

    def write(self, name: str, array: Array) -> None:
        """Set an input from a border array: float16 for fp16 (bit patterns count), bool, int or float32."""
        value = find_input(self._inputs, name)
        check_array(value, array)
        from_border(np.asarray(array), value.type, self.buffers[name], self.context.threads)

    def read(self, name: str) -> Array:
        """A copy of an input's present value (the state, for resident inputs) as a border array."""
        return to_border(self.buffers[name], self._inputs[name].type)

    @cached_property
    def _inputs(self) -> dict[str, Value]:
        return {value.name: value for value in self.function.inputs}


def prepare(
    function: Function,
    context: EngineContext,
    aliases: Sequence[tuple[str, str]] = (),
    given: Mapping[str, Array] | None = None,
) -> Plan:
    """Lay out memory and compile; `aliases` lists (output, input) pairs whose output is the next run's input.

    Core ML states become resident inputs (`states.py`); what depends on no input is worked out now. `given`: memory of
    inputs by name, where they have it.
    """
    function, kept = without_states(function)
    return _Binder(function, context, (*aliases, *kept), given or {}).bind()


class _Binder:
    """Builds a plan: one pass over the schedule, allocating and binding each entry."""

    def __init__(
        self,
        function: Function,
        context: EngineContext,
        aliases: Sequence[tuple[str, str]],
        given: Mapping[str, Array],
    ) -> None:
        self.function, self.context, self.given = function, context, given
        self.next_input = dict(aliases)
        self.entries = schedule(function)
        self.integer = integer_operands(function, context.chip.generation_number)
        self.encoded = encoded_products(function)
        self.buffers: dict[str, Array] = {}
        self.base: dict[str, str] = {}  # view -> the value whose memory it shows
        self.steps: list[Step] = []
        self.step_ops: list[tuple[str, ...]] = []
        self.compiler = fused.Compiler(context)
        self.lazy = lazy_values(function)
        self.unfolded: dict[str, unfolding.Unfolded] = {}  # windows, read where they lie
        self.last_read = self._last_reads()
        self.views_of = self._views()
        hidden = {name: found.q.name for name, found in self.integer.items()}
        self.pool = Pool(last_uses(function, self.entries, hidden), len(self.entries))

    def bind(self) -> Plan:
        for value in self.function.inputs:
            own = self.given.get(value.name)
            self.buffers[value.name] = (
                zeros(value.type.shape, storage_dtype(value.type)) if own is None else own
            )
            self.base[value.name] = value.name
        for index, entry in enumerate(self.entries):
            if entry.fused:
                self._bind_fused(index, entry)
            else:
                self._bind_single(entry)
            self._note_steps(tuple(op.name for op in entry.ops))
            self.pool.release(index)
        self._keep_old_state()
        self._copy_state_back()
        self._note_steps(())
        self.compiler.finish()
        aliased = set(self.next_input)
        results = tuple(v for v in self.function.outputs if v.name not in aliased)
        resident = frozenset(self.next_input.values())
        return Plan(
            self.function, self.context, self.buffers, self.steps, resident, results, tuple(self.step_ops),
            tuple(self.pool.blocks()),
        )  # fmt: skip

    def _note_steps(self, names: tuple[str, ...]) -> None:
        """The steps added since the last call work out the ops `names`."""
        self.step_ops += [names] * (len(self.steps) - len(self.step_ops))

    def _bind_fused(self, index: int, entry: Entry) -> None:
        made = {op.result.name for op in entry.ops}
        outputs = [op.result for op in entry.ops if self.last_read.get(op.result.name, -1) > index]
        for value in outputs:
            target = self._in_place_target(value, index, made)
            self.buffers[value.name] = self.buffers[target] if target else self._memory(value)
            self.base[value.name] = target or value.name
        self.steps.append(self.compiler.add(entry.ops, outputs, self.array_of))

    def _in_place_target(self, value: Value, index: int, made: set[str]) -> str | None:
        """The resident input that this output may overwrite: nobody reads it later, and here only in step."""
        target = self.next_input.get(value.name)
        if target is None or self._last_read_of_memory(target) > index:
            return None
        for op in self.entries[index].ops:
            for operand in op.operands():
                if operand.name not in made and self.base[operand.name] == target:
                    same = self.buffers[operand.name].strides == self.buffers[target].strides
                    if not same or operand.type.shape != value.type.shape:
                        return None
        return target

    def _bind_single(self, entry: Entry) -> None:
        op = entry.ops[0]
        call = bind(op.kind, dict(op.args))
        clamped = self.context.chip.width_slice_clamp is not None and offset_on_last_axis(call)
        if not clamped and not entry.constant and self._unfold(op, call):
            return
        if op.kind in VIEWS and isinstance(op.arg("x"), Value) and not clamped:
            views = view_of(call, self.array_of(call.args["x"]))
            if views is not None:
                source = self.base[next(op.operands()).name]
                for value, view in zip(op.results, views, strict=True):
                    self.buffers[value.name] = view
                    self.base[value.name] = source
                return
        outputs = []
        for value in [v for op in entry.ops for v in op.results]:
            outputs.append(self._memory(value, entry.constant))
            self.buffers[value.name], self.base[value.name] = outputs[-1], value.name
        step = self._unfolded_product(op, call, outputs)
        operands = [] if step is not None else self._operands(op)
        if step is None:
            step = self._integer_step(op, outputs)
        if entry.factor is not None:
            step = scaled_sum_into(self.context, call, outputs, operands[0], entry.factor)
        elif step is None:
            step = kernel_step(op, self.context, operands, outputs)
        if op.name in self.encoded:
            step = with_encoding(op, step, operands[0], operands[1], outputs[0])
        if entry.constant:
            step()
        else:
            self.steps.append(step)

    def _memory(self, value: Value, constant: bool = False) -> Array:
        """Memory for a result; a constant keeps its own."""
        shape, dtype = value.type.shape, storage_dtype(value.type)
        return empty(shape, dtype) if constant else self.pool.take(value.name, shape, dtype)

    def _unfold(self, op: Op, call: Call) -> bool:
        """Keep the result as a view with more axes, where it is concatenated slices of one value or a view of such."""
        name = op.results[0].name
        if op.kind == "concat" and name in self.lazy and not call.flag("interleave"):
            operands = list(op.operands())
            roots = {self.base.get(value.name, "") for value in operands}
            if len(roots) != 1 or "" in roots or roots & set(self.next_input.values()):
                return False
            parts = [
                self.unfolded.get(value.name) or unfolding.plain(self.buffers[value.name])
                for value in operands
            ]
            found = unfolding.joined(parts, call.integer("axis") % len(parts[0].groups))
        elif op.kind in VIEWS and name in self.lazy and (x := op.arg("x")) and self._is_unfolded(x):
            found = unfolding.moved(call, self.unfolded[x.name])
        else:
            return False
        if found is not None:
            self.unfolded[name] = found
            self.base[name] = self.base[next(op.operands()).name]
        return found is not None

    def _is_unfolded(self, argument: Arg) -> TypeGuard[Value]:
        return isinstance(argument, Value) and argument.name in self.unfolded

    def _unfolded_product(self, op: Op, call: Call, outputs: list[Array]) -> Step | None:
        """The product of windows, which are not in memory."""
        if op.kind != "matmul" or op.name in self.encoded or op.name in self.integer:
            return None
        operands = []
        for name in ("x", "y"):
            argument = call.args[name]
            if self._is_unfolded(argument):
                found = self.unfolded[argument.name]
            else:
                found = unfolding.plain(self.array_of(argument))
            rank = len(found.groups)
            if rank < 2:
                return None
            swapped = (*range(rank - 2), rank - 1, rank - 2)
            operands.append(found.transposed(swapped) if call.flag(f"transpose_{name}") else found)
        if all(max(found.groups) == 1 for found in operands):
            return None
        left, right = operands
        return unfolding.product(self.context, left, right, outputs[0])

    def _integer_step(self, op: Op, outputs: list[Array]) -> Step | None:
        """The op on the int8 path, when both operands are int8 behind a dequantization."""
        found = self.integer.get(op.name)
        if found is None:
            return None
        bias = op.arg("bias")
        start = None if bias is None else self.array_of(bias)
        return bind_integer(op, found, self.buffers[found.q.name], start, outputs[0])

    def _operands(self, op: Op) -> list[Any]:
        """The op's tensor operands as arrays, in the order of its parameters."""
        definition = bind(op.kind, dict(op.args)).op
        operands: list[object] = []
        for param in definition.params:
            if param.role == "const":
                continue
            argument = op.arg(param.name)
            if argument is None:
                operands.append(None)
            elif isinstance(argument, tuple):
                operands.append(tuple(self.array_of(item) for item in argument))
            else:
                operands.append(self.array_of(argument))
        return operands

    def array_of(self, argument: Arg) -> Array:
        """The memory of a value, or a literal as an array."""
        if self._is_unfolded(argument) and argument.name not in self.buffers:
            self._materialize(argument)
        if isinstance(argument, Value):
            return self.buffers[argument.name]
        if isinstance(argument, Literal):
            return literal_array(argument)
        raise SimulationError("plan: needs one operand; got several.", code="SIM100")

    def _materialize(self, value: Value) -> None:
        """Bring windows into memory."""
        view = self.unfolded[value.name].view
        room = self.pool.take(value.name, view.shape, np.float32)
        self.buffers[value.name], self.base[value.name] = room.reshape(value.type.shape), value.name
        self.steps.append(copies([(room, view)], self.context.threads))

    def _keep_old_state(self) -> None:
        """Results that show a state's memory are copied before the new state comes there."""
        resident = set(self.next_input.values())
        pairs = []
        for value in self.function.outputs:
            name = value.name
            if name not in self.next_input and name not in resident and self.base[name] in resident:
                pairs.append((np.empty_like(self.buffers[name], order="C"), self.buffers[name]))
                self.buffers[name] = pairs[-1][0]
        if pairs:
            self.steps.append(lambda: _copy(pairs))

    def _copy_state_back(self) -> None:
        """Outputs that could not be written in place are copied into their input at the end of a run."""
        pairs = []
        for output, target in self.next_input.items():
            if self.buffers[output] is not self.buffers[target]:
                pairs.append((self.buffers[target], self.buffers[output]))
        if pairs:
            self.steps.append(lambda: _copy(pairs))

    def _last_reads(self) -> dict[str, int]:
        """For each value, the index of the last entry that reads it; outputs are read at the very end."""
        last: dict[str, int] = {}
        for index, entry in enumerate(self.entries):
            for name in entry.reads:
                last[name] = index
        for value in self.function.outputs:
            last[value.name] = len(self.entries)
        return last

    def _last_read_of_memory(self, name: str) -> int:
        """The last read of a value or of any view bound on its memory; views bound later read later."""
        shown = [name]
        for each in shown:  # it grows
            shown += self.views_of.get(each, ())
        return max(self.last_read.get(each, -1) for each in shown)

    def _views(self) -> dict[str, list[str]]:
        """For each value, the results of the ops that may be views on its memory."""
        found: dict[str, list[str]] = {}
        for op in self.function.ops:
            for operand in op.operands() if op.kind in VIEWS else ():
                found.setdefault(operand.name, []).extend(v.name for v in op.results)
        return found


def _copy(pairs: list[tuple[Array, Array]]) -> None:
    """Copy each source to its target; a source that is the target of another copy (swapped states) is read
    first.
    """
    targets = [to for to, _ in pairs]
    sources = [s.copy() if any(np.may_share_memory(s, t) for t in targets) else s for _, s in pairs]
    for to, source in zip(targets, sources, strict=True):
        np.copyto(to, source)
