"""The program: Apple's Model Intermediate Language (MIL) as immutable values.

A `Program` holds functions; a `Function` is a list of operations in single-assignment form.
Op names and parameter names are exactly MIL's. Constants are `Literal` arguments of the operation
that uses them (MIL text spells them as `const` operations; `text.py` and `parser.py` translate),
their payload is raw little-endian bytes, so equality is equality of bits. Standard library only.

Legend: a *value* is a named, typed result of an operation or an input; a *literal* is a typed constant.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

#: Bytes of one element in memory; sub-byte types are held one per byte and packed by `weights.py`.
DTYPE_BYTES: Mapping[str, int] = {
    "fp16": 2, "fp32": 4, "fp64": 8, "bool": 1,
    "int4": 1, "uint1": 1, "uint2": 1, "uint3": 1, "uint4": 1, "uint6": 1,
    "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8, "uint64": 8,
}  # fmt: skip

_STRUCT_CODE: Mapping[str, str] = {
    "fp16": "e", "fp32": "f", "fp64": "d", "bool": "?",
    "int4": "b", "uint1": "B", "uint2": "B", "uint3": "B", "uint4": "B", "uint6": "B",
    "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I",
    "int64": "q", "uint64": "Q",
}  # fmt: skip

#: Largest finite fp16 number.
MAX_FP16 = 65504.0
#: Axes of a tensor on the engine (ANE guide ch. 4).
MAX_RANK = 5

Scalar = bool | int | float | str


@dataclass(frozen=True)
class TensorType:
    """A tensor's dtype and static shape; `()` is a scalar. `string` has no tensor form beyond rank 1.

    `state` marks a Core ML state input (`state<tensor<...>>`), read and written by `read_state` and
    `coreml_update_state`.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    state: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the unpacked payload."""
        return self.size * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        if not self.shape:
            return self.dtype
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Value:
    """A named, typed value: a function's input or an operation's result."""

    name: str
    type: TensorType

    def __hash__(self) -> int:
        return hash(self.name)  # names are unique in a function, and strings keep their hash


@dataclass(frozen=True)
class Literal:
    """A typed constant. `data` is little-endian bytes (row-major), or a `str` / tuple of `str` for strings.

    `name` is a wish for the MIL text (weights get telling names); it does not take part in equality.
    """

    type: TensorType
    data: bytes | str | tuple[str, ...]
    name: str | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        shown = self.data if isinstance(self.data, str) else f"{len(self.data)} bytes"
        return f"Literal({self.type}, {shown})"

    def to_python(self) -> Scalar | tuple[Scalar, ...]:
        """The constant as Python values: a scalar for rank 0, else a flat tuple in row-major order."""
        if isinstance(self.data, (str, tuple)):
            return self.data
        values = struct.unpack(f"<{self.type.size}{_STRUCT_CODE[self.type.dtype]}", self.data)
        return values[0] if self.type.rank == 0 else values


Arg = Value | Literal | tuple["Value | Literal", ...]


@dataclass(frozen=True)
class Op:
    """One operation: `results = kind(args)`. `source` is the user's module and line, for messages only."""

    kind: str
    args: tuple[tuple[str, Arg], ...]
    results: tuple[Value, ...]
    source: str | None = field(default=None, compare=False)

    @property
    def result(self) -> Value:
        """The only result of a single-result op."""
        (value,) = self.results
        return value

    @property
    def name(self) -> str:
        return self.results[0].name if self.results else self.kind

    def arg(self, name: str) -> Arg | None:
        """The argument `name`, or None when it is not given."""
        return next((value for key, value in self.args if key == name), None)

    def operands(self) -> Iterator[Value]:
        """Every value this op reads, in argument order."""
        return iter(self._reads)

    @cached_property
    def _reads(self) -> tuple[Value, ...]:
        items = (a if isinstance(a, tuple) else (a,) for _, a in self.args)
        return tuple(item for several in items for item in several if isinstance(item, Value))

    def renamed(self, names: Mapping[str, str]) -> Op:
        """The op on values of the same types that have other names; `names` has each that it reads or makes."""

        def value(old: Value) -> Value:
            return Value(names[old.name], old.type)

        def argument(arg: Arg) -> Arg:
            if isinstance(arg, tuple):
                return tuple(value(item) if isinstance(item, Value) else item for item in arg)
            return value(arg) if isinstance(arg, Value) else arg

        args = tuple((name, argument(arg)) for name, arg in self.args)
        return Op(self.kind, args, tuple(map(value, self.results)), self.source)

    def literals(self) -> Iterator[tuple[str, Literal]]:
        """Every constant this op carries, with the parameter it belongs to."""
        for key, argument in self.args:
            for item in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(item, Literal):
                    yield key, item


@dataclass(frozen=True)
class Function:
    """A pure function over tensors; `opset` is the deployment target tag of MIL text, e.g. `ios18`."""

    name: str
    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]
    opset: str = "ios18"


@dataclass(frozen=True)
class Program:
    """A MIL program. `main` is the function that is run.

    `attributes` is the text's header dictionary (build information); it takes no part in equality.
    """

    functions: tuple[Function, ...]
    version: str = "1.3"
    attributes: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def main(self) -> Function:
        """The function called `main`, or the only function."""
        return next((f for f in self.functions if f.name == "main"), self.functions[0])


def literal(
    value: Scalar | tuple[Scalar, ...] | list[Scalar], dtype: str, *, name: str | None = None
) -> Literal:
    """A rank-0 literal from a Python scalar, or a rank-1 literal from a sequence.

    fp16 values are rounded by `struct` (ties to even); pass values that fp16 holds exactly where it matters.
    """
    if dtype == "string":
        text = tuple(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
        return Literal(TensorType("string", (len(text),) if isinstance(text, tuple) else ()), text, name)
    items = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    shape = (len(items),) if isinstance(value, (tuple, list)) else ()
    return Literal(TensorType(dtype, shape), struct.pack(f"<{len(items)}{_STRUCT_CODE[dtype]}", *items), name)
