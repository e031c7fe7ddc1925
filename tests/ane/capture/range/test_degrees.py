"""Hooks and backwards of the user's that are not linear take gradients in their own unit, whatever the loss scale."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at

Hook = Callable[[torch.Tensor], torch.Tensor]

HOOKS: dict[str, Hook] = {
    "clamp": lambda g: g.clamp(-1e-3, 2e-3),
    "one bound": lambda g: g.clamp(min=-1e-3),
    "norm": lambda g: g / (g.norm() + 1e-12),
    "row norms": lambda g: g / g.pow(2).sum(1, keepdim=True).add(1e-6).sqrt(),
    "sign": lambda g: g.sign() * 1e-3,
    "threshold": lambda g: torch.where(g.abs() > 1e-3, g, torch.zeros_like(g)),
    "tanh": lambda g: 1e-3 * torch.tanh(g / 1e-3),
    "square": lambda g: g * g.abs() * 100,
    "offset": lambda g: g + 1e-3,
    "linear": lambda g: 0.5 * g,
}


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].clamp(-1e-3, 1e-3)


class Net(nn.Module):
    def __init__(self, hook: Hook | None) -> None:
        super().__init__()
        self.first, self.last, self.hook = nn.Linear(16, 32), nn.Linear(32, 10), hook

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu()
        if self.hook is None:
            h = Clipped.apply(h)
        elif h.requires_grad:
            h.register_hook(self.hook)
        return self.last(h)


def nets(hook: Hook | None) -> tuple[Net, Net, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = Net(hook)
    return model, copy.deepcopy(model), (torch.randn(16, 16), torch.randint(0, 10, (16,)))


def check(model: nn.Module, exact: nn.Module, start: nn.Module) -> None:
    for p, q, before in zip(model.parameters(), exact.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() < 0.02 * (q - before).norm()


@pytest.mark.parametrize("hook", [*HOOKS, None], ids=str)
def test_a_step_of_a_backward_that_is_not_linear(hook: str | None) -> None:
    model, exact, (x, y) = nets(HOOKS[hook] if hook else None)
    start, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        step = at.compile_step(model, "cross_entropy", optimizer, example=(x, y), chip="m4", device="sim")
        for _ in range(2):
            step(x, y)
    step.sync()
    own = torch.optim.SGD(exact.parameters(), 0.1)
    for _ in range(2):
        own.zero_grad()
        F.cross_entropy(exact(x), y).backward()
        own.step()
    check(model, exact, start)


@pytest.mark.parametrize("hook", ["clamp", "norm", "threshold", "tanh", None], ids=str)
def test_torch_compile_of_a_backward_that_is_not_linear(hook: str | None) -> None:
    model, exact, (x, y) = nets(HOOKS[hook] if hook else None)
    torch._dynamo.reset()
    call = torch.compile(model, backend="ane", options={"device": "sim"})
    for weight in (1.0, 1e-3, 1.0):  # gradients of other sizes, which a clamp sees
        model.zero_grad()
        exact.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Dynamo makes an object of a Function
            warnings.simplefilter("error", at.NumericsWarning)
            (weight * F.cross_entropy(call(x), y)).backward()
        (weight * F.cross_entropy(exact(x), y)).backward()
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert (p.grad - q.grad).norm() <= 0.02 * q.grad.norm()
