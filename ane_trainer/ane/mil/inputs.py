"""The checks of what is fed into a program: that a name is one of its inputs, and that an array has its shape."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.program import Value
from ane_trainer.ane.mil.weights import Array

_SHOWN = 8


def find_input(inputs: Mapping[str, Value], name: str) -> Value:
    """The input of that name. Raises: SimulationError SIM102."""
    if name not in inputs:
        known = ", ".join(itertools.islice(inputs, _SHOWN)) + (", .." if len(inputs) > _SHOWN else "")
        raise SimulationError(f"write: needs one of the inputs {known}; got {name}.", code="SIM102")
    return inputs[name]


def check_array(value: Value, array: Array) -> None:
    """Raises: SimulationError SIM103 for an array of another shape than the input's."""
    if tuple(array.shape) != value.type.shape:
        raise SimulationError(
            f"write {value.name}: needs the shape {value.type.shape}; got {tuple(array.shape)}.",
            code="SIM103",
        )


def missing_input(value: Value) -> SimulationError:
    """The error for an input that was not given."""
    return SimulationError(f"run: needs the input {value.name} ({value.type}); it is missing.", code="SIM101")
