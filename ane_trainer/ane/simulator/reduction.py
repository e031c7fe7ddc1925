"""Reductions and softmax on the pointwise unit.

The order of the engine's partial sums is not known (`facts`: ane-guide ch. 3 and M6 disagree); the simulator
sums in float64 and rounds once, half away from zero. Integers up to 2048 and the published 2049 -> 2050 come
out as on six chips (ANEForge numeric_cliffs).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.opset import Call
from ane_trainer.ane.opset.shapes import axes
from ane_trainer.ane.simulator.fp16 import round_half_away
from ane_trainer.ane.simulator.registry import Context, kernel
from ane_trainer.ane.simulator.tables import evaluate

Array = NDArray[Any]

_SUM = "ANEForge numeric_cliffs (integers to 2048, 2049 -> 2050 on six chips); order of partial sums unknown"


def _over(call: Call) -> dict[str, Any]:
    return {"axis": axes(call, "axes", call.type().rank), "keepdims": call.flag("keep_dims")}


@kernel("reduce_sum", "assumed", _SUM)
def reduce_sum(ctx: Context, call: Call, x: Array) -> Array:
    return round_half_away(np.sum(x, dtype=np.float64, **_over(call)))


@kernel("reduce_mean", "assumed", _SUM)
def reduce_mean(ctx: Context, call: Call, x: Array) -> Array:
    return round_half_away(np.mean(x, dtype=np.float64, **_over(call)))


@kernel("reduce_max", "exact", "no arithmetic: ANEForge vocabulary sweep, relative error 0 on M5")
def reduce_max(ctx: Context, call: Call, x: Array) -> Array:
    return np.asarray(np.max(x, **_over(call)))


@kernel("reduce_min", "exact", "no arithmetic: ANEForge vocabulary sweep, relative error 0 on M5")
def reduce_min(ctx: Context, call: Call, x: Array) -> Array:
    return np.asarray(np.min(x, **_over(call)))


@kernel("softmax", "assumed", "ane-guide ch. 3: the maximum is subtracted; exp table, sum, inverse table, product")
def softmax(ctx: Context, call: Call, x: Array) -> Array:
    axis = call.integer("axis")
    shifted = round_half_away(x - np.max(x, axis=axis, keepdims=True))
    weights = evaluate("exp", shifted)
    total = round_half_away(np.sum(weights, axis=axis, dtype=np.float64, keepdims=True))
    return round_half_away(weights * evaluate("inverse", total))
