"""Convolution on the multiply-accumulate unit: windows gathered into columns, then matrix products.

Exact: the weight `[Cout, K]` times columns `[K, positions]` of each sample (K = channels x kernel,
ascending), in Q15.16 (`mac.py`). Fast: the machine's fp32 convolution, with the same overflow and output
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ane_trainer.ane.opset import Call
from ane_trainer.ane.opset.shapes import spatial_padding
from ane_trainer.ane.simulator.compiled import round_in_place
from ane_trainer.ane.simulator.contraction import EVIDENCE, as_tensor
from ane_trainer.ane.simulator.fp16 import INF
from ane_trainer.ane.simulator.mac import OVERFLOW, mac_bind
from ane_trainer.ane.simulator.registry import Context, kernel, writes
from ane_trainer.ane.simulator.rounding import rounded

Array = NDArray[Any]
Step = Callable[[], None]

WINOGRAD = "3x3 stride-1 on M5 and M6: assumed (the chip uses Winograd there, its rounding is unknown)"

_COLUMN_BYTES = 8 << 20  # of gathered columns at a time: they stay in the last-level cache
_FEW_POSITIONS = 192  # below this a sample alone fills the multiply-accumulate kernel's tiles badly


@dataclass(frozen=True)
class Geometry:
    """How windows move: per spatial axis stride, dilation and (before, after) padding; and the groups."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int


def geometry(call: Call, x: Array, weight: Array) -> Geometry:
    """A convolution call's geometry, defaults filled in."""
    ones = (1,) * (x.ndim - 2)
    strides = call.integers("strides") if call.has("strides") else ones
    dilations = call.integers("dilations") if call.has("dilations") else ones
    padding = spatial_padding(call, x.shape[2:], weight.shape[2:], strides, dilations)
    return Geometry(strides, dilations, padding, call.integer("groups"))


@kernel("conv", "exact", EVIDENCE + "; published 3x3 errors on M1, M1 Max, M4 reproduce", WINOGRAD)
def conv(ctx: Context, call: Call, x: Array, weight: Array, bias: Array | None) -> Array:
    """See `conv_into`."""
    out = np.empty(call.op.infer(call)[0].shape, np.float32)
    conv_into(ctx, call, [out], x, weight, bias)()
    return out


@writes("conv")
def conv_into(
    ctx: Context, call: Call, outputs: list[Array], x: Array, weight: Array, bias: Array | None
) -> Step:
    """x `[N, Cin, *spatial]`, weight `[Cout, Cin/groups, *kernel]`, bias `[Cout]` as the accumulator's
    start.
    """
    bias = None if bias is None else np.ascontiguousarray(bias).reshape(-1)
    return convolve_into(ctx, geometry(call, x, weight), x, weight, bias, outputs[0])


def convolve_into(
    ctx: Context, shape: Geometry, x: Array, weight: Array, bias: Array | None, out: Array
) -> Step:
    """A step that convolves what x then holds into `out`."""
    padded, fill = _padded(x, shape.padding)
    if ctx.fast:
        return _fast(ctx, shape, padded, fill, weight, bias, out)
    taps = windows(padded, weight.shape[2:], shape.strides, shape.dilations)
    filters, refilter = _matrix(weight)
    steps = [fill, refilter]
    for group in range(shape.groups):
        inputs = slice(group * weight.shape[1], (group + 1) * weight.shape[1])
        per_group = weight.shape[0] // shape.groups
        outputs = slice(group * per_group, (group + 1) * per_group)
        start = None if bias is None else bias[outputs, None]
        steps += _group_steps(ctx, taps[:, inputs], filters[outputs], start, out[:, outputs])
    chosen = [step for step in steps if step is not None]

    def run() -> None:
        for step in chosen:
            step()

    return run


def _padded(x: Array, padding: tuple[tuple[int, int], ...]) -> tuple[Array, Step | None]:
    """x with zeros around, and the step that brings in what x holds; x itself where there is no padding."""
    if not any(map(any, padding)):
        return x, None
    extents = [n + before + after for n, (before, after) in zip(x.shape[2:], padding, strict=True)]
    padded = np.zeros((*x.shape[:2], *extents), np.float32)
    places = [slice(b, b + n) for n, (b, _) in zip(x.shape[2:], padding, strict=True)]
    inside = padded[(slice(None), slice(None), *places)]
    return padded, lambda: np.copyto(inside, x)


