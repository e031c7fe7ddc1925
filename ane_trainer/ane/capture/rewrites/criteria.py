"""Losses, and functions of losses, whose ATen operations read values or have no pure backward, in plain operations.

Connectionist temporal classification is the forward recursion over time, normalized: the score of being at place s
of the label sequence with blanks after step t is relative to the sum over all places, so that it stays near 0 and
fp16 holds it; the sums' logarithms add up to the loss. Places that no path reaches are at LOWEST.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from ane_trainer.ane.errors import Finding, UnsupportedModel

#: In place of minus infinity: its exponential is 0, differences from it are exact enough, sums of two stay negative.
LOWEST = -30000.0


def one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """`F.one_hot` without its look for labels that are too large; the number of classes must be given.

    The classes are counted down and turned round: by that lowering knows them, and refuses other labels.
    """
    if num_classes < 0:
        num_classes = int(tensor.max()) + 1
    classes = torch.arange(num_classes - 1, -1, -1, device=tensor.device).flip(0)
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
    return reduced(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


def logcumsumexp(input: torch.Tensor, dim: int) -> torch.Tensor:
    """`torch.logcumsumexp` as one `logsumexp` of a triangle: n x n numbers for an axis of n elements."""
    moved = input.movedim(dim, -1) if input.dim() else input.reshape(1)
    n = moved.shape[-1]
    kept = torch.ones(n, n, dtype=torch.bool, device=input.device).tril()
    result = torch.logsumexp(torch.where(kept, moved.unsqueeze(-2), LOWEST), -1)
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
    return reduced(loss if input.dim() == 2 else loss.reshape(()), reduction)


def soft_margin(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """`F.soft_margin_loss`, log(1 + exp(-y x)), as a softplus: the exponential leaves fp16 from 11 on."""
    return reduced(F.softplus(-target * input), reduction)


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
    return reduced(loss if input.dim() == 2 else loss.reshape(()), reduction)


def reduced(loss: torch.Tensor, reduction: str) -> torch.Tensor:
    """A loss of elements as `reduction` has it."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def ctc_loss(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: object,
    target_lengths: object,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> torch.Tensor:
    """`F.ctc_loss` of log_probs [T, N, C] (or [T, C]) and padded targets [N, S] (or [S]).

    Its gradient is the true one with respect to `log_probs`; behind `log_softmax` it is PyTorch's.
    Raises: UnsupportedModel for targets that are concatenated.
    """
    single = log_probs.dim() == 2
    if single:
        log_probs, targets = log_probs.unsqueeze(1), targets.unsqueeze(0)
    if targets.dim() == 1:
        finding = Finding(
            "ctc_loss", "ctc_loss", "needs padded targets [N, S]; got concatenated ones [sum of the lengths].",
            "Pad the targets to one length; target_lengths says how many count.",
        )  # fmt: skip
        raise UnsupportedModel("The step needs fixed shapes:", [finding])
    frames = torch.as_tensor(input_lengths).reshape(-1)
    counts = torch.as_tensor(target_lengths).reshape(-1)
    loss = -_log_likelihood(log_probs, targets, frames, counts, blank)
    if zero_infinity:
        loss = torch.where(loss > -0.5 * LOWEST, 0.0, loss)
    if reduction == "mean":
        return (loss / counts.clamp(min=1).to(loss.dtype)).mean()
    if reduction == "sum":
        return loss.sum()
    return loss.reshape(()) if single else loss


def _log_likelihood(
    log_probs: torch.Tensor, targets: torch.Tensor, frames: torch.Tensor, counts: torch.Tensor, blank: int
) -> torch.Tensor:
    """[N]: the logarithm of the summed probability of all paths."""
    size, rows = targets.shape[1], targets.shape[0]
    blanks = torch.full_like(targets, blank)
    labels = torch.cat([torch.stack([blanks, targets], 2).flatten(1), blanks[:, :1]], 1)  # [N, 2S+1]
    places = torch.arange(2 * size + 1)
    used = places < (2 * counts + 1).unsqueeze(1)
    picks = (labels.unsqueeze(2) == torch.arange(log_probs.shape[2])).to(log_probs.dtype)
    emitted = torch.matmul(log_probs.transpose(0, 1), picks.transpose(1, 2))  # [N, T, 2S+1]
    emitted = torch.where(used.unsqueeze(1), emitted, LOWEST)
    leaps = torch.zeros(rows, 2 * size + 1, dtype=torch.bool)
    if size > 1:
        leaps = torch.cat([leaps[:, :2], (labels[:, 2:] != labels[:, :-2]) & (labels[:, 2:] != blank)], 1)
    score = torch.where(places < 2, emitted[:, 0], LOWEST)
    score, total = _normalized(score)
    for t in range(1, log_probs.shape[0]):
        before = _shifted(score, 1)
        leap = torch.where(leaps, _shifted(score, 2), LOWEST) if size > 1 else before
        new = _log_sum(score, before, leap if size > 1 else None) + emitted[:, t]
        new, share = _normalized(new)
        running = (frames > t).unsqueeze(1)
        score = torch.where(running, new, score)
        total = total + torch.where(running, share, 0.0)
    last = (places == (2 * counts).unsqueeze(1)) | (places == (2 * counts - 1).unsqueeze(1))
    return total.squeeze(1) + torch.logsumexp(torch.where(last, score, LOWEST), 1)


def _shifted(score: torch.Tensor, places: int) -> torch.Tensor:
    """The score `places` before."""
    return torch.nn.functional.pad(score[:, :-places], (places, 0), value=LOWEST)


def _log_sum(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
    """log(exp(a) + exp(b) + exp(c))."""
    peak = torch.maximum(a, b) if c is None else torch.maximum(torch.maximum(a, b), c)
    peak = peak.detach()
    total = torch.exp(a - peak) + torch.exp(b - peak)
    return torch.log(total if c is None else total + torch.exp(c - peak)) + peak


def _normalized(score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(score minus the logarithm of its sum, that logarithm [N, 1])."""
    share = torch.logsumexp(score, 1, keepdim=True)
    return score - share, share
