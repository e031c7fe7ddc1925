"""Random models of the hunt, by family: tables, images, sequences, integers, long sums; each with its batch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = (
    nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Hardswish, nn.Mish,
    nn.Identity,
)  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A model, how a batch of its inputs is made, and what comes out of it: "vector", "tokens" or "image"."""

    model: nn.Module
    inputs: Callable[[], object]
    kind: str
    text: str


class Std(nn.Module):
    """Each row by its mean and standard deviation, written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


class Normalize(nn.Module):
    """Each row to length 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1)


class LlamaNorm(nn.Module):
    """RMS norm as language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Scaled(nn.Module):
    """The input times a number: it reaches what follows at that size."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Residual(nn.Module):
    """x + gamma * branch(x), as in ConvNeXt and CaiT."""

    def __init__(self, branch: nn.Module, width: int, gamma: float | None, axis: int) -> None:
        super().__init__()
        self.branch = branch
        shape = [1] * axis + [width] + [1] * (2 if axis == 1 else 0)
        self.gamma = None if gamma is None else nn.Parameter(torch.full(shape[axis:], gamma))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branch(x)
        return x + (y if self.gamma is None else self.gamma * y)


def scale_of(rng: random.Random, wild: bool) -> float:
    return 10 ** rng.uniform(-5, 5) if wild else rng.choice((1.0, 1.0, 0.3, 3.0))


def _row_norm(rng: random.Random, width: int) -> nn.Module:
    return rng.choice((
        nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-6), LlamaNorm(width), Std(), Normalize(), nn.Identity(),
    ))  # fmt: skip


def _flat_norm(rng: random.Random, width: int) -> nn.Module:
    return rng.choice(
        (nn.BatchNorm1d(width), nn.GroupNorm(4, width), _row_norm(rng, width), _row_norm(rng, width))
    )


def _image_norm(rng: random.Random, width: int) -> nn.Module:
    return rng.choice((
        nn.BatchNorm2d(width), nn.GroupNorm(4, width), nn.InstanceNorm2d(width, affine=rng.random() < 0.5),
        nn.Identity(),
    ))  # fmt: skip


def _gamma(rng: random.Random) -> float | None:
    return rng.choice((None, None, 1e-6, 1e-4, 0.1))


def table(rng: random.Random, wild: bool) -> Drawn:
    """Linear layers with norms, activations and residual branches."""
    width, features, rows = rng.choice((8, 16, 32, 64)), rng.choice((4, 8, 30)), rng.choice((4, 16, 64, 256))
    act = rng.choice(ACTIVATIONS)
    factor = scale_of(rng, wild)
    inside = rng.random() < 0.5
    layers: list[nn.Module] = [Scaled(factor)] if inside else []
    layers.append(nn.Linear(features, width, bias=rng.random() < 0.8))
    if wild or rng.random() < 0.5:
        layers.append(_flat_norm(rng, width))
    for _ in range(rng.choice((0, 1, 1, 2))):
        branch = nn.Sequential(
            _flat_norm(rng, width), nn.Linear(width, width), act(), nn.Linear(width, width)
        )
        layers.append(Residual(branch, width, _gamma(rng), 0) if rng.random() < 0.6 else branch)
    layers += [act(), nn.Linear(width, rng.choice((2, 3, 10)))]
    model = nn.Sequential(*layers)
    outlier = 25_000.0 if rng.random() < 0.1 else 0.0

    def inputs() -> torch.Tensor:
        x = torch.randn(rows, features) * (1.0 if inside else factor)
        if outlier:
            x[0, 0] = outlier * (1.0 if not inside else 1.0 / max(factor, 1.0))
        return x

    return Drawn(
        model,
        inputs,
        "vector",
        f"table {rows}x{features} scale {factor:.2g} outlier {outlier:g}: {_words(model)}",
    )


class _Image(nn.Module):
    def __init__(self, body: nn.Sequential, pool: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.pool, self.head = body, pool, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.body(x)).flatten(1))


