"""The simulator as a device: runs anywhere, computes what the engine of the program's chip computes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.dispatch.devices.chain import last_reads, number
from ane_trainer.ane.dispatch.devices.protocol import F16
from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.inputs import check_array, find_input
from ane_trainer.ane.mil.program import Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator import EngineContext, Memory, Plan, make_context, prepare
from ane_trainer.ane.simulator.arrays import from_border, storage_dtype, to_border
from ane_trainer.ane.simulator.lifetimes import Pool
from ane_trainer.ane.simulator.numbers.fp16 import zeros
from ane_trainer.ane.stages import Chain, Compiled, Dispatch


class Simulator:
    """`sim`: the exact or fast simulation of a chip."""

    name = "sim"
    precisions: tuple[str, ...] = ("fp16",)

    def unavailable(self) -> str | None:
        """Never: NumPy and llvmlite are all it needs."""
        return None

    def placement(self, chip: str, fidelity: str) -> tuple[str, str]:
        """The simulator of the chip; known because no other executor is involved."""
        title = get_chip(chip).title
        return f"simulator of {title}, {fidelity}", "the simulator runs the whole program itself"

    def load(self, compiled: Compiled, *, fidelity: str, threads: int | None) -> SimSession | SimChain:
        """Lay out the program's memory and compile its loops; UsageError for an unknown fidelity."""
        context = make_context(compiled.chip, fidelity, threads)
        if compiled.chain is not None:
            return SimChain(compiled, compiled.chain, context)
        aliases = [(alias.output, alias.input) for alias in compiled.aliases]
        plan = prepare(compiled.program.main, context, aliases)
        plan.resident |= {port.name for port in compiled.inputs if port.role == "state"}
        return SimSession(plan)


class SimSession:
    """A plan as a session; closed when the plan is gone."""

    def __init__(self, plan: Plan) -> None:
        self._plan: Plan | None = plan

    def write(self, port: str, array: Array) -> None:
        """Set an input from float16 patterns or float32."""
        self._open().write(port, array)

    def read(self, port: str) -> F16:
        """A copy of a resident input."""
        return self._open().read(port)

    def values(self, port: str) -> NDArray[np.float32]:
        """The live memory of an input, decoded."""
        return self._open().buffers[port]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, F16]:
        """One run of the plan."""
        return self._open().run(feeds)

    def close(self) -> None:
        """Let go of the plan's memory."""
        self._plan = None

    def _open(self) -> Plan:
        if self._plan is None:
            raise SimulationError("session: needs to be open; it was closed. Compile the step again.")
        return self._plan


class SimChain:
    """A step in several programs: a plan for each dispatch, on memory that they share.

    What programs hand to each other stays where it was written; a state is written in place as soon as no later
    dispatch reads the old one, else at the end.
    """

    def __init__(self, compiled: Compiled, chain: Chain, context: EngineContext) -> None:
        self._threads = context.threads
        function = compiled.program.main
        self._inputs = {v.name: v for v in function.inputs}
        self._buffers: dict[str, Array] = {
            v.name: zeros(v.type.shape, storage_dtype(v.type)) for v in function.inputs
        }
        self._next = {alias.output: alias.input for alias in compiled.aliases}
        self._results = [v for v in function.outputs if v.name not in self._next]
        self._last = last_reads(chain)
        self._free: list[Array] = []
        end = len(chain.dispatches)
        self._pool = Pool(self._last | {v.name: end for v in self._results}, end, self._free)
        self._late: list[tuple[Array, Array]] = []
        self.plans: list[Plan] | None = []
        for index, each in enumerate(chain.dispatches):
            program = chain.programs[each.program].program.main
            types = {v.name: v for v in (*program.inputs, *program.outputs)}
            aliases, given = self._memory(each, index, types)
            self.plans.append(prepare(program, context, aliases, Memory(given, self._free)))
            self._pool.release(index)

    def _memory(
        self, each: Dispatch, index: int, types: Mapping[str, Value]
    ) -> tuple[list[tuple[str, str]], dict[str, Array]]:
        """(output, input) of states that a dispatch writes in place, and the memory of its ports by name."""
        given = {port: self._buffers[value] for port, value in each.inputs}
        for port, constant in each.constants:
            given[port] = np.ascontiguousarray(number(constant), np.float32)
        ports = {value: port for port, value in each.inputs}
        aliases = []
        for port, value in each.outputs:
            state, type_ = self._next.get(value), types[port].type
            if state is None:
                self._buffers[value] = self._pool.take(value, type_.shape, storage_dtype(type_))
            elif self._last.get(state, -1) > index:
                self._buffers[value] = zeros(type_.shape, storage_dtype(type_))
                self._late.append((self._buffers[state], self._buffers[value]))
            elif state in ports:
                aliases.append((port, ports[state]))
                self._buffers[value] = self._buffers[state]
                continue
            else:
                self._buffers[value] = self._buffers[state]
            given[port] = self._buffers[value]
        return aliases, given

    def write(self, port: str, array: Array) -> None:
        """Set an input of the step from float16 patterns or float32."""
        self._open()
        value = find_input(self._inputs, port)
        check_array(value, array)
        from_border(np.asarray(array), value.type, self._buffers[port], self._threads)

    def read(self, port: str) -> Array:
        """A copy of an input of the step."""
        self._open()
        return to_border(self._buffers[port], self._inputs[port].type)

    def values(self, port: str) -> NDArray[np.float32]:
        """The live memory of an input, decoded."""
        self._open()
        return self._buffers[port]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every dispatch in turn."""
        for name, array in feeds.items():
            self.write(name, array)
        for plan in self._open():
            for step in plan.steps:
                step()
        for old, new in self._late:
            np.copyto(old, new)
        return {v.name: to_border(self._buffers[v.name], v.type, self._threads) for v in self._results}

    def close(self) -> None:
        """Let go of the memory."""
        self.plans, self._buffers = None, {}

    def _open(self) -> list[Plan]:
        if self.plans is None:
            raise SimulationError("session: needs to be open; it was closed. Compile the step again.")
        return self.plans
