"""Python numbers that change from call to call, arguments and attributes, are fed as scalars: one graph for all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ane_trainer.ane.dynamo import report


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.gain = nn.Linear(8, 3), 0.5

    def forward(self, x: Tensor, tau: float) -> Tensor:
        return self.layer(x) / tau * self.gain  # type: ignore[no-any-return]


def test_numbers_that_change_are_fed() -> None:
    model, x = Scaled(), torch.ones(2, 8)
    fast = torch.compile(model, backend="ane", options={"device": "sim"})
    for number, tau in enumerate((1.0, 0.5, 0.25, 3.0, 0.125, 1.5)):
        model.gain = 0.5 + number
        model.zero_grad()
        found = fast(x, tau)
        found.sum().backward()
        gradient = model.layer.weight.grad
        assert gradient is not None
        torch.testing.assert_close(found, model(x, tau), rtol=3e-3, atol=1e-3)
        torch.testing.assert_close(
            gradient, torch.full_like(gradient, 2.0 * model.gain / tau), rtol=3e-3, atol=1e-3
        )
    assert report().graphs == 2


@pytest.mark.parametrize("kind", ["dropout", "norm"])
def test_numbers_that_operations_take_as_they_are_compiled(kind: str) -> None:
    """PyTorch's dropout and batch norm take no tensor in the place of theirs."""
    layer = nn.Dropout(0.0) if kind == "dropout" else nn.BatchNorm1d(8, momentum=0.9)
    model = nn.Sequential(layer, nn.Linear(8, 3))
    twin, x = copy.deepcopy(model), torch.randn(16, 8)
    fast = torch.compile(model, backend="ane", options={"device": "sim"})
    for number, value in enumerate((0.5, 0.25, 0.125, 0.25, 0.75, 0.5)):
        for each in (layer, twin[0]):
            setattr(each, "p" if kind == "dropout" else "momentum", value)
        torch.manual_seed(number)
        found = fast(x)
        torch.manual_seed(number)
        torch.testing.assert_close(found, twin(x), rtol=1e-2, atol=4e-3)
    if kind == "norm":
        torch.testing.assert_close(model[0].running_var, twin[0].running_var, rtol=1e-3, atol=1e-4)


class Reversed(torch.autograd.Function):
    """The gradient reversal of domain adaptation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.share * gradients[0], None


class Adversary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.share = nn.Linear(8, 8), nn.Linear(8, 3), 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Reversed.apply(self.body(x), self.share))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_numbers_that_a_backward_of_the_user_s_takes_are_fed() -> None:
    model, x = Adversary(), torch.randn(4, 8)
    twin = copy.deepcopy(model)
    fast = torch.compile(model, backend="ane", options={"device": "sim"})
    for share in (0.1, 0.5, 0.8, 1.0):
        model.share = twin.share = share
        for net, call in ((model, fast), (twin, twin)):
            net.zero_grad()
            call(x).pow(2).sum().backward()
        assert model.body.weight.grad is not None
        assert twin.body.weight.grad is not None
        torch.testing.assert_close(model.body.weight.grad, twin.body.weight.grad, rtol=1e-2, atol=5e-3)
