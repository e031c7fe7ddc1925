"""Every pointwise op of ANEForge's graph interface, with parameters at and away from their defaults."""

from __future__ import annotations

import aneforge as af
import numpy as np
from scipy import special

from tests.interop.harness import Array, Case, values

X = values(4, 33)
BIG = values(3, 40, low=-9, high=9)
POSITIVE = values(4, 33, low=0.01, high=8)
Y = values(4, 33, seed=1)


def _elu(x: Array, a: float) -> Array:
    return np.where(x > 0, x, a * np.expm1(x))


def _half_away(x: Array) -> Array:
    return np.sign(x) * np.floor(np.abs(x) + 0.5)


UNARY = [
    Case("relu", lambda x: x.relu(), (X,), lambda x: np.maximum(x, 0), 0, 0),
    Case("relu6", lambda x: x.relu6(), (BIG,), lambda x: np.clip(x, 0, 6), 0, 0),
    Case("gelu", lambda x: x.gelu(), (BIG,), lambda x: x * special.ndtr(x), 2e-3, 7e-3),
    Case("silu", lambda x: x.silu(), (BIG,), lambda x: x * special.expit(x), 2e-3, 1.6e-2),
    Case("sigmoid", lambda x: x.sigmoid(), (BIG,), special.expit, 2e-3, 3.5e-3),
    Case("tanh", lambda x: x.tanh(), (BIG,), np.tanh, 2e-3, 2e-3),
    Case("exp", lambda x: x.exp(), (BIG,), np.exp, 8e-3, 1e-3),
    Case("exp2", lambda x: x.exp2(), (BIG,), np.exp2, 8e-3, 1e-3),
    Case("sqrt", lambda x: x.sqrt(), (POSITIVE,), np.sqrt, 2e-3),
    Case("abs", lambda x: x.abs(), (X,), np.abs, 0, 0),
    Case("square", lambda x: x.square(), (X,), np.square, 1e-3),
    Case("sin", lambda x: x.sin(), (BIG,), np.sin, 2e-3, 4e-3),
    Case("cos", lambda x: x.cos(), (BIG,), np.cos, 2e-3, 4e-3),
    Case("erf", lambda x: x.erf(), (BIG,), special.erf, 2e-3, 5e-3),
    Case(
        "softplus",
        lambda x: x.softplus(),
        (values(3, 40, low=-15, high=20),),
        lambda x: np.logaddexp(0, x),
        4e-3,
        1e-2,
    ),
    Case("softsign", lambda x: x.softsign(), (BIG,), lambda x: x / (1 + np.abs(x)), 1e-2),
    Case("atan", lambda x: x.atan(), (BIG,), np.arctan, 1e-2, 1e-2),
    Case("log", lambda x: x.log(), (POSITIVE,), np.log, 8e-3, 1e-2),
    Case("log with epsilon", lambda x: x.log(0.25), (POSITIVE,), lambda x: np.log(x + 0.25), 8e-3, 1e-2),
    Case("rsqrt", lambda x: x.rsqrt(), (POSITIVE,), lambda x: x**-0.5, 3e-3),
    Case("rsqrt with epsilon", lambda x: x.rsqrt(0.25), (POSITIVE,), lambda x: (x + 0.25) ** -0.5, 3e-3),
    Case("inverse", lambda x: x.inverse(), (POSITIVE + 0.25,), lambda x: 1 / x, 8e-3),
    Case("inverse with epsilon", lambda x: x.inverse(0.5), (POSITIVE,), lambda x: 1 / (x + 0.5), 8e-3),
    Case("elu", lambda x: x.elu(), (X,), lambda x: _elu(x, 1), 8e-3, 5e-3),
    Case("elu 0.5", lambda x: x.elu(0.5), (X,), lambda x: _elu(x, 0.5), 8e-3, 5e-3),
    Case("leaky_relu", lambda x: x.leaky_relu(0.125), (X,), lambda x: np.where(x > 0, x, 0.125 * x), 1e-3),
    Case("clip", lambda x: x.clip(-0.5, 1.5), (X,), lambda x: np.clip(x, -0.5, 1.5), 0, 0),
    Case("clamp", lambda x: x.clamp(0.0, 1.0), (X,), lambda x: np.clip(x, 0, 1), 0, 0),
    Case(
        "scaled_tanh", lambda x: x.scaled_tanh(1.5, 0.5), (X,), lambda x: 1.5 * np.tanh(0.5 * x), 4e-3, 4e-3
    ),
    Case("threshold", lambda x: x.threshold(0.25), (X,), lambda x: np.maximum(x, 0.25), 0, 0),
    Case(
        "thresholded_relu", lambda x: x.thresholded_relu(0.5), (X,), lambda x: np.where(x >= 0.5, x, 0), 0, 0
    ),
    Case(
        "clamped_relu",
        lambda x: x.clamped_relu(0.5, 1.0),
        (X,),
        lambda x: np.minimum(1, np.where(x >= 0, x, x / 2)),
        1e-3,
    ),
    Case(
        "sigmoid_hard",
        lambda x: x.sigmoid_hard(0.25, 0.5),
        (BIG,),
        lambda x: np.clip(x / 4 + 0.5, 0, 1),
        1e-3,
    ),
    Case("linear_activation", lambda x: x.linear_activation(2, -0.5), (X,), lambda x: 2 * x - 0.5, 1e-3),
    Case("floor", lambda x: x.floor(), (BIG,), np.floor, 0, 0),
    Case("ceil", lambda x: x.ceil(), (BIG,), np.ceil, 0, 0),
    Case("round", lambda x: x.round(), (BIG,), _half_away, 0, 0),
    Case("round large", lambda x: x.round(), (values(2, 40, low=-4000, high=4000),), _half_away, 0, 0),
    Case("sign", lambda x: x.sign(), (np.array([[-2, -0.5, 0, 0.5, 2]], np.float32),), np.sign, 0, 0),
    Case("scale after floor", lambda x: x.floor() * 0.5, (BIG,), lambda x: np.floor(x) / 2, 0, 0),
    Case("scale by zero", lambda x: x.sum(1) * 0.0, (X,), lambda x: np.zeros((4, 1)), 0, 0),
    Case("adds", lambda x: x.adds(0.75), (X,), lambda x: x + 0.75, 1e-3),
    Case("muls", lambda x: 3.0 * x, (X,), lambda x: 3 * x, 1e-3),
]

