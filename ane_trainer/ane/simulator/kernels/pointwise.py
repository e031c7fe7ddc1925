"""What each pointwise MIL op computes on the engine: one entry an op, with its evidence level and evidence.

Operands and results are decoded fp16 (`fp16.py`); every result of arithmetic is rounded half away from zero
and saturates at 65536 (inf). A NaN operand counts as an ordinary number above inf, so NaN + 1, relu(NaN) and
maximum(NaN, x) are inf; inf - inf and 0 * inf are 0; nothing returns NaN (ANE guide chapter 3 for M1, M6
notes/numerics.md). Parameters are rounded to fp16. `mod`, which the engine's backend refuses, is in
`transcendental.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.simulator.arrays import bias
from ane_trainer.ane.simulator.numbers.fp16 import F32, INF, round_half_away
from ane_trainer.ane.simulator.numbers.tables import TABLES, evaluate, real_div
from ane_trainer.ane.simulator.registry import EngineContext, kernel

Bool = NDArray[np.bool_]

_PE = "M6 notes/numerics.md, PE path (M4, M6): half away from zero, fp16 range, subnormals kept"
_SWEEP = "ANEForge full_mil_vocabulary_sweep (M5): relative error "
_EXACT_SWEEP = _SWEEP + "0"
_RUNS = "ANEForge full_mil_vocabulary_sweep (M5): runs, values not verified"
_ONE = np.float32(1)


def _parameter(call: Call, name: str, x: F32) -> F32:
    """A compile-time number as decoded fp16; one number per channel broadcasts along axis 1 of x."""
    values = round_half_away(np.asarray(call.const(name), dtype=np.float64))
    if values.size == 1:
        return values.reshape(())
    return values.reshape(-1, *(1,) * (x.ndim - 2))


def _larger(x: F32, y: F32 | np.float32) -> F32:
    return round_half_away(np.where(x > y, x, y))


def _smaller(x: F32, y: F32 | np.float32) -> F32:
    return round_half_away(np.where(x < y, x, y))


def _binary(
    kind: str, level: str, evidence: str, function: Callable[[Any, Any], object], bound: str = ""
) -> None:
    def run(ctx: EngineContext, call: Call, x: F32, y: F32) -> Any:
        return function(x, y)

    kernel(kind, level, evidence, bound)(run)


def _tabled(kind: str) -> None:
    """An op that is one table."""
    table = TABLES[kind]

    def run(ctx: EngineContext, call: Call, x: F32) -> F32:
        return evaluate(kind, x)

    kernel(kind, table.level, table.evidence, table.bound)(run)


def _tabled_epsilon(kind: str, table: str) -> None:
    """A table of x + epsilon: epsilon as a bias, a multiple of 2^-16 (half away), the sum rounded to fp16.

    With epsilon 1e-4 all of inverse's published figures come out for 7 * 2^-16 and not for fp16(1e-4) (M6
    data/06_numerics/f3_lut_m6.txt, lut_ulp_m6.txt); that rsqrt and log do the same is assumed.
    """
    entry = TABLES[table]

    def run(ctx: EngineContext, call: Call, x: F32) -> F32:
        return evaluate(kind, round_half_away(x + bias(call, "epsilon")))

    kernel(kind, entry.level, entry.evidence, entry.bound)(run)


# --- arithmetic ---

_binary("add", "exact", _PE, lambda x, y: round_half_away(x + y))
_binary("sub", "exact", _PE, lambda x, y: round_half_away(x - y))
_binary("mul", "exact", _PE, lambda x, y: round_half_away(x * y))
_binary("maximum", "exact", _EXACT_SWEEP, _larger)
_binary("minimum", "exact", _EXACT_SWEEP, _smaller)
_binary(
    "real_div", "bounded",
    "inverse table times x: with it a simulated ANEForge MNIST run ends at the published accuracy, 0.9070",
    real_div, "1 unit in the last place of inverse",
)  # fmt: skip
_binary("floor_div", "assumed", _EXACT_SWEEP + "; floor of real_div", lambda x, y: _floor(real_div(x, y)))


def _pow(x: F32, y: F32) -> F32:
    """2^(y log2 |x|); negative where x is and y is an odd integer."""
    size = evaluate("exp2", round_half_away(y * evaluate("log2", np.abs(x))))
    return np.where((x < 0) & (np.mod(y, 2) == 1), -size, size)


_binary("pow", "assumed", _SWEEP + "0.00018; exp2 and log2 tables", _pow)


@kernel("abs", "exact", _EXACT_SWEEP)
def _run_absolute(ctx: EngineContext, call: Call, x: F32) -> F32:
    return _smaller(np.abs(x), INF)


@kernel("sign", "exact", _EXACT_SWEEP)
def _run_sign(ctx: EngineContext, call: Call, x: F32) -> F32:
    return np.sign(x)


@kernel("square", "exact", "ANE guide chapter 3 (M1): inf from 256; " + _PE)
def _run_square(ctx: EngineContext, call: Call, x: F32) -> F32:
    return round_half_away(x * x)


def _floor(x: F32) -> F32:
    return round_half_away(np.floor(x))


@kernel("floor", "exact", _EXACT_SWEEP)
def _run_floor(ctx: EngineContext, call: Call, x: F32) -> F32:
    return _floor(x)


@kernel("ceil", "exact", _EXACT_SWEEP)
def _run_ceil(ctx: EngineContext, call: Call, x: F32) -> F32:
    return round_half_away(np.ceil(x))


@kernel(
    "round", "bounded",
    "ANEForge emitter (M5): half away from zero; from 1024 on the 0.5 is added in fp16: 1024 gives 1025, -2047 "
    "-2048",
    "exact below 1024; three numbers known from there",
)  # fmt: skip
def _run_round_nearest(ctx: EngineContext, call: Call, x: F32) -> F32:
    more = np.abs(x) + np.float32(0.5)
    return round_half_away(np.copysign(np.floor(np.where(more < 1024, more, round_half_away(more))), x))


# --- tables ---

for _kind in ("sigmoid", "tanh", "erf", "silu", "sqrt", "exp2", "sin"):
    _tabled(_kind)
for _kind, _table in (("rsqrt", "rsqrt"), ("inverse", "inverse"), ("log", "log2")):
    _tabled_epsilon(_kind, _table)


@kernel("exp", "exact", TABLES["exp2"].evidence)
def _run_exp(ctx: EngineContext, call: Call, x: F32) -> F32:
    return evaluate("exp", x)


@kernel("cos", "assumed", _SWEEP + "0.00056; ANE guide chapter 3: seams of 0.04 to 0.12 on M1")
def _run_cos(ctx: EngineContext, call: Call, x: F32) -> F32:
    return evaluate("cos", x)


@kernel("atan", "assumed", _SWEEP + "0.01881; ANE guide chapter 3: seams of 0.04 to 0.12 on M1")
def _run_atan(ctx: EngineContext, call: Call, x: F32) -> F32:
    return round_half_away(np.arctan(x.astype(np.float64)))


@kernel("gelu", "bounded", TABLES["gelu"].evidence, TABLES["gelu"].bound + "; SIGMOID_APPROXIMATION assumed")
def _run_gelu(ctx: EngineContext, call: Call, x: F32) -> F32:
    """EXACT and TANH_APPROXIMATION are one table (bit-identical on M6); SIGMOID_APPROXIMATION is composed."""
    if call.text("mode") != "SIGMOID_APPROXIMATION":
        return evaluate("gelu", x)
    scaled = round_half_away(x * round_half_away(1.702))
    return round_half_away(x * evaluate("sigmoid", scaled))


def _softplus(x: F32) -> F32:
    """log(1 + exp x), where exp is inf from 32768 on and log(inf) is 0.

    Measured on M5 (ANEForge issue 113): 10 at 10, 0 at 11, although exp(11) is within fp16. The limit between them
    is assumed to be that of the multiply-accumulate unit.
    """
    power = evaluate("exp", x)
    return evaluate("log", round_half_away(_ONE + np.where(power < 32768, power, np.float32(INF))))


@kernel(
    "softplus",
    "assumed",
    _SWEEP
    + "0.00078; ANE guide chapter 3 (M1): softplus(inf) = 0; ANEForge issue 113 (M5): 0 at 11; composed",
)
def _run_softplus(ctx: EngineContext, call: Call, x: F32) -> F32:
    return _softplus(x)


@kernel("softplus_parametric", "assumed", "as softplus, scaled per channel")
def _run_softplus_parametric(ctx: EngineContext, call: Call, x: F32) -> F32:
    inner = _softplus(round_half_away(_parameter(call, "beta", x) * x))
    return round_half_away(_parameter(call, "alpha", x) * inner)


@kernel("softsign", "assumed", _SWEEP + "0.00076; ANE guide chapter 3 (M1): softsign(inf) = 0; composed")
def _run_softsign(ctx: EngineContext, call: Call, x: F32) -> F32:
    return real_div(x, round_half_away(_ONE + np.abs(x)))


@kernel("elu", "assumed", _SWEEP + "0.00506; alpha (exp x - 1) below 0")
def _run_elu(ctx: EngineContext, call: Call, x: F32) -> F32:
    below = round_half_away(_parameter(call, "alpha", x) * round_half_away(evaluate("exp", x) - _ONE))
    return np.where(x > 0, _smaller(x, INF), below)


@kernel("scaled_tanh", "assumed", _SWEEP + "0.00172; alpha tanh(beta x), each product rounded")
def _run_scaled_tanh(ctx: EngineContext, call: Call, x: F32) -> F32:
    inner = evaluate("tanh", round_half_away(_parameter(call, "beta", x) * x))
    return round_half_away(_parameter(call, "alpha", x) * inner)


# --- piecewise linear ---


@kernel("relu", "exact", _EXACT_SWEEP + "; no table: M6 notes/numerics.md")
def _run_relu(ctx: EngineContext, call: Call, x: F32) -> F32:
    return _larger(x, np.float32(0))


@kernel("relu6", "exact", _EXACT_SWEEP)
def _run_relu6(ctx: EngineContext, call: Call, x: F32) -> F32:
    return _smaller(_larger(x, np.float32(0)), np.float32(6))


def _leaky(x: F32, alpha: F32) -> F32:
    return np.where(x > 0, _smaller(x, INF), round_half_away(alpha * x))


@kernel("leaky_relu prelu", "bounded", _SWEEP + "1e-5", "1 unit in the last place below 0")
def _run_leaky_relu(ctx: EngineContext, call: Call, x: F32) -> F32:
    """x above 0, alpha x below; prelu has one alpha per channel."""
    return _leaky(x, _parameter(call, "alpha", x))


@kernel("clamped_relu", "bounded", _SWEEP + "9e-5", "1 unit in the last place below 0")
def _run_clamped_relu(ctx: EngineContext, call: Call, x: F32) -> F32:
    """min(beta, x) above 0, min(beta, alpha x) below."""
    return _smaller(_leaky(x, _parameter(call, "alpha", x)), _parameter(call, "beta", x))


@kernel("thresholded_relu", "exact", _EXACT_SWEEP)
def _run_thresholded_relu(ctx: EngineContext, call: Call, x: F32) -> F32:
    return np.where(x >= _parameter(call, "alpha", x), _smaller(x, INF), np.float32(0))


@kernel("threshold", "exact", _EXACT_SWEEP)
def _run_threshold(ctx: EngineContext, call: Call, x: F32) -> F32:
    return _larger(x, _parameter(call, "alpha", x))


@kernel("clip", "exact", "no arithmetic: maximum, then minimum")
def _run_clip(ctx: EngineContext, call: Call, x: F32) -> F32:
    return _smaller(_larger(x, _parameter(call, "alpha", x)), _parameter(call, "beta", x))


def _linear(call: Call, x: F32) -> F32:
    scaled = round_half_away(_parameter(call, "alpha", x) * x)
    return round_half_away(scaled + _parameter(call, "beta", x))


@kernel("linear_activation", "assumed", _SWEEP + "9e-5; alpha x + beta, the product rounded")
def _run_linear_activation(ctx: EngineContext, call: Call, x: F32) -> F32:
    return _linear(call, x)


@kernel("sigmoid_hard", "assumed", _SWEEP + "0.00026; alpha x + beta within 0..1, the product rounded")
def _run_sigmoid_hard(ctx: EngineContext, call: Call, x: F32) -> F32:
    return _smaller(_larger(_linear(call, x), np.float32(0)), _ONE)


# --- comparison and logic: bool arrays ---

_COMPARISONS: dict[str, Callable[[F32, F32], Bool]] = {
    "equal": np.equal, "not_equal": np.not_equal, "greater": np.greater, "greater_equal": np.greater_equal,
    "less": np.less, "less_equal": np.less_equal,
}  # fmt: skip
for _kind, _function in _COMPARISONS.items():
    _binary(_kind, "assumed", _RUNS, _function)
for _kind, _logic in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
    _binary(f"logical_{_kind}", "assumed", "Core ML only (M4): M6 notes; ANEForge's path refuses it", _logic)


@kernel("logical_not", "assumed", _RUNS)
def _run_logical_not(ctx: EngineContext, call: Call, x: Bool) -> Bool:
    return np.logical_not(x)


@kernel("select", "exact", _EXACT_SWEEP + "; moves bit patterns")
def _run_select(ctx: EngineContext, call: Call, cond: Bool, a: F32, b: F32) -> F32:
    return np.where(cond, a, b)
