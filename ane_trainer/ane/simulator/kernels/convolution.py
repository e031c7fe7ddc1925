"""Convolution on the multiply-accumulate unit: windows gathered into columns, then matrix products.

Exact: the weight `[Cout, K]` times columns `[K, positions]` of each sample (K = channels x kernel,
ascending), in Q15.16 (`mac/`); on chips that do so, 3x3 kernels by `winograd.py`'s operands. Fast: the
machine's fp32 convolution, with the same overflow and output rounding.

Depthwise, a result is a sum of a few products of one channel: a loop over the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.shapes import spatial_padding
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.kernels import winograd
from ane_trainer.ane.simulator.kernels.contraction import EVIDENCE, as_tensor, product_into
from ane_trainer.ane.simulator.loops.compiled import Pass, copies, in_turn, round_in_place, round_into
from ane_trainer.ane.simulator.mac.product import mac_bind
from ane_trainer.ane.simulator.numbers.fp16 import empty
from ane_trainer.ane.simulator.registry import EngineContext, kernel, writes

Step = Callable[[], None]

WINOGRAD = "3x3 stride-1 on M5 and M6: by Winograd; which shapes take it, and M6's rounding, are assumed"

_COLUMN_BYTES = 8 << 20  # of gathered columns at a time: they stay in the last-level cache
_FEW_POSITIONS = 192  # below this a sample alone fills the multiply-accumulate kernel's tiles badly


@dataclass(frozen=True)
class ConvGeometry:
    """How windows move: per spatial axis stride, dilation and (before, after) padding; and the groups."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int


def geometry(call: Call, x: Array, weight: Array) -> ConvGeometry:
    """A convolution call's geometry, defaults filled in."""
    ones = (1,) * (x.ndim - 2)
    strides = call.integers("strides") if call.has("strides") else ones
    dilations = call.integers("dilations") if call.has("dilations") else ones
    padding = spatial_padding(call, x.shape[2:], weight.shape[2:], strides, dilations)
    return ConvGeometry(strides, dilations, padding, call.integer("groups"))


@kernel("conv", "exact", EVIDENCE + "; published 3x3 errors on M1, M1 Max, M4, M5 Pro reproduce", WINOGRAD)
def conv(ctx: EngineContext, call: Call, x: Array, weight: Array, bias: Array | None) -> Array:
    """See `conv_into`."""
    out = np.empty(call.op.infer(call)[0].shape, np.float32)
    conv_into(ctx, call, [out], x, weight, bias)()
    return out


@writes("conv")
def conv_into(
    ctx: EngineContext, call: Call, outputs: list[Array], x: Array, weight: Array, bias: Array | None
) -> Step:
    """x `[N, Cin, *spatial]`, weight `[Cout, Cin/groups, *kernel]`, bias `[Cout]` as the accumulator's
    start.
    """
    bias = None if bias is None else np.ascontiguousarray(bias).reshape(-1)
    shape = geometry(call, x, weight)
    if not ctx.fast and winograd.eligible(
        ctx.chip, weight.shape[2:], shape.strides, shape.dilations, shape.groups
    ):
        return _by_winograd(ctx, shape, x, weight, bias, outputs[0])
    return convolve_into(ctx, shape, x, weight, bias, outputs[0])


def _by_winograd(
    ctx: EngineContext, shape: ConvGeometry, x: Array, weight: Array, bias: Array | None, out: Array
) -> Step:
    """Each pair of neighbouring columns of `out` as two convolutions of transformed operands."""
    padded, pad = with_padding(ctx, x, shape.padding)
    *operands, spread = winograd.columns(padded, out.shape[3])
    *kernels, transform = winograd.filters(weight)
    plain = ConvGeometry((1, 1), (1, 1), ((0, 0), (0, 0)), 1)
    halves = [np.empty((*out.shape[:3], operand.shape[3]), np.float32) for operand in operands]
    products = [
        convolve_into(ctx, plain, operand, kernel, bias, half)
        for operand, kernel, half in zip(operands, kernels, halves, strict=True)
    ]
    left, right = out[..., 0::2], out[..., 1::2]

    def join() -> None:
        np.copyto(left, halves[0])
        np.copyto(right, halves[1][..., : right.shape[3]])

    return in_turn(pad or (lambda: None), spread, transform, *products, join)


def convolve_into(
    ctx: EngineContext, shape: ConvGeometry, x: Array, weight: Array, bias: Array | None, out: Array
) -> Step:
    """A step that convolves what x then holds into `out`."""
    if shape.groups == x.shape[1] > 1:
        padded, fill = with_padding(ctx, x, shape.padding)
        taps = windows(padded, weight.shape[2:], shape.strides, shape.dilations)
        step = depthwise(ctx, taps, weight, bias, out)
        if step is not None:
            return step if fill is None else in_turn(fill, step)
    if ctx.fast:
        return _fast(ctx, shape, x, weight, bias, out)
    padded, fill = with_padding(ctx, x, shape.padding)
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


