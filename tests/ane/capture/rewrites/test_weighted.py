"""Logarithms of masked sums of exponentials, and of quotients of such, are PyTorch's for scores any distance apart."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.capture.rewrites.substitutes import rewriting
from tests.ane.capture.rewrites.derivatives import value_and_gradient
from tests.ane.compiler.lower.harness import normal

Op = Callable[[torch.Tensor], torch.Tensor]
MASK = torch.arange(30).view(6, 5) % 3 != 0
FEW = torch.arange(30).view(6, 5) < 7  # rows that are masked wholly


def multi_similarity(x: torch.Tensor) -> torch.Tensor:
    same = MASK.float()
    return torch.log(1 + (torch.exp(x) * same).sum(1)) + torch.log1p((torch.exp(-x) * (1 - same)).sum(1))


def proxy_anchor(x: torch.Tensor) -> torch.Tensor:
    e = torch.exp(x)
    return (
        torch.log(1 + torch.where(FEW, e, torch.zeros_like(e)).sum(0))
        + torch.where(MASK, e, 0.0).sum(0).log()
    )


def pairs(x: torch.Tensor) -> torch.Tensor:
    own, others = x[:, 0].exp(), x[:, 1:].exp().sum(1)
    return -torch.log(own / (own + others))


def neighbours(x: torch.Tensor) -> torch.Tensor:
    e = x.exp() * MASK
    return torch.log((e * FEW).sum(1, keepdim=True) + 1e-6) - torch.log(e.sum(1, keepdim=True))


def divergence(x: torch.Tensor) -> torch.Tensor:
    p, q = torch.softmax(x, 1), torch.softmax(-x, 1)
    return (p * torch.log((p + 1e-8) / (q + 1e-8))).sum(1)


def mixture(x: torch.Tensor) -> torch.Tensor:
    """The likelihood of a mixture of normal distributions."""
    share, mean, spread = torch.softmax(x / 9, 1), torch.linspace(-2, 2, 5), torch.linspace(0.3, 2, 5)
    density = 0.4 * torch.exp(-0.5 * ((x - mean) / spread) ** 2) / spread
    return -torch.log(torch.sum(share * density, dim=1)) - (density * share).mean(1).add(1e-6).log()


def information(x: torch.Tensor) -> torch.Tensor:
    """The bound of Donsker and Varadhan."""
    return torch.log(torch.mean(torch.exp(x))) - x.exp().mean(1).log()


def importance(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x) * torch.exp(-x / 3)
    return torch.log(weights.mean(1)) + torch.log1p((x.exp() / torch.exp(x / 2)).sum(1))


WRITTEN: dict[str, Op] = {
    "log-cosh": lambda x: torch.log(torch.cosh(x + 1e-12)) + (x / 9).cosh().log(),
    "mixture": mixture, "information": information, "importance": importance,
    "multi-similarity": multi_similarity, "proxy anchor": proxy_anchor, "pairs": pairs, "neighbours": neighbours,
    "divergence": divergence,
}  # fmt: skip


def written_to(x: torch.Tensor) -> torch.Tensor:
    total = (x.exp() * MASK).sum(1)
    total.mul_(3.0)
    return torch.log(1 + total)


def scores_written_to(x: torch.Tensor) -> torch.Tensor:
    scores = x * 1.0
    with torch.no_grad():
        total = (scores.exp() * MASK).sum(1) + 1
        scores.add_(1.0)
    return torch.log(total) + x.sum(1)


OTHERS: dict[str, Op] = {
    "weights": lambda x: torch.log(60 + (x.exp() * torch.linspace(-1, 1, 5)).sum(1)), "written to": written_to,
    "scores written to": scores_written_to,
    "weights less than 0": lambda x: ((x.exp() * torch.linspace(-0.1, 1, 5)).sum(1) + 1e-8).log(),
    "sum of two": lambda x: (30 + (x.exp() * x).mean(1) + (x.exp() / (x - 9)).sum(1)).log(),
    "share of": lambda x: ((x.exp() * 3).sum(1) / (x.exp() * MASK + 1).sum(1)).log(),
    "other": lambda x: torch.log(torch.where(MASK, x.exp(), 0.5).sum(1)),
    "two axes": lambda x: torch.log(1 + (x.exp() * MASK).sum()) * x, "number": lambda x: (2 * x.exp()).sum(1).log(),
    "numbers of masks": lambda x: x * (1 - MASK.float()) * FEW.float(), "truths": lambda x: (MASK * 2.0).log1p() + x,
}  # fmt: skip


@pytest.mark.parametrize("name", [*WRITTEN, *OTHERS])
def test_values_and_gradients_are_pytorchs(name: str) -> None:
    op = {**WRITTEN, **OTHERS}[name]
    kept = lambda value: torch.where(value.isfinite(), value, 0.0)  # noqa: E731
    results = [value_and_gradient(op, rewritten, kept) for rewritten in (False, True)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WRITTEN)
def test_scores_may_lie_far_apart(name: str) -> None:
    class Applied(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return WRITTEN[name](x)

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 5), Applied()), torch.randn(6, 8) * 30
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    loss = lambda output, target: (output * target).mean()  # noqa: E731
    y = torch.rand(twin(x).shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        step = at.compile_step(model, loss, optimizer, example=(x, y), chip="m4", device="sim")
        value = step(x, y)
    step.sync()
    own = torch.optim.SGD(twin.parameters(), 1e-3)
    expected = loss(twin(x), y)
    expected.backward()
    own.step()
    assert abs(float(value) - float(expected.detach())) < 0.01 * abs(float(expected.detach()))
    for p, q, before in zip(model.parameters(), twin.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() < 0.02 * (q - before).norm()


def by_hand(x: torch.Tensor) -> torch.Tensor:
    """A divergence of two near softmaxes, at a high temperature."""
    p = torch.softmax(x / 3, 1)
    return (p * (p.log() - torch.log_softmax(0.8 * x / 3, 1))).sum(1)


def clustering(x: torch.Tensor) -> torch.Tensor:
    """Shares that are no softmaxes: deep embedded clustering."""
    q = 1 / (1 + 0.1 * x**2)
    q = q / q.sum(1, keepdim=True)
    p = q**2 / q.sum(0)
    return nn.functional.kl_div(q.log(), (p / p.sum(1, keepdim=True)).detach(), reduction="batchmean")


OTHER_DIVERGENCES: dict[str, Op] = {
    "another p": lambda x: (x.softmax(1) * ((2 * x).softmax(1).log() - x.log_softmax(1))).sum(1),
    "another axis": lambda x: (x.softmax(1) * (x.softmax(1).log() - (2 * x).log_softmax(1))).sum(0),
    "the other way round": lambda x: (x.softmax(1) * ((2 * x).log_softmax(1) - x.log_softmax(1))).sum(1),
}


@pytest.mark.parametrize("op", [by_hand, clustering, *OTHER_DIVERGENCES.values()])
def test_divergences_by_hand_are_pytorchs(op: Op) -> None:
    results = []
    for rewritten in (False, True):
        x = normal(6, 5).double().requires_grad_()
        if rewritten:
            with rewriting():
                value = op(x).sum()
        else:
            value = op(x).sum()
        value.backward()
        assert x.grad is not None
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("op", [by_hand, clustering])
def test_small_divergences_keep_their_value(op: Op) -> None:
    class Applied(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return op(x).mean()

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 5), Applied()), torch.randn(6, 8) * 2
    expected, y = float(model(x).detach()), torch.zeros(())
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    step = at.compile_step(
        model, lambda output, _: output, optimizer, example=(x, y), chip="m4", device="sim"
    )
    assert abs(float(step(x, y)) - expected) < 0.03 * expected
