"""torch functions that draw dropout masks inside: the same functions with the draws visible to a mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


def gumbel_softmax(
    logits: torch.Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> torch.Tensor:
    """`F.gumbel_softmax`: softmax of (logits + noise) / tau; `hard`: one-hot, with the soft one's gradient."""
    noise = -torch.empty_like(logits, memory_format=torch.legacy_contiguous_format).exponential_().log()
    soft = ((logits + noise) / tau).softmax(dim)
    if not hard:
        return soft
    index = soft.max(dim, keepdim=True)[1]
    zeros = torch.zeros_like(logits, memory_format=torch.legacy_contiguous_format)
    return zeros.scatter_(dim, index, 1.0) - soft.detach() + soft


def multi_head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: torch.Tensor | None,
    in_proj_bias: torch.Tensor | None,
    bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    training: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: torch.Tensor | None = None,
    k_proj_weight: torch.Tensor | None = None,
    v_proj_weight: torch.Tensor | None = None,
    static_k: torch.Tensor | None = None,
    static_v: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`F.multi_head_attention_forward` [L, N, E] (or [L, E]) in operations that a mode sees."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    is_causal = is_causal and key_padding_mask is None
    attn_mask = None if is_causal and not need_weights else attn_mask
    padding, mask = _additive(key_padding_mask, query.dtype), _additive(attn_mask, query.dtype)
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    q, k, v = _projected((query, key, value), separate, in_proj_weight, in_proj_bias)
    mask = mask.unsqueeze(0) if mask is not None and mask.dim() == 2 else mask
    length, batch, width = query.shape
    more = 0
    if bias_k is not None and bias_v is not None:
        k, v, more = torch.cat([k, bias_k.repeat(1, batch, 1)]), torch.cat([v, bias_v.repeat(1, batch, 1)]), 1
    q, k, v = (x.view(x.shape[0], batch * num_heads, width // num_heads).transpose(0, 1) for x in (q, k, v))
    k, v = (x if static is None else static for x, static in ((k, static_k), (v, static_v)))
    if add_zero_attn:
        zeros = (batch * num_heads, 1, width // num_heads)
        k, v = (torch.cat([x, torch.zeros(zeros, dtype=x.dtype)], dim=1) for x in (k, v))
        more += 1
    for _ in range(more):
        mask, padding = (None if m is None else F.pad(m, (0, 1)) for m in (mask, padding))
    mask = _both(mask, padding, num_heads)
    options = mask, dropout_p if training else 0.0, (length, batch, num_heads)
    seen, weights = (
        _weighted(q, k, v, *options) if need_weights else (_fused(q, k, v, *options, is_causal), None)
    )
    result = F.linear(seen, out_proj_weight, out_proj_bias).view(length, batch, -1)
    if weights is not None:
        weights = weights.view(batch, num_heads, length, k.shape[1])
        weights = _averaged(weights, average_attn_weights, batched)
    return (result if batched else result.squeeze(1)), weights


def _averaged(weights: torch.Tensor, average: bool, batched: bool) -> torch.Tensor:
    """Weights [N, heads, L, S], averaged over heads where asked for, without N where there was none."""
    weights = weights.mean(dim=1) if average else weights
    return weights if batched else weights.squeeze(0)


def _both(mask: torch.Tensor | None, padding: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """The sum of two additive masks: one of [L, S] or [N * heads, L, S], one of [N, S] for the keys."""
    if padding is None:
        return mask
    batch, keys = padding.shape
    padding = padding.view(batch, 1, 1, keys).expand(-1, heads, -1, -1)
    padding = padding.reshape(batch * heads, 1, keys)
    return padding if mask is None else mask + padding


def _projected(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    separate: tuple[torch.Tensor | None, ...] | None,
    joined: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values by three weights, or by one that holds all three."""
    if separate is None:
        assert joined is not None
        return tuple(_projections(*inputs, joined, bias))
    biases = (None, None, None) if bias is None else bias.chunk(3)
    parts: Any = zip(inputs, separate, biases, strict=True)
    return tuple(F.linear(x, weight, b) for x, weight, b in parts)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask of what is left out as one that is added: minus infinity there."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _projections(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> Sequence[torch.Tensor]:
    """Query, key and value by one weight [3 E, E]; those of the same tensor in one product."""
    if key is not value:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        parts = zip((query, key, value), weight.chunk(3), biases, strict=True)
        return [F.linear(x, w, b) for x, w, b in parts]
    if query is key:
        return _several(query, weight, bias, 3)
    width = query.shape[-1]
    w_query, w_both = torch.split(weight, [width, width * 2])
    b_query, b_both = (None, None) if bias is None else torch.split(bias, [width, width * 2])
    return [F.linear(query, w_query, b_query), *_several(key, w_both, b_both, 2)]


def _several(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: int
) -> list[torch.Tensor]:
    product = torch.unflatten(F.linear(x, weight, bias), -1, (count, x.shape[-1]))
    product = product.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return [product[number] for number in range(count)]


def _weighted(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    shape: tuple[int, int, int],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(attention [L N, E], its weights [N heads, L, S]) of q, k, v [N heads, L, E / heads]."""
    scaled, across = q * math.sqrt(1.0 / q.shape[-1]), k.transpose(-2, -1)
    scores = torch.bmm(scaled, across) if mask is None else torch.baddbmm(mask, scaled, across)
    weights = torch.softmax(scores, -1)
    weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
    return torch.bmm(weights, v).transpose(0, 1).reshape(shape[0] * shape[1], -1), weights


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    shape: tuple[int, int, int], is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    """[N L, E], by `attention`."""
    length, batch, heads = shape
    if mask is not None:
        one = mask.shape[0] == 1 and mask.dim() == 3
        mask = mask.unsqueeze(0) if one else mask.view(batch, heads, -1, k.shape[1])
    q, k, v = (x.view(batch, heads, x.shape[1], x.shape[2]) for x in (q, k, v))
    seen = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    return seen.permute(2, 0, 1, 3).reshape(batch * length, -1)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    lowest: float = -math.inf,
) -> torch.Tensor:
    """`scaled_dot_product_attention` in plain operations: softmax(q k^T * scale + mask), dropout, times v.

    A finite `lowest` score keeps rows that see nothing from nan where PyTorch computes this.
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, lowest)
    elif attn_mask is not None:
        scores = scores + (attn_mask if lowest == -math.inf else attn_mask.clamp(min=lowest))
    weights = torch.softmax(scores, -1)
    if attn_mask is not None and not is_causal:  # a row that sees nothing gives 0
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf
        weights = weights * seen.any(-1, keepdim=True).to(weights.dtype)
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


#: Written in Python over other torch functions, of which a mode sees only the outermost call: the same, seen inside.
#: torch's numbers for ways to compute distances.
_MODES = {"use_mm_for_euclid_dist": 1, "donot_use_mm_for_euclid_dist": 2}
#: Up to this many differences of coordinates distances are made of them.
_MOST_DIFFERENCES = 1 << 21


def cdist(
    x1: torch.Tensor, x2: torch.Tensor, p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> torch.Tensor:  # fmt: skip
    """`torch.cdist`; Euclidean distances of many rows are norms of differences, too, or of what is near 0.

    torch takes `a^2 + b^2 - 2ab` there, of which eleven bits leave nothing where rows are nearer than they are long.
    """
    rows = math.prod(x1.shape[:-1]) * x2.shape[-2]
    if p == 2.0 and rows * x1.shape[-1] <= _MOST_DIFFERENCES:
        compute_mode = "donot_use_mm_for_euclid_dist"
    elif p == 2.0 and x2.numel():
        middle = x2.detach().mean(-2, keepdim=True)
        x1, x2 = x1 - middle, x2 - middle
    result: torch.Tensor = torch.ops.aten.cdist.default(x1, x2, p, _MODES.get(compute_mode))
    return result


COMPOSITES: dict[Callable[..., object], Callable[..., object]] = {
    F.multi_head_attention_forward: multi_head_attention,
    F.gumbel_softmax: gumbel_softmax,
    F.scaled_dot_product_attention: attention,
    torch.cdist: cdist,
}
