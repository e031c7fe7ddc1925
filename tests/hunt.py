"""A hunt for silent errors: models drawn at random, one step each against PyTorch in fp64.

`python -m tests.hunt --count N`. Each draw is right (loss within 2 %, update within 5 % over the entries that a 1 %
error of the gradients leaves as they are), announced (an error of this package, a NumericsWarning, a skipped step),
silent, or a raw exception. Exit code 1 if one is silent or raw.
"""

from __future__ import annotations

import argparse
import collections
import copy
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at

LOSS_BOUND, UPDATE_BOUND, NOISE = 0.02, 0.05, 0.01
NORMS = ("none", "layer", "rms", "batch", "group", "normalize", "std")
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Identity)
LOSSES = ("cross_entropy", "mse", "mse_sum", "l1", "huber", "bce", "rmse", "dice")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-2),
    "momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}


@dataclass(frozen=True)
class Draw:
    """One set-up, in words."""

    seed: int
    norm: str
    activation: str
    loss: str
    optimizer: str
    scale: float
    target_scale: float
    width: int
    rows: int
    chip: str
    fidelity: str


def draw(seed: int) -> Draw:
    """The set-up with this number."""
    rng = random.Random(seed)
    spread = rng.random() < 0.5
    return Draw(
        seed, rng.choice(NORMS), rng.choice(ACTIVATIONS).__name__, rng.choice(LOSSES), rng.choice(list(OPTIMIZERS)),
        10 ** rng.uniform(-5, 5) if spread else 1.0, 10 ** rng.uniform(-3, 3.5) if spread else 1.0,
        rng.choice((8, 16, 32, 64)), rng.choice((4, 16, 64, 512)), rng.choice(("m1", "m4", "m5")),
        rng.choice(("exact", "fast")),
    )  # fmt: skip


class Net(nn.Module):
    """Two layers with a norm; the input is multiplied inside, so that it reaches the model's own numbers."""

    def __init__(self, d: Draw) -> None:
        super().__init__()
        self.norm, self.factor = d.norm, d.scale
        self.a, self.b = nn.Linear(8, d.width), nn.Linear(d.width, 3)
        self.act = getattr(nn, d.activation)()
        made = {"layer": lambda: nn.LayerNorm(d.width), "rms": lambda: nn.RMSNorm(d.width, eps=1e-6),
                "batch": lambda: nn.BatchNorm1d(d.width), "group": lambda: nn.GroupNorm(4, d.width)}  # fmt: skip
        self.n = made.get(d.norm, nn.Identity)()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x * self.factor)
        h = self.n(h)
        if self.norm == "normalize":
            h = F.normalize(h, dim=-1)
        if self.norm == "std":
            h = (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-6)
        if self.norm == "none":
            h = h / self.factor
        return self.b(self.act(h))


def loss_of(d: Draw) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss by name."""

    def dice(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        p = torch.sigmoid(o)
        return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)

    return {
        "cross_entropy": F.cross_entropy, "mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss,
        "mse_sum": lambda o, y: F.mse_loss(o, y, reduction="sum"), "bce": F.binary_cross_entropy_with_logits,
        "rmse": lambda o, y: F.mse_loss(o, y).sqrt(), "dice": dice,
    }[d.loss]  # fmt: skip


def target_of(d: Draw) -> torch.Tensor:
    """Classes, shares or numbers."""
    if d.loss == "cross_entropy":
        return torch.randint(0, 3, (d.rows,))
    if d.loss in ("bce", "dice"):
        return (torch.rand(d.rows, 3) > 0.5).float()
    return torch.randn(d.rows, 3) * d.target_scale


def changes(d: Draw, model: nn.Module, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the optimizer makes of gradients, in fp64."""
    twin = copy.deepcopy(model).double()
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    for n, p in twin.named_parameters():
        p.grad = gradients[n].clone()
    OPTIMIZERS[d.optimizer](twin.parameters()).step()
    return {n: p.detach() - before[n] for n, p in twin.named_parameters()}


def run(d: Draw) -> tuple[str, str]:
    """(right, announced, silent or raw; what happened)"""
    torch.manual_seed(d.seed)
    model, x, y = Net(d), torch.randn(d.rows, 8), target_of(d)
    exact = copy.deepcopy(model).double()
    value = loss_of(d)(exact(x.double()), y.double() if y.is_floating_point() else y)
    torch.autograd.backward(value)
    gradients = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    start = copy.deepcopy(model)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = OPTIMIZERS[d.optimizer](model.parameters())
            step = at.compile_step(model, loss_of(d), optimizer, (x, y), chip=d.chip, fidelity=d.fidelity)
            got = float(step(x, y))
    except at.AneTrainerError as error:
        return "announced", str(error).splitlines()[0]
    except Exception as error:  # noqa: BLE001  (what is hunted)
        return "raw", f"{type(error).__name__}: {error}"
    if any(issubclass(w.category, at.NumericsWarning) for w in caught) or step.skipped_steps:
        return "announced", "; ".join(str(w.message)[:200] for w in caught) or "skipped"
    loss_error = abs(got - float(value.detach())) / max(abs(float(value.detach())), 1e-9)
    sizes = {n: float(g.square().mean().sqrt()) for n, g in gradients.items()}
    least = 1e-4 * max(sizes.values())
    want = changes(d, start, gradients)
    sure = {n: torch.ones_like(v, dtype=torch.bool) for n, v in want.items()}
    for sign in (NOISE, -NOISE):
        near = changes(d, start, {n: g + sign * max(sizes[n], least) for n, g in gradients.items()})
        sure = {n: s & ((near[n] - want[n]).abs() <= 0.2 * want[n].abs()) for n, s in sure.items()}
    moved = {n: p.detach().double() - dict(start.named_parameters())[n].detach().double()
             for n, p in model.named_parameters()}  # fmt: skip
    error = sum(float(((moved[n] - w) * sure[n]).norm()) ** 2 for n, w in want.items()) ** 0.5
    size = sum(float((w * sure[n]).norm()) ** 2 for n, w in want.items()) ** 0.5
    update_error = error / size if size else 0.0
    facts = f"loss {got:.4g} for {float(value.detach()):.4g}, update off {update_error:.3f}"
    return ("right" if loss_error <= LOSS_BOUND and update_error <= UPDATE_BOUND else "silent"), facts


def hunt(numbers: range, show: bool = True) -> collections.Counter[str]:
    """Run these draws; prints what is not right."""
    counts: collections.Counter[str] = collections.Counter()
    for number in numbers:
        kind, facts = run(draw(number))
        counts[kind] += 1
        if show and kind != "right":
            print(f"{kind}: {draw(number)}: {facts}", flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    counts = hunt(range(args.first, args.first + args.count))
    print(dict(counts))
    return 1 if counts["silent"] or counts["raw"] else 0


if __name__ == "__main__":
    sys.exit(main())
