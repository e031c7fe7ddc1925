"""MIL ops as operations of Apple's Core AI authoring API, one rule per op.

A rule gets a `Site` (the op with its operands already translated) and returns a Core AI value. Extents are
static everywhere, so a result whose shape Core AI states differently is reshaped to MIL's. Arithmetic is IEEE
at the program's precision: on Apple's CPU runtime there are real infinities and NaNs, which the engine lacks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.ane.mil.opset import Call, bind
from ane_trainer.ane.mil.opset.movement import index_slices
from ane_trainer.ane.mil.opset.shapes import axes, axis, spatial_padding
from ane_trainer.ane.mil.program import Function, Literal, Op, TensorType
from ane_trainer.ane.mil.weights import to_array

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
    operands: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """The translated operand `name`."""
        return self.operands[name]

    @property
    def result(self) -> TensorType:
        return self.op.result.type

    def number(self, value: float) -> Any:
        """A rank-0 number of the operands' float type."""
        return NUMPY[self.call.type().dtype](value)

    def parameter(self, name: str) -> Any:
        """A compile-time number; one number per channel broadcasts along axis 1 of x."""
        values = np.asarray(self.call.const(name), NUMPY[self.call.type().dtype])
        channels = (-1, *(1,) * (self.call.type().rank - 2))
        return values.reshape(() if values.size == 1 else channels)

    def shaped(self, value: Any, shape: tuple[int, ...] | None = None) -> Any:
        """`value` as a tensor of MIL's result shape."""
        return self.api.reshape(value, np.asarray(self.result.shape if shape is None else shape, np.int32))

    # Arithmetic, so that formulas read as such.

    def add(self, x: Any, y: Any) -> Any:
        return self.api.broadcasting_add(x, y)

    def sub(self, x: Any, y: Any) -> Any:
        return self.api.broadcasting_sub(x, y)

    def mul(self, x: Any, y: Any) -> Any:
        return self.api.broadcasting_mul(x, y)

    def div(self, x: Any, y: Any) -> Any:
        return self.api.broadcasting_divide(x, y)

    def neg(self, x: Any) -> Any:
        return self.sub(self.number(0), x)

    def clamp(self, x: Any, low: Any, high: Any) -> Any:
        return self.api.broadcasting_minimum(self.api.broadcasting_maximum(x, low), high)


Rule = Callable[[Site], Any]
Ints = tuple[int, ...]
RULES: dict[str, Rule] = {}


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
        Finding(op.source or op.name, kind, "has no Core AI translation.", 'Use device="sim".')
        for kind, op in first.items()
    ]
    if findings:
        raise UnsupportedModel("Core AI: needs ops that can be translated:", findings, code="ANE305")


def translate(api: Any, op: Op, operand: Callable[[Any], Any]) -> Any:
    """The op's result as a Core AI value; `operand` translates a MIL value or literal."""
    call = bind(op.kind, dict(op.args))
    runtime = {p.name for p in call.op.params if p.role in ("tensor", "tensors")}
    operands = {
        name: [operand(item) for item in arg] if isinstance(arg, tuple) else operand(arg)
        for name, arg in op.args
        if name in runtime
    }
    return RULES[op.kind](Site(api, op, call, operands))


def constant(literal: Literal) -> Any:
    """A literal as a Core AI constant (rank 0 and bool included)."""
    return constant_of(np.array(to_array(literal), NUMPY[literal.type.dtype]))


def constant_of(array: NDArray[Any]) -> Any:
    """An array as a Core AI constant."""
    from coreai.authoring.constant import constant as make

    return make(np.ascontiguousarray(array).reshape(array.shape))


# --- one input ---

_SAME_NAME = {
    "abs": "abs_", "acos": "acos", "asin": "asin", "atan": "atan", "atanh": "atanh", "cos": "cos",
    "cosh": "cosh", "erf": "erf", "exp": "exp", "relu": "relu", "sigmoid": "sigmoid", "silu": "silu",
    "sin": "sin", "sinh": "sinh", "sqrt": "sqrt", "tan": "tan", "tanh": "tanh", "logical_not": "not_",
    "round": "round_",
}  # fmt: skip


