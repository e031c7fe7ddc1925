"""The simulator as a device: runs anywhere, computes what the engine of the program's chip computes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.dispatch.devices.joined import joined
from ane_trainer.ane.dispatch.devices.protocol import F16, Floats
from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator import Plan, make_context, prepare
from ane_trainer.ane.stages import Compiled


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

    def load(self, compiled: Compiled, *, fidelity: str, threads: int | None) -> SimSession:
        """Lay out the program's memory (of a chain: of all its dispatches) and compile its loops; UsageError for an
        unknown fidelity.
        """
        context = make_context(compiled.chip, fidelity, threads)
        aliases = [(alias.output, alias.input) for alias in compiled.aliases]
        function, constants = compiled.program.main, dict[str, Floats]()
        if compiled.chain is not None:
            function, constants = joined(function, compiled.chain)
        plan = prepare(function, context, aliases)
        plan.resident |= {port.name for port in compiled.inputs if port.role == "state"} | constants.keys()
        for name, value in constants.items():
            plan.write(name, value)
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
