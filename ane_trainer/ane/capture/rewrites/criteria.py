"""Losses, and functions of losses, whose ATen operations read values or have no pure backward: in plain terms."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

#: In place of minus infinity: its exponential is 0, and sums with it stay in fp16.
_LOWEST = -30000.0


def one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """`F.one_hot` without its look for labels that are too large; the number of classes must be given."""
    if num_classes < 0:
        num_classes = int(tensor.max()) + 1
    classes = torch.arange(num_classes, device=tensor.device)
    return (tensor.unsqueeze(-1) == classes).to(torch.int64)


def gaussian_nll(
    input: torch.Tensor,
    target: torch.Tensor,
    var: torch.Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> torch.Tensor:
    """`F.gaussian_nll_loss` without the look for negative variances: 0.5 (log v + (x - t)^2 / v)."""
    variance = var if isinstance(var, torch.Tensor) else torch.full_like(input, var)
    if variance.shape == input.shape[:-1] and variance.shape != input.shape:
        variance = variance.unsqueeze(-1)
    clamped = variance + (variance.clamp(min=eps) - variance).detach()
    loss = 0.5 * (torch.log(clamped) + (input - target) ** 2 / clamped)
    return _reduced(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


def logcumsumexp(input: torch.Tensor, dim: int) -> torch.Tensor:
    """`torch.logcumsumexp` as one `logsumexp` of a triangle: n x n numbers for an axis of n elements."""
    moved = input.movedim(dim, -1) if input.dim() else input.reshape(1)
    n = moved.shape[-1]
    kept = torch.ones(n, n, dtype=torch.bool, device=input.device).tril()
    result = torch.logsumexp(torch.where(kept, moved.unsqueeze(-2), _LOWEST), -1)
    return result.movedim(-1, dim) if input.dim() else result.reshape(())


def multi_margin(
    input: torch.Tensor,
    target: torch.Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """`F.multi_margin_loss`: the mean over the other classes of max(0, margin - x_y + x_i)^p."""
    scores, labels = (input, target) if input.dim() == 2 else (input.unsqueeze(0), target.reshape(1))
    picks = one_hot(labels, scores.shape[1]).to(scores.dtype)
    own = (scores * picks).sum(1, keepdim=True)
    excess = F.relu(margin - own + scores)
    excess = (excess if p == 1 else excess * excess) * (1.0 - picks)
    if weight is not None:
        excess = excess * (picks * weight).sum(1, keepdim=True)
    loss = excess.mean(1)
    return _reduced(loss if input.dim() == 2 else loss.reshape(()), reduction)


def multi_label_margin(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """`F.multilabel_margin_loss`: labels up to the first -1; max(0, 1 - (x_y - x_i)) over labels and others."""
    scores, labels = (input, target) if input.dim() == 2 else (input.unsqueeze(0), target.unsqueeze(0))
    classes = scores.shape[1]
    valid = torch.cumprod((labels >= 0).to(scores.dtype), 1)
    picks = (labels.unsqueeze(-1) == torch.arange(classes)).to(scores.dtype) * valid.unsqueeze(-1)
    others = 1.0 - picks.amax(1)
    own = (scores.unsqueeze(1) * picks).sum(-1, keepdim=True)
    excess = F.relu(1.0 - own + scores.unsqueeze(1)) * others.unsqueeze(1) * valid.unsqueeze(-1)
    loss = excess.sum((1, 2)) / classes
    return _reduced(loss if input.dim() == 2 else loss.reshape(()), reduction)


def _reduced(loss: torch.Tensor, reduction: str) -> torch.Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
