"""What a `where` does not take counts in no magnitude: steps are fp32's however large it is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.capture.range.calibration import calibration_of, calibration_tensors, magnitudes
from tests.ane.compiler.lower.harness import captured, gradients

Op = Callable[[torch.Tensor], torch.Tensor]

CHOSEN: dict[str, Op] = {
    "elu": F.elu,
    "celu in place": lambda x: F.celu_(x * 1.0, 2.0),
    "exp": lambda x: torch.where(x > 0, x, 0.01 * x.exp()),
    "exp - 1": lambda x: torch.where(x > 0, x, torch.exp(x) - 1.0),
    "both sides": lambda x: torch.where(x > 0, torch.exp(-x), torch.exp(x)),
}


class _Applied(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_not_taken_may_have_any_size(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), _Applied(CHOSEN[name]), nn.LayerNorm(16), nn.Linear(16, 3))
    x, y = torch.randn(32, 8) * 30.0, torch.randint(0, 3, (32,))
    twin = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        step = at.compile_step(
            model, "cross_entropy", torch.optim.SGD(model.parameters(), 0.1), (x, y), fidelity="fast"
        )
        step(x, y)
        step.sync()
    F.cross_entropy(twin(x), y).backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    for before, own, true in zip(start, model.parameters(), twin.parameters(), strict=True):
        want = true.detach() - before
        assert float((own.detach() - before - want).norm()) < 0.02 * float(want.norm()) + 1e-6
    assert step.applied_steps == 1


def test_magnitudes_of_parts_are_kept() -> None:
    x = torch.tensor([[-1.0, 50.0, -2.0, 3.0]])
    module = captured(gradients(lambda x: torch.where(x > 0, x, x.exp() * 2.0).sum(0)), [x]).graph
    found = magnitudes(module, [[x]])
    parts = {n: m for n, m in found.items() if m.part}
    assert parts
    assert all(m.peak < 1.0 for m in parts.values())
    assert calibration_of(calibration_tensors(found)) == found


def test_values_that_are_read_elsewhere_count_whole() -> None:
    x = torch.tensor([[-1.0, 50.0, -2.0, 3.0]])
    module = captured(lambda x: (torch.where(x > 0, x, x.exp()), x.exp()), [x]).graph
    assert not any(m.part for m in magnitudes(module, [[x]]).values())


def far(x: torch.Tensor) -> torch.Tensor:
    """Distances along rays, the last as NeRF has it."""
    return torch.cat([torch.full_like(x[:, :3], 0.2), torch.full_like(x[:, :1], 1e10)], 1)


BEHIND: dict[str, Op] = {
    "behind a relu": lambda x: 1.0 - torch.exp(-F.relu(x) * far(x)),
    "one number": lambda x: torch.exp(
        -F.softplus(x) * torch.cat([torch.ones(3) / 5, torch.full((1,), 1e10)])
    ),
    "of several sizes": lambda x: torch.exp(
        -F.softplus(x) * (far(x) * torch.linspace(1.0, 1.4, 32)[:, None])
    ),
}


@pytest.mark.parametrize("name", BEHIND)
@pytest.mark.parametrize("front", ["step", "compile"])
def test_a_distance_that_stands_for_infinity_costs_its_neighbours_nothing(name: str, front: str) -> None:
    """The last distance along a ray (NeRF) is 1e10: others kept four bits, and gradients were those of another."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 4), _Applied(BEHIND[name]))
    x, y = torch.randn(32, 8), torch.rand(32, 4)
    twin = copy.deepcopy(model)
    loss = lambda output, target: (output * target).sum(1).mean()  # noqa: E731
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", at.NumericsWarning)
        if front == "step":
            step = at.compile_step(model, loss, optimizer, (x, y))
            step(x, y)
            step.sync()
        else:
            loss(torch.compile(model, backend=at.ane.dynamo.ane)(x), y).backward()
            optimizer.step()
    loss(twin(x), y).backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    for before, own, true in zip(start, model.parameters(), twin.parameters(), strict=True):
        want = true.detach() - before
        assert float((own.detach() - before - want).norm()) < 0.02 * float(want.norm())
