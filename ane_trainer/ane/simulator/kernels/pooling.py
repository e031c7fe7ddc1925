"""Pooling on the pointwise unit, over explicitly padded images.

Averages and l2 sums are formed wide and rounded once; in fast mode the wide sum of an average is fp32. In a plan,
windows of few elements are one loop over the results, larger ones a fold over a view of every window.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.shapes import spatial_padding
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.kernels.convolution import windows, with_padding
from ane_trainer.ane.simulator.loops.compiled import Pass, Step, in_turn
from ane_trainer.ane.simulator.loops.convert import rounded, table_of
from ane_trainer.ane.simulator.numbers.fp16 import INF, empty
from ane_trainer.ane.simulator.registry import EngineContext, kernel, writes

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
def max_pool(ctx: EngineContext, call: Call, x: Array) -> Array:
    """The largest element of each window; padding never wins."""
    sizes, strides, pads = _padding(call, x)
    padded = _padded(x, pads, -float(INF))
    function = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)[len(sizes) - 1]
    result = function(torch.from_numpy(np.ascontiguousarray(padded)), sizes, strides).numpy()
    counts = call.op.infer(call)[0].shape[2:]
    return np.asarray(np.clip(result[(slice(None), slice(None), *(slice(n) for n in counts))], -INF, INF))


MOST_TAPS = 32
"""Elements of a window that one loop takes side by side: each is an array of the loop."""


@writes("max_pool")
def max_pool_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `max_pool`."""
    view, fill = _windows(ctx, call, x, -float(INF))
    work, out = Pass(ctx), outputs[0]
    if np.prod(view.shape[out.ndim :]) > MOST_TAPS:
        largest = work.fold("max", work.add("scale", work.load(view), value=1.0), _spread(out, view))
        return in_turn(*fill, largest)
    taps = [work.load(tap) for tap in _side_by_side(view)]
    value = work.add("scale", taps[0], value=1.0)
    for tap in taps[1:]:
        value = work.add("max", value, tap)
    return in_turn(*fill, work.store(value, out))


def _windows(ctx: EngineContext, call: Call, x: Array, fill: float) -> tuple[Array, list[Step]]:
    """A view `[N, C, *out, *kernel]` of every window of the padded image, and the step that pads it."""
    sizes, strides, pads = _padding(call, x)
    padded, step = with_padding(ctx, x, pads, fill)
    view = windows(padded, sizes, strides, (1,) * len(sizes))
    counts = call.op.infer(call)[0].shape[2:]
    return view[(slice(None), slice(None), *(slice(n) for n in counts))], [] if step is None else [step]


def _side_by_side(view: Array) -> list[Array]:
    """For each place in a window an array of the shape of the results."""
    kernel = view.shape[2 + (view.ndim - 2) // 2 :]
    return [view[(..., *place)] for place in np.ndindex(kernel)]


def _spread(out: Array, view: Array) -> Array:
    """The results as totals of a fold over the windows."""
    return out.reshape(*out.shape, *(1,) * (view.ndim - out.ndim))


@kernel(
    "avg_pool", "bounded", _SWEEP + "2.1e-4 on M5", "1 unit in the last place (summed wide, one rounding)"
)
def avg_pool(ctx: EngineContext, call: Call, x: Array) -> Array:
    """The sum over the window times 1, divided by its size, or by the elements inside the image."""
    return rounded(_wide_sum(_taps(call, x)) / _divisors(call, x))


@writes("avg_pool")
def avg_pool_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `avg_pool`."""
    out, divisors = outputs[0], _divisors(call, x)
    view, fill = _windows(ctx, call, x, 0.0)
    count, work, last = float(divisors.flat[0]), Pass(ctx), Pass(ctx)
    same, few = bool((divisors == count).all()), np.prod(view.shape[out.ndim :]) <= MOST_TAPS
    if same and not few:
        total = empty(out.shape, np.float32 if ctx.fast else np.float64)
        sums = work.fold("sum", work.load(view), _spread(total, view))
        return in_turn(*fill, sums, last.store(last.total(total, count), out))
    if not ctx.fast or not few:
        return lambda: np.copyto(out, avg_pool(ctx, call, x))
    taps = [work.load(tap) for tap in _side_by_side(view)]
    value, one = taps[0], work.number(1)
    for tap in taps[1:]:
        value = work.add("fma", value, tap, one)
    part = work.number(1 / count) if same else work.load((1 / divisors)[None, None])
    return in_turn(*fill, work.store(work.add("mul", value, part), out))


def _wide_sum(views: list[Array]) -> NDArray[np.float64]:
    total = np.zeros(views[0].shape, np.float64)
    for view in views:
        total += view
    return total


@kernel("l2_pool", "assumed", _SWEEP + "4.1e-4 on M5; sum of squares in fp16 range, then the sqrt table")
def l2_pool(ctx: EngineContext, call: Call, x: Array) -> Array:
    """The root of each window's sum of squares."""
    squares = [view.astype(np.float64) ** 2 for view in _taps(call, x)]
    return table_of("sqrt", rounded(_wide_sum(squares)))