@rule(" ".join(_SAME_NAME))
def _unary(s: Site) -> Any:
    return getattr(s.api, _SAME_NAME[s.op.kind])(s["x"])


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


def _affine(s: Site) -> Any:
    return s.add(s.mul(s["x"], s.parameter("alpha")), s.parameter("beta"))


def _leaky(s: Site) -> Any:
    below = s.mul(s["x"], s.parameter("alpha"))
    return s.api.broadcasting_where(_not_less(s, s["x"], s.number(0)), s["x"], below)


def _not_less(s: Site, x: Any, y: Any) -> Any:
    """x >= y; false for a NaN."""
    return s.api.broadcasting_or(s.api.broadcasting_greater(x, y), s.api.broadcasting_equal(x, y))


@rule("sign")
def _sign(s: Site) -> Any:
    positive, zero = s.api.broadcasting_greater(s["x"], s.number(0)), s.number(0)
    negative = s.api.broadcasting_greater(zero, s["x"])
    below = s.api.broadcasting_where(negative, s.number(-1), zero)
    return s.api.broadcasting_where(positive, s.number(1), below)


@rule("elu")
def _elu(s: Site) -> Any:
    below = s.sub(s.api.exp(s.api.broadcasting_minimum(s["x"], s.number(0))), s.number(1))
    return s.api.broadcasting_where(
        _not_less(s, s["x"], s.number(0)), s["x"], s.mul(below, s.parameter("alpha"))
    )


@rule("softplus")
def _softplus(s: Site) -> Any:
    """max(x, 0) + log(1 + exp(-|x|)): no overflow."""
    tail = s.api.exp(s.neg(s.api.abs_(s["x"])))
    return s.add(s.api.relu(s["x"]), s.api.log(s.add(tail, s.number(1))))


@rule("gelu")
def _gelu(s: Site) -> Any:
    mode = s.call.text("mode")
    if mode == "SIGMOID_APPROXIMATION":
        return s.mul(s["x"], s.api.sigmoid(s.mul(s["x"], s.number(1.702))))
    return s.api.gelu(s["x"], approximate="none" if mode == "EXACT" else "tanh")


@rule("cast")
def _cast(s: Site) -> Any:
    return s.api.cast(s["x"], NUMPY[s.result.dtype])


@rule("const")
def _const(s: Site) -> Any:
    literal = s.call.args["val"]
    assert isinstance(literal, Literal)
    return constant(literal)


# --- two or three inputs ---

_BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "real_div": "divide", "floor_div": "floor_divide", "pow": "pow",
    "maximum": "maximum", "minimum": "minimum", "mod": "modulo", "equal": "equal", "not_equal": "not_equal",
    "greater": "greater", "logical_and": "and", "logical_or": "or", "logical_xor": "xor",
}  # fmt: skip


@rule(" ".join(_BINARY))
def _binary(s: Site) -> Any:
    return getattr(s.api, f"broadcasting_{_BINARY[s.op.kind]}")(s["x"], s["y"])


@rule("less")
def _less(s: Site) -> Any:
    return s.api.broadcasting_greater(s["y"], s["x"])


@rule("greater_equal")
def _greater_equal(s: Site) -> Any:
    return _not_less(s, s["x"], s["y"])


@rule("less_equal")
def _less_equal(s: Site) -> Any:
    return _not_less(s, s["y"], s["x"])


@rule("select")
def _select(s: Site) -> Any:
    return s.api.broadcasting_where(s["cond"], s["a"], s["b"])


# --- contractions ---


@rule("matmul")
def _matmul(s: Site) -> Any:
    sides = []
    for name in ("x", "y"):
        side, rank = s[name], s.call.type(name).rank
        if s.call.flag(f"transpose_{name}"):
            side = s.api.transpose(side, np.asarray([*range(rank - 2), rank - 1, rank - 2], np.uint32))
        sides.append(side)
    return s.api.broadcasting_batch_matmul(*sides)


