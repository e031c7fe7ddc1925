"""Further families (`FAMILIES`), optimizers and changes: integers and masks written out, buffers that the forward
writes, models partly trained; numbers from 200,000 on draw of them, with later batches of other sizes and scales."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from tests.hunt import kinds, models, more
from tests.hunt.models import Drawn
from tests.hunt.surroundings import Change, Optimizer

Codes = Callable[[torch.Tensor], torch.Tensor]


def _runs(i: torch.Tensor) -> torch.Tensor:
    """The number of the run of equal numbers that each entry is in."""
    return F.pad((i[:, 1:] != i[:, :-1]).long().cumsum(1), (1, 0))


def _ranks(i: torch.Tensor) -> torch.Tensor:
    return (i[:, :, None] > i[:, None, :]).sum(2)


def _modular(i: torch.Tensor) -> torch.Tensor:
    """A linear congruence, twice."""
    return (((i * 421 + 1663) % 7875) * 13 + 5) % 7919


#: Integers of [rows, length] from integers of [rows, length].
CODES: dict[str, Codes] = {
    "negative_floor": lambda i: -i // 7 + 900,
    "negative_remainder": lambda i: (3 - i) % 89,
    "fmod": lambda i: torch.fmod(50 - i, 31).abs(),
    "digits": lambda i: i // 10 % 10 + 10 * (i // 1000),
    "congruence": _modular,
    "square": lambda i: (i % 200) * (i % 200) % 97,
    "sum": lambda i: i + i.sum(1, keepdim=True),
    "total": lambda i: (i.sum() - i) % 101,
    "cumsum": lambda i: i.cumsum(1),
    "mean": lambda i: (i.float().mean(1, keepdim=True).long() + i) % 97,
    "divided": lambda i: torch.div(i, 300, rounding_mode="trunc"),
    "largest": lambda i: i.amax(1, keepdim=True) - i,
    "argmax": lambda i: i.argmax(1, keepdim=True) + torch.arange(i.shape[1]),
    "sorted": lambda i: i.sort(1).values - i.amin(),
    "argsort": lambda i: i.argsort(stable=True),
    "ranks": _ranks,
    "runs": _runs,
    "equal": lambda i: (i[:, :, None] == i[:, None, :]).sum(2),
    "buckets": lambda i: torch.bucketize(i, torch.tensor([3, 50, 400, 1500, 2500, 4000])),
    "searched": lambda i: torch.searchsorted(torch.arange(0, 5000, 37), i),
    "flipped": lambda i: torch.where(i > 2047, 4095 - i, i).clamp(min=0),
    "positions": lambda i: torch.arange(i.shape[1]) + 3000 - (i == 0).long(),
    "pairs": lambda i: i * 3 + i.roll(1, 1),
    "bits": lambda i: (i & 15) + (i >> 4 & 3),
    "float_floor": lambda i: (i.float() / 3.0).floor().long(),
    "rounded": lambda i: (i * 0.01).round().long(),
}  # fmt: skip


class _Codes(nn.Module):
    def __init__(self, name: str, read: str, classes: int) -> None:
        super().__init__()
        self.name, self.read = name, read
        self.table, self.head = nn.Embedding(97, 6), nn.Linear(8, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        codes = CODES[self.name](ids)
        first = self.table(codes % 97)
        if self.read == "numbers":
            second = torch.stack((codes / 5000.0, (codes % 64).to(first.dtype) / 64.0), -1)
        elif self.read == "compared":
            second = torch.stack((codes > ids, codes % 2 == 0), -1)
        else:
            waves = codes.to(first.dtype)[..., None] * torch.tensor([0.01, 0.001], dtype=first.dtype)
            second = waves.sin()
        both = torch.cat((first, second.to(first.dtype)), -1)
        return self.head(both.tanh().mean(1))


def codes(rng: random.Random, wild: bool) -> Drawn:
    """Integer arithmetic of one kind, its results looked up, compared or read as numbers."""
    name, read = rng.choice(list(CODES)), rng.choice(("numbers", "compared", "waves"))
    rows, length, largest = rng.choice((4, 16)), rng.choice((3, 8)), rng.choice((100, 3000, 5000))
    model = _Codes(name, read, rng.choice((3, 5)))
    text = f"codes {name} {read} {rows}x{length} to {largest}"
    return Drawn(model, lambda: torch.randint(0, largest, (rows, length)), "vector", text)


def _assigned(x: torch.Tensor) -> torch.Tensor:
    out, keep = torch.zeros_like(x), x > 0
    out[keep] = torch.tanh(x[keep])
    return out


def _in_place(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[x.abs() > 1] *= 0.5
    return x


def _filled_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows whose mean is negative are 0."""
    return x.masked_fill((x.mean(1) < 0)[:, None], 0.0)


