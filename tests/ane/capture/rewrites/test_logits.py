"""Losses written by hand on probabilities: loss and gradient are those of double precision, in both front doors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ane_trainer as at

Loss = Callable[[Tensor, Tensor], Tensor]
E = 1e-6


def both(o: Tensor) -> Tensor:
    return torch.cat([o, -o], 1).softmax(1)


def binary(p: Tensor, y: Tensor, e: float = 0.0) -> Tensor:
    return -(y * torch.log(p + e) + (1 - y) * torch.log(1 - p + e)).mean()


LOSSES: dict[str, Loss] = {
    "epsilon": lambda o, y: binary(o.sigmoid(), y, 1e-7),
    "view": lambda o, y: binary(torch.sigmoid(o).squeeze(1), y[:, 0], 1e-8),
    "clamp": lambda o, y: binary(o.sigmoid().clamp(E, 1 - E), y),
    "clamped bce": lambda o, y: F.binary_cross_entropy(
        torch.clamp(torch.sigmoid(o), min=E, max=1 - E), y, weight=y + 1, reduction="sum"
    ),
    "log1p": lambda o, y: -(y * torch.log(o.sigmoid()) + (1 - y) * torch.log1p(-o.sigmoid())).mean(),
    "where": lambda o, y: -(torch.where(y > 0.5, o.sigmoid(), 1 - o.sigmoid()) + 1e-8).log().mean(),
    "focal": lambda o, y: -((1 - o.sigmoid()) ** 2 * y * (o.sigmoid() + E).log()).mean() + o.square().mean(),
    "soft margin": lambda o, y: F.soft_margin_loss(o, 2 * y - 1),
    "softmax": lambda o, y: -(torch.cat([y, 1 - y], 1) * both(o).clamp_min(1e-7).log()).sum(1).mean(),
    "gather": lambda o, y: -(both(o).gather(1, y.long()) + 1e-8).log().mean(),
    "index": lambda o, y: -both(o)[torch.arange(len(y)), y[:, 0].long()].log().mean(),
    "entropy": lambda o, y: -(both(o) * (both(o) + 1e-8).log()).sum(1).mean() + 0.01 * o.square().mean(),
}


def drawn() -> tuple[nn.Linear, Tensor, Tensor]:
    """Scores up to about 20: a sigmoid is 1 in fp16 from 8.4 on, in fp32 from 16.6."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 8))
    return model, 2 * torch.randn(64, 8), (torch.rand(64, 1) > 0.5).float()


def wanted(loss: Loss) -> tuple[float, Tensor]:
    model, x, y = drawn()
    model = model.double()
    value = loss(model(x.double()), y.double())
    value.backward()
    assert model.weight.grad is not None
    return value.item(), model.weight.grad.float()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("error::ane_trainer.NumericsWarning")
def test_a_step_is_that_of_double_precision(name: str) -> None:
    expected, gradient = wanted(LOSSES[name])
    model, x, y = drawn()
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = at.compile_step(model, LOSSES[name], optimizer, example=(x, y), device="sim")
    assert float(step(x, y)) == pytest.approx(expected, rel=2e-3)
    step.sync()
    assert ((before - model.weight.detach()) / 0.1 - gradient).norm() < 0.01 * gradient.norm()


@pytest.mark.parametrize("name", ["epsilon", "clamp", "index"])
def test_so_is_one_through_torch_compile(name: str) -> None:
    expected, gradient = wanted(LOSSES[name])
    model, x, y = drawn()
    compiled = torch.compile(lambda x, y: LOSSES[name](model(x), y), backend="ane")
    value = compiled(x, y)
    value.backward()
    assert model.weight.grad is not None
    assert value.item() == pytest.approx(expected, rel=2e-3)
    assert (model.weight.grad - gradient).norm() < 0.01 * gradient.norm()


@pytest.mark.parametrize("target", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("whole", [True, False], ids=["compile_step", "torch.compile"])
def test_saturated_probabilities_cost_what_they_cost_in_fp32(target: float, whole: bool) -> None:
    """PyTorch bounds the logarithm of 0 by -100, and a sigmoid that is 1 has no gradient."""
    scores = torch.tensor([[-120.0, -95, -60, -35, -29, -20, -5, 1, 8, 15, 16.4, 17, 18, 25, 110]])
    y = torch.full_like(scores, target)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy(o.sigmoid(), y, weight=y + 1, reduction="sum")

    start = scores.clone().requires_grad_()
    expected = loss(start, y)
    (gradient,) = torch.autograd.grad(expected, start)
    model = nn.Linear(1, scores.shape[1])
    with torch.no_grad():
        model.weight.zero_(), model.bias.copy_(scores[0])
    x, optimizer = torch.zeros(1, 1), torch.optim.SGD(model.parameters(), lr=1.0)
    if whole:
        step = at.compile_step(model, loss, optimizer, example=(x, y), device="sim")
        value = float(step(x, y))
        step.sync()
        assert step.agreement is not None
        assert step.agreement.agrees
    else:
        compiled = torch.compile(lambda x, y: loss(model(x), y), backend="ane")(x, y)
        compiled.backward()
        optimizer.step()
        value = compiled.item()
    assert value == pytest.approx(expected.item(), rel=2e-3)
    assert torch.allclose(scores[0] - model.bias.detach(), gradient[0], atol=5e-3)


def test_what_was_written_to_is_taken_as_it_is() -> None:
    """A probability that is changed in place is none of its scores any more."""

    def loss(o: Tensor, y: Tensor) -> Tensor:
        p = o.sigmoid()
        q = 1 - p
        with torch.no_grad():
            q.mul_(0.5).add_(0.25)
        return -(y * p.detach() * (q + 1e-4).log()).mean() + o.square().mean()

    model, x, y = drawn()
    expected = loss(model(x), y).item()
    step = at.compile_step(
        model, loss, torch.optim.SGD(model.parameters(), lr=0.1), example=(x, y), device="sim"
    )
    assert float(step(x, y)) == pytest.approx(expected, rel=2e-3)
