"""Embedding bags and mixtures of experts, whose row counts depend on data, in fixed shapes.

`embedding_bag` becomes a look-up and a sum over each bag: a constant shape of bags, or one that offsets give.
Experts, as `transformers` computes them, get rows sorted by expert; here every expert's matrix is multiplied with all
rows, and the rows of others are set to 0: as many products as experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from ane_trainer.ane.capture.trace.torch_private import OperatorBase
from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.ane.mil.program import MAX_FP16

#: Stands for no row in the maximum over a bag.
_LOWEST = -MAX_FP16


def embedding_bag(
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """`F.embedding_bag`: rows [N, D] looked up, then summed, averaged or maximized over each bag [B, D].

    A bag without rows is 0. The gradient is dense.
    """
    rows = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    counted = torch.ones_like(input, dtype=rows.dtype)
    if padding_idx is not None:
        counted = (input != padding_idx % weight.shape[0]).to(rows.dtype)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(input.shape).unsqueeze(-1)
    if input.dim() == 2:
        return _of_rectangle(rows, counted, mode, padding_idx is not None)
    if offsets is None:
        fix = "Give offsets, or indices [bags, length]."
        raise UnsupportedModel(
            "The step needs:",
            [Finding("embedding_bag", "embedding_bag", "has one row of indices and no offsets.", fix)],
        )
    return _by_offsets(rows, counted, offsets, mode, include_last_offset)


def _of_rectangle(rows: torch.Tensor, counted: torch.Tensor, mode: str, padded: bool) -> torch.Tensor:
    """Bags of one length: rows [B, L, D], counted [B, L]."""
    if mode == "max":
        return _largest(rows, counted, 1) if padded else rows.amax(1)
    total = (rows * counted.unsqueeze(-1)).sum(1) if padded else rows.sum(1)
    if mode == "sum":
        return total
    return total / counted.sum(1, keepdim=True).clamp(min=1.0) if padded else rows.mean(1)


def _by_offsets(
    rows: torch.Tensor, counted: torch.Tensor, offsets: torch.Tensor, mode: str, last: bool
) -> torch.Tensor:
    """Bags that begin at `offsets`: a matrix [B, N] of which rows [N, D] belong to which bag."""
    places = torch.arange(rows.shape[0], device=rows.device)
    begins = offsets[:-1] if last else offsets
    ends = offsets[1:] if last else torch.cat([offsets[1:], offsets.new_full((1,), rows.shape[0])])
    inside = (places >= begins.unsqueeze(1)) & (places < ends.unsqueeze(1))
    member = inside.to(rows.dtype) * counted
    if mode == "max":
        bags = rows.unsqueeze(0).expand(member.shape[0], *rows.shape)
        return _largest(bags, member, 1)
    total = member @ rows
    return total if mode == "sum" else total / member.sum(1, keepdim=True).clamp(min=1.0)


def _largest(rows: torch.Tensor, counted: torch.Tensor, axis: int) -> torch.Tensor:
    """The maximum over the counted rows, 0 where there are none."""
    kept = torch.where(counted.unsqueeze(-1) > 0, rows, _LOWEST).amax(axis)
    return torch.where(counted.amax(axis).unsqueeze(-1) > 0, kept, 0.0)


_LIBRARY = "transformers"


def grouped_mm(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """input [S, K] in runs that end at `offs` [E], weight [E, K, N] -> [S, N]."""
    products = torch.matmul(input.unsqueeze(0), weight)
    return (products * _member(input, offs)).sum(0)


def grouped_mm_backward(
    input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input [S, K] and weight [E, K, N]."""
    own = grad_output.unsqueeze(0) * _member(input, offs)
    of_input = torch.matmul(own, weight.transpose(1, 2)).sum(0)
    return of_input, torch.matmul(input.t().unsqueeze(0), own)


def histc(input: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    """`torch.histc` with given bounds: how many numbers lie in each of `bins` equal parts of [min, max]."""
    if min == max:
        return torch.histc(input, bins, min, max)
    edges = torch.linspace(min, max, bins + 1)
    numbers = input.reshape(-1, 1)
    inside = (numbers >= edges[:-1]) & (numbers < edges[1:])
    counts = inside.to(input.dtype).sum(0)
    last = torch.arange(bins) == bins - 1
    return counts + ((input == max).to(input.dtype).sum() * last)


def decompositions() -> dict[OperatorBase, Callable[..., object]]:
    """For the operations that the library registered so far."""
    library = getattr(torch.ops, _LIBRARY)
    found: dict[OperatorBase, Callable[..., object]] = {}
    for name, function in (
        ("grouped_mm_fallback", grouped_mm),
        ("grouped_mm_fallback_backward", grouped_mm_backward),
    ):
        if hasattr(library, name):
            found[getattr(library, name).default] = function
    return found


def _member(input: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[E, S, 1]: 1 where the row belongs to the expert."""
    places = torch.arange(input.shape[0])
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    inside = (places >= starts.unsqueeze(1)) & (places < ends.unsqueeze(1))
    return inside.to(input.dtype).unsqueeze(-1)