def _attended(x: torch.Tensor) -> torch.Tensor:
    """Attention among rows, of which the first sees nothing."""
    keep = torch.ones(len(x), len(x), dtype=torch.bool).tril(-1)
    return F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=keep[None])[0] + x


def _softmax_left(x: torch.Tensor) -> torch.Tensor:
    """Softmax over positive entries, 0 in rows that have none."""
    scores = x.masked_fill(x <= 0, float("-inf"))
    return torch.where((x > 0).any(1, keepdim=True), scores.softmax(1), torch.zeros_like(x)) * x


def _masked_rms(x: torch.Tensor) -> torch.Tensor:
    """Rows by the root mean square of their positive entries."""
    square = (x * (x > 0)).square().sum(1, keepdim=True) / ((x > 0).sum(1, keepdim=True) + 1)
    return x / (square + 1e-4).sqrt()


def _scatter_most(x: torch.Tensor) -> torch.Tensor:
    places = (torch.arange(x.shape[1]) % 4).expand_as(x)
    return x + torch.zeros_like(x).scatter_reduce(1, places, x, "amax")


#: Operations on [rows, width] with masks that depend on the data.
MASKS: dict[str, kinds.Op] = {
    "assigned": _assigned,
    "in_place": _in_place,
    "filled_rows": _filled_rows,
    "attended": _attended,
    "softmax_left": _softmax_left,
    "selected_mean": lambda x: x - torch.masked_select(x, x > 0).mean(),
    "any_all": lambda x: x * ((x > -1).all(1, keepdim=True) | (x > 2).any(1, keepdim=True)).to(x.dtype),
    "xor": lambda x: torch.where((x > 0) ^ (x.roll(1, 1) > 0), x, 0.1 * x),
    "first_positive": lambda x: x.gather(1, (x > 0).to(torch.uint8).argmax(1, keepdim=True)) + 0.1 * x,
    "masked_rms": _masked_rms,
    "lengths": lambda x: x * (torch.arange(x.shape[1]) < (x > 0).sum(1, keepdim=True)).to(x.dtype),
    "nan_to_num": lambda x: torch.nan_to_num(x / x.clamp(min=0.0), 0.0, 1.0, -1.0) * x,
    "band": lambda x: (x @ x.T / x.shape[1]).triu(-2).tril(2) @ x / x.shape[0],
    "kept_best": lambda x: x * (x >= x.topk(3, 1).values[:, -1:]).to(x.dtype),
    "straight_through": lambda x: x + (x.round() - x).detach(),
    "cummax": lambda x: x.cummax(1).values,
    "median": lambda x: x - x.median(1, keepdim=True).values,
    "prod": lambda x: (1 + 0.05 * x.tanh()).prod(1, keepdim=True) * x,
    "norm3": lambda x: x / (torch.linalg.vector_norm(x, 3, 1, keepdim=True) + 1e-3),
    "norm_inf": lambda x: x / (torch.linalg.vector_norm(x, float("inf"), 1, keepdim=True) + 1e-3),
    "columns": lambda x: x.softmax(0) * len(x) * 0.1 + x,
    "scatter_most": _scatter_most,
    "put": lambda x: x.index_put((torch.arange(4),), x[:4] * 2, accumulate=True),
    "power_of_two": lambda x: torch.exp2(x.clamp(-4, 4)) * 0.1,
    "sinc": lambda x: torch.sinc(x * 0.3),
    "bounded": lambda x: torch.minimum(torch.maximum(x, x.mean(1, keepdim=True) - 1), x.mean(1, keepdim=True) + 1),
    "differences": lambda x: F.pad(x.diff(dim=1), (1, 0)),
    "covariance": lambda x: torch.cov(x.T) @ torch.ones(x.shape[1], dtype=x.dtype) * 0.1 + x,
}  # fmt: skip


