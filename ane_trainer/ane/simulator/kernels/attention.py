"""Scaled dot product attention: two products on the multiply-accumulate unit around a softmax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.simulator.kernels.contraction import product_into
from ane_trainer.ane.simulator.kernels.reduction import softmax_steps
from ane_trainer.ane.simulator.loops.compiled import Step, in_turn
from ane_trainer.ane.simulator.loops.passes import Pass
from ane_trainer.ane.simulator.memory.buffers import empty
from ane_trainer.ane.simulator.memory.fp16 import INF, round_half_away
from ane_trainer.ane.simulator.registry import Context, kernel, writes

Array = NDArray[Any]


@kernel(
    "scaled_dot_product_attention", "assumed",
    "ANEForge vocabulary sweep: relative error 2.7e-4 on M5; composed: product, scale, mask, softmax,"
    " product."
    " On the direct path the mask is ignored (Orion, maderix/ANE)",
)  # fmt: skip
def attention(ctx: Context, call: Call, query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """See `attention_into`."""
    out = np.empty((*query.shape[:-1], value.shape[-1]), np.float32)
    attention_into(ctx, call, [out], query, key, value, mask)()
    return out


@writes("scaled_dot_product_attention")
def attention_into(
    ctx: Context, call: Call, outputs: list[Array], query: Array, key: Array, value: Array, mask: Array | None
) -> Step:
    """query `[*B, L, E]`, key `[*B, S, E]`, value `[*B, S, V]`; a bool mask keeps, a float mask is added."""
    scores = empty((*query.shape[:-1], key.shape[-2]), np.float32)
    work = Pass(ctx)
    scale = work.add("const", value=float(round_half_away(1 / math.sqrt(query.shape[-1]))))
    score = work.add("mul", work.load(scores), scale)
    if mask is not None and ctx.path != "direct":
        added = work.load(mask.reshape((1,) * (scores.ndim - mask.ndim) + mask.shape))
        if mask.dtype == np.bool_:
            score = work.add("select", added, score, work.add("const", value=-float(INF)))
        else:
            score = work.add("add", score, added)
    return in_turn(
        product_into(ctx, query, key.swapaxes(-1, -2), None, scores),
        softmax_steps(ctx, work, score, scores.ndim - 1, scores),
        product_into(ctx, scores, value, None, outputs[0]),
    )
