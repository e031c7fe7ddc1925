"""Logarithms, exponentials, powers and norms beyond fp16's range, through both front doors."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ane_trainer as at

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: (loss of output and target, size of the targets, learning rate)
CASES: dict[str, tuple[Loss, float, float]] = {
    "Cauchy": (lambda o, y: torch.log1p((o - y) ** 2 / 2).mean(), 1000.0, 0.1),
    "log of squares": (lambda o, y: torch.log((o - y) ** 2 + 1e-3).mean(), 2000.0, 0.1),
    "log10 of squares": (lambda o, y: torch.log10((o - y) ** 2 + 1.0).mean(), 2000.0, 0.1),
    "log1p of small": (lambda o, y: torch.log1p((o * 1e-4) ** 2).sum() * 1e6, 1.0, 0.1),
    "power 1.5": (lambda o, y: ((o - y).abs() ** 1.5).mean(), 1500.0, 0.01),
    "power 2.5": (lambda o, y: ((o - y).abs() ** 2.5).mean() * 1e-3, 500.0, 1e-3),
    "exp": (lambda o, y: torch.exp(o + 12.0).mean() * 1e-5, 1.0, 0.1),
    "norm of order 3": (lambda o, y: torch.linalg.vector_norm(o - y, ord=3, dim=1).mean(), 1000.0, 0.1),
    "norm of order 4": (lambda o, y: torch.linalg.vector_norm(o - y, ord=4) * 0.1, 50.0, 0.1),
}


def problem(name: str) -> tuple[nn.Module, Loss, torch.Tensor, torch.Tensor, float]:
    torch.manual_seed(0)
    loss, size, rate = CASES[name]
    return nn.Linear(8, 4), loss, torch.randn(16, 8), torch.randn(16, 4) * size, rate


def check(model: nn.Module, exact: nn.Module, start: nn.Module, losses: list[tuple[float, float]]) -> None:
    for got, want in losses:
        assert math.isclose(got, want, rel_tol=0.01, abs_tol=1e-4)
    moved = nn.utils.parameters_to_vector(exact.parameters()) - nn.utils.parameters_to_vector(
        start.parameters()
    )
    apart = nn.utils.parameters_to_vector(model.parameters()) - nn.utils.parameters_to_vector(
        exact.parameters()
    )
    assert float(apart.detach().norm()) < 0.02 * float(moved.detach().norm())


@pytest.mark.parametrize("name", CASES)
def test_a_step(name: str) -> None:
    model, loss, x, y, rate = problem(name)
    exact, start, losses = copy.deepcopy(model), copy.deepcopy(model), []
    own, other = (torch.optim.SGD(m.parameters(), rate) for m in (model, exact))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = at.compile_step(model, loss, own, example=(x, y), device="sim")
        for _ in range(2):
            got = float(step(x, y))
            other.zero_grad()
            value = loss(exact(x), y)
            value.backward()
            other.step()
            losses.append((got, float(value.detach())))
    step.sync()
    check(model, exact, start, losses)


@pytest.mark.parametrize("name", CASES)
def test_torch_compile(name: str) -> None:
    model, loss, x, y, rate = problem(name)
    torch._dynamo.reset()
    exact, start, losses = copy.deepcopy(model), copy.deepcopy(model), []
    fast = torch.compile(lambda x, y: loss(model(x), y), backend="ane", options={"device": "sim"})
    optimizers = [torch.optim.SGD(m.parameters(), rate) for m in (model, exact)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        for _ in range(2):
            values = fast(x, y), loss(exact(x), y)
            for value, optimizer in zip(values, optimizers, strict=True):
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            losses.append((float(values[0].detach()), float(values[1].detach())))
    check(model, exact, start, losses)