class _Masked(nn.Module):
    def __init__(self, features: int, width: int, names: list[str], classes: int) -> None:
        super().__init__()
        self.names = names
        self.layers = nn.ModuleList(nn.Linear(features if not i else width, width) for i in range(len(names)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in zip(self.names, self.layers, strict=True):
            x = MASKS[name](layer(x))
        return self.head(x)


def masked(rng: random.Random, wild: bool) -> Drawn:
    """One or two operations with masks, a linear layer in front of each."""
    width, features, rows = rng.choice((8, 16)), rng.choice((4, 10)), rng.choice((8, 16))
    names = rng.sample(list(MASKS), rng.choice((1, 2)))
    model, factor = _Masked(features, width, names, rng.choice((3, 5))), models.scale_of(rng, wild)
    text = f"masked {rows}x{features} width {width} scale {factor:.2g}: {' '.join(names)}"
    return Drawn(model, lambda: torch.randn(rows, features) * factor, "vector", text)


class _Stateful(nn.Module):
    """What a forward keeps: a mean by view, a queue, a count, a number that anneals, a cache replaced."""

    memory: torch.Tensor
    center: torch.Tensor
    queue: torch.Tensor
    seen: torch.Tensor

    def __init__(self, how: str, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.how, self.calls, self.beta = how, 0, 1.0
        self.first, self.head = nn.Linear(features, width), nn.Linear(width, classes)
        self.register_buffer("memory", torch.zeros(3, width))
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("queue", torch.zeros(5, width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        mean = h.detach().mean(0)
        match self.how:
            case "row":
                self.memory[1].copy_(mean)
                h = h + self.memory.sum(0)
            case "average":
                self.center.mul_(0.9).add_(mean, alpha=0.1)
                h = h - self.center
            case "queue":
                h = h + self.queue.mean(0)
                self.queue = torch.cat((mean[None], self.queue[:-1]))
            case "count":
                self.seen += 1
                h = h / self.seen.to(h.dtype)
            case "range":
                self.center.copy_(torch.maximum(self.center, mean.abs()))
                h = h / (self.center + 1e-2)
            case _:
                h = h * self.beta
        return self.head(torch.tanh(h))


def stateful(rng: random.Random, wild: bool) -> Drawn:
    """A model that writes its buffers in the forward."""
    how = rng.choice(("row", "average", "queue", "count", "range", "number"))
    rows, features, factor = rng.choice((4, 16)), rng.choice((4, 10)), models.scale_of(rng, wild)
    model = _Stateful(how, features, rng.choice((8, 16)), rng.choice((3, 5)))
    text = f"stateful {how} {rows}x{features} scale {factor:.2g}"
    return Drawn(model, lambda: torch.randn(rows, features) * factor, "vector", text)


FAMILIES = {**kinds.FAMILIES, "codes": codes, "masked": masked, "stateful": stateful}
SHARES = (*kinds.SHARES, 20, 26, 12)

OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    **more.OPTIMIZERS,
    "head_only": lambda p: torch.optim.AdamW(list(p)[-2:], 1e-3),
    "sgd_tensor_rate": lambda p: torch.optim.SGD(p, torch.tensor(1e-2), momentum=0.9),
    "adam_long_memory": lambda p: torch.optim.Adam(p, 1e-3, betas=(0.95, 0.9999), eps=1e-6),
    "rmsprop_plain_momentum": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, eps=1e-6),
    "nadam_fast": lambda p: torch.optim.NAdam(p, 0.05),
    "asgd_decay": lambda p: torch.optim.ASGD(p, 0.05, weight_decay=1e-2),
}  # fmt: skip


def _fresh(model: nn.Module, optimizer: Optimizer) -> None:
    """All weights drawn again."""
    draws = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws) * 0.2)


def _toggled(model: nn.Module, optimizer: Optimizer) -> None:
    """The first parameter frozen, or trained again."""
    first = next(model.parameters())
    first.requires_grad_(not first.requires_grad)
    first.grad = None


def _mode(model: nn.Module, optimizer: Optimizer) -> None:
    model.train(not model.training)


def _schedule(model: nn.Module, optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = float(group["lr"]) * 0.7


def _pruned(model: nn.Module, optimizer: Optimizer) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.view(-1)[::3] = 0.0


def _renormed(model: nn.Module, optimizer: Optimizer) -> None:
    for p in model.parameters():
        if p.ndim == 2:
            p.data = p.data / p.data.norm(dim=1, keepdim=True).clamp(min=1e-3)


def _all_trained(model: nn.Module, optimizer: Optimizer) -> None:
    """What the optimizer has not yet is trained, too."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in known]
    if rest:
        optimizer.add_param_group({"params": rest, "lr": 1e-3})


def _new_buffers(model: nn.Module, optimizer: Optimizer) -> None:
    """Buffers replaced by other tensors."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, buffer * 0.5 + 0.01)


def _annealed(model: nn.Module, optimizer: Optimizer) -> None:
    for module in model.modules():
        for name in ("beta", "factor"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, getattr(module, name) * 0.8)


def _tiny_weights(model: nn.Module, optimizer: Optimizer) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-3)


CHANGES: Mapping[str, Change] = {
    **more.CHANGES, "fresh": _fresh, "toggled": _toggled, "mode": _mode, "schedule": _schedule, "pruned": _pruned,
    "renormed": _renormed, "add_param_group": _all_trained, "new buffers": _new_buffers, "annealed": _annealed,
    "weights x 1e-3": _tiny_weights,
}  # fmt: skip