def with_padding(
    ctx: EngineContext, x: Array, padding: Sequence[tuple[int, int]], fill: float = 0.0
) -> tuple[Array, Step | None]:
    """x with `fill` around, and the step that brings in what x holds; x itself where there is no padding."""
    if not any(map(any, padding)):
        return x, None
    extents = [n + before + after for n, (before, after) in zip(x.shape[2:], padding, strict=True)]
    room = empty((*x.shape[:2], *extents))
    room[...] = fill
    places = [slice(b, b + n) for n, (b, _) in zip(x.shape[2:], padding, strict=True)]
    return room, copies([(room[(slice(None), slice(None), *places)], x)], ctx.threads)


def _matrix(weight: Array) -> tuple[Array, Step | None]:
    """The weight as `[Cout, K]`; a step copies it when no view does."""
    matrix = weight.reshape(weight.shape[0], -1)
    if np.may_share_memory(matrix, weight):
        return matrix, None
    shaped = matrix.reshape(weight.shape)
    return matrix, lambda: np.copyto(shaped, weight)


def _group_steps(
    ctx: EngineContext, taps: Array, filters: Array, start: Array | None, out: Array
) -> list[Step]:
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


def _sample_steps(
    ctx: EngineContext, source: Array, filters: Array, start: Array | None, out: Array
) -> list[Step]:
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


def _joined_steps(
    ctx: EngineContext, source: Array, filters: Array, start: Array | None, out: Array
) -> list[Step]:
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
    ctx: EngineContext, shape: ConvGeometry, x: Array, weight: Array, bias: Array | None, out: Array
) -> Step:
    """The machine's convolution, which pads by itself where both sides get the same; 1 x 1 kernels as a product."""
    if (
        weight.size == weight.shape[0] * x.shape[1]
        and set(shape.strides) == {1}
        and not any(map(any, shape.padding))
    ):
        flat = [v.reshape(*v.shape[:2], -1) for v in (x, out)]
        if all(np.may_share_memory(f, v) for f, v in zip(flat, (x, out), strict=True)):
            start = None if bias is None else bias[:, None]
            return product_into(ctx, weight.reshape(weight.shape[:2]), flat[0], start, flat[1])
    padding, fill = tuple(before for before, _ in shape.padding), None
    if any(before != after for before, after in shape.padding):
        padding, (x, fill) = (0,) * len(padding), with_padding(ctx, x, shape.padding)
    tx, tw, tb = as_tensor(x), as_tensor(weight), None if bias is None else as_tensor(bias)
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[x.ndim - 3]
    finish = finish_into(ctx, out)

    def step() -> None:
        if fill is not None:
            fill()
        finish(function(tx, tw, tb, shape.strides, padding, shape.dilations, shape.groups))

    return step


def finish_into(ctx: EngineContext, out: Array) -> Callable[[torch.Tensor], None]:
    """Rounds a tensor of raw accumulator values into `out`."""
    if not out.flags.c_contiguous:
        to, in_place = torch.from_numpy(out), round_in_place(out, ctx.threads)

        def finish(raw: torch.Tensor) -> None:
            to.copy_(raw)
            in_place()

        return finish
    read = round_into(out, ctx.threads)

    def take(raw: torch.Tensor) -> None:
        whole = raw.contiguous()  # alive until it has been read
        read(whole.data_ptr())

    return take


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


MOST_TAPS = 32
"""Products a result may have: each is an array of the loop."""


def depthwise(
    ctx: EngineContext, taps: Array, weight: Array, bias: Array | None, out: Array
) -> Callable[[], None] | None:
    """The step for windows `[N, C, *out, *kernel]`, weight `[C m, 1, *kernel]`, bias `[C m]` and out `[N, C m,
    *out]`; None where a loop does not pay.
    """
    (batch, channels), spatial = taps.shape[:2], out.shape[2:]
    kernel, ones = weight.shape[2:], (1,) * len(spatial)
    filters = weight.reshape(channels, -1, *kernel)
    results = out.reshape(batch, channels, -1, *spatial)
    views = np.may_share_memory(filters, weight) and np.may_share_memory(results, out)
    if not views or np.prod(kernel) > MOST_TAPS or taps.strides[1 + len(spatial)] != taps.itemsize:
        return None
    work = Pass(ctx)
    if bias is None:
        total = work.add("const", value=0.0)
    else:
        total = work.load(bias.reshape(1, channels, -1, *ones))
    total = total if ctx.fast else work.add("mac_start", total)
    for place in np.ndindex(*kernel):
        x = work.load(taps[(..., *place)][:, :, None])
        w = work.load(filters[(slice(None), slice(None), *place)].reshape(1, channels, -1, *ones))
        total = work.add("fma" if ctx.fast else "mac_add", total, x, w)
    return work.store(work.add("mac_round" if ctx.fast else "mac_end", total), results)
