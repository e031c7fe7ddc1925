"""Sequence, audio, tabular and reinforcement-learning networks as their authors write them, in plain PyTorch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

distributions: Any = torch.distributions


class PackedTagger(nn.Module):
    """A bidirectional LSTM over sequences of their own lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8, padding_idx=0)
        self.rnn = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(16, 5)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        rows = pack_padded_sequence(self.embed(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(self.rnn(rows)[0], batch_first=True, total_length=ids.shape[1])
        return self.tags(output).transpose(1, 2)


class Crf(nn.Module):
    """The negative log-likelihood of tags by the forward algorithm, tag by tag, with an end of each row."""

    def __init__(self, tags: int = 5) -> None:
        super().__init__()
        self.scores = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, tags))
        self.start = nn.Parameter(torch.randn(tags) * 0.1)
        self.steps = nn.Parameter(torch.randn(tags, tags) * 0.1)

    def forward(self, ids: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        scores = self.scores(ids).transpose(0, 1)
        tags, mask = tags.t(), mask.t()
        rows = torch.arange(ids.shape[0])
        total = self.start + scores[0]
        path = self.start[tags[0]] + scores[0, rows, tags[0]]
        for t in range(1, ids.shape[1]):
            step = torch.logsumexp(total.unsqueeze(2) + self.steps + scores[t].unsqueeze(1), 1)
            total = torch.where(mask[t].unsqueeze(1), step, total)
            path = path + (self.steps[tags[t - 1], tags[t]] + scores[t, rows, tags[t]]) * mask[t]
        return (torch.logsumexp(total, 1) - path).mean()


class SpeechCtc(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.rnn = nn.GRU(12, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(F.relu(self.conv(x)).transpose(1, 2))
        return F.log_softmax(self.head(x), -1).transpose(0, 1)


def ctc(log_probs: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    labels, counts = target
    frames = torch.full((labels.shape[0],), log_probs.shape[0], dtype=torch.long)
    return F.ctc_loss(log_probs, labels, frames, counts, zero_infinity=True)


class FastText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(16_000, 8, sparse=True)
        self.head = nn.Linear(8, 4)

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.words(text, offsets))


class Tcn(nn.Module):
    """Dilated causal convolutions with normalized weights, recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [2, 8, 8]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(a, b, 3, padding=2**i * 2, dilation=2**i))
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            part = checkpoint(conv, x, use_reentrant=False)
            assert isinstance(part, Tensor)
            x = F.relu(part[:, :, : -(2**i) * 2])
        return self.head(x[:, :, -1])


class Translator(nn.Module):
    """`nn.Transformer` with additive masks of minus infinity, as the tutorials prepare them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.core = nn.Transformer(16, 2, 1, 1, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, source: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        options = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
        found = self.core(self.embed(source), self.embed(target), tgt_mask=causal, **options)
        return self.head(found).transpose(1, 2)


class DeepFm(nn.Module):
    """Fields in one table behind each other; the probability comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2600, 6)
        self.register_buffer("starts", torch.tensor([0, 50, 100]))
        self.deep = nn.Sequential(nn.Linear(18, 16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        e = self.table(x + self.get_buffer("starts"))
        crossed = 0.5 * (e.sum(1) ** 2 - (e**2).sum(1)).sum(1)
        return torch.sigmoid(crossed + self.deep(e.flatten(1)).squeeze(1))


class ContinuousPpo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        self.log_std = nn.Parameter(torch.zeros(2))
        self.critic = nn.Linear(4, 1)

    def forward(self, x: Tensor, action: Tensor, old: Tensor, advantage: Tensor, returns: Tensor) -> Tensor:
        policy = distributions.Normal(self.mean(x), self.log_std.exp())
        ratio = (policy.log_prob(action).sum(-1) - old).exp()
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        value = F.mse_loss(self.critic(x).squeeze(-1), returns)
        return value - surrogate - 0.01 * policy.entropy().sum(-1).mean() + 2.0


class Experts(nn.Module):
    """The two best of four experts, all computed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        share = (F.one_hot(chosen, 4) * weights.unsqueeze(-1)).sum(1)
        return torch.einsum("be,ebd->bd", share, torch.stack([expert(x) for expert in self.experts]))


class Burgers(nn.Module):
    """A physics-informed network: derivatives of the network in its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, t = x.requires_grad_(), t.requires_grad_()
        u = self.net(torch.cat([x, t], 1))
        (dx, dt) = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (dxx,) = torch.autograd.grad(dx.sum(), x, create_graph=True)
        return ((dt + u * dx - 0.01 / math.pi * dxx) ** 2).mean() + (u - x.detach()).square().mean()


def distillation(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """Soft targets at temperature 8, whose gradient passes 64 times its size."""
    teacher, labels = target
    soft = F.kl_div(F.log_softmax(output / 8, 1), F.softmax(teacher / 8, 1), reduction="batchmean")
    return 64.0 * soft + 0.5 * F.cross_entropy(output, labels)


def negative_log_likelihood(output: Tensor, target: Tensor) -> Tensor:
    """A Gaussian with a mean and a variance of its own for each example."""
    mean, spread = output.unbind(-1)
    return F.gaussian_nll_loss(mean, target, F.softplus(spread))


def cox(risk: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """Cox' partial likelihood, with the examples in falling order of time."""
    time, seen = target
    order = torch.argsort(time, descending=True)
    ordered = risk.squeeze(1)[order]
    return -((ordered - torch.logcumsumexp(ordered, 0)) * seen[order]).sum() / seen.sum()
