"""Gradients whose decomposition in torch leaves fp16 on its way, in forms that stay in range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


def softplus_backward(gradient: torch.Tensor, x: torch.Tensor, beta: float, threshold: float) -> torch.Tensor:
    """`g * sigmoid(beta x)` instead of `g * exp(beta x) / (exp(beta x) + 1)`; g beyond the threshold."""
    scaled = x * beta
    return torch.where(scaled > threshold, gradient, gradient * torch.sigmoid(scaled))


DERIVATIVES: dict[Any, Callable[..., Any]] = {aten.softplus_backward.default: softplus_backward}
