"""Parameters that have seen different numbers of updates; optimizer settings and state that change while training."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.errors import AneTrainerError

Optimizer = torch.optim.Optimizer
Change = Callable[[nn.Module, Optimizer, int], None]


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(16, 8), torch.randn(16, 4)) for _ in range(count)]


def frozen_at_times(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    first = next(iter(model.children()))
    first.requires_grad_(number not in (1, 2))
    for p in first.parameters():
        p.grad = None


def late(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    """Its last layer is frozen at first."""
    list(model.children())[2].requires_grad_(number > 2)


def forgotten(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    if number == 3:
        optimizer.state.pop(next(model.parameters()))


def betas(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (0.9 - 0.05 * number, group["betas"][1] - 0.01 * number)
        if "alpha" in group:
            group["alpha"] = 0.99 - 0.02 * number


def large(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    """Moments far above the gradients."""
    if number == 2:
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    state[name] = torch.full_like(value, 100.0)


MAKES: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2), "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2), "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2), "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2),
}  # fmt: skip


def distance(make: Callable[[Any], Optimizer], change: Change, model: nn.Module | None = None) -> float:
    """How far the weights are from PyTorch's, relative to the way they went."""
    model = model or net()
    exact = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    own, other = make(model.parameters()), make(exact.parameters())
    change(model, own, 0)
    change(exact, other, 0)
    data = batches()
    step = at.compile_step(model, "mse", own, example=data[0], device="sim", verify="off")
    for number, (x, y) in enumerate(data, 1):
        step(x, y)
        other.zero_grad()
        nn.functional.mse_loss(exact(x), y).backward()
        other.step()
        change(model, own, number)
        change(exact, other, number)
    step.sync()
    pairs = [(model.state_dict()[n], q.detach(), start[n]) for n, q in exact.named_parameters()]
    apart = sum(float((p - q).square().sum()) for p, q, _ in pairs)
    return float((apart / sum(float((q - s).square().sum()) for _, q, s in pairs)) ** 0.5)


@pytest.mark.parametrize("name", MAKES)
def test_a_layer_that_was_frozen_for_a_while_counts_its_own_updates(name: str) -> None:
    assert distance(MAKES[name], frozen_at_times) < 0.02


@pytest.mark.parametrize("change", [late, forgotten, betas, large])
@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_what_changes_between_steps_is_followed_as_pytorch_does(name: str, change: Change) -> None:
    assert distance(MAKES[name], change) < 0.02


def test_a_schedule_that_changes_betas_in_each_step() -> None:
    schedules: dict[int, torch.optim.lr_scheduler.OneCycleLR] = {}

    def change(model: nn.Module, optimizer: Optimizer, number: int) -> None:
        if number == 0:
            schedules[id(optimizer)] = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=10)
        else:
            schedules[id(optimizer)].step()

    assert distance(MAKES["adam"], change) < 0.02


def test_own_counts_are_part_of_the_state() -> None:
    data, make = batches(8), MAKES["adam"]

    def go(step: Any, model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
        for number in range(first, last):
            step(*data[number])
            frozen_at_times(model, optimizer, number)

    model = net()
    optimizer = make(model.parameters())
    step = at.compile_step(model, "mse", optimizer, example=data[0], device="sim")
    go(step, model, optimizer, 0, 5)
    again = net()
    other = make(again.parameters())
    second = at.compile_step(again, "mse", other, example=data[0], device="sim")
    second.load_state_dict(step.state_dict())
    assert int(other.state[next(again.parameters())]["step"]) == 3
    for part, own, its in ((step, model, optimizer), (second, again, other)):
        go(part, own, its, 5, 8)
        part.sync()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_product_that_does_not_follow_from_its_step_is_refused() -> None:
    model, data = net(), batches()
    optimizer = MAKES["nadam"](model.parameters())
    step = at.compile_step(model, "mse", optimizer, example=data[0], device="sim")
    step(*data[0])
    for state in optimizer.state.values():
        state["step"] = torch.tensor(50.0)
    with pytest.raises(AneTrainerError, match=r"mu_product of 0\.weight"):
        step(*data[1])


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_around_the_steps_of_all_optimizers_are_refused(when: str) -> None:
    register = getattr(sys.modules["torch.optim.optimizer"], f"register_optimizer_step_{when}_hook")
    model, (batch, *_) = net(), batches()
    optimizer = MAKES["adam"](model.parameters())
    step = at.compile_step(model, "mse", optimizer, example=batch, device="sim")
    handle = register(lambda *_: None)
    try:
        with pytest.raises(AneTrainerError, match="hooks around its step"):
            step(*batch)
        host = at.compile_step(model, "mse", optimizer, example=batch, device="sim")
        assert host.optimizer_on == "host"
    finally:
        handle.remove()
