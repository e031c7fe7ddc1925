"""Globals that a function reads, and attributes of the same names."""

import pytest
import torch
from torch import Tensor, nn

import ane_trainer as at
from ane_trainer.ane.dispatch.globals_read import global_names

body: list[float] = [1.0]
factor = 2.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * factor  # type: ignore[no-any-return]


def test_attributes_are_no_globals() -> None:
    assert set(global_names(Net.forward.__code__)) == {"factor"}


def test_a_global_with_the_name_of_an_attribute_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Net(), torch.randn(8, 4)
    step = at.compile_step(model, "mse", torch.optim.SGD(model.parameters(), 0.0), (x, x), device="sim")
    first = float(step(x, x))
    for number in range(10):  # more than there may be programs
        body.append(float(number))
        assert float(step(x, x)) == first
    monkeypatch.setitem(globals(), "factor", 4.0)
    assert float(step(x, x)) != first
