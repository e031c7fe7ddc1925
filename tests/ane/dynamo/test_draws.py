"""Random draws through both front doors: torch.manual_seed governs them, and they are PyTorch's own numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ane_trainer as at

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(6, 3)
Draw = Callable[[Tensor], Tensor]
#: Drawn as eager PyTorch draws them, number for number.
SAME: dict[str, Draw] = {
    "randint": lambda h: torch.randint(0, 9, (h.shape[0], 1)).float(),
    "randint of two bounds": lambda h: torch.randint(3, 9, h.shape).float(),
    "randperm": lambda h: torch.randperm(h.shape[0])[:, None].float(),
    "normal": lambda h: torch.normal(0.5, 2.0, h.shape),
    "randn_like": torch.randn_like,
    "rand": lambda h: torch.rand(h.shape[0], 1),
    "dropout": lambda h: F.dropout(h, 0.5),
    "exponential_": lambda h: torch.empty_like(h).exponential_(),
    "uniform_": lambda h: torch.empty_like(h).uniform_(-1.0, 2.0),
}  # fmt: skip
#: The same distribution by other numbers.
ALIKE: dict[str, Draw] = {
    "multinomial": lambda h: torch.multinomial(torch.tensor([0.0, 1.0, 3.0]), 600, replacement=True)[:, None].float(),
    "multinomial without replacement": lambda h: torch.multinomial(torch.ones(6), 6)[:, None].float(),
    "bernoulli": lambda h: torch.bernoulli(torch.full((600, 1), 0.25)),
}  # fmt: skip


class Noisy(nn.Module):
    def __init__(self, draw: Draw) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.draw = nn.Linear(5, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h + self.draw(h)  # type: ignore[no-any-return]


class Drawn(nn.Module):
    """The draw alone, through a weight of 1."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.one, self.draw = nn.Parameter(torch.ones(())), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.one * self.draw(x) + 0.0 * x.sum()


def mean(output: Tensor, _target: Tensor) -> Tensor:
    return output.mean()


def expected(model: nn.Module, seed: int) -> float:
    torch.manual_seed(seed)
    return float(F.mse_loss(model(X), Y).detach())


@pytest.mark.parametrize("name", SAME)
def test_compile_step_draws_as_pytorch_does(name: str) -> None:
    model = Noisy(SAME[name])
    reference = copy.deepcopy(model)
    step = at.compile_step(
        model, "mse", torch.optim.SGD(model.parameters(), lr=0.0), example=(X, Y), device="sim"
    )
    for seed in (3, 4, 3):
        wanted = expected(reference, seed)
        torch.manual_seed(seed)
        assert float(step(X, Y)) == pytest.approx(wanted, rel=5e-3)


@pytest.mark.parametrize("name", SAME)
def test_torch_compile_draws_as_pytorch_does(name: str) -> None:
    model = Noisy(SAME[name])
    fast = torch.compile(model, backend="ane", options={"device": "sim"})
    for seed in (3, 4, 3):
        wanted = expected(model, seed)
        torch.manual_seed(seed)
        loss = F.mse_loss(fast(X), Y)
        assert float(loss.detach()) == pytest.approx(wanted, rel=5e-3)
        loss.backward()


@pytest.mark.parametrize("door", ["compile_step", "torch.compile"])
@pytest.mark.parametrize("name", ALIKE)
def test_other_draws_have_pytorchs_distribution(name: str, door: str) -> None:
    model = Drawn(ALIKE[name])
    torch.manual_seed(0)
    reference = ALIKE[name](X)
    if door == "torch.compile":
        drawn = torch.compile(model, backend="ane", options={"device": "sim"})(X).detach()
    else:
        step = at.compile_step(
            model, mean, torch.optim.SGD(model.parameters(), lr=0.0), example=(X, Y), device="sim"
        )
        means = torch.tensor([float(step(X, Y)) for _ in range(4)])
        assert float(means.mean()) == pytest.approx(float(reference.mean()), rel=0.15)
        return
    assert drawn.shape == reference.shape
    assert float(drawn.mean()) == pytest.approx(float(reference.mean()), rel=0.1)
    assert set(drawn.flatten().tolist()) == set(reference.flatten().tolist())


def test_a_seed_of_its_own_leaves_torchs_generator_alone() -> None:
    model = Noisy(SAME["dropout"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = []
    for seed in (5, 6):
        step = at.compile_step(model, "mse", optimizer, example=(X, Y), device="sim", seed=2)
        torch.manual_seed(seed)
        losses.append(float(step(X, Y)))
        assert float(torch.rand(1)) == float(torch.rand(1, generator=torch.Generator().manual_seed(seed)))
    assert losses[0] == losses[1]