def image(rng: random.Random, wild: bool) -> Drawn:
    """Convolutions, norms, pools, residual branches; a linear head, or the image itself."""
    width, rows, side = rng.choice((4, 8, 16)), rng.choice((2, 8, 16)), rng.choice((8, 12, 16))
    act, factor, channels = rng.choice(ACTIVATIONS), scale_of(rng, wild), rng.choice((1, 3))
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, stride=rng.choice((1, 1, 2)))]
    side = (side + 1) // 2 if layers[0].stride == (2, 2) else side
    layers += [
        rng.choice((nn.BatchNorm2d(width), nn.GroupNorm(2, width))) if wild else _image_norm(rng, width),
        act(),
    ]
    for _ in range(rng.choice((0, 1, 2))):
        groups = rng.choice((1, 1, width))
        branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=groups), _image_norm(rng, width), act()
        )
        layers.append(Residual(branch, width, _gamma(rng), 1) if rng.random() < 0.6 else branch)
    if rng.random() < 0.2:
        layers.append(nn.Conv2d(width, 2, 1))
        model: nn.Module = nn.Sequential(*layers)
        kind = "image"
    else:
        pool = rng.choice((nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2), nn.AvgPool2d(2)))
        size = width if isinstance(pool, nn.AdaptiveAvgPool2d) else width * (side // 2) ** 2
        model, kind = _Image(nn.Sequential(*layers), pool, nn.Linear(size, rng.choice((3, 10)))), "vector"
    full = side * 2 if layers[0].stride == (2, 2) else side
    shape = (rows, channels, full, full)
    return Drawn(
        model, lambda: torch.randn(shape) * factor, kind, f"image {shape} scale {factor:.2g}: {_words(model)}"
    )


class Attention(nn.Module):
    """Self-attention with a mask: none, causal, of padding, or both."""

    def __init__(self, width: int, heads: int, mask: str, written: bool) -> None:
        super().__init__()
        self.heads, self.mask, self.written = heads, mask, written
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        keep = torch.ones(length, length, dtype=torch.bool)[None, None]
        if "causal" in self.mask:
            keep = keep.tril()
        if "padding" in self.mask:
            keep = keep & real[:, None, None, :]
        if self.written:
            scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            y = scores.masked_fill(~keep, -1e9).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if self.mask == "none" else keep)
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    """A transformer's block, norms in front; gamma scales both branches."""

    def __init__(self, rng: random.Random, width: int, mask: str) -> None:
        super().__init__()
        norm = rng.choice((nn.LayerNorm, LlamaNorm, nn.RMSNorm))
        self.n1, self.n2 = norm(width), norm(width)
        self.attention = Attention(width, rng.choice((1, 2, 4)), mask, rng.random() < 0.4)
        self.up, self.down, self.act = (
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
            rng.choice(ACTIVATIONS)(),
        )
        gamma = _gamma(rng)
        self.gamma = None if gamma is None else nn.Parameter(torch.full((width,), gamma))

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        y = self.attention(self.n1(x), real)
        x = x + (y if self.gamma is None else self.gamma * y)
        y = self.down(self.act(self.up(self.n2(x))))
        return x + (y if self.gamma is None else self.gamma * y)


class _Sequence(nn.Module):
    def __init__(self, rng: random.Random, sizes: tuple[int, int, int, int], wild: bool) -> None:
        super().__init__()
        vocabulary, width, length, classes = sizes
        self.embed, self.positions = (
            nn.Embedding(vocabulary, width),
            rng.choice(("table", "waves", "counted", "none")),
        )
        self.factor = scale_of(rng, wild)
        self.place = nn.Embedding(length + 1, width) if self.positions in ("table", "counted") else None
        mask = rng.choice(("none", "causal", "padding", "causal padding"))
        self.blocks = nn.ModuleList(Block(rng, width, mask) for _ in range(rng.choice((1, 1, 2))))
        self.norm, self.head = rng.choice((nn.LayerNorm(width), LlamaNorm(width))), nn.Linear(width, classes)
        self.pooled = rng.choice(("tokens", "mean", "masked", "first"))
        self.tied = rng.random() < 0.2 and classes == vocabulary

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        real = tokens > 0
        x = self.embed(tokens) * self.factor
        length = tokens.shape[1]
        if self.place is not None:
            counted = self.positions == "counted"
            x = x + self.place(real.cumsum(1) * real if counted else torch.arange(length))
        elif self.positions == "waves":
            rates = torch.exp(torch.arange(0, x.shape[-1], 2) * (-math.log(10000.0) / x.shape[-1]))
            angles = torch.arange(length)[:, None] * rates
            x = x + torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
        for block in self.blocks:
            x = block(x, real)
        x = self.norm(x)
        if self.pooled == "mean":
            x = x.mean(1)
        elif self.pooled == "masked":
            x = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        elif self.pooled == "first":
            x = x[:, 0]
        return x @ self.embed.weight.T if self.tied else self.head(x)


