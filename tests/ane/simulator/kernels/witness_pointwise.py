"""Pointwise ops in double precision: one range where each is smooth, one bound a table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from tests.ane.simulator.kernels.witness import Drawn, Rng, moved, normal, op, sizes, wide

_UNARY: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float, float, float, float]] = {
    # function, low, high, units in the last place, absolute
    "abs": (torch.abs, -99, 99, 0, 0),
    "relu": (torch.relu, -99, 99, 0, 0),
    "relu6": (F.relu6, -9, 9, 0, 0),
    "sign": (torch.sign, -9, 9, 0, 0),
    "square": (torch.square, -99, 99, 0.5, 0),
    "floor": (torch.floor, -99, 99, 0, 0),
    "ceil": (torch.ceil, -99, 99, 0, 0),
    "sqrt": (torch.sqrt, 0.01, 999, 1.3, 0),
    "exp": (torch.exp, -9, 9, 10, 0),
    "exp2": (torch.exp2, -9, 9, 2, 0),
    "tanh": (torch.tanh, -6, 6, 0, 2e-3),
    "sigmoid": (torch.sigmoid, -12, 12, 0, 4e-3),
    "erf": (torch.erf, -4, 4, 0, 1e-3),
    "silu": (F.silu, -12, 12, 0, 1.6e-2),
    "sin": (torch.sin, -3, 3, 0, 2e-3),
    "cos": (torch.cos, -3, 3, 0, 2e-3),
    "atan": (torch.atan, -9, 9, 0.51, 0),
    "softplus": (F.softplus, -5, 10, 4, 1.2e-2),
    "softsign": (F.softsign, -9, 9, 20, 0),
    "acos": (torch.acos, -1, 1, 0.51, 0),
    "asin": (torch.asin, -1, 1, 0.51, 0),
    "atanh": (torch.atanh, -0.9, 0.9, 0.51, 0),
    "cosh": (torch.cosh, -5, 5, 0.51, 0),
    "sinh": (torch.sinh, -5, 5, 0.51, 0),
    "tan": (torch.tan, -1.5, 1.5, 0.51, 0),
    "round": (lambda x: torch.sign(x) * torch.floor(x.abs() + 0.5), -99, 99, 0, 0),
}


@op(" ".join(_UNARY))
def unary(rng: Rng, kind: str) -> Drawn:
    function, low, high, ulps, absolute = _UNARY[kind]
    x = rng.uniform(low, high, sizes(rng, 3)).astype(np.float16)
    return Drawn({"x": x}, {}, (function(wide(x)).numpy(),), ulps, absolute)


@op("rsqrt inverse log")
def with_epsilon(rng: Rng, kind: str) -> Drawn:
    x = rng.uniform(0.05, 99, 17).astype(np.float16)
    function = {"rsqrt": torch.rsqrt, "inverse": torch.reciprocal, "log": torch.log}[kind]
    bound = {"rsqrt": (3.0, 0.0), "inverse": (14.0, 0.0), "log": (1.5, 7e-3)}[kind]
    return Drawn({"x": x}, {"epsilon": 0.0}, (function(wide(x)).numpy(),), *bound)


@op("add sub mul real_div floor_div maximum minimum mod pow")
def binary(rng: Rng, kind: str) -> Drawn:
    x, y = rng.uniform(0.5, 9, (3, 1, 4)).astype(np.float16), rng.uniform(0.5, 3, (2, 4)).astype(np.float16)
    a, b = wide(x), wide(y)
    want = {
        "add": a + b,
        "sub": a - b,
        "mul": a * b,
        "real_div": a / b,
        "maximum": torch.maximum(a, b),
        "mod": a % b,
        "minimum": torch.minimum(a, b),
        "pow": a**b,
        "floor_div": torch.floor(a / b),
    }[kind].numpy()
    ulps = {"real_div": 16.0, "pow": 40.0, "maximum": 0.0, "minimum": 0.0}.get(kind, 0.5)
    if kind == "floor_div":  # near a whole quotient the inverse table may fall on the other side
        return Drawn({"x": x, "y": y}, {}, (want,), 0.0, 1.0)
    return Drawn({"x": x, "y": y}, {}, (want,), ulps, 0.01 if kind == "pow" else 0.0)


@op("equal not_equal less less_equal greater greater_equal")
def comparison(rng: Rng, kind: str) -> Drawn:
    x, y = (rng.integers(0, 3, (3, 4)).astype(np.float16) for _ in range(2))
    function = {
        "equal": np.equal,
        "not_equal": np.not_equal,
        "less": np.less,
        "less_equal": np.less_equal,
        "greater": np.greater,
        "greater_equal": np.greater_equal,
    }[kind]
    return Drawn({"x": x, "y": y}, {}, (function(x, y),))


@op("logical_and logical_or logical_xor")
def logical(rng: Rng, kind: str) -> Drawn:
    x, y = (rng.integers(0, 2, (3, 4)).astype(bool) for _ in range(2))
    want = {"logical_and": x & y, "logical_or": x | y, "logical_xor": x ^ y}[kind]
    return Drawn({"x": x, "y": y}, {}, (want,))


@op("logical_not")
def logical_not(rng: Rng) -> Drawn:
    x = rng.integers(0, 2, (3, 4)).astype(bool)
    return Drawn({"x": x}, {}, (~x,))


@op("select")
def select(rng: Rng) -> Drawn:
    cond, a, b = rng.integers(0, 2, (3, 4)).astype(bool), moved(rng, 3, 4), moved(rng, 3, 4)
    return Drawn({"cond": cond, "a": a, "b": b}, {}, (np.where(cond, a, b).astype(np.float64),))


_PARAMETRIC: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, object], float, float]] = {
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.25), {"alpha": 0.25}, 0.5, 0.0),
    "elu": (lambda x: F.elu(x, 0.5), {"alpha": 0.5}, 1.0, 6e-3),
    "thresholded_relu": (lambda x: torch.where(x >= 0.5, x, 0.0), {"alpha": 0.5}, 0.0, 0.0),
    "threshold": (lambda x: torch.clamp(x, min=0.5), {"alpha": 0.5}, 0.0, 0.0),
    "clip": (lambda x: x.clamp(-0.5, 1.5), {"alpha": -0.5, "beta": 1.5}, 0.0, 0.0),
    "clamped_relu": (
        lambda x: torch.clamp(torch.where(x >= 0, x, 0.25 * x), max=2.0),
        {"alpha": 0.25, "beta": 2.0},
        0.5,
        0.0,
    ),
    "linear_activation": (lambda x: 1.5 * x + 0.25, {"alpha": 1.5, "beta": 0.25}, 2.0, 0.01),
    "scaled_tanh": (lambda x: 1.5 * torch.tanh(0.5 * x), {"alpha": 1.5, "beta": 0.5}, 1.0, 3e-3),
    "sigmoid_hard": (lambda x: (0.25 * x + 0.5).clamp(0, 1), {"alpha": 0.25, "beta": 0.5}, 1.0, 2.0**-11),
    "gelu": (F.gelu, {"mode": "EXACT"}, 0.0, 7e-3),
}


@op(" ".join(_PARAMETRIC))
def parametric(rng: Rng, kind: str) -> Drawn:
    function, params, ulps, absolute = _PARAMETRIC[kind]
    x = rng.uniform(-5, 5, (3, 7)).astype(np.float16)
    return Drawn({"x": x}, dict(params), (function(wide(x)).numpy(),), ulps, absolute)


@op("prelu")
def prelu(rng: Rng) -> Drawn:
    x, alpha = normal(rng, 2, 3, 4, 2), normal(rng, 3)
    return Drawn({"x": x}, {"alpha": alpha}, (F.prelu(wide(x), wide(alpha)).numpy(),), 0.5)


@op("softplus_parametric")
def softplus_parametric(rng: Rng) -> Drawn:
    x, alpha, beta = normal(rng, 2, 3, 4), np.abs(normal(rng, 3)), np.abs(normal(rng, 3))
    a, b = (wide(v).reshape(1, 3, 1) for v in (alpha, beta))
    return Drawn({"x": x}, {"alpha": alpha, "beta": beta}, ((a * F.softplus(b * wide(x))).numpy(),), 8, 0.03)
