"""Exponentials written out train as softmax, logsumexp, sigmoid and softplus do, whatever the size of the scores."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from tests.ane.capture.rewrites.derivatives import value_and_gradient

Op = Callable[[torch.Tensor], torch.Tensor]


def over_sum(x: torch.Tensor) -> torch.Tensor:
    e = torch.exp(x)
    return e / e.sum(1, keepdim=True)


def over_new_axis(x: torch.Tensor) -> torch.Tensor:
    e = x.exp()
    return e / e.sum(-1)[:, None]


def over_unsqueezed(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x) / torch.sum(torch.exp(x), dim=1).unsqueeze(1)


def over_all(x: torch.Tensor) -> torch.Tensor:
    e = x.exp()
    return 100.0 * (e / e.sum())


WRITTEN: dict[str, Op] = {
    "over sum": over_sum, "new axis": over_new_axis, "unsqueezed": over_unsqueezed, "over all": over_all,
    "logarithm": lambda x: over_sum(x).log(), "logsumexp": lambda x: x - x.exp().sum(1, keepdim=True).log(),
    "log1p": lambda x: torch.log1p(x.exp()), "log 1 +": lambda x: torch.log(1 + x.exp()),
    "1 / (1 + exp)": lambda x: 1 / (1 + torch.exp(-x)), "exp / (1 + exp)": lambda x: x.exp() / (x.exp() + 1.0),
    "x / (1 + exp)": lambda x: x / (1 + torch.exp(-x)), "reciprocal": lambda x: (1 + (-x).exp()).reciprocal(),
}  # fmt: skip

#: What is none of these stays what it is.
OTHERS: dict[str, Op] = {
    "other axis": lambda x: x.exp() / x.exp().sum(0, keepdim=True).T.sum(),
    "two shapes": lambda x: x[:5].exp() / x[:5].exp().sum(0)[:, None],
    "chosen rows": lambda x: x.exp() / x.exp().sum(1)[torch.arange(5, -1, -1)][:, None],
    "two": lambda x: torch.log(2 + x.exp()), "masked": lambda x: x.exp() / (x.exp() * (x > 0)).sum(1, keepdim=True),

    "written to": lambda x: x.exp().sum(1, keepdim=True).mul_(2.0).log() + x,
    "both": lambda x: (x.exp().sum() + 1).log() + x,
}  # fmt: skip


@pytest.mark.parametrize("name", [*WRITTEN, *OTHERS])
def test_values_and_gradients_are_pytorchs(name: str) -> None:
    op = {**WRITTEN, **OTHERS}[name]
    results = [value_and_gradient(op, rewritten) for rewritten in (False, True)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", WRITTEN)
def test_scores_may_lie_far_apart(name: str) -> None:
    class Applied(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return WRITTEN[name](x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), Applied(), nn.Linear(16, 3))
    x, y = 20.0 * torch.randn(32, 8), torch.randint(0, 3, (32,))
    twin, start = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        step = at.compile_step(model, "cross_entropy", optimizer, (x, y), fidelity="fast")
        step(x, y)
        step.sync()
    F.cross_entropy(twin(x), y).backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    for before, own, true in zip(start, model.parameters(), twin.parameters(), strict=True):
        want = true.detach() - before
        assert float((own.detach() - before - want).norm()) < 0.02 * float(want.norm()) + 1e-6
