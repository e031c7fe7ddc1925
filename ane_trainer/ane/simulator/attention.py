"""Scaled dot product attention: two products on the multiply-accumulate unit around a softmax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.opset import Call
from ane_trainer.ane.simulator.contraction import product_into
from ane_trainer.ane.simulator.fp16 import INF, round_half_away
from ane_trainer.ane.simulator.reduction import softmax_over
from ane_trainer.ane.simulator.registry import Context, kernel
from ane_trainer.ane.simulator.rounding import rounded

Array = NDArray[Any]


@kernel(
    "scaled_dot_product_attention", "assumed",
    "ANEForge vocabulary sweep: relative error 2.7e-4 on M5; composed: product, scale, mask, softmax,"
    " product."
    " On the direct path the mask is ignored (Orion, maderix/ANE)",
)  # fmt: skip
def attention(ctx: Context, call: Call, query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """query `[*B, L, E]`, key `[*B, S, E]`, value `[*B, S, V]`; a bool mask keeps, a float mask is added."""
    scores = np.empty((*query.shape[:-1], key.shape[-2]), np.float32)
    product_into(ctx, query, key.swapaxes(-1, -2), None, scores)()
    scores = rounded(scores * round_half_away(1 / math.sqrt(query.shape[-1])))
    if mask is not None and ctx.path != "direct":
        added = rounded(scores + mask) if mask.dtype != np.bool_ else scores
        scores = added if mask.dtype != np.bool_ else np.where(mask, scores, -INF)
    out = np.empty((*query.shape[:-1], value.shape[-1]), np.float32)
    product_into(ctx, softmax_over(scores, -1), value, None, out)()
    return out
