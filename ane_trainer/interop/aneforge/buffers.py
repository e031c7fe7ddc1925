"""Port memory: real memory at a stable address, converted to and from the simulator only when it changed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.program import TensorType

_ALIGNMENT_BYTES = 64
"""ANEForge's library rounds every buffer up to a multiple of 64 bytes, and to at least 64."""


@dataclass(eq=False)
class Buffer:
    """Memory that one or several ports are bound to (one buffer object, as `share_buffer` makes it).

    `version` counts the changes that the interface saw; `exposed` says that the host holds its address and
    may write at any time; `pending` gives the bytes of a result that nobody has asked for yet.
    """

    data: NDArray[np.uint8]
    version: int = 0
    exposed: bool = False
    pending: Callable[[], NDArray[Any]] | None = field(default=None, repr=False)

    @classmethod
    def allocate(cls, nbytes: int) -> Buffer:
        """Zeros at an aligned address that stays."""
        rounded = max(_ALIGNMENT_BYTES, -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
        memory = np.zeros(rounded + _ALIGNMENT_BYTES, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT_BYTES
        return cls(memory[start : start + rounded])

    @property
    def address(self) -> int:
        return int(self.data.ctypes.data)

    def settle(self) -> None:
        """Bring a pending result into memory."""
        if self.pending is not None:
            result, self.pending = self.pending(), None
            raw = np.ascontiguousarray(result).reshape(-1).view(np.uint8)
            self.data[: raw.size] = raw[: self.data.size]

    def write(self, source: Any, nbytes: int) -> None:
        """Copy `nbytes` from a ctypes pointer, an address or bytes."""
        self.settle()
        ctypes.memmove(self.address, source, nbytes)
        self.version += 1

    def read(self, target: Any, nbytes: int) -> None:
        """Copy `nbytes` to a ctypes pointer or an address."""
        self.settle()
        ctypes.memmove(target, self.address, nbytes)

    def expose(self) -> int:
        """The address, for a host that will read and write there without telling."""
        self.settle()
        self.exposed = True
        return self.address

    def result(self, values: Callable[[], NDArray[Any]]) -> None:
        """A run left a new result, which `values` gives when somebody asks."""
        self.version += 1
        self.pending = values
        if self.exposed:
            self.settle()

    def view(self, type_: TensorType) -> NDArray[Any]:
        """The memory as an array of this type (float16 for fp16)."""
        dtype = BORDER_DTYPES[type_.dtype]
        return self.data[: type_.size * dtype.itemsize].view(dtype).reshape(type_.shape)


#: What a host sees for each dtype that a port may have (e5rt: fp16 and uint8; ANEForge runtime).
BORDER_DTYPES: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
}
