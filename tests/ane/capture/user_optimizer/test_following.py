"""Operations of users' optimizers, planned and tried in fp32 against the same code in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ane_trainer.ane.capture.user_optimizer.following import NotFollowed
from ane_trainer.ane.capture.user_optimizer.planning import UserUpdate, plan_update
from ane_trainer.ane.capture.user_optimizer.probing import probe
from ane_trainer.ane.capture.user_optimizer.trial import check_update

Tensor = torch.Tensor
Step = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


class Stepping(torch.optim.Optimizer):
    """p -= 0.1 * direction(gradient, p, state)."""

    def __init__(self, params: Any, direction: Step) -> None:
        self.direction = direction
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(self.direction(p.grad, p, self.state[p]), alpha=self.param_groups[0]["lr"])


def planned(direction: Step) -> UserUpdate:
    """The plan, after its trial against PyTorch."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 6), (5,), ())]
    gradients = [0.01 * torch.randn(p.shape, generator=generator) for p in parameters]
    optimizer = Stepping(parameters, direction)
    before = [p.detach().clone() for p in parameters]
    plan = plan_update(probe(optimizer, parameters), ["a", "b", "c"], gradients, [1024.0] * 3, 2.0**-14)
    check_update(plan, gradients)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert not optimizer.state
    assert all(p.grad is None for p in parameters)
    return plan


def counted(state: dict[str, Any]) -> int:
    state["n"] = state.get("n", 0) + 1
    return int(state["n"])


def centered(g: Tensor) -> Tensor:
    return g - g.mean(dim=tuple(range(1, g.ndim)), keepdim=True) if g.ndim > 1 else g


def filled(g: Tensor) -> Tensor:
    out = torch.empty_like(g)
    out.copy_(g).mul_(2)
    return torch.mul(out, 3.0, out=torch.empty_like(g))


def in_view(g: Tensor) -> Tensor:
    flat = (g * 2).view(-1)
    flat.div_(flat.norm() + 1e-3)
    return flat.view(g.shape)


FOLLOWED: dict[str, Step] = {
    "powers": lambda g, p, s: (
        g**2 + (g.abs() + 0.1) ** 0.5 + g**3 + (g**2 + 1.0) ** -0.5 + (g.abs() + 1) ** 0.75
    ),
    "quotients": lambda g, p, s: 2.0 / (g.abs() + 0.5) + g / 3.0 + g.reciprocal().clamp(-2, 2),
    "choices": lambda g, p, s: (
        torch.where((g > 0) & (p < 0.5), g, -2 * p) + torch.maximum(g, p) - torch.minimum(g, p)
    ),
    "masks": lambda g, p, s: g * (g * p > 0).to(g.dtype) + g.masked_fill(~(p.abs() >= 0.3), 0.0),
    "limits": lambda g, p, s: g.clamp(-0.005, 0.01) + p.clamp(min=0.1) + (1e6 * g).clamp(max=0.5),
    "norms": lambda g, p, s: g / g.norm() + p / (p.abs().max() + p.norm(1)) + g * g.pow(2).mean().rsqrt(),
    "sums": lambda g, p, s: centered(g) + g * p.sum() + g * (g * p).sum(),
    "functions": lambda g, p, s: torch.tanh(p) * torch.exp(g) + torch.sign(g) * 0.1,
    "linear": lambda g, p, s: torch.lerp(g, p, 0.3) + g.addcmul(g, p, value=2.0) + torch.rsub(g, 1.0),
    "shapes": lambda g, p, s: g.t().contiguous().t() if g.ndim == 2 else g.unsqueeze(0).squeeze(0),
    "products": lambda g, p, s: (g @ p.mT) @ g if g.ndim == 2 else g,
    "counts": lambda g, p, s: g / (1 - 0.9 ** counted(s)),
    "out": lambda g, p, s: filled(g),
    "view": lambda g, p, s: in_view(g),
    "data": lambda g, p, s: g.data + p.data.clone().detach(),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_plan_computes_what_the_code_does(name: str) -> None:
    plan = planned(FOLLOWED[name])
    assert all(abs(value) <= 65504 for value in plan.scalars(plan.samples[0]).values())


outside: list[Tensor] = []


def keeping_outside(g: Tensor) -> Tensor:
    outside.append(g * 1.0)
    return g + outside[0] if outside[0].shape == g.shape else g


REFUSED: dict[str, tuple[Step, str]] = {
    "item": (lambda g, p, s: g * g.sum().item(), "looks at the content"),
    "if": (lambda g, p, s: g if bool((g > 0).all()) else -g, "looks at the content"),
    "array": (lambda g, p, s: torch.from_numpy(g.numpy() * 2), r"reads the content of a tensor \(numpy\)"),
    "random": (lambda g, p, s: g + torch.rand_like(g), "draws random tensors"),
    "unrepeatable": (
        lambda g, p, s: g * float(torch.rand(())),
        "do not come from its settings and state alone",
    ),
    "rule": (lambda g, p, s: g.cumsum(0) if g.ndim else g, "cumsum, which has no rule"),
    "part": (
        lambda g, p, s: (g.clone().fill_(1.0)[..., :1].mul_(2) + g) if g.ndim else g,
        "no rule|in place",
    ),
    "torn": (lambda g, p, s: torn(g), "in place and reads the tensor later"),
    "outside": (lambda g, p, s: keeping_outside(g), "outside optimizer.state"),
    "constants": (lambda g, p, s: g * torch.arange(1.0, g.numel() + 1).reshape(g.shape), "different numbers"),
    "growing": (lambda g, p, s: grown(g, s), "grow"),
}


def torn(g: Tensor) -> Tensor:
    base = g * 2
    base.view(-1, 1).mul_(3)
    return base


def grown(g: Tensor, state: dict[str, Any]) -> Tensor:
    kept = state.setdefault("kept", torch.zeros_like(g))
    kept.mul_(1.1).add_(g)
    return g


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_with_its_reason(name: str) -> None:
    direction, reason = REFUSED[name]
    outside.clear()
    with pytest.raises(NotFollowed, match=reason):
        planned(direction)
    outside.clear()
