"""How each pointwise MIL op becomes instructions of a fused group.

Ops with a short exact form (`add`, `select`, ...) are written out; every other function of one variable is
a table of its 65,536 results, computed from its registered kernel, so fused and unfused cannot differ.

`Compiler` makes compiled loops of a plan's fused entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call, bind
from ane_trainer.ane.mil.program import Arg, Literal, Op, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.arrays import bias, channel_line, literal_array
from ane_trainer.ane.simulator.loops.compiled import Loops
from ane_trainer.ane.simulator.loops.group import Code, Group
from ane_trainer.ane.simulator.loops.tabulate import tabulate
from ane_trainer.ane.simulator.numbers.fp16 import decode, round_half_away
from ane_trainer.ane.simulator.numbers.tables import lookup
from ane_trainer.ane.simulator.registry import KERNELS, EngineContext

F32 = NDArray[np.float32]


Writer = Callable[[Code, EngineContext, Call, tuple[int, ...]], int]


def _simple(code: str) -> Writer:
    return lambda group, _ctx, _call, s: group.add(code, *s)


def _mul(group: Code, _ctx: EngineContext, _call: Call, s: tuple[int, ...]) -> int:
    """A product with a constant power of two of at least 1 is exact: no rounding."""
    for constant, other in ((s[1], s[0]), (s[0], s[1])):
        instr = group.instrs[constant]
        if instr.code == "const" and instr.value >= 1 and math.frexp(instr.value)[0] == 0.5:
            return group.add("scale", other, value=instr.value)
    return group.add("mul", *s)


def _real_div(group: Code, ctx: EngineContext, _call: Call, s: tuple[int, ...]) -> int:
    """x / y is x times the inverse table of y (see `facts`: M6 numerics, inverse x mul); fast: the quotient."""
    if ctx.fast:
        return group.add("div", *s)
    return group.add("mul", s[0], group.lookup(s[1], lookup("inverse")))


def _floor_div(group: Code, ctx: EngineContext, call: Call, s: tuple[int, ...]) -> int:
    return group.add("floor", _real_div(group, ctx, call, s))


def _inverse(group: Code, ctx: EngineContext, call: Call, s: tuple[int, ...]) -> int:
    """The table of x + epsilon; fast: the quotient."""
    epsilon, one = group.number(bias(call, "epsilon")), group.number(1)
    if ctx.fast:
        return group.add("div", one, group.add("fma", epsilon, s[0], one))
    return group.lookup(group.add("add", s[0], epsilon), lookup("inverse"))


def _relu(group: Code, _ctx: EngineContext, _call: Call, s: tuple[int, ...]) -> int:
    return group.add("max", s[0], group.number(0))


def _batch_norm(group: Code, ctx: EngineContext, call: Call, s: tuple[int, ...]) -> int:
    scale, offset = (group.load(line) for line in channel_line(call))
    if ctx.fast:
        return group.add("round", group.add("fma", offset, s[0], scale))
    return group.add("affine", s[0], scale, offset)


def _square(group: Code, _ctx: EngineContext, _call: Call, s: tuple[int, ...]) -> int:
    return group.add("mul", s[0], s[0])


def _sign(group: Code, _ctx: EngineContext, _call: Call, s: tuple[int, ...]) -> int:
    zero = group.number(0)
    below = group.add("select", group.add("lt", s[0], zero), group.number(-1), zero)
    return group.add("select", group.add("gt", s[0], zero), group.number(1), below)


def _round(group: Code, _ctx: EngineContext, _call: Call, s: tuple[int, ...]) -> int:
    """Half away from zero. 0.5 added in fp16 from 1024 on is 1 up to 2048, then nothing."""
    one = group.number(1)
    size = group.add("copysign", s[0], one)
    odd = group.add(
        "and", group.add("ge", size, group.number(1024)), group.add("lt", size, group.number(2048))
    )
    more = group.add("fma", group.add("select", odd, one, group.number(0.5)), size, one)
    return group.add("copysign", group.add("floor", more), s[0])


def _pow(group: Code, _ctx: EngineContext, _call: Call, s: tuple[int, ...]) -> int:
    """2^(y log2 |x|); negative where x is and y is an odd integer."""
    size = group.lookup(group.add("mul", s[1], group.lookup(s[0], _log2_of_size())), lookup("exp2"))
    odd = group.add("eq", group.lookup(s[1], _odd()), group.number(1))
    negative = group.add("and", group.add("lt", s[0], group.number(0)), odd)
    return group.add("select", negative, group.add("mul", size, group.number(-1)), size)


@cache
def _log2_of_size() -> F32:
    return np.asarray(lookup("log2")[np.arange(1 << 16) & 0x7FFF])


@cache
def _odd() -> F32:
    odd: F32 = (np.mod(decode(np.arange(1 << 16, dtype=np.uint16)), 2) == 1).astype(np.float32)
    return odd


# --- piecewise linear, with parameters ---


def _number(group: Code, call: Call, name: str) -> int:
    """A parameter: one number, or one per channel along axis 1."""
    values = round_half_away(np.asarray(call.const(name), dtype=np.float64))
    if values.size == 1:
        return group.number(float(values.reshape(())))
    return group.load(values.reshape(-1, *(1,) * (call.type().rank - 2)))


def _bound(group: Code, position: int, low: int | None = None, high: int | None = None) -> int:
    """No less than `low`, then no more than `high`."""
    position = position if low is None else group.add("max", position, low)
    return position if high is None else group.add("min", position, high)


def _relu6(group: Code, _ctx: EngineContext, _call: Call, s: tuple[int, ...]) -> int:
    return _bound(group, s[0], group.number(0), group.number(6))


def _clip(group: Code, _ctx: EngineContext, call: Call, s: tuple[int, ...]) -> int:
    return _bound(group, s[0], _number(group, call, "alpha"), _number(group, call, "beta"))


def _threshold(group: Code, _ctx: EngineContext, call: Call, s: tuple[int, ...]) -> int:
    return _bound(group, s[0], _number(group, call, "alpha"))


def _thresholded_relu(group: Code, _ctx: EngineContext, call: Call, s: tuple[int, ...]) -> int:
    passes = group.add("ge", s[0], _number(group, call, "alpha"))
    return group.add("round", group.add("select", passes, s[0], group.number(0)))


def _leaky_relu(group: Code, _ctx: EngineContext, call: Call, s: tuple[int, ...]) -> int:
    """x or alpha x, rounded; x is itself when rounded, and no more than inf."""
    below = group.add("product", _number(group, call, "alpha"), s[0])
    return group.add("round", group.add("select", group.add("gt", s[0], group.number(0)), s[0], below))


def _clamped_relu(group: Code, ctx: EngineContext, call: Call, s: tuple[int, ...]) -> int:
    return _bound(group, _leaky_relu(group, ctx, call, s), high=_number(group, call, "beta"))


def _linear(group: Code, ctx: EngineContext, call: Call, s: tuple[int, ...]) -> int:
    """alpha x + beta, the product rounded; fast: only the sum."""
    alpha, beta = _number(group, call, "alpha"), _number(group, call, "beta")
    if ctx.fast:
        return group.add("round", group.add("fma", beta, alpha, s[0]))
    return group.add("add", group.add("mul", alpha, s[0]), beta)


def _sigmoid_hard(group: Code, ctx: EngineContext, call: Call, s: tuple[int, ...]) -> int:
    return _bound(group, _linear(group, ctx, call, s), group.number(0), group.number(1))


def _softplus_parametric(group: Code, ctx: EngineContext, call: Call, s: tuple[int, ...]) -> int:
    """alpha log(1 + exp(beta x)), every step rounded; exp is inf from 32768 on."""
    power = group.lookup(group.add("mul", _number(group, call, "beta"), s[0]), lookup("exp"))
    power = group.add("select", group.add("lt", power, group.number(32768)), power, group.number(65536))
    logarithm = group.lookup(group.add("add", group.number(1), power), lookup("log"))
    return group.add("mul", _number(group, call, "alpha"), logarithm)


#: MIL op -> how it is written. Ops that are absent but have one tensor operand become a lookup.
WRITERS: dict[str, Writer] = {
    "add": _simple("add"), "sub": _simple("sub"), "mul": _mul, "real_div": _real_div, "floor_div": _floor_div,
    "maximum": _simple("max"), "minimum": _simple("min"), "abs": _simple("abs"), "relu": _relu, "pow": _pow,
    "square": _square, "less": _simple("lt"), "less_equal": _simple("le"), "greater": _simple("gt"),
    "greater_equal": _simple("ge"), "equal": _simple("eq"), "not_equal": _simple("ne"), "select": _simple("select"),
    "logical_and": _simple("and"), "logical_or": _simple("or"), "logical_xor": _simple("xor"),
    "logical_not": _simple("not"), "batch_norm": _batch_norm, "inverse": _inverse, "sign": _sign,
    "floor": _simple("floor"), "ceil": _simple("ceil"), "round": _round, "relu6": _relu6,
    "clip": _clip, "threshold": _threshold, "thresholded_relu": _thresholded_relu, "leaky_relu": _leaky_relu,
    "prelu": _leaky_relu, "clamped_relu": _clamped_relu, "linear_activation": _linear,
    "sigmoid_hard": _sigmoid_hard, "softplus_parametric": _softplus_parametric,
}  # fmt: skip

#: Unary ops, fused as a lookup of their kernel's results. Parameters must be per tensor, not per channel.
TABLED = frozenset(
    (
        "sqrt rsqrt exp exp2 log erf tanh sigmoid silu gelu elu softplus softsign scaled_tanh sin cos atan"
        " acos asin atanh cosh sinh tan"
    ).split()
)


def is_pointwise(kind: str) -> bool:
    """True when the op can join a fused group."""
    return kind in WRITERS or kind in TABLED


def write(group: Code, ctx: EngineContext, call: Call, sources: tuple[int, ...]) -> int:
    """Append the instructions of one op to a group; returns the position of its result."""
    kind = call.op.kind
    if kind in WRITERS:
        return WRITERS[kind](group, ctx, call, sources)
    return group.lookup(sources[0], table_of(call, ctx))


_TABLES: dict[tuple[object, ...], F32] = {}


def table_of(call: Call, ctx: EngineContext) -> F32:
    """The 65,536 results of a unary op with its parameters, by fp16 pattern."""
    kind = call.op.kind
    parameters = tuple((p.name, call.const(p.name)) for p in call.op.params if p.role == "const")
    key = (kind, ctx.chip.name, parameters)
    if key not in _TABLES:
        patterns = decode(np.arange(1 << 16, dtype=np.uint16))
        _TABLES[key] = np.ascontiguousarray(KERNELS[kind].run(ctx, call, patterns), dtype=np.float32)
    return _TABLES[key]


class Compiler:
    """Turns the fused entries of one plan into compiled loops."""

    def __init__(self, context: EngineContext) -> None:
        self.context = context
        self._loops = Loops(context.threads)
        #: Groups and tables that were worked out, and what gave them: layers that repeat have one between them.
        self._tabulated: dict[object, tuple[Group, list[Array], Sequence[Array]]] = {}

    def add(
        self, ops: Sequence[Op], outputs: Sequence[Value], array_of: Callable[[Arg], Array]
    ) -> Callable[[], None]:
        """The step that computes `outputs` from the ops; callable once `finish` has been called."""
        group, arrays, tables = self._translate(ops, outputs, array_of)
        return self._loops.add(group, arrays, tables, [array_of(value) for value in outputs])

    def finish(self) -> None:
        """Compile the loops."""
        self._loops.finish()

    def _translate(
        self, ops: Sequence[Op], outputs: Sequence[Value], array_of: Callable[[Arg], Array]
    ) -> tuple[Group, list[Array], list[Array]]:
        """The fused group, its arrays and its tables."""
        code = Code()
        positions: dict[str, int] = {}

        def operand(argument: Arg) -> int:
            if isinstance(argument, Value) and argument.name in positions:
                return positions[argument.name]
            if isinstance(argument, Literal):
                constant = literal_array(argument)
                if constant.size == 1 and constant.dtype == np.float32:
                    return code.add("const", value=float(constant.reshape(-1)[0]))
                position = code.load(np.ascontiguousarray(constant))
            else:
                position = code.load(array_of(argument))
            if isinstance(argument, Value):
                positions[argument.name] = position
            return position

        for op in ops:
            call = bind(op.kind, dict(op.args))
            tensors = [p.name for p in call.op.params if p.role == "tensor"]
            sources = tuple(operand(call.args[name]) for name in tensors if name in call.args)
            positions[op.result.name] = write(code, self.context, call, sources)
        stores = tuple(positions[value.name] for value in outputs)
        group = Group(tuple(code.instrs), len(code.arrays), len(code.tables), stores)
        group, tables = self._with_tables(group, code.tables)
        return group, code.arrays, tables

    def _with_tables(self, group: Group, tables: Sequence[Array]) -> tuple[Group, list[Array]]:
        """`tabulate`, once for equal groups."""
        signs = tuple(math.copysign(1.0, instr.value) for instr in group.code)  # 0 and -0 are equal
        known = group, signs, tuple(map(id, tables))
        if known not in self._tabulated:
            self._tabulated[known] = (*tabulate(group, tables), tables)
        found, worked_out, _ = self._tabulated[known]
        return found, worked_out
