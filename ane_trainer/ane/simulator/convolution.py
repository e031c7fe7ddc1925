"""Convolution on the multiply-accumulate unit: windows gathered into rows, then one matrix product per group."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ane_trainer.ane.opset import Call
from ane_trainer.ane.opset.shapes import spatial_padding
from ane_trainer.ane.simulator.contraction import EVIDENCE, product_into
from ane_trainer.ane.simulator.registry import Context, kernel

Array = NDArray[Any]


@kernel("conv", "exact", EVIDENCE, "3x3 stride-1 on M5 and M6: assumed (hardware Winograd, rounding unknown)")
def conv(ctx: Context, call: Call, x: Array, weight: Array, bias: Array | None) -> Array:
    """x `[N, Cin, *spatial]`, weight `[Cout, Cin/groups, *kernel]`, bias `[Cout]` as the accumulator's start."""
    spatial = x.ndim - 2
    strides = call.integers("strides") if call.has("strides") else (1,) * spatial
    dilations = call.integers("dilations") if call.has("dilations") else (1,) * spatial
    groups = call.integer("groups")
    padding = spatial_padding(call, x.shape[2:], weight.shape[2:], strides, dilations)
    padded = np.pad(x, ((0, 0), (0, 0), *padding)) if any(map(any, padding)) else x
    taps = windows(padded, weight.shape[2:], strides, dilations)  # [N, Cin, *out, *kernel]
    n, extents = x.shape[0], taps.shape[2 : 2 + spatial]
    out_channels = weight.shape[0] // groups
    out = np.empty((groups, n * int(np.prod(extents)), out_channels), np.float32)
    for group in range(groups):
        channels = slice(group * weight.shape[1], (group + 1) * weight.shape[1])
        filters = weight[group * out_channels : (group + 1) * out_channels].reshape(out_channels, -1)
        rows = np.moveaxis(taps[:, channels], 1, 1 + spatial).reshape(out.shape[1], -1)
        start = None if bias is None else bias.reshape(-1)[group * out_channels : (group + 1) * out_channels]
        product_into(ctx, rows, filters.T, start, out[group])()
    result = out.reshape(groups, n, *extents, out_channels)
    result = np.moveaxis(np.moveaxis(result, -1, 1), 0, 1)  # [N, groups, Cout/groups, *out]
    return np.ascontiguousarray(result).reshape(n, weight.shape[0], *extents)


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
