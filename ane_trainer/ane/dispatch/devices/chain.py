"""A step in several programs as one session, on any device: each program loaded once, its inputs set for each dispatch.

The host keeps the state between dispatches, and what programs hand to each other, in the program's precision. A device
that can let programs share memory has a session of its own.

Unverified on hardware: exercised on the simulator and on Core AI's runtime for Linux.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.dispatch.devices.protocol import Floats, Session
from ane_trainer.ane.mil.inputs import check_array, find_input
from ane_trainer.ane.mil.program import Literal, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Chain, Compiled

_NUMPY: Mapping[str, Any] = {"fp16": np.float16, "fp32": np.float32}


def number(constant: Literal) -> Floats:
    """A dispatch's constant as an array of its port's shape."""
    assert isinstance(constant.data, bytes)
    dtype = np.dtype(_NUMPY[constant.type.dtype]).newbyteorder("<")
    found: Floats = np.frombuffer(constant.data, dtype).reshape(constant.type.shape or (1,))
    return found


def last_reads(chain: Chain) -> dict[str, int]:
    """For each value that a dispatch reads the number of the last that does."""
    return {value: i for i, each in enumerate(chain.dispatches) for _, value in each.inputs}


class ChainSession:
    """The programs' sessions, and the step's values by name. `run` changes no state before its last dispatch ended."""

    def __init__(self, compiled: Compiled, sessions: Sequence[Session]) -> None:
        assert compiled.chain is not None
        self._chain, self._sessions = compiled.chain, tuple(sessions)
        self._types = {value.name: value for value in compiled.program.main.inputs}
        self._values: dict[str, Floats] = {
            name: np.zeros(value.type.shape, _NUMPY[value.type.dtype]) for name, value in self._types.items()
        }
        self._next = {alias.output: alias.input for alias in compiled.aliases}
        self._results = [port.name for port in compiled.outputs if port.name not in self._next]
        self._constants = [
            {port: number(literal) for port, literal in each.constants} for each in self._chain.dispatches
        ]
        self._last = last_reads(self._chain)

    def write(self, port: str, array: Array) -> None:
        """Set an input of the step."""
        value = self._known(port)
        check_array(value, array)
        with np.errstate(over="ignore"):
            self._values[port] = np.array(array, _NUMPY[value.type.dtype])

    def read(self, port: str) -> Floats:
        """A copy of an input of the step."""
        return self._values[self._known(port).name].copy()

    def values(self, port: str) -> NDArray[np.float32]:
        """An input of the step as float32 numbers."""
        return self._values[self._known(port).name].astype(np.float32)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Floats]:
        """Every dispatch in turn, then the new state in place of the old."""
        for name, array in feeds.items():
            self.write(name, array)
        values: dict[str, Any] = dict(self._values)
        kept = {*self._next, *self._results, *self._types}
        for index, each in enumerate(self._chain.dispatches):
            given = {port: values[value] for port, value in each.inputs}
            results = self._sessions[each.program].run({**given, **self._constants[index]})
            values |= {value: results[port] for port, value in each.outputs}
            for value in (v for _, v in (*each.inputs, *each.outputs)):
                if value not in kept and self._last.get(value, -1) <= index:
                    values.pop(value, None)
        self._values |= {state: values[name] for name, state in self._next.items()}
        return {name: values[name] for name in self._results}

    def close(self) -> None:
        """Release every program."""
        for session in self._sessions:
            session.close()

    def _known(self, port: str) -> Value:
        return find_input(self._types, port)
