"""MIL ops as operations of Apple's Core AI authoring API: the table of rules, and the elementwise ops.

A rule gets a `Site` (the op with its operands already translated) and returns a Core AI value. Extents are
static everywhere, so a result whose shape Core AI states differently is reshaped to MIL's. Arithmetic is IEEE
at the program's precision: on Apple's CPU runtime there are real infinities and NaNs, which the engine lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.ane.mil.opset import Call, bind, family, known_ops, op_def
from ane_trainer.ane.mil.program import Function, Literal, Op, TensorType, Value
from ane_trainer.ane.mil.weights import Array, to_array

#: MIL dtypes as NumPy's, which is how Core AI names element types.
NUMPY: Mapping[str, type[np.generic]] = {
    "fp16": np.float16, "fp32": np.float32, "bool": np.bool_, "int32": np.int32, "uint32": np.uint32,
    "int16": np.int16, "uint16": np.uint16, "int8": np.int8, "uint8": np.uint8,
}  # fmt: skip


@dataclass
class Site:
    """One op on its way into a Core AI graph. `api` is the module `coreai.authoring`."""

    api: Any
    op: Op
    call: Call
    operands: Mapping[str, object]

    def __getitem__(self, name: str) -> object:
        """The translated operand `name`."""
        return self.operands[name]

    @property
    def result(self) -> TensorType:
        return self.op.result.type

    def number(self, value: float) -> object:
        """A rank-0 number of the operands' float type."""
        return NUMPY[self.call.type().dtype](value)

    def parameter(self, name: str) -> object:
        """A compile-time number; one number per channel broadcasts along axis 1 of x."""
        values = np.asarray(self.call.const(name), NUMPY[self.call.type().dtype])
        channels = (-1, *(1,) * (self.call.type().rank - 2))
        return values.reshape(() if values.size == 1 else channels)

    def shaped(self, value: object, shape: tuple[int, ...] | None = None) -> object:
        """`value` as a tensor of MIL's result shape."""
        return self.api.reshape(value, np.asarray(self.result.shape if shape is None else shape, np.int32))

    # Arithmetic, so that formulas read as such.

    def add(self, x: object, y: object) -> object:
        return self.api.broadcasting_add(x, y)

    def sub(self, x: object, y: object) -> object:
        return self.api.broadcasting_sub(x, y)

    def mul(self, x: object, y: object) -> object:
        return self.api.broadcasting_mul(x, y)

    def div(self, x: object, y: object) -> object:
        return self.api.broadcasting_divide(x, y)

    def neg(self, x: object) -> object:
        return self.sub(self.number(0), x)

    def clamp(self, x: object, low: object, high: object) -> object:
        return self.api.broadcasting_minimum(self.api.broadcasting_maximum(x, low), high)


Rule = Callable[[Site], object]
Ints = tuple[int, ...]
RULES: dict[str, Rule] = {}
_NEEDS, _FIX = "Core AI: needs ops that can be translated:", 'Use device="sim".'


def rule(kinds: str) -> Callable[[Rule], Rule]:
    """Register a rule for space-separated op kinds."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds.split(), function))
        return function

    return register


def refuse_unknown(function: Function) -> None:
    """Raises: UnsupportedModel (ANE305) with one finding for each kind of op that has no rule."""
    first = {op.kind: op for op in reversed(function.ops) if op.kind not in RULES}
    findings = [
        Finding(op.source or op.name, kind, "has no Core AI translation.", _FIX) for kind, op in first.items()
    ]
    if findings:
        raise UnsupportedModel(_NEEDS, findings, code="ANE305")


def translate(api: object, op: Op, operand: Callable[[Value | Literal], object]) -> object:
    """The op's result as a Core AI value; `operand` translates a MIL value or literal."""
    call = bind(op.kind, dict(op.args))
    runtime = {p.name for p in call.op.params if p.role in ("tensor", "tensors")}
    operands = {
        name: [operand(item) for item in arg] if isinstance(arg, tuple) else operand(arg)
        for name, arg in op.args
        if name in runtime
    }
    return RULES[op.kind](Site(api, op, call, operands))


def constant(literal: Literal) -> object:
    """A literal as a Core AI constant (rank 0 and bool included)."""
    return constant_of(np.array(to_array(literal), NUMPY[literal.type.dtype]))


def constant_of(array: Array) -> object:
    """An array as a Core AI constant."""
    from coreai.authoring.constant import constant as make

    return make(np.ascontiguousarray(array).reshape(array.shape))


# --- one input ---


def _by_name(s: Site) -> object:
    """An op that Core AI has under MIL's name (`abs` as `abs_`, `logical_not` as `not_`), or broadcasting."""
    name = _ALIASES.get(s.op.kind, s.op.kind).removeprefix("logical_")
    wide = family(s.op.kind) == "binary"
    function = getattr(s.api, f"broadcasting_{name}" if wide else name, None) or getattr(
        s.api, f"{name}_", None
    )
    if function is None:
        raise UnsupportedModel(
            _NEEDS,
            [Finding(s.op.source or s.op.name, s.op.kind, "has no Core AI translation.", _FIX)],
            code="ANE305",
        )
    return function(*(s.operands[p.name] for p in s.call.op.params))


