"""Mixtures of experts as `transformers` computes them: rows sorted by expert, a matrix for each run of rows.

How many rows an expert gets depends on data, so every expert's matrix is multiplied with all rows here and the rows of
others are set to 0: as many products as experts, in fixed shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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


def decompositions() -> dict[Any, Callable[..., Any]]:
    """For the operations that the library registered so far."""
    library = getattr(torch.ops, _LIBRARY)
    found: dict[Any, Callable[..., Any]] = {}
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
