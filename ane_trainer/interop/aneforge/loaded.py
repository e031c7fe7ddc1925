"""A loaded program: operations with their ports bound to buffers, run on the simulator in order.

Port memory is real memory at a stable address, converted to and from the simulator only when it changed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.program import Function, TensorType, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator import EngineContext, Plan, prepare
from ane_trainer.ane.simulator.arrays import to_border
from ane_trainer.interop.aneforge.reading import port

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
    pending: Callable[[], Array] | None = field(default=None, repr=False)

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

    def result(self, values: Callable[[], Array]) -> None:
        """A run left a new result, which `values` gives when somebody asks."""
        self.version += 1
        self.pending = values
        if self.exposed:
            self.settle()

    def view(self, type_: TensorType) -> Array:
        """The memory as an array of this type (float16 for fp16)."""
        dtype = BORDER_DTYPES[type_.dtype]
        return self.data[: type_.size * dtype.itemsize].view(dtype).reshape(type_.shape)


#: What a host sees for each dtype that a port may have (e5rt: fp16 and uint8; ANEForge runtime).
BORDER_DTYPES: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
}


#: Name and size in bytes of a port, as the caller of the library gives them.
PortSpec = tuple[str, int]


@dataclass(eq=False)
class BoundPort:
    """A port of an operation: its value in the program, its buffer, the bytes the caller asked for.

    `seen` is the buffer's version that the simulator holds (inputs only).
    """

    value: Value
    buffer: Buffer
    nbytes: int
    seen: int = -1


@dataclass(eq=False)
class Operation:
    """One compiled program of a stream. The plan is made at the first run, when sharing is settled.

    `signaled` is the count of its completion event.
    """

    function: Function
    context: EngineContext
    inputs: dict[str, BoundPort]
    outputs: dict[str, BoundPort]
    plan: Plan | None = field(default=None, repr=False)
    resident: dict[str, str] = field(default_factory=dict)
    signaled: int = 0

    def run(self) -> None:
        """Read the inputs that changed, execute, leave the results in the output buffers."""
        plan = self.plan or self._prepare()
        for bound in self.inputs.values():
            if bound.buffer.exposed or bound.buffer.version != bound.seen:
                bound.buffer.settle()
                plan.write(bound.value.name, bound.buffer.view(bound.value.type))
                bound.seen = bound.buffer.version
        for step in plan.steps:
            step()
        for name, bound in self.outputs.items():
            memory = plan.buffers[self.resident.get(name, name)]
            bound.buffer.result(partial(to_border, memory, bound.value.type))
        for name in self.resident.values():
            self.inputs[name].seen = self.inputs[name].buffer.version

    def _prepare(self) -> Plan:
        """Compile; an input that shares its buffer with an output of its type stays inside the simulator."""
        for name, out in self.outputs.items():
            for other, bound in self.inputs.items():
                if (
                    bound.buffer is out.buffer
                    and bound.value.type == out.value.type
                    and bound.value != out.value
                ):
                    self.resident[name] = other
                    break
        self.plan = prepare(self.function, self.context, tuple(self.resident.items()))
        return self.plan


def bind_operation(
    function: Function, context: EngineContext, inputs: Sequence[PortSpec], outputs: Sequence[PortSpec]
) -> Operation:
    """An operation with a fresh buffer for every port.

    Raises: SimulationError (SIM102) when a port is unknown, missing, or too small for its type.
    """
    missing = [v.name for v in function.inputs if v.name not in dict(inputs)]
    if missing:
        raise SimulationError(
            f"ports: needs every input bound; got none for {', '.join(missing)}.", code="SIM102"
        )
    return Operation(
        function,
        context,
        {name: _bind(function.inputs, "input", name, nbytes) for name, nbytes in inputs},
        {name: _bind(function.outputs, "output", name, nbytes) for name, nbytes in outputs},
    )


def _bind(values: tuple[Value, ...], kind: str, name: str, nbytes: int) -> BoundPort:
    value = port(values, name)
    if value is None:
        known = ", ".join(v.name for v in values)
        raise SimulationError(f"{kind} port {name}: needs one of {known}.", code="SIM102")
    if nbytes < border_bytes(value.type):
        raise SimulationError(
            f"{kind} port {name}: needs {border_bytes(value.type)} bytes ({value.type}); got {nbytes}.",
            code="SIM102",
        )
    return BoundPort(value, Buffer.allocate(nbytes), nbytes)


def border_bytes(type_: TensorType) -> int:
    """Bytes of a port of this type."""
    return type_.size * BORDER_DTYPES[type_.dtype].itemsize


@dataclass(eq=False)
class LoadedProgram:
    """A stream of operations, as one handle of the library names it. `committed` after the first execute.

    `submitted`: an asynchronous run that nobody has waited for; `signaled_before`: the last operation's event
    before it.
    """

    operations: list[Operation]
    cache_dir: str
    device_mask: int
    committed: bool = False
    submitted: bool = False
    signaled_before: int = 0

    def execute(self) -> None:
        """Run all operations in order."""
        self.committed = True
        for operation in self.operations:
            operation.run()

    def execute_async(self) -> None:
        """Run all operations in order and count the run on their events."""
        self.signaled_before = self.operations[-1].signaled
        self.execute()
        for operation in self.operations:
            operation.signaled += 1
        self.submitted = True

    def chain(self, source: int, target: int) -> None:
        """Check that the order of two operations may still be set.

        Raises: SimulationError when the program has run already, or an operation does not exist.
        """
        if self.committed:
            raise SimulationError("chain_ops: needs a program that has not run; it has.", code="SIM106")
        self.operation(source)
        self.operation(target)

    def share(self, source: tuple[int, str], target: tuple[int, str]) -> None:
        """Bind an input port to the buffer of an output port; later writes to either are the same memory.

        Raises: SimulationError when the program has run already, or a port does not exist.
        """
        if self.committed:
            raise SimulationError("share_buffer: needs a program that has not run; it has.", code="SIM106")
        out = self.find("outputs", *source)
        bound = self.find("inputs", *target)
        if out.buffer.data.size < border_bytes(bound.value.type):
            raise SimulationError(
                f"share_buffer: needs {border_bytes(bound.value.type)} bytes for {target[1]}; "
                f"{source[1]} has {out.buffer.data.size}.",
                code="SIM106",
            )
        bound.buffer, bound.nbytes, bound.seen = out.buffer, out.nbytes, -1

    def operation(self, index: int) -> Operation:
        """The operation `index` of the stream."""
        if not 0 <= index < len(self.operations):
            count = len(self.operations)
            raise SimulationError(f"operation: needs an index below {count}; got {index}.", code="SIM102")
        return self.operations[index]

    def find(self, kind: str, operation: int, name: str) -> BoundPort:
        """The port `name` of an operation; `kind` is inputs or outputs."""
        ports: dict[str, BoundPort] = getattr(self.operation(operation), kind)
        if name not in ports:
            raise SimulationError(f"no {kind[:-1]} port: {name}", code="SIM102")
        return ports[name]
