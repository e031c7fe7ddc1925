"""Pooling on the pointwise unit: one pass per window tap."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.opset import Call
from ane_trainer.ane.opset.shapes import spatial_padding
from ane_trainer.ane.simulator.fp16 import INF, round_half_away
from ane_trainer.ane.simulator.registry import Context, kernel

Array = NDArray[Any]


def _taps(call: Call, x: Array, fill: float) -> tuple[list[Array], Array]:
    """One strided view per window position, and how many taps of each window lie inside the input."""
    sizes = call.integers("kernel_sizes")
    strides = call.integers("strides") if call.has("strides") else sizes
    padding = spatial_padding(call, x.shape[2:], sizes, strides, (1,) * len(sizes))
    (type_,) = call.op.infer(call)
    pads = []  # ceil_mode may look past the padded end: pad as far as the last window reaches
    for size, k, s, (before, after), count in zip(
        x.shape[2:], sizes, strides, padding, type_.shape[2:], strict=True
    ):
        pads.append((before, max(after, (count - 1) * s + k - size - before)))
    padded = np.pad(x, ((0, 0), (0, 0), *pads), constant_values=fill) if any(map(any, pads)) else x
    inside = np.pad(np.ones(x.shape[2:], np.float32), pads)
    views, counts = [], np.zeros(type_.shape[2:], np.float32)
    for offset in product(*(range(k) for k in sizes)):
        where = tuple(
            slice(o, o + (count - 1) * s + 1, s) for o, count, s in zip(offset, type_.shape[2:], strides, strict=True)
        )
        views.append(padded[(slice(None), slice(None), *where)])
        counts += inside[where]
    return views, counts


@kernel("max_pool", "exact", "no arithmetic: ANEForge vocabulary sweep, relative error 0 on M5")
def max_pool(ctx: Context, call: Call, x: Array) -> Array:
    views, _ = _taps(call, x, -float(INF))
    result = views[0].copy()
    for view in views[1:]:
        np.maximum(result, view, out=result)
    return result


@kernel("avg_pool", "bounded", "ANEForge vocabulary sweep: relative error 2.1e-4 on M5", "1 ulp (summed in fp32, one rounding)")
def avg_pool(ctx: Context, call: Call, x: Array) -> Array:
    views, counts = _taps(call, x, 0.0)
    total = np.zeros(views[0].shape, np.float64)
    for view in views:
        total += view
    taps = counts if call.flag("exclude_padding_from_average") else np.float32(len(views))
    return round_half_away(total / taps)


@kernel("l2_pool", "assumed", "ANEForge vocabulary sweep: relative error 4.1e-4 on M5; root of the sum of squares")
def l2_pool(ctx: Context, call: Call, x: Array) -> Array:
    views, _ = _taps(call, x, 0.0)
    total = np.zeros(views[0].shape, np.float64)
    for view in views:
        total += view.astype(np.float64) ** 2
    return round_half_away(np.sqrt(total))
