"""More families of models: operations written out, recurrent layers, other convolutions and pools, attention of torch's
own, parametrized weights, bags of tokens, counts. `FAMILIES` has them beside the first ones (`models`)."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.hunt import models
from tests.hunt.models import ACTIVATIONS, Drawn

Op = Callable[[torch.Tensor], torch.Tensor]


def _picked(x: torch.Tensor) -> torch.Tensor:
    places = torch.arange(x.shape[0] * 5).view(-1, 5) % x.shape[1]
    return x.gather(1, places).repeat(1, x.shape[1] // 5 + 1)[:, : x.shape[1]]


def _added(x: torch.Tensor) -> torch.Tensor:
    places = torch.arange(x.shape[1]) // 3
    return torch.zeros_like(x).index_add(1, places, x)


def _scattered(x: torch.Tensor) -> torch.Tensor:
    places = (torch.arange(x.shape[1]) % 4).expand_as(x)
    return x + torch.zeros_like(x).scatter_add(1, places, x * x)


def _ranked(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x.topk(3, 1).values, x.sort(1).values), 1)[:, : x.shape[1]]


def _hidden(value: float) -> Op:
    """Scores beyond the first four of a row are masked with this value, then softmax."""
    return lambda x: x.masked_fill(torch.arange(x.shape[1]) > 3, value).softmax(1) * x


#: Operations on [rows, width] that keep the shape, width 8 or more.
OPS: dict[str, Op] = {
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: (1 + 0.1 * x.tanh()).cumprod(1),
    "einsum": lambda x: torch.einsum("ij,kj,kl->il", x, x, x) / x.shape[0],
    "gather": _picked,
    "index_add": _added,
    "scatter": _scattered,
    "topk": _ranked,
    "where": lambda x: torch.where(x > 0, x, 0.01 * x.exp()),
    "masked_inf": lambda x: x + _hidden(float("-inf"))(x),
    "masked_1e9": lambda x: x + _hidden(-1e9)(x),
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "exp_log": lambda x: torch.log(1e-6 + x.exp()),
    "exp_norm": lambda x: x.exp() / x.exp().sum(1, keepdim=True),
    "exp12": lambda x: (lambda e: e / e.sum(1, keepdim=True))((2 * x.tanh()).exp()),
    "log1p": lambda x: x.sign() * x.abs().log1p(),
    "divided": lambda x: x / 1e-4 * 1e-4,
    "small": lambda x: (x * 1e-4) / 1e-4,
    "eps": lambda x: x / (x.norm(dim=1, keepdim=True) + 1e-8),
    "rms": lambda x: x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt(),
    "softmax": lambda x: x.softmax(1),
    "cosine": lambda x: F.normalize(x, dim=1) @ F.normalize(x, dim=1).T @ x / x.shape[0],
    "distance": lambda x: torch.exp(-torch.cdist(x, x + 1.0)) @ x,
    "outer": lambda x: torch.einsum("bi,bj->bij", x, x).mean(2),
    "sqrt": lambda x: (x.abs() + 1e-3).sqrt(),
    "pow": lambda x: x.sign() * x.abs().clamp(min=1e-2).pow(1.5),
    "cube": lambda x: x.pow(3),
    "fraction": lambda x: x / (1 + x.abs()),
    "inverse": lambda x: 1 / (x.abs() + 0.1),
    "clamp": lambda x: x.clamp(-0.5, 2.0),
    "mean_std": lambda x: (x - x.mean(0)) / (x.std(0) + 1e-5),
    "minmax": lambda x: (
        (x - x.amin(1, keepdim=True)) / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True) + 1e-6)
    ),
    "gate": lambda x: F.glu(torch.cat((x, x.flip(1)), 1)),
    "fourier": lambda x: torch.cat((x.sin(), x.cos()), 1)[:, ::2],
    "entropy": lambda x: x - (x.softmax(1) * x.log_softmax(1)).sum(1, keepdim=True),
    "roll": lambda x: x.roll(1, 1) - x,
    "maxout": lambda x: torch.maximum(x, x.roll(3, 1)),
    "counted": lambda x: x / (x > 0).sum(1, keepdim=True).clamp(min=1),
    "share": lambda x: x * ((x > 0).to(x.dtype).sum() / x.numel()),
    "sharp": lambda x: (x * 10).sigmoid(),
    "tril": lambda x: (x @ x.T / x.shape[1]).tril() @ x / x.shape[0],
    "far": lambda x: (x + 1000.0) - 1000.0,
    "pad": lambda x: F.pad(x, (2, 2))[:, 1:-3],
    "unfold": lambda x: x.unfold(1, 4, 4).mean(2).repeat(1, 4),
    "var": lambda x: x / (x.var(1, keepdim=True) + 1e-5).sqrt(),
    "huber_like": lambda x: torch.where(x.abs() < 1, x * x, x.abs()),
    "softplus": lambda x: F.softplus(x, beta=5.0),
    "logit": lambda x: torch.logit(x.sigmoid().clamp(1e-3, 1 - 1e-3)),
    "atan": lambda x: torch.atan2(x, 1 + x.abs()),
    "erf": lambda x: torch.erf(x),
    "hypot": lambda x: (x * x + x.flip(1).square() + 1e-6).sqrt(),
}


class _Written(nn.Module):
    def __init__(self, features: int, width: int, names: list[str], classes: int) -> None:
        super().__init__()
        self.names, self.factor = names, 1.0
        self.layers = nn.ModuleList(nn.Linear(features if not i else width, width) for i in range(len(names)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in zip(self.names, self.layers, strict=True):
            x = OPS[name](layer(x) * self.factor)
        return self.head(x)


def written(rng: random.Random, wild: bool) -> Drawn:
    """One to three operations written out, a linear layer in front of each."""
    width, features, rows = rng.choice((8, 16, 32)), rng.choice((4, 10)), rng.choice((8, 16, 64))
    names = rng.sample(list(OPS), rng.choice((1, 2, 3)))
    model, factor = _Written(features, width, names, rng.choice((3, 10))), models.scale_of(rng, wild)
    if rng.random() < 0.15:
        with torch.no_grad():
            model.layers[0].bias += rng.choice((100.0, -30.0))
        names = [*names, "large bias"]
    return Drawn(
        model, lambda: torch.randn(rows, features) * factor, "vector",
        f"written {rows}x{features} width {width} scale {factor:.2g}: {' '.join(names)}",
    )  # fmt: skip


class _Recurrent(nn.Module):
    def __init__(self, rng: random.Random, features: int, width: int, classes: int) -> None:
        super().__init__()
        kind = rng.choice((nn.GRU, nn.LSTM, nn.RNN))
        self.rnn = kind(features, width, batch_first=True, bidirectional=rng.random() < 0.3)
        self.norm = rng.choice((nn.Identity, nn.LayerNorm))(width * (2 if self.rnn.bidirectional else 1))
        self.head = nn.Linear(width * (2 if self.rnn.bidirectional else 1), classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.rnn(x)[0][:, -1]))


def recurrent(rng: random.Random, wild: bool) -> Drawn:
    """A GRU, LSTM or plain recurrent layer, both ways at times."""
    rows, length, features = rng.choice((4, 16)), rng.choice((3, 6)), rng.choice((3, 8))
    factor = models.scale_of(rng, wild)
    model = _Recurrent(rng, features, rng.choice((8, 16)), rng.choice((3, 5)))
    text = f"recurrent {rows}x{length}x{features} scale {factor:.2g}: {model.rnn}"
    return Drawn(model, lambda: torch.randn(rows, length, features) * factor, "vector", text)


def _signal_layer(rng: random.Random, width: int) -> nn.Module:
    return rng.choice((
        lambda: nn.Conv1d(width, width, 3, padding=2, dilation=2),
        lambda: nn.Conv1d(width, width, 3, padding=1, groups=2, padding_mode="circular"),
        lambda: nn.ConvTranspose1d(width, width, 2, stride=2), lambda: nn.AvgPool1d(2), lambda: nn.MaxPool1d(3, 1, 1),
        lambda: nn.InstanceNorm1d(width), lambda: nn.BatchNorm1d(width, affine=False),
        lambda: nn.GroupNorm(2, width, affine=False), lambda: nn.PReLU(width), lambda: nn.Upsample(scale_factor=2),
        lambda: nn.LPPool1d(2.0, 2),
    ))()  # fmt: skip


def _picture_layer(rng: random.Random, width: int) -> nn.Module:
    return rng.choice((
        lambda: nn.Conv2d(width, width, 3, padding=2, dilation=2), lambda: nn.Conv2d(width, width, (1, 3), groups=2),
        lambda: nn.Conv2d(width, width, 3, padding="same", padding_mode="reflect", bias=False),
        lambda: nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1),
        lambda: nn.ConvTranspose2d(width, width, 2, groups=2), lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        lambda: nn.MaxPool2d(3, 2, 1), lambda: nn.AdaptiveAvgPool2d((3, 2)), lambda: nn.AdaptiveMaxPool2d(2),
        lambda: nn.LPPool2d(2.0, 2), lambda: nn.InstanceNorm2d(width, track_running_stats=True),
        lambda: nn.BatchNorm2d(width, momentum=0.5, eps=1e-3), lambda: nn.BatchNorm2d(width, affine=False),
        lambda: nn.GroupNorm(width, width, affine=False), lambda: nn.LocalResponseNorm(3),
        lambda: nn.Upsample(scale_factor=2, mode="bilinear"), lambda: nn.ZeroPad2d(1), lambda: nn.Softmax2d(),
        lambda: nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.PixelShuffle(2)), lambda: nn.PReLU(),
    ))()  # fmt: skip


def signal(rng: random.Random, wild: bool) -> Drawn:
    """Convolutions, pools and norms along one axis."""
    width, rows, length, factor = (
        rng.choice((4, 8)),
        rng.choice((4, 8)),
        rng.choice((8, 12)),
        models.scale_of(rng, wild),
    )
    layers: list[nn.Module] = [nn.Conv1d(2, width, 3, padding=1), rng.choice(ACTIVATIONS)()]
    for _ in range(rng.choice((1, 2, 3))):
        layers += [_signal_layer(rng, width), rng.choice(ACTIVATIONS)()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(2 * width, 3))
    return Drawn(
        model,
        lambda: torch.randn(rows, 2, length) * factor,
        "vector",
        f"signal {rows}x2x{length} {factor:.2g}: {model}",
    )


def picture(rng: random.Random, wild: bool) -> Drawn:
    """Convolutions of other kinds, transposed, dilated and grouped ones, and other pools."""
    width, rows, side, factor = (
        rng.choice((4, 8)),
        rng.choice((2, 4, 8)),
        rng.choice((8, 11)),
        models.scale_of(rng, wild),
    )
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), rng.choice(ACTIVATIONS)()]
    for _ in range(rng.choice((1, 2, 3))):
        layers += [_picture_layer(rng, width), rng.choice(ACTIVATIONS)()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
    return Drawn(
        model,
        lambda: torch.randn(rows, 1, side, side) * factor,
        "vector",
        f"picture {rows}x{side} {factor:.2g}: {model}",
    )


class _Attending(nn.Module):
    def __init__(self, rng: random.Random, vocabulary: int, width: int, length: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0, scale_grad_by_freq=rng.random() < 0.2)
        self.causal, self.padded = rng.random() < 0.5, rng.random() < 0.5
        self.alone = rng.random() < 0.4
        self.body: nn.Module = (
            nn.MultiheadAttention(width, 2, batch_first=True) if self.alone
            else nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, rng.choice(("relu", "gelu")), batch_first=True,
                                            norm_first=rng.random() < 0.5)
        )  # fmt: skip
        self.head = nn.Linear(width, classes)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, hidden = self.embed(tokens), (tokens == 0) if self.padded else None
        mask = self.mask.to(x.dtype) if self.causal else None
        if hidden is not None:
            hidden = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, float("-inf"))
        if self.alone:
            x = x + self.body(x, x, x, attn_mask=mask, key_padding_mask=hidden, need_weights=False)[0]
        else:
            x = self.body(x, src_mask=mask, src_key_padding_mask=hidden)
        return self.head(x.mean(1))


def attending(rng: random.Random, wild: bool) -> Drawn:
    """torch's own attention and encoder layers, with causal masks and padding."""
    rows, length, vocabulary = rng.choice((2, 8)), rng.choice((5, 12)), rng.choice((7, 60))
    model = _Attending(rng, vocabulary, rng.choice((8, 16)), length, rng.choice((3, 5)))

    def inputs() -> torch.Tensor:
        tokens = torch.randint(1, vocabulary, (rows, length))
        return torch.where(torch.arange(length) < torch.randint(1, length + 1, (rows, 1)), tokens, 0)

    text = f"attending {rows}x{length} causal {model.causal} padded {model.padded}: {model.body}"
    return Drawn(model, inputs, "vector", " ".join(text.split()))


