"""A step after weights or a batch became many times larger is compared with fp32 as the first one is."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.dispatch.sizes import Sizes


class Scaled(nn.Module):
    """Rows by the mean magnitude of their entries, which no example near 1 brings near the end of fp16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.a.weight.mul_(8.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.b(x / (x.abs().mean(1, keepdim=True) + 1e-4))


@pytest.mark.parametrize("what", ["weights", "batch"])
def test_numbers_of_another_size_are_compared(what: str) -> None:
    model, x, y = Scaled(), torch.randn(16, 6), torch.arange(16) % 3
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    step = at.compile_step(model, F.cross_entropy, optimizer, (x, y), device="sim", fidelity="fast")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x, y)
        step(2 * x, y)
    assert step.agreement is not None
    assert step.agreement.step == 1
    if what == "weights":
        with torch.no_grad():
            model.a.weight.mul_(10000.0)
            model.a.bias.mul_(10000.0)
    with pytest.warns(at.NumericsWarning, match="step 3 departs from fp32"):
        step(x if what == "weights" else 10000 * x, y)


def test_sizes_that_were_seen_are_not_new() -> None:
    sizes, x = Sizes(), torch.ones(3)
    found = [
        sizes.unlike(None, (factor * x, {"y": torch.arange(3)}))
        for factor in (1, 7, 9, 9.5, 60, 60, 0.2, 0.01, 0)
    ]
    assert found == [False, False, True, False, True, False, False, True, False]