@rule("linear")
def _linear(s: Site) -> Any:
    weight = s.api.transpose(s["weight"], np.asarray([1, 0], np.uint32))
    product = s.api.broadcasting_batch_matmul(s["x"], weight)
    return s.add(product, s["bias"]) if s.call.has("bias") else product


def _window(s: Site, kernel: Ints) -> tuple[Ints, Ints, tuple[tuple[int, int], ...]]:
    """(strides, dilations, padding) of a convolution or pooling with their defaults filled in."""
    ones = (1,) * len(kernel)
    strides = s.call.integers("strides") if s.call.has("strides") else ones
    dilations = s.call.integers("dilations") if s.call.has("dilations") else ones
    sizes = s.call.type("x").shape[2:]
    return strides, dilations, spatial_padding(s.call, sizes, kernel, strides, dilations)


def _padded(s: Site, padding: tuple[tuple[int, int], ...], value: float) -> Any:
    """x with its spatial axes padded, as rank 4 or 5 (one spatial axis becomes two)."""
    x, shape = s["x"], s.call.type("x").shape
    if len(padding) == 1:
        x, padding = s.shaped(x, (*shape[:2], 1, shape[2])), ((0, 0), *padding)
    if not any(itertools.chain(*padding)):
        return x
    amounts = [0, 0, 0, 0, *itertools.chain(*padding)]
    return s.api.pad(x, np.asarray(amounts, np.uint32), s.number(value))


def _pairs(values: tuple[int, ...]) -> Any:
    return np.asarray(values if len(values) > 1 else (1, *values), np.uint32)


@rule("conv")
def _conv(s: Site) -> Any:
    kernel = s.call.type("weight").shape
    strides, dilations, padding = _window(s, kernel[2:])
    weight = s["weight"] if len(kernel) > 3 else s.shaped(s["weight"], (*kernel[:2], 1, kernel[2]))
    convolve = s.api.conv3d if len(kernel) == 5 else s.api.conv2d
    groups = np.uint32(s.call.integer("groups"))
    y = convolve(_padded(s, padding, 0.0), weight, _pairs(strides), _pairs(dilations), groups)
    y = s.shaped(y)
    return s.add(y, s.shaped(s["bias"], (-1, *(1,) * (len(kernel) - 2)))) if s.call.has("bias") else y


@rule("avg_pool")
def _avg_pool(s: Site) -> Any:
    kernel = s.call.integers("kernel_sizes")
    strides, _, padding = _pool_window(s, kernel)
    pool = s.api.sumpool3d if len(kernel) == 3 else s.api.sumpool2d
    ones = constant_of(np.ones(max(2, len(kernel)), np.uint32))
    total = s.shaped(pool(_padded(s, padding, 0.0), _pairs(kernel), _pairs(strides), ones))
    if not s.call.flag("exclude_padding_from_average"):
        return s.div(total, s.number(math.prod(kernel)))
    counts = np.ones((), np.float64)
    for size, k, step, pad, out in zip(
        s.call.type("x").shape[2:], kernel, strides, padding, s.result.shape[2:], strict=True
    ):
        starts = np.arange(out) * step - pad[0]
        inside = np.minimum(starts + k, size) - np.maximum(starts, 0)
        counts = np.multiply.outer(counts, inside)
    return s.div(total, counts.astype(NUMPY[s.result.dtype]))


@rule("max_pool")
def _max_pool(s: Site) -> Any:
    kernel = s.call.integers("kernel_sizes")
    strides, _, padding = _pool_window(s, kernel)
    shape = s.result.shape if len(kernel) > 1 else (*s.result.shape[:2], 1, s.result.shape[2])
    output = s.api.TensorType(shape, NUMPY[s.result.dtype])
    pool = s.api.maxpool3d if len(kernel) == 3 else s.api.maxpool2d
    ones = constant_of(np.ones(max(2, len(kernel)), np.uint32))
    x = _padded(s, padding, -math.inf)
    return s.shaped(pool(output, x, _pairs(kernel), _pairs(strides), ones, np.bool_(False)))


