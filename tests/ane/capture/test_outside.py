"""Draws from foreign generators and counters in the forward are refused by name, unless the numbers do without."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ane_trainer.ane.capture import capture_training
from ane_trainer.ane.errors import UnsupportedModel

X, Y = torch.ones(4, 5), torch.zeros(4, 3)


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind, self.calls = nn.Linear(5, 3), kind, 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.calls += 1
        factors: dict[str, Any] = {
            "counter": lambda: min(1.0, self.calls / 9), "late counter": lambda: 1.0 if self.calls < 500 else 0.1,
            "random": lambda: random.random(), "numpy": lambda: float(np.random.rand()), "none": lambda: 1.0,
        }  # fmt: skip
        return y * factors[self.kind]()


class Outer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = Net(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def capture(model: nn.Module, loss: Any = "mse") -> None:
    capture_training(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), (X, Y))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("counter", r"inner\.calls: counter: is counted by the forward \(0 -> 1\)"),
        ("late counter", r"inner\.calls: counter"),
        ("random", r"inner: random: draws from Python's random"),
        ("numpy", r"inner: numpy.random: draws from Python's numpy.random"),
    ],
)
def test_what_a_program_cannot_do_is_refused_by_module(kind: str, message: str) -> None:
    model = Outer(kind)
    with pytest.raises(UnsupportedModel, match=message):
        capture(model)
    assert model.inner.calls == 0


def test_a_counter_that_no_number_depends_on_is_left_alone() -> None:
    model = Outer("none")
    capture(model)
    assert model.inner.calls <= 2  # the trace's own forward may count


def test_a_loss_that_draws_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="loss: random: draws"):
        capture(nn.Linear(5, 3), lambda output, target: ((output - target) ** 2).mean() * random.random())


def test_a_loss_that_counts_is_refused() -> None:
    class Annealed:
        calls = 0

        def __call__(self, output: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return ((output - target) ** 2).mean() * self.calls

    with pytest.raises(UnsupportedModel, match=r"counter: is counted by the forward"):
        capture(nn.Linear(5, 3), Annealed())
