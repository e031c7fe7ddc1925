"""torch.compile: losses outside of the model, of probabilities that fp16 does not hold, are those of PyTorch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane import dynamo

SIM = {"device": "sim"}
Loss = Callable[[torch.Tensor], torch.Tensor]


class Clamped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x).flatten().clamp(1e-6, 1 - 1e-6)


class Both(nn.Module):
    """Probabilities that the model itself needs stay in its program."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p = torch.softmax(x, 1)
        return p, p @ torch.ones(4, 2)


def of_labels(p: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy(p, (torch.arange(p.numel()) % 2).float().view(p.shape))


def of_classes(p: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(torch.log(p + 1e-8), torch.arange(len(p)) % 4)


def of_actions(a: torch.Tensor) -> torch.Tensor:
    return -torch.log(1 - a * a + 1e-6).mean()


@pytest.mark.parametrize(
    ("last", "loss", "spread"),
    [(nn.Sigmoid(), of_labels, 16.0), (Clamped(), of_labels, 16.0), (nn.Softmax(1), of_classes, 20.0),
     (nn.Tanh(), of_actions, 8.0)],
)  # fmt: skip
def test_a_loss_outside_sees_probabilities_in_fp32(last: nn.Module, loss: Loss, spread: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4), last), torch.randn(64, 8)
    with torch.no_grad():
        model[0].weight *= spread
    exact = copy.deepcopy(model)
    expected = loss(exact(x))
    expected.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        found = loss(torch.compile(model, backend="ane", options=SIM)(x))
        found.backward()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0.0)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad - q.grad).norm() < 5e-3 * q.grad.norm()
    assert "last activation" in str(dynamo.report())


def test_probabilities_that_the_model_reads_stay_on_the_engine() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4), Both()), torch.randn(16, 8)
    exact, call = copy.deepcopy(model), torch.compile(model, backend="ane", options=SIM)
    for net in (call, exact):
        p, q = net(x)
        (p.pow(2).sum() + q.pow(2).sum()).backward()
    assert model[0].weight.grad is not None
    assert exact[0].weight.grad is not None
    torch.testing.assert_close(model[0].weight.grad, exact[0].weight.grad, rtol=2e-2, atol=2e-2)
    assert "last activation" not in str(dynamo.report())


def test_a_forward_without_gradients_has_the_same_end() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid()), torch.full((2, 8), 9.0)
    with torch.no_grad():
        model[0].weight.fill_(0.15)
        found = 1 - torch.compile(model, backend="ane", options=SIM)(x)
        assert 0.0 < float(found.max()) < 1e-3
        torch.testing.assert_close(found, 1 - model(x), rtol=2e-2, atol=0.0)
