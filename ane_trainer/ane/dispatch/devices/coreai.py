"""Apple's Core AI runtime as a device: on Linux on the CPU, on macOS 27 with the Neural Engine preferred."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.compiler.coreai import (
    MAIN,
    LoadedAsset,
    make_state,
    missing,
    prefers_neural_engine,
    program_dtype,
    read_state,
    save_asset,
)
from ane_trainer.ane.dispatch.devices.chain import ChainSession
from ane_trainer.ane.dispatch.devices.protocol import Session
from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Compiled

_NUMPY = {"fp16": np.float16, "fp32": np.float32}


class CoreAI:
    """`coreai`: programs as `.aimodel` assets whose state the session owns; fp16 or fp32 like the program."""

    name = "coreai"

    def unavailable(self) -> str | None:
        """Without the package coreai-core: how to install it."""
        return missing()

    def placement(self, chip: str, fidelity: str) -> tuple[str, str]:
        """CPU where the runtime has no other; elsewhere unknown, since Core AI does not tell."""
        if prefers_neural_engine():
            how = "Core AI prefers the Neural Engine as asked; no interface tells where ops ran"
            return "unknown (Core AI, Neural Engine preferred)", how
        where = f"CPU ({platform.machine()}), Apple's Core AI runtime"
        return where, "this runtime has no other executor than the CPU"

    @property
    def precisions(self) -> tuple[str, ...]:
        """fp16 first where the Neural Engine may run; fp32 first on a CPU, which emulates fp16."""
        return ("fp16", "fp32") if prefers_neural_engine() else ("fp32", "fp16")

    def not_chosen(self) -> str | None:
        """Why `auto` does not take it although it can run: None where it may reach the Neural Engine."""
        return None if prefers_neural_engine() else "it runs on the CPU here"

    def load(self, compiled: Compiled, *, fidelity: str, threads: int | None) -> Session:
        """Translate, write and load the program; `fidelity` and `threads` mean nothing to Apple's runtime.

        Raises: UnsupportedModel (ANE305) for ops without a translation.
        """
        if compiled.chain is not None:
            return ChainSession(compiled, [CoreAISession(each) for each in compiled.programs])
        return CoreAISession(compiled)


class CoreAISession:
    """A loaded asset with its state and its unchanging inputs."""

    def __init__(self, compiled: Compiled) -> None:
        lowered = compiled.legalized.lowered
        self._dtype = _NUMPY[program_dtype(lowered.program.main)]
        with tempfile.TemporaryDirectory(prefix="ane_trainer-") as folder:
            self._loaded: LoadedAsset | None = LoadedAsset(save_asset(Path(folder) / "step.aimodel", lowered))
        self._changing = {alias.input for alias in compiled.aliases}
        self._shapes = {port.name: port.shape for port in compiled.inputs}
        zeros = {p.name: np.zeros(p.shape, self._dtype) for p in compiled.inputs if p.role == "state"}
        self._state = {name: make_state(zero) for name, zero in zeros.items() if name in self._changing}
        self._fixed = {name: zero for name, zero in zeros.items() if name not in self._changing}

    def write(self, port: str, array: Array) -> None:
        """Set a resident input from float16 or float32 numbers."""
        self._open()
        values = self._checked(port, array)
        if port in self._changing:
            self._state[port] = make_state(values)
        else:
            self._fixed[port] = np.array(values)

    def read(self, port: str) -> Array:
        """A copy of a resident input, in the program's precision."""
        return np.array(self._resident(port))

    def values(self, port: str) -> NDArray[np.float32]:
        """A resident input as float32 numbers."""
        return self._resident(port).astype(np.float32)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One call of the program; the state is updated in place. Results in the program's precision."""
        inputs = self._fixed | {name: self._checked(name, array) for name, array in feeds.items()}
        absent = sorted(self._shapes.keys() - inputs.keys() - self._changing)
        if absent:
            raise SimulationError(f"run: needs the inputs {', '.join(absent)}; they are missing. Pass them.")
        return self._open().call(MAIN, inputs, self._state)

    def close(self) -> None:
        """Release the model and the state."""
        if self._loaded is not None:
            self._loaded.close()
            self._loaded, self._state, self._fixed = None, {}, {}

    def _open(self) -> LoadedAsset:
        if self._loaded is None:
            raise SimulationError("session: needs to be open; it was closed. Compile the step again.")
        return self._loaded

    def _resident(self, port: str) -> Array:
        self._open()
        return read_state(self._state[port]) if port in self._changing else self._fixed[port]

    def _checked(self, port: str, array: Array) -> Array:
        shape = self._shapes.get(port)
        if shape is None:
            known = ", ".join(sorted(self._shapes))
            raise SimulationError(f"input {port}: needs a known name; the program has {known}. Rename it.")
        if np.shape(array) != shape:
            raise SimulationError(
                f"input {port}: needs the shape {list(shape)}; got {list(np.shape(array))}. Reshape it."
            )
        return np.asarray(array).astype(self._dtype, copy=False)
