"""The device protocol: a device loads compiled programs into sessions, which hold state and run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.stages import Compiled

F16 = NDArray[np.float16]
#: float16, or float32 for a program in single precision.
Floats = NDArray[np.float16] | NDArray[np.float32]


class Session(Protocol):
    """A loaded program with its resident state. Ports are named as in the program."""

    def write(self, port: str, array: Array) -> None:
        """Set an input from float16 (bit patterns count) or float32, rounded to nearest even if need be."""

    def read(self, port: str) -> Floats:
        """A copy of a resident input, in the program's precision."""

    def values(self, port: str) -> NDArray[np.float32]:
        """A resident input as float32 numbers; may be the live memory, to be copied before the next run."""

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Floats]:
        """One dispatch: inputs that are not resident in, results out; aliased outputs stay as next inputs."""

    def close(self) -> None:
        """Release what the session holds; closing twice is fine."""


class Device(Protocol):
    """A kind of executor."""

    @property
    def name(self) -> str:
        """The name that users type."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """Float types of programs that it runs, "fp16" or "fp32"; the one it takes by itself comes first."""

    def unavailable(self) -> str | None:
        """None if it can run here, else the reason and what to type instead."""

    def placement(self, chip: str, fidelity: str) -> tuple[str, str]:
        """Where a program runs, and how that is known."""

    def load(self, compiled: Compiled, *, fidelity: str, threads: int | None) -> Session:
        """Load a program; UsageError for a fidelity that the device has not."""
