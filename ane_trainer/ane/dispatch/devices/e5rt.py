"""Direct dispatch to the Neural Engine through ANEForge's runtime layer (private e5rt interface of macOS).

Unverified on hardware: exercised only on a stand-in of the dispatch library, and written after ANEForge
0.4.0's `ane_e5rt_dispatch.mm`. State stays in the engine's buffers between steps, in one of two ways:

* `e5rt` (state="alias"): a state output is bound to the buffer of its input (`share_buffer`) wherever nothing
  can read the old value once the new one is written (`ordering.py`), so that a step updates it in place. The
  engine's compiler does not know of the sharing; ANEForge has verified it bit for bit on its own programs.
  Outputs that share no buffer (two-term weights: the rest is computed from old and new value) have their own,
  and the host copies them to the inputs after the step.
* `e5rt-pingpong` (state="pingpong"): no output shares a buffer; a step cannot overwrite what it reads. The
  runtime layer binds buffers only within one loaded program and only before its first run, so two bindings
  that take turns are out of its reach; the copy costs two passes over the state in shared memory.

Ports are bound by name: neither order nor equal sizes matter on this path (ANEForge `retain_input_port`;
the rules on order and size are the direct path's). Feeds are converted straight into the port's memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.dispatch.devices.aneforge_runtime import (
    LoadedProgram,
    given_library,
    load_program,
    missing,
    on_apple_silicon,
)
from ane_trainer.ane.dispatch.devices.chain import ChainSession
from ane_trainer.ane.dispatch.devices.ordering import ordered
from ane_trainer.ane.dispatch.devices.protocol import F16, Session
from ane_trainer.ane.errors import EnvironmentFault, SimulationError, UsageError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Alias, Compiled

STATES = ("alias", "pingpong")


class E5RT:
    """`e5rt` and `e5rt-pingpong`: compiled programs on the engine, by how they keep their state."""

    precisions: tuple[str, ...] = ("fp16",)

    def __init__(self, state: str = "alias") -> None:
        if state not in STATES:
            raise UsageError(f"state: needs {' or '.join(STATES)}; got {state!r}. Choose one of them.")
        self.state = state
        self.name = "e5rt" if state == "alias" else f"e5rt-{state}"

    def unavailable(self) -> str | None:
        """Off a Mac, or without ANEForge: what to type."""
        return missing()

    def not_chosen(self) -> str | None:
        """Why `auto` does not take it although it can run: the library that was named is not an engine's."""
        return None if on_apple_silicon() else "a dispatch library was named, and there is no engine here"

    def placement(self, chip: str, fidelity: str) -> tuple[str, str]:
        """The engine, since this path compiles for nothing else and has no fallback."""
        if on_apple_silicon():
            how = "the program is compiled for the engine alone and fails otherwise; unverified on hardware"
            return "Neural Engine, direct dispatch (e5rt)", how
        return f"unknown: the dispatch library {given_library()}", "this machine has no Neural Engine"

    def load(self, compiled: Compiled, *, fidelity: str, threads: int | None) -> Session:
        """Compile and load; `fidelity` and `threads` mean nothing to an engine. Raises as `load_program`."""
        if compiled.chain is not None:
            return ChainSession(
                compiled, [E5RTSession(c, load_program(c), self.state) for c in compiled.programs]
            )
        return E5RTSession(compiled, load_program(compiled), self.state)


class E5RTSession:
    """A loaded program; views of its ports' memory stay inside, since they die with it."""

    def __init__(self, compiled: Compiled, loaded: LoadedProgram, state: str) -> None:
        self._loaded = loaded
        self._shapes = {port.name: port.shape for port in compiled.inputs}
        self._state = {port.name for port in compiled.inputs if port.role == "state"}
        self._state |= {alias.input for alias in compiled.aliases}
        kept = {alias.output for alias in compiled.aliases}
        #: Aliases whose two ports are one buffer.
        self.shared: frozenset[Alias] = (
            ordered(compiled.program.main, compiled.aliases) if state == "alias" else frozenset()
        )
        program = loaded.program
        try:
            for alias in self.shared:
                program.share_buffer(0, alias.output, 0, alias.input)
            self._inputs: dict[str, F16] = {p.name: program.input_view(p.name) for p in compiled.inputs}
            outputs: dict[str, F16] = {p.name: program.output_view(p.name) for p in compiled.outputs}
        except RuntimeError as fault:
            loaded.release()
            raise EnvironmentFault(
                f"program: needs ports in memory that it can share; got {fault}. "
                'Use device="e5rt-pingpong", or device="sim".',
                code="ANE206",
            ) from None
        self._results = {name: view for name, view in outputs.items() if name not in kept}
        moves = [alias for alias in compiled.aliases if alias not in self.shared]
        self._moves = [(self._inputs[alias.input], outputs[alias.output]) for alias in moves]

    def write(self, port: str, array: Array) -> None:
        """Set an input from float16 patterns or float32 numbers, in the port's own memory."""
        _ = self._loaded.program
        np.copyto(self._view(port), self._checked(port, array))

    def read(self, port: str) -> F16:
        """A copy of a resident input."""
        _ = self._loaded.program
        return self._view(port).copy()

    def values(self, port: str) -> NDArray[np.float32]:
        """A resident input as float32 numbers."""
        return self.read(port).astype(np.float32)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, F16]:
        """One dispatch; results are copies, since the next run overwrites the port's memory."""
        absent = sorted(self._shapes.keys() - self._state - feeds.keys())
        if absent:
            raise SimulationError(
                f"run: needs the inputs {', '.join(absent)}; they are missing. Pass them.", code="SIM101"
            )
        for port, array in feeds.items():
            self.write(port, array)
        self._loaded.execute()
        for target, source in self._moves:
            np.copyto(target, source)
        return {name: view.copy() for name, view in self._results.items()}

    def close(self) -> None:
        """Release the program and its place among the 128."""
        self._inputs, self._results, self._moves = {}, {}, []
        self._loaded.release()

    def _view(self, port: str) -> F16:
        if port not in self._inputs:
            known = ", ".join(sorted(self._inputs))
            raise SimulationError(
                f"input {port}: needs a known name; the program has {known}. Rename it.", code="SIM102"
            )
        return self._inputs[port]

    def _checked(self, port: str, array: Array) -> F16:
        shape = self._shapes[port]
        if np.shape(array) != shape:
            raise SimulationError(
                f"input {port}: needs the shape {list(shape)}; got {list(np.shape(array))}. Reshape it.",
                code="SIM103",
            )
        with np.errstate(over="ignore"):
            return np.asarray(array).astype(np.float16, copy=False)
