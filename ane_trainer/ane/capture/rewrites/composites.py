"""torch functions that draw dropout masks inside: the same functions with the draws visible to a mode."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

#: Written in Python over other torch functions; a mode sees only the outermost call.
COMPOSITES = frozenset(
    {
        F.multi_head_attention_forward, F.gumbel_softmax,
    }
)  # fmt: skip
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


@functools.cache
def inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function's body without its hand-over to modes, so that a mode sees the calls it makes."""
    assert isinstance(function, types.FunctionType)
    scope = {
        **function.__globals__, "has_torch_function": lambda *_: False,
        "has_torch_function_unary": lambda *_: False, "has_torch_function_variadic": lambda *_: False,
    }  # fmt: skip
    result = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    result.__kwdefaults__ = function.__kwdefaults__
    return result


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` in plain operations: softmax(q k^T * scale + mask), dropout, times v."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.softmax(scores, -1)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value


def drops(*args: Any) -> bool:
    """Whether a call of a recurrent layer (not on packed sequences) has dropout between its layers."""
    return isinstance(args[3], bool) and bool(args[5] and args[6] and args[4] > 1)


def recurrent(
    func: Callable[..., Any],
    x: torch.Tensor,
    start: Any,
    weights: list[torch.Tensor],
    bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """An RNN layer by layer, with dropout between the layers."""
    several = isinstance(start, (tuple, list))
    states = list(start) if several else [start]
    rows, each, ends = 2 if bidirectional else 1, len(weights) // layers, []
    for layer in range(layers):
        here = [s[layer * rows : (layer + 1) * rows] for s in states]
        own = weights[layer * each : (layer + 1) * each]
        first = here if several else here[0]
        x, *end = func(x, first, own, bias, 1, 0.0, training, bidirectional, batch_first)
        ends.append(end)
        if layer < layers - 1:
            x = F.dropout(x, dropout)
    return (x, *(torch.cat(parts) for parts in zip(*ends, strict=True)))
