"""Depthwise convolution: each result is a sum of a few products of one channel, in a loop over the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.simulator.loops.passes import Pass
from ane_trainer.ane.simulator.registry import Context

Array = NDArray[Any]

MOST_TAPS = 32
"""Products a result may have: each is an array of the loop."""


def depthwise(
    ctx: Context, taps: Array, weight: Array, bias: Array | None, out: Array
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