def parametrized(rng: random.Random, wild: bool) -> Drawn:
    """Weight norm, spectral norm and orthogonal weights."""
    width, rows, factor = rng.choice((8, 16)), rng.choice((8, 32)), models.scale_of(rng, wild)
    way = rng.choice(
        (parametrizations.weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm)
    )
    layers = [way(nn.Linear(6, width)), rng.choice(ACTIVATIONS)(), way(nn.Linear(width, width)), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, 4))
    return Drawn(
        model, lambda: torch.randn(rows, 6) * factor, "vector", f"{way.__name__} {rows}x6 {factor:.2g}"
    )


class _Bag(nn.Module):
    def __init__(self, rng: random.Random, vocabulary: int, width: int, classes: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(vocabulary, width, mode=rng.choice(("sum", "mean", "max")))
        self.table, self.count = nn.Embedding(vocabulary, width), rng.choice(("share", "total", "log"))
        self.head = nn.Linear(2 * width + 1, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first = self.table(tokens).sum(1)
        same = (tokens[:, :, None] == tokens[:, None, :]).sum((1, 2), keepdim=True)[:, 0]
        if self.count == "log":
            number = same.to(first.dtype).log()
        else:
            number = same / tokens.shape[1] ** 2 if self.count == "share" else same.to(first.dtype) * 1e-3
        return self.head(torch.cat((self.bag(tokens), first, number.to(first.dtype)), 1))


def bags(rng: random.Random, wild: bool) -> Drawn:
    """Bags of few tokens that repeat, and how often they do."""
    rows, length, vocabulary = rng.choice((4, 16)), rng.choice((6, 40)), rng.choice((3, 30))
    model = _Bag(rng, vocabulary, rng.choice((4, 8)), 3)
    text = f"bags {rows}x{length} of {vocabulary} {model.bag.mode} {model.count}"
    return Drawn(model, lambda: torch.randint(0, vocabulary, (rows, length)), "vector", text)


FAMILIES = {
    **models.FAMILIES, "written": written, "recurrent": recurrent, "signal": signal, "picture": picture,
    "attending": attending, "parametrized": parametrized, "bags": bags,
}  # fmt: skip
SHARES = (6, 6, 6, 4, 4, 30, 6, 10, 14, 8, 6, 6)
