"""Pooling on the pointwise unit, over explicitly padded images.

Maxima come from the machine's pooling (no arithmetic, so no bit can differ). Averages and l2 sums are formed
wide and rounded once; in fast mode the wide sum is fp32.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.opset import Call
from ane_trainer.ane.opset.shapes import spatial_padding
from ane_trainer.ane.simulator.fp16 import INF
from ane_trainer.ane.simulator.registry import Context, kernel
from ane_trainer.ane.simulator.rounding import rounded, table_of

Array = NDArray[Any]

_SWEEP = "ANEForge vocabulary sweep: relative error "


def _padding(call: Call, x: Array) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, int]]]:
    """Window sizes, strides, and padding per spatial axis as far as the last window (of ceil_mode)
    reaches.
    """
    sizes = call.integers("kernel_sizes")
    strides = call.integers("strides") if call.has("strides") else (1,) * len(sizes)
    padding = spatial_padding(call, x.shape[2:], sizes, strides, (1,) * len(sizes))
    counts = call.op.infer(call)[0].shape[2:]
    rows = zip(x.shape[2:], sizes, strides, padding, counts, strict=True)
    pads = [(before, max(0, (count - 1) * s + k - size - before)) for size, k, s, (before, _), count in rows]
    return sizes, strides, pads


def _padded(x: Array, pads: list[tuple[int, int]], fill: float) -> Array:
    return np.pad(x, ((0, 0), (0, 0), *pads), constant_values=fill) if any(map(any, pads)) else x


def _taps(call: Call, x: Array) -> list[Array]:
    """One strided view of the zero-padded image per window position."""
    sizes, strides, pads = _padding(call, x)
    padded, counts = _padded(x, pads, 0.0), call.op.infer(call)[0].shape[2:]
    views = []
    for offset in product(*(range(k) for k in sizes)):
        where = (slice(o, o + (n - 1) * s + 1, s) for o, n, s in zip(offset, counts, strides, strict=True))
        views.append(padded[(slice(None), slice(None), *where)])
    return views


def _divisors(call: Call, x: Array) -> Array:
    """How many elements each window's sum is divided by."""
    sizes, strides, pads = _padding(call, x)
    counts, total = call.op.infer(call)[0].shape[2:], np.ones((), np.float32)
    exclude = call.flag("exclude_padding_from_average")
    for size, k, s, (before, _), count in zip(x.shape[2:], sizes, strides, pads, counts, strict=True):
        starts = np.arange(count) * s - before
        inside = np.minimum(starts + k, size) - np.maximum(starts, 0) if exclude else np.full(count, k)
        total = np.multiply.outer(total, np.maximum(inside, 1).astype(np.float32))
    return total


@kernel("max_pool", "exact", "no arithmetic: ANEForge vocabulary sweep, relative error 0 on M5")
def max_pool(ctx: Context, call: Call, x: Array) -> Array:
    """The largest element of each window; padding never wins."""
    sizes, strides, pads = _padding(call, x)
    padded = _padded(x, pads, -float(INF))
    function = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)[len(sizes) - 1]
    result = function(torch.from_numpy(np.ascontiguousarray(padded)), sizes, strides).numpy()
    counts = call.op.infer(call)[0].shape[2:]
    return np.asarray(np.minimum(result[(slice(None), slice(None), *(slice(n) for n in counts))], INF))


@kernel(
    "avg_pool", "bounded", _SWEEP + "2.1e-4 on M5", "1 unit in the last place (summed wide, one rounding)"
)
def avg_pool(ctx: Context, call: Call, x: Array) -> Array:
    """The sum over the window times 1, divided by its size, or by the elements inside the image."""
    if ctx.fast:
        sizes, strides, pads = _padding(call, x)
        padded = torch.from_numpy(np.ascontiguousarray(_padded(x, pads, 0.0)))
        function = (
            torch.nn.functional.avg_pool1d,
            torch.nn.functional.avg_pool2d,
            torch.nn.functional.avg_pool3d,
        )[len(sizes) - 1]
        mean = function(padded, sizes, strides).numpy()
        mean = mean[(slice(None), slice(None), *(slice(n) for n in call.op.infer(call)[0].shape[2:]))]
        if not call.flag("exclude_padding_from_average"):
            return rounded(mean)
        return rounded(mean * (np.float32(np.prod(sizes)) / _divisors(call, x)))
    return rounded(_wide_sum(_taps(call, x)) / _divisors(call, x))


def _wide_sum(views: list[Array]) -> NDArray[np.float64]:
    total = np.zeros(views[0].shape, np.float64)
    for view in views:
        total += view
    return total


@kernel("l2_pool", "assumed", _SWEEP + "4.1e-4 on M5; sum of squares in fp16 range, then the sqrt table")
def l2_pool(ctx: Context, call: Call, x: Array) -> Array:
    """The root of each window's sum of squares."""
    squares = [view.astype(np.float64) ** 2 for view in _taps(call, x)]
    return table_of("sqrt", rounded(_wide_sum(squares)))
