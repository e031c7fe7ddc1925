"""Settings of the optimizer that change a program's operations between two steps: another program goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ane_trainer as at
from ane_trainer.ane.dispatch.guards import Guards
from ane_trainer.ane.errors import UsageError

Optimizer = torch.optim.Optimizer


def _set(**settings: object) -> Callable[[nn.Module, Optimizer], None]:
    def change(model: nn.Module, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group.update(settings)

    return change


def _all_trained(model: nn.Module, optimizer: Optimizer) -> None:
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    optimizer.add_param_group({"params": [p for p in model.parameters() if id(p) not in known], "lr": 1e-2})


def _one_group_less(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups.pop(0)


def _groups(m: nn.Module) -> list[dict[str, object]]:
    return [{"params": list(layer.parameters())} for layer in m.children() if list(layer.parameters())]


CASES: dict[str, tuple[Callable[[nn.Module], Optimizer], Callable[[nn.Module, Optimizer], None]]] = {
    "weight decay": (lambda m: torch.optim.Adam(m.parameters(), 1e-2), _set(weight_decay=0.1)),
    "momentum": (lambda m: torch.optim.SGD(m.parameters(), 0.1), _set(momentum=0.9)),
    "no momentum": (lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9), _set(momentum=0.0)),
    "maximize": (lambda m: torch.optim.Adam(m.parameters(), 1e-2), _set(maximize=True)),
    "one group less": (lambda m: torch.optim.SGD(_groups(m), 0.1, momentum=0.5), _one_group_less),
    "a group": (lambda m: torch.optim.Adam(list(m.parameters())[2:], 1e-2), _all_trained),
}


@pytest.mark.parametrize("name", CASES)
def test_the_next_steps_are_pytorchs(name: str) -> None:
    make, change = CASES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    batches = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(4)]
    step = at.compile_step(model, "cross_entropy", optimizer, batches[0], device="sim", fidelity="fast")
    for number, (x, y) in enumerate(batches):
        if number == 2:
            step.sync()
            change(model, optimizer)
            change(twin, other)
            before = [p.detach().clone() for p in twin.parameters()]
        step(x, y)
        other.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        other.step()
    step.sync()
    assert step.compiles == 2
    for got, want, start in zip(model.parameters(), twin.parameters(), before, strict=True):
        assert float((got - want).detach().norm()) < 0.02 * float((want - start).detach().norm()) + 1e-4


def _momentum(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["momentum_buffer"].mul_(4.0)


def _weights(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(1.5)  # type: ignore[index]


@pytest.mark.parametrize("setting", [{"weight_decay": 0.05}, {"nesterov": True}, {"maximize": True}])
@pytest.mark.parametrize("steps", [0, 2])
def test_what_changes_together_with_a_setting_counts(setting: dict[str, object], steps: int) -> None:
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)),
        torch.randn(24, 8),
        torch.arange(24) % 3,
    )
    plain = copy.deepcopy(model)
    mine, its = (torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, plain))
    step = at.compile_step(model, "cross_entropy", mine, (x, y), device="sim", threads=1, verify="off")
    for number in range(steps + 3):
        if number == steps:
            for held, optimizer in ((model, mine), (plain, its)):
                _weights(held)
                _momentum(optimizer)
                for group in optimizer.param_groups:
                    group.update(setting)
        its.zero_grad()
        wanted = nn.functional.cross_entropy(plain(x), y)
        assert float(step(x, y)) == pytest.approx(float(wanted.detach()), rel=2e-3)
        wanted.backward()
        its.step()
    step.sync()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a - b).norm() < 2e-3 * b.norm()


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.Adam(m.parameters(), 1e-3, betas=(0.0, 0.0)),
        lambda m: torch.optim.RMSprop(m.parameters(), 1e-3, alpha=0.0),
    ],
)
def test_squares_that_nothing_is_kept_of_are_those_of_the_last_gradient(
    make: Callable[[nn.Module], Optimizer],
) -> None:
    """A gradient a hundred times smaller than the one before was divided by what rounding left of that one."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    twin = copy.deepcopy(model)
    x, y = torch.randn(16, 6), torch.randn(16, 3)
    optimizer, other = make(model), make(twin)
    step = at.compile_step(model, lambda o, t: ((o - t[0]) * t[1]).square().sum(), optimizer, (x, (y, torch.ones(1))),
                           device="sim", verify="off")  # fmt: skip
    for factor in (1.0, 0.1, 0.1):
        size = torch.full((1,), factor)
        step(x, (y, size))
        before = [p.detach().clone() for p in twin.parameters()]
        other.zero_grad()
        ((twin(x) - y) * size).square().sum().backward()
        other.step()
    step.sync()
    for got, want, start in zip(model.parameters(), twin.parameters(), before, strict=True):
        assert float((got - want).detach().norm()) < 0.05 * float((want - start).detach().norm())


def test_a_step_of_0_beside_moments_is_refused() -> None:
    model, x, y = nn.Linear(4, 2), torch.randn(8, 4), torch.randn(8, 2)
    optimizer = torch.optim.Adam(model.parameters())
    step = at.compile_step(model, "mse", optimizer, (x, y), device="sim", verify="off")
    step(x, y)
    for state in optimizer.state.values():
        state["step"].zero_()
    with pytest.raises(UsageError, match="Clear the whole state"):
        step(x, y)
    optimizer.state.clear()
    assert float(step(x, y)) > 0.0


class Agent(nn.Sequential):
    """A network that holds what trains it, as those of many a repository do."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.1)


def test_a_model_that_holds_its_optimizer_does_not_change_by_its_steps() -> None:
    """Each step was taken for a change of the model, which was captured anew for it."""
    torch.manual_seed(0)
    model = Agent()
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    step = at.compile_step(model, "cross_entropy", model.optimizer, (x, y), device="sim", verify="off")
    guards = Guards(model, "cross_entropy")
    for _ in range(3):
        step(x, y)
        step.sync()
        assert not guards.changed()
        assert not guards.differences()
    model.schedule.step()
    assert not guards.differences()
    model.schedule.step()  # a rate that the forward may read
    assert guards.differences() == ["Agent.optimizer.param_groups[0].lr: 0.01 -> 0.001"]
    model.optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    assert "Agent.optimizer: another Adam" in guards.differences()


class Rated(Agent):
    """A network whose forward reads the rate that it is trained at."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = super().forward(x)
        return scores * (100.0 * self.optimizer.param_groups[0]["lr"])


def test_a_rate_that_the_forward_reads_is_followed() -> None:
    torch.manual_seed(0)
    model = Rated()
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    step = at.compile_step(model, "cross_entropy", model.optimizer, (x, y), device="sim", verify="off")
    for _ in range(4):
        step.sync()
        wanted = float(torch.nn.functional.cross_entropy(model(x), y).detach())
        assert float(step(x, y)) == pytest.approx(wanted, rel=5e-3)
        model.schedule.step()
