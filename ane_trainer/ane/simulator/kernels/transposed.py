"""Transposed convolution on the multiply-accumulate unit: one ordinary convolution per phase of the strides.

Result f of the full transposed convolution gets x[i] w[k] where i * stride + k * dilation = f. With dilation 1
the results of one remainder r of f by the stride need the taps r, r + stride, ... only: an ordinary convolution
of x with those taps mirrored. The products with the zeros between the elements of x, which the plain definition
adds, change no sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import torch

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.shapes import spatial_padding
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.kernels.contraction import EVIDENCE, as_tensor
from ane_trainer.ane.simulator.kernels.convolution import ConvGeometry, convolve_into, finish_into
from ane_trainer.ane.simulator.loops.compiled import in_turn
from ane_trainer.ane.simulator.numbers.fp16 import zeros
from ane_trainer.ane.simulator.registry import EngineContext, kernel, writes

Step = Callable[[], None]


@kernel("conv_transpose", "exact", EVIDENCE + "; ANEForge vocabulary sweep: relative error 2.5e-4 on M5")
def conv_transpose(ctx: EngineContext, call: Call, x: Array, weight: Array, bias: Array | None) -> Array:
    """See `conv_transpose_into`."""
    out = np.empty(call.op.infer(call)[0].shape, np.float32)
    conv_transpose_into(ctx, call, [out], x, weight, bias)()
    return out


@writes("conv_transpose")
def conv_transpose_into(
    ctx: EngineContext, call: Call, outputs: list[Array], x: Array, weight: Array, bias: Array | None
) -> Step:
    """x `[N, Cin, *spatial]`, weight `[Cin, Cout/groups, *kernel]`, bias `[Cout]`. `pad` cuts the result,
    `output_shape` says where it ends.
    """
    ones, out = (1,) * (x.ndim - 2), outputs[0]
    strides = call.integers("strides") if call.has("strides") else ones
    dilations = call.integers("dilations") if call.has("dilations") else ones
    cut = _cut_before(call, x.shape[2:], weight.shape[2:], strides, dilations)
    bias = None if bias is None else np.ascontiguousarray(bias).reshape(-1)
    groups = call.integer("groups")
    if ctx.fast:
        step = _fast(ctx, (strides, dilations, cut, groups), x, weight, bias, out)
        if step is not None:
            return step
    if any(s > 1 and d > 1 for s, d in zip(strides, dilations, strict=True)):
        x, spread = _spread(x, strides)
        return in_turn(spread, *_phases(ctx, (ones, dilations, cut, groups), x, weight, bias, out))
    return in_turn(*_phases(ctx, (strides, dilations, cut, groups), x, weight, bias, out))


_Moves = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # strides, dilations, cut, groups


def _fast(
    ctx: EngineContext, moves: _Moves, x: Array, weight: Array, bias: Array | None, out: Array
) -> Step | None:
    """The machine's transposed convolution, where it can cut as the op does."""
    strides, dilations, cut, groups = moves
    full = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(x.shape[2:], strides, weight.shape[2:], dilations, strict=True)
    ]
    more = tuple(extent - (n - 2 * c) for extent, n, c in zip(out.shape[2:], full, cut, strict=True))
    if any(not 0 <= m < max(s, d) for m, s, d in zip(more, strides, dilations, strict=True)):
        return None
    function = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[x.ndim - 3]
    tx, tw, tb = as_tensor(x), as_tensor(weight), None if bias is None else as_tensor(bias)
    finish = finish_into(ctx, out)
    return lambda: finish(function(tx, tw, tb, strides, cut, more, groups, dilations))


def _spread(x: Array, strides: tuple[int, ...]) -> tuple[Array, Step]:
    """x with `stride - 1` zeros between its elements, and the step that brings in what x holds."""
    extents = [s * (n - 1) + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
    spread = zeros((*x.shape[:2], *extents), np.float32)
    places = spread[(slice(None), slice(None), *(slice(None, None, s) for s in strides))]
    return spread, lambda: np.copyto(places, x)


def _phases(
    ctx: EngineContext, moves: _Moves, x: Array, weight: Array, bias: Array | None, out: Array
) -> Iterator[Step]:
    """The steps: per combination of remainders one convolution into every stride-th result."""
    strides, dilations, cut, groups = moves
    ones = (1,) * len(strides)
    for starts in product(*map(range, strides)):
        target = out[
            (slice(None), slice(None), *(slice(o, None, s) for o, s in zip(starts, strides, strict=True)))
        ]
        if target.size == 0:
            continue
        at = [o + c for o, c in zip(starts, cut, strict=True)]  # in the full result
        remainders = [f % s for f, s in zip(at, strides, strict=True)]
        filters, take = _taps(weight, remainders, strides, groups)
        reach = [(k - 1) * d for k, d in zip(filters.shape[2:], dilations, strict=True)]
        firsts = [f // s - r for f, s, r in zip(at, strides, reach, strict=True)]
        window, fill = _window(x, firsts, [n + r for n, r in zip(target.shape[2:], reach, strict=True)])
        shape = ConvGeometry(ones, dilations, ((0, 0),) * len(ones), groups)
        yield in_turn(take, fill, convolve_into(ctx, shape, window, filters, bias, target))


def _taps(weight: Array, remainders: list[int], strides: tuple[int, ...], groups: int) -> tuple[Array, Step]:
    """The taps r, r + stride, ... mirrored, as a convolution's weight `[Cout, Cin/groups, *taps]`, and the step
    that takes them from `weight`; a zero where there is none.
    """
    chosen = weight[
        (slice(None), slice(None), *(slice(r, None, s) for r, s in zip(remainders, strides, strict=True)))
    ]
    mirrored = np.flip(chosen, tuple(range(2, weight.ndim)))
    split = (groups, len(weight) // groups, *chosen.shape[1:])
    counts = (max(1, n) for n in chosen.shape[2:])
    taps = np.zeros((groups, split[2], split[1], *counts), np.float32)

    def take() -> None:
        if mirrored.size:
            np.copyto(taps, mirrored.reshape(split).swapaxes(1, 2))

    return taps.reshape(-1, *taps.shape[2:]), take


def _window(x: Array, firsts: list[int], extents: list[int]) -> tuple[Array, Step]:
    """`extents` elements per spatial axis from `firsts` (which may be negative), zeros outside x; and the step
    that brings in what x holds.
    """
    window = zeros((*x.shape[:2], *extents), np.float32)
    inside, source = [slice(None)] * 2, [slice(None)] * 2
    for first, extent, size in zip(firsts, extents, x.shape[2:], strict=True):
        low, high = max(first, 0), max(min(first + extent, size), 0)
        source.append(slice(low, max(low, high)))
        inside.append(slice(low - first, max(low, high) - first))
    to, values = window[tuple(inside)], x[tuple(source)]
    return window, lambda: np.copyto(to, values)


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
