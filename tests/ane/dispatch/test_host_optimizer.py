"""Optimizers without a rule: in PyTorch fp32 on the host, at the price of their own step, and said so."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ane_trainer import Trainer, compile_step
from ane_trainer.ane.dispatch.host_optimizer import HostOptimizer
from ane_trainer.ane.errors import UnsupportedModel, UsageError
from tests.ane.dispatch.test_gradients import Lion, batches, mlp, run


class Drawing(Lion):
    """One whose updates hang on what it reads from tensors and on random numbers."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and float(p.grad.norm()) > 1e-3:
                    p.grad.add_(torch.randn_like(p), alpha=1e-3)
        super().step()


REASONS: list[tuple[Callable[[Any], torch.optim.Optimizer], str]] = [
    (lambda p: Drawing(p), "has no update rule for the engine"),
    (lambda p: torch.optim.Rprop(p), "has no update rule for the engine"),
    (
        lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
        "has no update rule for its settings",
    ),
]


@pytest.mark.parametrize(("make", "reason"), REASONS)
def test_what_has_no_rule_runs_on_the_host_and_says_why(
    make: Callable[[Any], torch.optim.Optimizer], reason: str
) -> None:
    torch.manual_seed(3)
    step = run(make, 3)[1]
    place = step.placement()
    assert (step.optimizer_on, place["optimizer_on"], place["optimizer_reason"]) == ("host", "host", reason)
    assert reason in place["where"]
    with pytest.raises(UnsupportedModel, match=re.escape(reason)):
        run(make, 1, optimizer_on="engine")


def test_its_path_is_pytorchs() -> None:
    error, step, _ = run(REASONS[2][0], 8, accumulate=2)
    assert step.applied_steps == 4
    assert error < 0.01


def test_it_gets_gradients_in_pytorchs_size_when_their_units_move() -> None:
    """Units move between steps, after the run whose gradients they were: those were taken for other ones."""
    torch.manual_seed(3)
    layers = (
        torch.nn.Linear(8, 16, bias=False),
        torch.nn.BatchNorm1d(16),
        torch.nn.Tanh(),
        torch.nn.Linear(16, 4),
    )
    model = torch.nn.Sequential(*layers)
    exact = copy.deepcopy(model)
    own, other = (torch.optim.ASGD(m.parameters(), 1e-2) for m in (model, exact))
    data = [(torch.randn(16, 8), torch.randn(16, 4) * 0.5**i) for i in range(6)]
    step = compile_step(model, "mse", own, example=data[0], device="sim", verify="off")
    before = copy.deepcopy(model.state_dict())
    for x, y in data:
        step(x, y)
        other.zero_grad()
        torch.nn.functional.mse_loss(exact(x), y).backward()
        other.step()
    step.sync()
    for name, q in exact.named_parameters():
        moved = q.detach() - before[name]
        assert float((model.state_dict()[name] - q.detach()).norm()) < 0.02 * float(moved.norm()), name


def test_an_update_costs_what_the_optimizers_own_step_costs() -> None:
    """Timed in turn in one run; operations are counted in the first update only."""
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(9)])
    twin = copy.deepcopy(model)
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in twin.named_parameters():
        p.grad = gradients[name].clone()
    host, plain = HostOptimizer(model, Lion(model.parameters())), Lion(twin.parameters())
    host.update(gradients)
    plain.step()
    counted = host.flops
    times: list[tuple[float, float]] = []
    for _ in range(30):
        start = time.perf_counter()
        host.update(gradients)
        middle = time.perf_counter()
        plain.step()
        times.append((middle - start, time.perf_counter() - middle))
    ours, theirs = (min(column) for column in zip(*times, strict=True))
    assert ours < 2.0 * theirs  # 1.2; counting each step made it 5
    assert host.flops == counted > 9 * 64 * 64
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_saved_on_the_host_goes_on_there() -> None:
    """Also of an optimizer that has a rule; the other place is refused by name."""
    data, model = batches(6), mlp()
    options: dict[str, Any] = {"example": data[0], "fidelity": "fast"}
    step = compile_step(
        model, "cross_entropy", torch.optim.Adam(model.parameters()), optimizer_on="host", **options
    )
    for x, y in data[:3]:
        step(x, y)
    kept, other = step.state_dict(), copy.deepcopy(model)
    for x, y in data[3:]:
        step(x, y)
    optimizer = torch.optim.Adam(other.parameters())
    again = compile_step(other, "cross_entropy", optimizer, state=kept, **options)
    assert again.optimizer_on == "host"
    assert "was saved" in again.placement()["optimizer_reason"]
    for x, y in data[3:]:
        again(x, y)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for here, there, state in (("engine", "host", kept), ("host", "engine", None)):
        fresh = mlp()
        adam = torch.optim.Adam(fresh.parameters())
        if state is None:
            state = compile_step(fresh, "cross_entropy", adam, **options).state_dict()
        with pytest.raises(
            UsageError, match=f"needs an optimizer on the {here}.*saved with it on the {there}"
        ):
            compile_step(fresh, "cross_entropy", adam, state=state, optimizer_on=here, **options)


def test_the_trainer_resumes_it(tmp_path: Path) -> None:
    data = batches(6)
    model = mlp()
    trainer = Trainer(model, "cross_entropy", Lion(model.parameters()), device="sim", fidelity="fast")
    trainer.fit(data, epochs=2)
    path = trainer.save(tmp_path / "run")
    trainer.fit(data, epochs=1)
    other = mlp()
    resumed = Trainer.resume(path, model=other, optimizer=Lion(other.parameters()))
    resumed.fit(data, epochs=1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


class Looking(torch.nn.Module):
    """A table whose gradient is sparse in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = torch.nn.Embedding(20, 4, sparse=True), torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.table(x).sum(1))  # type: ignore[no-any-return]


SPARSE: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1),
    lambda m: torch.optim.SparseAdam(list(m.table.parameters()), lr=0.1),
]


@pytest.mark.filterwarnings("ignore:.*parse:UserWarning")
@pytest.mark.parametrize("make", SPARSE)
def test_tables_with_sparse_gradients(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = Looking()
    twin = copy.deepcopy(model)
    own, theirs = make(model), make(twin)
    given = [(torch.randint(0, 20, (8, 3)), torch.randn(8, 3)) for _ in range(3)]
    step = compile_step(model, "mse", own, given[0], device="sim")
    for x, y in given:
        theirs.zero_grad()
        torch.nn.functional.mse_loss(twin(x), y).backward()  # type: ignore[no-untyped-call]
        theirs.step()
        step(x, y)
    step.sync()
    torch.testing.assert_close(model.table.weight, twin.table.weight, rtol=2e-3, atol=2e-3)