def _pool_window(s: Site, kernel: tuple[int, ...]) -> Any:
    if s.call.flag("ceil_mode"):
        raise UnsupportedModel(
            "Core AI: needs ops that can be translated:",
            [Finding(s.op.source or s.op.name, s.op.kind, "has ceil_mode.", 'Use device="sim".')],
            code="ANE305",
        )
    return _window(s, kernel)


# --- reductions ---


@rule("reduce_sum reduce_mean reduce_max reduce_min reduce_l1_norm reduce_l2_norm reduce_sum_square")
def _reduce(s: Site) -> Any:
    along = np.asarray(axes(s.call, "axes", s.call.type().rank), np.int32)
    kind, x = s.op.kind.removeprefix("reduce_"), s["x"]
    if kind in ("sum", "mean", "max", "min"):
        return s.shaped(getattr(s.api, f"reduce_{kind}")(x, along))
    total = s.shaped(s.api.reduce_sum(s.api.abs_(x) if kind == "l1_norm" else s.mul(x, x), along))
    return s.api.sqrt(total) if kind == "l2_norm" else total


@rule("reduce_argmax")
def _argmax(s: Site) -> Any:
    found = s.api.argmax(s["x"], np.int32(axis(s.call, s.call.integer("axis"), s.call.type().rank)))
    return s.shaped(s.api.cast(found, NUMPY[s.result.dtype]))


@rule("softmax")
def _softmax(s: Site) -> Any:
    return s.api.softmax(s["x"], np.int32(axis(s.call, s.call.integer("axis"), s.call.type().rank)))


# --- movement ---


@rule("reshape expand_dims squeeze")
def _reshape(s: Site) -> Any:
    return s.shaped(s["x"])


@rule("transpose")
def _transpose(s: Site) -> Any:
    rank = s.call.type().rank
    perm = [axis(s.call, p, rank) for p in s.call.integers("perm")]
    return s.api.transpose(s["x"], np.asarray(perm, np.uint32))


@rule("slice_by_size")
def _slice_by_size(s: Site) -> Any:
    begin = np.asarray(s.call.integers("begin"), np.int32)
    end = begin + np.asarray(s.result.shape, np.int32)
    return s.api.slice_(s["x"], begin, end, np.ones_like(begin))


@rule("slice_by_index")
def _slice_by_index(s: Site) -> Any:
    slices, _ = index_slices(s.call)
    ranges = [range(*cut.indices(n)) for cut, n in zip(slices, s.call.type().shape, strict=True)]
    forward = [r if r.step > 0 else r[::-1] for r in ranges]
    bounds = np.asarray([(r[0], r[-1] + 1, r.step) for r in forward], np.int32).reshape(-1, 3).T
    part = s.api.slice_(s["x"], bounds[0].copy(), bounds[1].copy(), bounds[2].copy())
    back = [i for i, r in enumerate(ranges) if r.step < 0]
    return s.shaped(s.api.reverse(part, np.asarray(back, np.int32)) if back else part)


@rule("concat")
def _concat(s: Site) -> Any:
    rank = s.result.rank
    along = axis(s.call, s.call.integer("axis"), rank)
    parts = s["values"]
    if s.call.flag("interleave"):
        shape = s.call.types("values")[0].shape
        parts = [s.shaped(part, (*shape[: along + 1], 1, *shape[along + 1 :])) for part in parts]
        along += 1
    return s.shaped(s.api.concat(np.int32(along), parts))


@rule("tile")
def _tile(s: Site) -> Any:
    return s.api.tile(s["x"], np.asarray(s.call.integers("reps"), np.uint32))


@rule("pad")
def _pad(s: Site) -> Any:
    amounts = s.call.integers("pad")
    every = [0] * (2 * s.call.type().rank - len(amounts)) + list(amounts)
    mode = s.call.text("mode")
    value = s.parameter("constant_val") if mode == "constant" else s.number(0)
    return s.api.pad(s["x"], np.asarray(every, np.uint32), value, mode)