CHANNELS = values(1, 5, 4, 6)
ALPHA = values(5, low=0, high=1)

BINARY = [
    Case("add", lambda x, y: x + y, (X, Y), np.add, 1e-3),
    Case("sub", lambda x, y: x - y, (X, Y), np.subtract, 1e-3),
    Case("mul", lambda x, y: x * y, (X, Y), np.multiply, 1e-3),
    Case("real_div", lambda x, y: x / y, (X, POSITIVE + 0.25), np.divide, 1e-2),
    Case("pow", lambda x, y: x**y, (POSITIVE, Y), np.power, 4e-2, 1e-2),
    Case("pow scalar", lambda x: x.pow(2.0), (POSITIVE,), np.square, 4e-2, 1e-2),
    Case("maximum", af.maximum, (X, Y), np.maximum, 0, 0),
    Case("minimum", af.minimum, (X, Y), np.minimum, 0, 0),
    Case("broadcast rows", lambda x, y: x + y, (X, values(1, 33)), np.add, 1e-3),
    Case("broadcast columns", lambda x, y: x * y, (X, values(4, 1)), np.multiply, 1e-3),
    Case("broadcast ranks", lambda x, y: x - y, (values(2, 3, 4), values(4)), np.subtract, 1e-3),
    Case("constant operand", lambda x: x + Y, (X,), lambda x: x + Y, 1e-3),
    Case("constant scalar operand", lambda x: af.maximum(x, 0.5), (X,), lambda x: np.maximum(x, 0.5), 0, 0),
    Case(
        "prelu",
        lambda x: x.prelu(ALPHA),
        (CHANNELS,),
        lambda x: np.where(x > 0, x, ALPHA[:, None, None] * x),
        1e-3,
    ),
    Case(
        "prelu rank 3",
        lambda x: x.prelu(ALPHA),
        (values(2, 5, 7),),
        lambda x: np.where(x > 0, x, ALPHA[:, None] * x),
        1e-3,
    ),
]

ROUNDED = np.round(X)
COMPARE = [
    Case(
        op,
        lambda x, y, op=op: af.select(getattr(x, op)(y), x, y),
        (ROUNDED, np.round(Y)),
        lambda x, y, op=op: np.where(getattr(np, op)(x, y), x, y),
        0,
        0,
    )
    for op in ("greater", "less", "equal", "not_equal", "less_equal", "greater_equal")
] + [
    Case(
        "logical_not of floats",
        lambda x, y: af.where((x - x.abs()).logical_not(), x, y),
        (X, Y),
        lambda x, y: np.where(x >= 0, x, y),
        0,
        0,
    ),
    Case("logical_not", lambda x, y: af.where(x.greater(y).logical_not(), x, y), (X, Y), np.minimum, 0, 0),
    Case(
        "select",
        lambda x, y: af.select(x.less(y), x * 2.0, y),
        (X, Y),
        lambda x, y: np.where(x < y, 2 * x, y),
        1e-3,
    ),
]

CASES = [*UNARY, *BINARY, *COMPARE]
