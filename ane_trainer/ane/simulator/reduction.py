"""Reductions and softmax on the pointwise unit.

The order of the engine's partial sums is not known (`facts`: ane-guide ch. 3 and M6 disagree); the simulator
sums in float64 and rounds once, half away from zero. Integers up to 2048 and the published 2049 -> 2050 come
out as on six chips (ANEForge numeric_cliffs). Roots and logarithms of sums go through the tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.opset import Call
from ane_trainer.ane.opset.shapes import axes
from ane_trainer.ane.simulator.registry import Context, kernel
from ane_trainer.ane.simulator.rounding import rounded, table_of

Array = NDArray[Any]

_SUM = "ANEForge numeric_cliffs (integers to 2048, 2049 -> 2050 on six chips); order of partial sums unknown"
_SWEEP = "ANEForge vocabulary sweep (M5): relative error "


def _over(call: Call) -> dict[str, Any]:
    return {"axis": axes(call, "axes", call.type().rank), "keepdims": call.flag("keep_dims")}


def _sum(x: Array, **over: Any) -> Array:
    return rounded(np.sum(x, dtype=np.float64, **over))


@kernel("reduce_sum", "assumed", _SUM)
def reduce_sum(ctx: Context, call: Call, x: Array) -> Array:
    """Sum over `axes`."""
    return _sum(x, **_over(call))


@kernel("reduce_mean", "assumed", _SUM)
def reduce_mean(ctx: Context, call: Call, x: Array) -> Array:
    """Mean over `axes`."""
    return rounded(np.mean(x, dtype=np.float64, **_over(call)))


@kernel("reduce_l1_norm", "assumed", _SWEEP + "0.00071; the order of partial sums is unknown")
def reduce_l1_norm(ctx: Context, call: Call, x: Array) -> Array:
    """Sum of magnitudes."""
    return _sum(np.abs(x), **_over(call))


@kernel("reduce_sum_square", "assumed", _SWEEP + "0.00054; the order of partial sums is unknown")
def reduce_sum_square(ctx: Context, call: Call, x: Array) -> Array:
    """Sum of squares."""
    return _sum(np.square(x), **_over(call))


@kernel("reduce_l2_norm", "assumed", _SWEEP + "0.00051; sum of squares in fp16 range, then the sqrt table")
def reduce_l2_norm(ctx: Context, call: Call, x: Array) -> Array:
    """Root of the sum of squares."""
    return table_of("sqrt", reduce_sum_square(ctx, call, x))


@kernel("reduce_log_sum", "assumed", _SWEEP + "0.00091; sum, then the log table")
def reduce_log_sum(ctx: Context, call: Call, x: Array) -> Array:
    """Logarithm of the sum."""
    return table_of("log", _sum(x, **_over(call)))


@kernel("reduce_log_sum_exp", "assumed", _SWEEP + "0.00077; maximum subtracted, exp table, sum, log table")
def reduce_log_sum_exp(ctx: Context, call: Call, x: Array) -> Array:
    """Logarithm of the sum of exponentials."""
    over = _over(call)
    most = np.max(x, axis=over["axis"], keepdims=True)
    total = _sum(table_of("exp", rounded(x - most)), **over)
    return rounded(table_of("log", total) + most.reshape(total.shape))


@kernel(
    "reduce_prod", "assumed", "refused on the e5rt path (ANEForge sweep, M5); multiplied wide, rounded once"
)
def reduce_prod(ctx: Context, call: Call, x: Array) -> Array:
    """Product over `axes`."""
    return rounded(np.prod(x, dtype=np.float64, **_over(call)))


@kernel("reduce_max", "exact", "no arithmetic: ANEForge vocabulary sweep, relative error 0 on M5")
def reduce_max(ctx: Context, call: Call, x: Array) -> Array:
    """Largest element over `axes`."""
    return np.asarray(np.max(x, **_over(call)))


@kernel("reduce_min", "exact", "no arithmetic: ANEForge vocabulary sweep, relative error 0 on M5")
def reduce_min(ctx: Context, call: Call, x: Array) -> Array:
    """Smallest element over `axes`."""
    return np.asarray(np.min(x, **_over(call)))


@kernel(
    "softmax", "assumed", "ane-guide ch. 3: the maximum is subtracted; exp table, sum, inverse table, product"
)
def softmax(ctx: Context, call: Call, x: Array) -> Array:
    """exp(x) over its sum along one axis."""
    return softmax_over(x, call.integer("axis"))


def softmax_over(x: Array, axis: int) -> Array:
    """exp(x - maximum) times the inverse of its sum, along one axis; every step rounded."""
    shifted = rounded(x - np.max(x, axis=axis, keepdims=True))
    weights = table_of("exp", shifted)
    return rounded(weights * table_of("inverse", _sum(weights, axis=axis, keepdims=True)))
