"""Kullback-Leibler divergences of softmaxes that are near each other, by both front doors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.capture.rewrites.substitutes import rewriting

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def tempered(temperature: float, reduction: str, log_target: bool = False) -> Loss:
    def loss(scores: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        target = (
            F.log_softmax(teacher / temperature, 1) if log_target else F.softmax(teacher / temperature, 1)
        )
        log_q = F.log_softmax(scores / temperature, 1)
        return F.kl_div(log_q, target, reduction=reduction, log_target=log_target) * temperature**2

    return loss


@pytest.mark.parametrize(
    ("temperature", "reduction", "log_target"),
    [(20.0, "batchmean", False), (20.0, "mean", False), (50.0, "sum", False), (4.0, "batchmean", True)],
)
@pytest.mark.filterwarnings("ignore:reduction:UserWarning", "error::ane_trainer.ane.errors.NumericsWarning")
def test_distillation_at_a_high_temperature(temperature: float, reduction: str, log_target: bool) -> None:
    torch.manual_seed(0)
    loss, x, teacher = (
        tempered(temperature, reduction, log_target),
        torch.randn(32, 16),
        3 * torch.randn(32, 100),
    )
    model = nn.Linear(16, 100)
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    step = at.compile_step(
        model, loss, torch.optim.SGD(model.parameters(), lr=0.1), (x, teacher), device="sim"
    )
    value = loss(twin(x), teacher)
    value.backward()
    want = float(value.detach())
    assert abs(float(step(x, teacher)) - want) < 0.01 * want
    step.sync()
    change, gradient = (other.weight - model.weight).detach(), twin.weight.grad
    assert gradient is not None
    assert float((change - 0.1 * gradient).norm()) < 0.04 * 0.1 * float(gradient.norm())
    call = torch.compile(lambda x, y: loss(other(x), y), backend="ane", options={"device": "sim"})
    got = call(x, teacher)
    got.backward()
    assert abs(float(got.detach()) - want) < 0.01 * want


def test_the_terms_are_pytorchs_where_exponentials_add_to_one() -> None:
    """In full precision; the gradient of the teacher, too, and of scores far from its."""
    torch.manual_seed(0)
    loss = tempered(1.0, "batchmean")
    for scale in (0.1, 1.0, 30.0):
        x, y = (scale * torch.randn(8, 10, dtype=torch.float64).requires_grad_() for _ in range(2))
        want = loss(x, y)
        with rewriting():
            got = loss(x, y)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
        found, true = (torch.autograd.grad(value, (x, y)) for value in (got, want))
        for a, b in zip(found, true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_what_does_not_add_to_one_is_left_alone() -> None:
    """Targets of the batch, probabilities that were written to, other axes."""
    torch.manual_seed(0)
    x, weights = torch.randn(8, 10, dtype=torch.float64), torch.rand(8, 10, dtype=torch.float64)

    def losses() -> list[torch.Tensor]:
        written = F.softmax(weights, 1)
        written *= 0.5
        log_q = F.log_softmax(x, 1)
        targets = (weights, written, F.softmax(weights, 0))
        return [F.kl_div(log_q, target, reduction="sum") for target in targets]

    with rewriting():
        got = losses()
    torch.testing.assert_close(got, losses(), rtol=1e-9, atol=0.0)