#: Names that Core AI spells otherwise.
_ALIASES = {"real_div": "divide", "floor_div": "floor_divide", "mod": "modulo"}

_FORMULAS: dict[str, Rule] = {
    "identity": lambda s: s["x"],
    "square": lambda s: s.mul(s["x"], s["x"]),
    "exp2": lambda s: s.api.exp(s.mul(s["x"], s.number(math.log(2)))),
    "floor": lambda s: s.api.broadcasting_floor_divide(s["x"], s.number(1)),
    "ceil": lambda s: s.neg(s.api.broadcasting_floor_divide(s.neg(s["x"]), s.number(1))),
    "relu6": lambda s: s.clamp(s["x"], s.number(0), s.number(6)),
    "softsign": lambda s: s.div(s["x"], s.add(s.api.abs_(s["x"]), s.number(1))),
    "rsqrt": lambda s: s.api.rsqrt(s.add(s["x"], s.parameter("epsilon"))),
    "inverse": lambda s: s.div(s.number(1), s.add(s["x"], s.parameter("epsilon"))),
    "log": lambda s: s.api.log(s.add(s["x"], s.parameter("epsilon"))),
    "clip": lambda s: s.clamp(s["x"], s.parameter("alpha"), s.parameter("beta")),
    "clamped_relu": lambda s: s.api.broadcasting_minimum(_leaky(s), s.parameter("beta")),
    "leaky_relu": lambda s: _leaky(s),
    "prelu": lambda s: _leaky(s),
    "linear_activation": lambda s: _affine(s),
    "sigmoid_hard": lambda s: s.clamp(_affine(s), s.number(0), s.number(1)),
    "scaled_tanh": lambda s: s.mul(s.api.tanh(s.mul(s["x"], s.parameter("beta"))), s.parameter("alpha")),
    "thresholded_relu": lambda s: s.api.broadcasting_where(
        _not_less(s, s["x"], s.parameter("alpha")), s["x"], s.number(0)
    ),
    "threshold": lambda s: s.api.broadcasting_maximum(s["x"], s.parameter("alpha")),
}  # fmt: skip
RULES.update(_FORMULAS)


def _affine(s: Site) -> object:
    return s.add(s.mul(s["x"], s.parameter("alpha")), s.parameter("beta"))


def _leaky(s: Site) -> object:
    below = s.mul(s["x"], s.parameter("alpha"))
    return s.api.broadcasting_where(_not_less(s, s["x"], s.number(0)), s["x"], below)


def _not_less(s: Site, x: object, y: object) -> object:
    """x >= y; false for a NaN."""
    return s.api.broadcasting_or(s.api.broadcasting_greater(x, y), s.api.broadcasting_equal(x, y))


@rule("sign")
def _sign(s: Site) -> object:
    positive, zero = s.api.broadcasting_greater(s["x"], s.number(0)), s.number(0)
    negative = s.api.broadcasting_greater(zero, s["x"])
    below = s.api.broadcasting_where(negative, s.number(-1), zero)
    return s.api.broadcasting_where(positive, s.number(1), below)


@rule("elu")
def _elu(s: Site) -> object:
    below = s.sub(s.api.exp(s.api.broadcasting_minimum(s["x"], s.number(0))), s.number(1))
    return s.api.broadcasting_where(
        _not_less(s, s["x"], s.number(0)), s["x"], s.mul(below, s.parameter("alpha"))
    )


@rule("softplus")
def _softplus(s: Site) -> object:
    """max(x, 0) + log(1 + exp(-|x|)): no overflow."""
    tail = s.api.exp(s.neg(s.api.abs_(s["x"])))
    return s.add(s.api.relu(s["x"]), s.api.log(s.add(tail, s.number(1))))


@rule("gelu")
def _gelu(s: Site) -> object:
    mode = s.call.text("mode")
    if mode == "SIGMOID_APPROXIMATION":
        return s.mul(s["x"], s.api.sigmoid(s.mul(s["x"], s.number(1.702))))
    return s.api.gelu(s["x"], approximate="none" if mode == "EXACT" else "tanh")


@rule("cast")
def _cast(s: Site) -> object:
    return s.api.cast(s["x"], NUMPY[s.result.dtype])


@rule("const")
def _const(s: Site) -> object:
    literal = s.call.args["val"]
    assert isinstance(literal, Literal)
    return constant(literal)


# --- two or three inputs ---


@rule("less")
def _less(s: Site) -> object:
    return s.api.broadcasting_greater(s["y"], s["x"])


@rule("greater_equal")
def _greater_equal(s: Site) -> object:
    return _not_less(s, s["x"], s["y"])


@rule("less_equal")
def _less_equal(s: Site) -> object:
    return _not_less(s, s["y"], s["x"])


@rule("select")
def _select(s: Site) -> object:
    return s.api.broadcasting_where(s["cond"], s["a"], s["b"])


for _kind in known_ops():
    _plain = all(p.role == "tensor" for p in op_def(_kind).params)
    if _kind not in RULES and family(_kind) in ("unary", "binary") and _plain:
        RULES[_kind] = _by_name