def _matrix(weight: Array) -> tuple[Array, Step | None]:
    """The weight as `[Cout, K]`; a step copies it when no view does."""
    matrix = weight.reshape(weight.shape[0], -1)
    if np.may_share_memory(matrix, weight):
        return matrix, None
    shaped = matrix.reshape(weight.shape)
    return matrix, lambda: np.copyto(shaped, weight)


def _group_steps(ctx: Context, taps: Array, filters: Array, start: Array | None, out: Array) -> list[Step]:
    """The steps of one group, a few samples at a time. taps `[N, C, *out, *kernel]`, out `[N, Cout,
    *out]`.
    """
    spatial = (taps.ndim - 2) // 2
    order = (1, *range(2 + spatial, taps.ndim), 0, *range(2, 2 + spatial))
    columns = taps.transpose(order)  # [C, *kernel, N, *out]
    depth, positions = filters.shape[1], int(np.prod(out.shape[2:]))
    few = positions < _FEW_POSITIONS
    at_a_time = min(len(out), max(1, _COLUMN_BYTES // (4 * depth * positions)))
    steps: list[Step] = []
    for first in range(0, len(out), at_a_time):
        source = columns[(slice(None),) * (1 + spatial) + (slice(first, first + at_a_time),)]
        target = out[first : first + at_a_time]
        make = _joined_steps if few else _sample_steps
        steps += make(ctx, source, filters, start, target)
    return steps


def _sample_steps(ctx: Context, source: Array, filters: Array, start: Array | None, out: Array) -> list[Step]:
    """One product a sample: columns `[n, K, positions]`, results straight into `out`."""
    n, spatial = len(out), out.ndim - 2
    moved = np.moveaxis(source, 1 + spatial, 0)  # [n, C, *kernel, *out]
    flat = moved.reshape(n, filters.shape[1], -1)
    results = out.reshape(n, out.shape[1], -1)
    if not np.may_share_memory(results, out):
        return _joined_steps(ctx, source, filters, start, out)
    product = mac_bind(
        np.broadcast_to(filters, (n, *filters.shape)), flat, start, threads=ctx.threads, out=results
    )
    if np.may_share_memory(flat, source):
        return [product]
    shaped = flat.reshape(moved.shape)
    return [lambda: np.copyto(shaped, moved), product]


def _joined_steps(ctx: Context, source: Array, filters: Array, start: Array | None, out: Array) -> list[Step]:
    """One product for all samples: columns `[K, n * positions]`, results `[Cout, n * positions]` copied to
    `out`.
    """
    columns = np.empty(source.shape, np.float32)
    results = np.empty((out.shape[1], out.shape[0], *out.shape[2:]), np.float32)
    flat, into = columns.reshape(filters.shape[1], -1), results.reshape(len(results), -1)
    product = mac_bind(filters, flat, start, threads=ctx.threads, out=into)
    moved = results.swapaxes(0, 1)
    return [lambda: np.copyto(columns, source), product, lambda: np.copyto(out, moved)]


def _fast(
    ctx: Context,
    shape: Geometry,
    padded: Array,
    fill: Step | None,
    weight: Array,
    bias: Array | None,
    out: Array,
) -> Step:
    x, w, to = as_tensor(padded), as_tensor(weight), torch.from_numpy(out)
    b = None if bias is None else as_tensor(bias)
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[x.dim() - 3]
    finish = round_in_place(out, ctx.threads)

    def step() -> None:
        if fill is not None:
            fill()
        to.copy_(function(x, w, b, shape.strides, 0, shape.dilations, shape.groups))
        finish()

    return step


def windows(x: Array, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]) -> Array:
    """A view `[N, C, *out, *kernel]` of every window of `x` `[N, C, *spatial]`."""
    steps = x.strides[2:]
    extents = tuple(
        (size - (k - 1) * d - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    )
    moves = tuple(step * s for step, s in zip(steps, strides, strict=True))
    taps = tuple(step * d for step, d in zip(steps, dilations, strict=True))
    return as_strided(x, (*x.shape[:2], *extents, *kernel), (*x.strides[:2], *moves, *taps), writeable=False)


@kernel("conv_transpose", "exact", EVIDENCE + "; ANEForge vocabulary sweep: relative error 2.5e-4 on M5")
def conv_transpose(ctx: Context, call: Call, x: Array, weight: Array, bias: Array | None) -> Array:
    """x `[N, Cin, *spatial]`, weight `[Cin, Cout/groups, *kernel]`: x spread out by the strides, convolved
    with the mirrored weight. `pad` cuts the result, `output_shape` says where it ends.
    """
    extents = call.op.infer(call)[0].shape[2:]
    ones = (1,) * (x.ndim - 2)
    strides = call.integers("strides") if call.has("strides") else ones
    dilations = call.integers("dilations") if call.has("dilations") else ones
    before = _cut_before(call, x.shape[2:], weight.shape[2:], strides, dilations)
    if ctx.fast:
        return _fast_transpose(call, x, weight, bias, before)
    spread = np.zeros(
        (*x.shape[:2], *(s * (n - 1) + 1 for n, s in zip(x.shape[2:], strides, strict=True))), np.float32
    )
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    reach = [(k - 1) * d for k, d in zip(weight.shape[2:], dilations, strict=True)]
    for axis, (cut, span, extent) in enumerate(zip(before, reach, extents, strict=True), start=2):
        spread = _window(spread, axis, cut - span, extent + span)
    groups, out = call.integer("groups"), np.empty(call.op.infer(call)[0].shape, np.float32)
    mirrored = np.flip(weight, tuple(range(2, weight.ndim))).reshape(groups, -1, *weight.shape[1:])
    filters = np.ascontiguousarray(mirrored.swapaxes(1, 2)).reshape(out.shape[1], -1, *weight.shape[2:])
    shape = Geometry(ones, dilations, ((0, 0),) * len(ones), groups)
    bias = None if bias is None else np.ascontiguousarray(bias).reshape(-1)
    convolve_into(ctx, shape, spread, filters, bias, out)()
    return out


def _fast_transpose(
    call: Call, x: Array, weight: Array, bias: Array | None, before: tuple[int, ...]
) -> Array:
    """The machine's transposed convolution, cut or filled up with the bias to the result's extents."""
    (type_,) = call.op.infer(call)
    ones = (1,) * (x.ndim - 2)
    strides = call.integers("strides") if call.has("strides") else ones
    dilations = call.integers("dilations") if call.has("dilations") else ones
    functions = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
    image, filters = as_tensor(np.ascontiguousarray(x)), as_tensor(np.ascontiguousarray(weight))
    groups = call.integer("groups")
    full = functions[x.ndim - 3](image, filters, None, strides, 0, 0, groups, dilations).numpy()
    for axis, cut in enumerate(before, start=2):
        full = _window(full, axis, cut, type_.shape[axis])
    full = np.ascontiguousarray(full)
    if bias is not None:
        full += bias.reshape(1, -1, *ones)
    over = np.abs(full) >= OVERFLOW
    result = rounded(full)
    return np.where(over, np.copysign(INF, result), result) if over.any() else result


def _cut_before(
    call: Call,
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[int, ...]:
    """How many leading results of the full transposed convolution are cut, per spatial axis."""
    if call.text("pad_type") != "same":
        return tuple(before for before, _ in spatial_padding(call, sizes, kernel, strides, dilations))
    return tuple(max((k - 1) * d + 1 - s, 0) // 2 for k, s, d in zip(kernel, strides, dilations, strict=True))


def _window(x: Array, axis: int, first: int, extent: int) -> Array:
    """`extent` entries of an axis from `first` (which may be negative), zeros outside."""
    last = first + extent
    pads = [(0, 0)] * x.ndim
    pads[axis] = (max(-first, 0), max(last - x.shape[axis], 0))
    where = [slice(None)] * x.ndim
    where[axis] = slice(max(first, 0), max(first, 0) + extent)
    return np.pad(x, pads)[tuple(where)]