def sequence(rng: random.Random, wild: bool) -> Drawn:
    """Tokens with padding through embeddings, positions and transformer blocks."""
    rows, length, width = rng.choice((2, 4, 8)), rng.choice((6, 12, 24)), rng.choice((16, 32))
    vocabulary = rng.choice((11, 50, 300))
    classes = rng.choice((3, vocabulary))
    model = _Sequence(rng, (vocabulary, width, length, classes), wild and rng.random() < 0.5)

    def inputs() -> torch.Tensor:
        tokens = torch.randint(1, vocabulary, (rows, length))
        ends = torch.randint(1, length + 1, (rows, 1))
        return torch.where(torch.arange(length) < ends, tokens, 0)

    kind = "tokens" if model.pooled == "tokens" else "vector"
    mask, norms = (
        model.blocks[0].attention.mask,
        {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__},
    )
    gamma = None if model.blocks[0].gamma is None else float(model.blocks[0].gamma.detach()[0])
    text = f"sequence {rows}x{length} width {width} vocabulary {vocabulary} classes {classes} scale {model.factor:.2g}"
    text += f" positions {model.positions} mask {mask} pooled {model.pooled} gamma {gamma} {norms}"
    text += f" blocks {len(model.blocks)}"
    return Drawn(model, inputs, kind, text)


class _Integers(nn.Module):
    def __init__(self, how: str, width: int, classes: int) -> None:
        super().__init__()
        self.how = how
        self.embed, self.body = (
            nn.Embedding(97, width),
            nn.Sequential(nn.LayerNorm(width + 2), nn.Linear(width + 2, 16), nn.Tanh()),
        )
        self.head = nn.Linear(16, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        match self.how:
            case "hash":
                codes = (ids * 31 + 7) % 97
            case "floor":
                codes = (ids // 53).clamp(0, 96)
            case "cumsum":
                codes = ids.cumsum(1) % 97
            case "difference":
                codes = torch.where(ids > 2500, ids - 2500, ids) % 97
            case _:
                codes = torch.minimum(ids, torch.full_like(ids, 96))
        share = torch.stack(((ids % 100) / 100.0, (ids > 1000).float()), -1)
        return self.head(self.body(torch.cat((self.embed(codes), share), -1)).mean(1))


def integers(rng: random.Random, wild: bool) -> Drawn:
    """Codes computed from integers up to 5,000, embedded."""
    how, rows, length = (
        rng.choice(("hash", "floor", "cumsum", "difference", "least")),
        rng.choice((4, 16)),
        rng.choice((3, 8)),
    )
    largest = 5000 if wild or rng.random() < 0.7 else 2000
    model = _Integers(how, rng.choice((4, 8)), rng.choice((3, 5)))
    return Drawn(
        model,
        lambda: torch.randint(0, largest, (rows, length)),
        "vector",
        f"integers {how} {rows}x{length} to {largest}",
    )


class _Long(nn.Module):
    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.scale, self.shift, self.norm = (
            nn.Parameter(torch.ones(width)),
            nn.Parameter(torch.zeros(width)),
            norm,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x * self.scale + self.shift)


def long(rng: random.Random, wild: bool) -> Drawn:
    """Few parameters and up to a million elements under the loss."""
    width = rng.choice((64, 256, 1024))
    rows = rng.choice((8, 64, 512, 1000 if width == 1024 else 512))
    factor = scale_of(rng, wild)
    norm = rng.choice((nn.Identity(), nn.LayerNorm(width), nn.Tanh()))
    model = _Long(width, norm)
    return Drawn(
        model,
        lambda: torch.randn(rows, width) * factor,
        "vector",
        f"long {rows}x{width} scale {factor:.2g} {norm}",
    )


Family = Callable[[random.Random, bool], Drawn]
FAMILIES: Mapping[str, Family] = {
    "table": table,
    "image": image,
    "sequence": sequence,
    "integers": integers,
    "long": long,
}
#: How often each is drawn.
SHARES = (35, 25, 22, 8, 10)


def draw_model(
    rng: random.Random, wild: bool, families: Mapping[str, Family] = FAMILIES, shares: Sequence[int] = SHARES
) -> Drawn:
    """A family and a model of it; `wild`: of any scale."""
    family = rng.choices(list(families), shares)[0]
    drawn = families[family](rng, wild)
    if wild and rng.random() < 0.3:  # weights of another size
        factor = 10 ** rng.uniform(-2, 1)
        weights = [p for n, p in drawn.model.named_parameters() if n.endswith("weight") and p.ndim > 1]
        with torch.no_grad():
            for p in weights:
                p.mul_(factor)
        return Drawn(drawn.model, drawn.inputs, drawn.kind, f"{drawn.text}; weights x {factor:.2g}")
    return drawn


def _words(model: nn.Module) -> str:
    """The kinds of the model's modules that have no children."""
    found = []
    for module in model.modules():
        if isinstance(module, Residual) and module.gamma is not None:
            found.append(f"gamma {float(module.gamma.detach().flatten()[0]):g}")
        if not list(module.children()):
            found.append(type(module).__name__)
    return " ".join(found)
