"""Pointwise ops in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.semantics.registry import along, constant, half_away, meaning, wide_dtype
from ane_trainer.ane.mil.weights import Array

_erf_each = np.frompyfunc(math.erf, 1, 1)


def _erf(x: Array) -> Array:
    return np.asarray(_erf_each(x), np.float64).reshape(x.shape)


_UNARY: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs, "acos": np.arccos, "asin": np.arcsin, "atan": np.arctan, "atanh": np.arctanh,
    "ceil": np.ceil, "cos": np.cos, "cosh": np.cosh, "erf": _erf, "exp": np.exp, "exp2": np.exp2,
    "floor": np.floor, "relu": lambda x: np.maximum(x, 0), "relu6": lambda x: np.clip(x, 0, 6),
    "round": half_away, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "sign": np.sign,
    "silu": lambda x: x / (1 + np.exp(-x)), "sin": np.sin, "sinh": np.sinh,
    "softplus": lambda x: np.logaddexp(0, x), "softsign": lambda x: x / (1 + np.abs(x)), "sqrt": np.sqrt,
    "square": np.square, "tan": np.tan, "tanh": np.tanh, "logical_not": np.logical_not,
    "identity": lambda x: x,
}  # fmt: skip


@meaning(" ".join(_UNARY))
def unary(call: Call, x: Array) -> Array:
    """One input, one function."""
    return _UNARY[call.op.kind](x)


_SHIFTED: dict[str, Callable[[Array], Array]] = {
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "inverse": lambda x: 1 / x,
    "log": np.log,
}


@meaning(" ".join(_SHIFTED))
def unary_epsilon(call: Call, x: Array) -> Array:
    """epsilon is added before the function."""
    return _SHIFTED[call.op.kind](x + call.number("epsilon"))


@meaning("gelu")
def gelu(call: Call, x: Array) -> Array:
    """One of three formulas."""
    mode = call.text("mode")
    if mode == "EXACT":
        return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2))))
    if mode == "SIGMOID_APPROXIMATION":
        return np.asarray(x / (1 + np.exp(-1.702 * x)))
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


_ALPHA: dict[str, Callable[[Array, float], Array]] = {
    "leaky_relu": lambda x, a: np.where(x >= 0, x, a * x),
    "elu": lambda x, a: np.where(x >= 0, x, a * np.expm1(np.minimum(x, 0))),
    "thresholded_relu": lambda x, a: np.where(x >= a, x, 0.0),
    "threshold": lambda x, a: np.maximum(x, a),
}


@meaning(" ".join(_ALPHA))
def unary_alpha(call: Call, x: Array) -> Array:
    """One input and one number."""
    return _ALPHA[call.op.kind](x, call.number("alpha"))


_ALPHA_BETA: dict[str, Callable[[Array, float, float], Array]] = {
    "clip": lambda x, a, b: np.clip(x, a, b),
    "clamped_relu": lambda x, a, b: np.minimum(np.where(x >= 0, x, a * x), b),
    "linear_activation": lambda x, a, b: a * x + b,
    "scaled_tanh": lambda x, a, b: a * np.tanh(b * x),
    "sigmoid_hard": lambda x, a, b: np.clip(a * x + b, 0, 1),
}


@meaning(" ".join(_ALPHA_BETA))
def unary_alpha_beta(call: Call, x: Array) -> Array:
    """One input and two numbers."""
    return _ALPHA_BETA[call.op.kind](x, call.number("alpha"), call.number("beta"))


@meaning("prelu")
def prelu(call: Call, x: Array) -> Array:
    """One slope a channel for negative numbers."""
    return np.where(x >= 0, x, x * along(constant(call, "alpha"), 1, x.ndim))


@meaning("softplus_parametric")
def softplus_parametric(call: Call, x: Array) -> Array:
    """alpha log(1 + exp(beta x)), one alpha and beta a channel."""
    alpha, beta = (along(constant(call, name), 1, x.ndim) for name in ("alpha", "beta"))
    return np.asarray(alpha * np.logaddexp(0, beta * x))


def _mul(x: Array, y: Array) -> Array:
    """As on the engine, 0 times infinity is 0."""
    return np.where((x == 0) | (y == 0), 0, x * y)


def _divide(x: Array, y: Array) -> Array:
    return np.divide(x, y) if x.dtype.kind == "f" else np.trunc(np.divide(x, y))


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": _mul, "real_div": _divide, "floor_div": np.floor_divide,
    "maximum": np.maximum, "minimum": np.minimum, "mod": np.mod,
    "pow": lambda x, y: np.power(x.astype(np.float64), y),
    "equal": np.equal, "not_equal": np.not_equal, "greater": np.greater, "greater_equal": np.greater_equal,
    "less": np.less, "less_equal": np.less_equal, "logical_and": np.logical_and,
    "logical_or": np.logical_or, "logical_xor": np.logical_xor,
}  # fmt: skip


@meaning(" ".join(_BINARY))
def binary(call: Call, x: Array, y: Array) -> Array:
    """Two inputs that broadcast; an integer quotient is cut towards zero."""
    return _BINARY[call.op.kind](x, y)


@meaning("select")
def select(call: Call, cond: Array, a: Array, b: Array) -> Array:
    """a where cond holds, else b."""
    return np.where(cond, a, b)


@meaning("cast")
def cast(call: Call, x: Array) -> Array:
    """Floats become integers towards zero, clipped to the target's range; NaN becomes 0."""
    target = call.text("dtype")
    if target == "bool":
        return np.asarray(x != 0)
    if x.dtype.kind == "f" and not target.startswith("fp"):
        limits = np.iinfo(target)
        low, high = max(limits.min, -(2**53)), min(limits.max, 2**53)
        return np.asarray(np.nan_to_num(np.clip(np.trunc(x), low, high)))
    return x.astype(wide_dtype(target))
