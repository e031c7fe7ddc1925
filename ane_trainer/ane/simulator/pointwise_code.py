"""How each pointwise MIL op becomes instructions of a fused group.

Ops with a short exact form (`add`, `select`, ...) are written out; every other function of one variable is
a table of its 65,536 results, computed from its registered kernel, so fused and unfused cannot differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.opset import Call
from ane_trainer.ane.simulator.constants import channel_line
from ane_trainer.ane.simulator.fp16 import decode
from ane_trainer.ane.simulator.fuse import Instr
from ane_trainer.ane.simulator.registry import KERNELS, Context
from ane_trainer.ane.simulator.tables import lookup

F32 = NDArray[np.float32]


class Code:
    """A group's instructions under construction; equal constants and lookups are shared."""

    def __init__(self) -> None:
        self.instrs: list[Instr] = []
        self.arrays: list[NDArray[Any]] = []
        self.tables: list[F32] = []
        self._seen: dict[Instr, int] = {}

    def add(self, code: str, *sources: int, which: int = -1, value: float = 0.0) -> int:
        """Append an instruction (or find the equal one) and return its position."""
        instr = Instr(code, sources, which, value)
        if instr not in self._seen:
            self._seen[instr] = len(self.instrs)
            self.instrs.append(instr)
        return self._seen[instr]

    def load(self, array: NDArray[Any]) -> int:
        """Append a load of an array's elements."""
        kind = "load_bool" if array.dtype == np.bool_ else "load"
        return self.add(kind, which=self.which(array))

    def which(self, array: NDArray[Any]) -> int:
        """The number of an array among those of the group."""
        for number, known in enumerate(self.arrays):
            if known is array:
                return number
        self.arrays.append(array)
        return len(self.arrays) - 1

    def lookup(self, source: int, table: F32) -> int:
        """Append a gather from `table`, float32[65536] indexed by fp16 pattern."""
        for number, known in enumerate(self.tables):
            if known is table or np.array_equal(known, table):
                return self.add("lookup", source, which=number)
        self.tables.append(table)
        return self.add("lookup", source, which=len(self.tables) - 1)


Writer = Callable[[Code, Context, Call, tuple[int, ...]], int]


def _simple(code: str) -> Writer:
    return lambda group, _ctx, _call, s: group.add(code, *s)


def _mul(group: Code, _ctx: Context, _call: Call, s: tuple[int, ...]) -> int:
    """A product with a constant power of two of at least 1 is exact: no rounding."""
    for constant, other in ((s[1], s[0]), (s[0], s[1])):
        instr = group.instrs[constant]
        if instr.code == "const" and instr.value >= 1 and math.frexp(instr.value)[0] == 0.5:
            return group.add("scale", other, value=instr.value)
    return group.add("mul", *s)


def _real_div(group: Code, _ctx: Context, _call: Call, s: tuple[int, ...]) -> int:
    """x / y is x times the inverse table of y (see `facts`: M6 numerics, inverse x mul)."""
    return group.add("mul", s[0], group.lookup(s[1], lookup("inverse")))


def _relu(group: Code, _ctx: Context, _call: Call, s: tuple[int, ...]) -> int:
    zero = group.add("const", value=0.0)
    return group.add("max", s[0], zero)


def _batch_norm(group: Code, _ctx: Context, call: Call, s: tuple[int, ...]) -> int:
    scale, offset = channel_line(call)
    return group.add("affine", s[0], group.load(scale), group.load(offset))


def _square(group: Code, _ctx: Context, _call: Call, s: tuple[int, ...]) -> int:
    return group.add("mul", s[0], s[0])


#: MIL op -> how it is written. Ops that are absent but have one tensor operand become a lookup.
WRITERS: dict[str, Writer] = {
    "add": _simple("add"), "sub": _simple("sub"), "mul": _mul, "real_div": _real_div,
    "maximum": _simple("max"), "minimum": _simple("min"), "abs": _simple("abs"), "relu": _relu,
    "square": _square, "less": _simple("lt"), "less_equal": _simple("le"), "greater": _simple("gt"),
    "greater_equal": _simple("ge"), "equal": _simple("eq"), "not_equal": _simple("ne"), "select": _simple("select"),
    "logical_and": _simple("and"), "logical_or": _simple("or"), "logical_xor": _simple("xor"),
    "logical_not": _simple("not"), "batch_norm": _batch_norm,
}  # fmt: skip

#: Unary ops, fused as a lookup of their kernel's results. Parameters must be per tensor, not per channel.
TABLED = frozenset(
    (
        "sqrt rsqrt inverse exp exp2 log erf tanh sigmoid silu gelu relu6 leaky_relu elu softplus softsign"
        " sigmoid_hard scaled_tanh linear_activation clamped_relu thresholded_relu threshold clip floor ceil"
        " round sign sin cos atan"
    ).split()
)


def is_pointwise(kind: str) -> bool:
    """True when the op can join a fused group."""
    return kind in WRITERS or kind in TABLED


def write(group: Code, ctx: Context, call: Call, sources: tuple[int, ...]) -> int:
    """Append the instructions of one op to a group; returns the position of its result."""
    kind = call.op.kind
    if kind in WRITERS:
        return WRITERS[kind](group, ctx, call, sources)
    return group.lookup(sources[0], table_of(call, ctx))


_TABLES: dict[tuple[object, ...], F32] = {}


def table_of(call: Call, ctx: Context) -> F32:
    """The 65,536 results of a unary op with its parameters, by fp16 pattern."""
    kind = call.op.kind
    parameters = tuple((p.name, call.const(p.name)) for p in call.op.params if p.role == "const")
    key = (kind, ctx.chip.name, parameters)
    if key not in _TABLES:
        patterns = decode(np.arange(1 << 16, dtype=np.uint16))
        _TABLES[key] = np.ascontiguousarray(KERNELS[kind].run(ctx, call, patterns), dtype=np.float32)
    return _TABLES[key]
