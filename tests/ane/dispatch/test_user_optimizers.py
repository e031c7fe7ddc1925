"""Optimizers that users write out of tensor operations: on the engine, against PyTorch fp32 on the same steps."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ane_trainer import Trainer, compile_step
from ane_trainer.ane.dispatch import TrainingStep
from ane_trainer.ane.dispatch.followed import host_reason
from ane_trainer.ane.errors import Finding, UnsupportedModel
from tests.ane import user_optimizers as user

Make = Callable[[nn.Module], torch.optim.Optimizer]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


def batches(count: int, factor: float = 1.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (factor * torch.randn(16, 12, generator=generator), torch.randint(0, 5, (16,), generator=generator))
        for _ in range(count)
    ]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights and biases with settings of their own."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n.endswith("weight")], "weight_decay": 0.05},
        {"params": [p for n, p in named if n.endswith("bias")], "lr": 4e-3, "weight_decay": 0.0},
    ]


def compiled(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> TrainingStep:
    return compile_step(
        model, "cross_entropy", optimizer, batches(1)[0], **{"fidelity": "fast", "sync": "lazy", **options}
    )


def torch_steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, after: Any = None) -> None:
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if after is not None:
            after()


def distance(model: nn.Module, twin: nn.Module, start: nn.Module) -> float:
    """The largest error of a parameter relative to how far it moved."""
    pairs = zip(model.parameters(), twin.parameters(), start.parameters(), strict=True)
    return max(float(((a - b).norm() / (b - c).norm()).detach()) for a, b, c in pairs)


def compare(make: Make, count: int, **options: Any) -> tuple[float, TrainingStep]:
    """(distance after `count` steps of the engine and of PyTorch, step)."""
    model = mlp()
    twin, start, data = copy.deepcopy(model), copy.deepcopy(model), batches(count)
    step = compiled(model, make(model), **options)
    for x, y in data:
        step(x, y)
    step.sync()
    torch_steps(twin, make(twin), data)
    return distance(model, twin, start), step


#: fp16 gradients are right to 2^-11 each; over 12 steps the path to half a per cent of its length. Where signs of
#: gradients near 0 flip, a weight is two whole steps off: a few of 300 do, each by 2 of 12 steps.
SMOOTH: dict[str, Make] = {
    "adam": lambda m: user.HandAdam(m.parameters()),
    "adam-decay": lambda m: user.HandAdam(m.parameters(), weight_decay=0.01),
    "adam-groups": lambda m: user.HandAdam(groups(m), eps=1e-3),
    "lars": lambda m: user.Lars(m.parameters()),
    "lamb": lambda m: user.Lamb(m.parameters()),
    "adan": lambda m: user.Adan(m.parameters()),
    "sums": lambda m: user.SumOfSquares(m.parameters()),
    "schedule-free": lambda m: user.ScheduleFree(m.parameters()),
    "foreach": lambda m: user.Foreach(m.parameters()),
}
SIGNS: dict[str, Make] = {
    "lion": lambda m: user.Lion(m.parameters()),
    "lion-groups": lambda m: user.Lion(groups(m)),
    "clipped": lambda m: user.ClippedSecondMoment(m.parameters()),
}


@pytest.mark.parametrize("name", [*SMOOTH, *SIGNS])
def test_the_path_is_pytorchs(name: str) -> None:
    error, step = compare({**SMOOTH, **SIGNS}[name], 12)
    assert step.optimizer_on == "engine"
    assert step.engine_flop_fraction == 1.0
    assert (step.dispatches_per_step, step.compiles, step.applied_steps) == (1, 1, 12)
    assert error < (0.005 if name in SMOOTH else 0.15)


@pytest.mark.parametrize("name", ["lion", "adam", "lamb"])
@pytest.mark.parametrize("chip", ["m1", "m5"])
def test_the_same_with_exact_arithmetic(name: str, chip: str) -> None:
    error, _ = compare({**SMOOTH, **SIGNS}[name], 4, fidelity="exact", chip=chip)
    assert error < (0.01 if name in SMOOTH else 0.15)


@pytest.mark.parametrize("name", [*SMOOTH, *SIGNS])
def test_twenty_steps_of_falling_loss(name: str) -> None:
    model = mlp()
    step = compiled(model, {**SMOOTH, **SIGNS}[name](model))
    x, y = batches(1)[0]
    losses = [float(step(x, y)) for _ in range(20)]
    assert all(b < a + 1e-3 for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 0.01


def test_state_stays_on_the_engine_and_comes_back_with_sync() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    own, reference = user.HandAdam(model.parameters()), user.HandAdam(twin.parameters())
    step, data = compiled(model, own), batches(7)
    for x, y in data:
        step(x, y)
    batch_bytes = 2 * (16 * 12 + 16)
    assert step.host_bytes_per_step < batch_bytes + 100  # scalars, loss and flag: no weights, no gradients
    assert float(own.state[model[0].weight]["v"].abs().sum()) == 0.0  # not yet
    step.sync()
    torch_steps(twin, reference, data)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        found, wanted = own.state[p], reference.state[q]
        assert found["step"] == wanted["step"] == 7
        for key in ("m", "v"):
            error = (found[key] - wanted[key]).norm() / wanted[key].norm()
            assert float(error) < 0.01, key
    reference.load_state_dict(own.state_dict())  # PyTorch takes it for its own


def test_schedulers_and_settings_act_without_a_new_program() -> None:
    model = mlp()
    twin, start, data = copy.deepcopy(model), copy.deepcopy(model), batches(12)
    pair = [user.HandAdam(groups(m), eps=1e-3) for m in (model, twin)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 12) for o in pair]
    step = compiled(model, pair[0])
    for number, (x, y) in enumerate(data):
        step(x, y)
        schedules[0].step()
        torch_steps(twin, pair[1], [(x, y)])
        schedules[1].step()
        if number == 5:
            for optimizer in pair:
                optimizer.param_groups[1]["betas"] = (0.8, 0.99)
    step.sync()
    assert (step.compiles, step.optimizer_on) == (1, "engine")
    assert distance(model, twin, start) < 0.005


def test_a_learning_rate_that_starts_at_zero() -> None:
    model = mlp()
    twin, start, data = copy.deepcopy(model), copy.deepcopy(model), batches(8)
    pair = [user.Lion(m.parameters(), lr=1e-3, weight_decay=0.0) for m in (model, twin)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda n: n / 4) for o in pair]
    step = compiled(model, pair[0])
    for x, y in data:
        step(x, y)
        schedules[0].step()
    torch_steps(twin, pair[1], data, schedules[1].step)
    step.sync()
    assert (step.compiles, step.optimizer_on) == (1, "engine")
    assert distance(model, twin, start) < 0.15


@pytest.mark.parametrize("name", ["adam", "adan", "lars", "schedule-free"])
def test_accumulation_and_clipping_come_before_it(name: str) -> None:
    model = mlp()
    twin, start, data = copy.deepcopy(model), copy.deepcopy(model), batches(12)
    own, reference = (SMOOTH[name](m) for m in (model, twin))
    for optimizer in (own, reference):  # so that first steps do not hang on the signs of gradients near 0
        if "eps" in optimizer.param_groups[0]:
            optimizer.param_groups[0]["eps"] = 1e-2
    step = compiled(model, own, accumulate=3, clip_grad_norm=0.5)
    for x, y in data:
        step(x, y)
    step.sync()
    for number, (x, y) in enumerate(data, 1):
        (F.cross_entropy(twin(x), y) / 3).backward()
        if number % 3 == 0:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            reference.step()
            reference.zero_grad()
    assert (step.applied_steps, step.optimizer_on) == (4, "engine")
    assert distance(model, twin, start) < 0.01


@pytest.mark.parametrize("name", ["adam", "adan", "lars", "lamb"])
def test_a_skipped_step_changes_nothing(name: str) -> None:
    model = nn.Linear(12, 5)
    optimizer = SMOOTH[name](model)
    step = compiled(model, optimizer, loss_scale=2.0**15)
    x, y = batches(1)[0]
    step(1000 * x, y)  # overflows: the first step
    assert (step.applied_steps, step.skipped_steps) == (0, 1)
    assert not optimizer.state
    while not step.applied_steps:
        step(x, y)
    step.sync()
    before, numbers = step.port_state(), copy.deepcopy(optimizer.state_dict())
    skipped = step.skipped_steps
    step._mirror.set_scaling(2.0**15)
    step(1000 * x, y)
    assert step.skipped_steps == skipped + 1
    step.sync()
    after = step.port_state()
    for port, value in before.items():
        assert port in ("loss_scale", "loss_scale_inverse", "good_steps") or (after[port] == value).all(), (
            port
        )
    for key, group in optimizer.state_dict()["state"].items():
        for entry, value in group.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(numbers["state"][key][entry]))


@pytest.mark.parametrize("name", ["lion", "adam-groups", "adan", "lars", "lamb", "schedule-free", "sums"])
def test_a_saved_state_continues_bit_for_bit(name: str) -> None:
    make, data = {**SMOOTH, **SIGNS}[name], batches(7)
    model = mlp()
    step = compiled(model, make(model))
    for x, y in data[:4]:
        step(x, y)
    kept = step.state_dict()
    for x, y in data[4:]:
        step(x, y)
    step.sync()
    other = mlp()
    optimizer = make(other)
    again = compile_step(other, "cross_entropy", optimizer, data[5], fidelity="fast", state=kept)
    for x, y in data[4:]:
        again(x, y)
    again.sync()
    assert again.applied_steps == 7
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = step._optimizer.state_dict(), optimizer.state_dict()
    for number, entries in ours["state"].items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][number][key])), key


def test_an_optimizer_with_a_past_goes_on() -> None:
    """Three steps in PyTorch, then on the engine: its state is taken over, at compile time or by `load`."""
    data = batches(9)
    model = mlp()
    optimizer = user.HandAdam(model.parameters())
    torch_steps(model, optimizer, data[:3])
    past = copy.deepcopy(optimizer.state_dict())
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    reference = user.HandAdam(twin.parameters())
    reference.load_state_dict(past)
    step = compiled(model, optimizer)
    assert step.optimizer_on == "engine"
    torch_steps(twin, reference, data[3:])
    for x, y in data[3:]:
        step(x, y)
    step.sync()
    assert distance(model, twin, start) < 0.005
    assert optimizer.state[model[0].weight]["step"] == 9
    fresh = copy.deepcopy(start)
    late = user.HandAdam(fresh.parameters())
    other = compiled(fresh, late)
    late.load_state_dict(past)
    other.load()
    for x, y in data[3:]:
        other(x, y)
    other.sync()
    assert distance(fresh, twin, start) < 0.005


def test_parameters_without_a_gradient_are_left_alone() -> None:
    """Frozen ones, and ones that the loss does not reach; an optimizer that changes them is not followed."""
    for make, place in ((user.Foreach, "engine"), (user.Careless, "host")):
        model = mlp()
        model[0].weight.requires_grad_(False)
        model.register_parameter("unused", nn.Parameter(torch.ones(3)))
        before = model[0].weight.clone(), model.unused.detach().clone()
        x, y = batches(1)[0]
        step = compile_step(model, "cross_entropy", make(model.parameters()), (x, y), fidelity="fast")
        assert torch.equal(model[0].weight, before[0])
        assert torch.equal(model.unused, before[1])
        assert step.optimizer_on == place
        step(x, y)
        assert torch.equal(model[0].weight, before[0]) is (place == "engine")


def test_names_of_state_do_not_clash_with_the_engines() -> None:
    error, step = compare(lambda m: user.Named(m.parameters()), 6)
    assert step.optimizer_on == "engine"
    assert error < 0.005


def test_a_state_saved_on_the_host_goes_on_there() -> None:
    data, model = batches(6), mlp()
    step = compiled(model, user.Adan(model.parameters()), optimizer_on="host")
    for x, y in data[:3]:
        step(x, y)
    kept, other = step.state_dict(), copy.deepcopy(model)
    for x, y in data[3:]:
        step(x, y)
    again = compiled(other, user.Adan(other.parameters()), state=kept)
    assert again.optimizer_on == "host"
    assert "was saved" in again.placement()["optimizer_reason"]
    for x, y in data[3:]:
        again(x, y)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


REFUSED: list[tuple[Make, str]] = [
    (lambda m: user.Looking(m.parameters()), "looks at the content of a tensor.*user_optimizers.py"),
    (lambda m: user.Looking(m.parameters(), how="if"), "looks at the content of a tensor"),
    (lambda m: user.Looking(m.parameters(), how="numpy"), r"reads the content of a tensor \(numpy\)"),
    (lambda m: user.Looking(m.parameters(), how="tolist"), r"reads the content of a tensor \(tolist\)"),
    (lambda m: user.Noisy(m.parameters()), "draws random tensors"),
    (lambda m: user.EveryFew(m.parameters()), "other operations in step 5"),
    (lambda m: user.Normalized(m.parameters()), "replaces a weight"),
    (lambda m: torch.optim.Rprop(m.parameters()), "no rule|in place"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_what_cannot_run_there_runs_on_the_host_and_says_why(make: Make, reason: str) -> None:
    torch.manual_seed(3)
    model = mlp()
    step = compiled(model, make(model))
    x, y = batches(1)[0]
    step(x, y)
    place = step.placement()
    assert (step.optimizer_on, place["optimizer_on"]) == ("host", "host")
    assert step.engine_flop_fraction < 1.0
    assert re.search(reason, place["optimizer_reason"])
    assert place["optimizer_reason"] in place["where"]
    other = mlp()
    with pytest.raises(UnsupportedModel, match=reason):
        compiled(other, make(other), optimizer_on="engine")


def test_what_only_the_update_is_refused_for_is_a_reason_for_the_host() -> None:
    update = Finding("optimizer Mine", "sort", "is not there.", "Leave it out.")
    layer = Finding("net.fc (net.py:3)", "sort", "is not there.", "Leave it out.")
    assert host_reason(UnsupportedModel("No:", [update])) == "does what the engine refuses: sort is not there"
    assert host_reason(UnsupportedModel("No:", [update, layer])) == ""


def test_a_closure_is_refused_everywhere() -> None:
    class Searching(user.Optimizer):
        def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
            closure()

    model = mlp()
    with pytest.raises(UnsupportedModel, match="closure"):
        compiled(model, Searching(model.parameters(), {"lr": 0.1}))


def test_what_changes_later_moves_to_the_host_with_a_warning() -> None:
    make: Make = lambda m: user.EveryFew(m.parameters(), every=20)  # noqa: E731
    model = mlp()
    twin, start, data = copy.deepcopy(model), copy.deepcopy(model), batches(23)
    step = compiled(model, make(model))
    for x, y in data[:19]:
        step(x, y)
    assert step.optimizer_on == "engine"
    with pytest.warns(UserWarning, match="EveryFew: runs on the host .* from update 20 on; it does other"):
        step(*data[19])
    for x, y in data[20:]:
        step(x, y)
    step.sync()
    assert (step.optimizer_on, step.applied_steps, step.compiles) == ("host", 23, 2)
    torch_steps(twin, make(twin), data)
    assert distance(model, twin, start) < 0.005


def test_a_setting_that_changes_the_operations_moves_it_too() -> None:
    model = mlp()
    twin, start, data = copy.deepcopy(model), copy.deepcopy(model), batches(6)
    pair = [user.HandAdam(m.parameters()) for m in (model, twin)]
    step = compiled(model, pair[0])
    for x, y in data[:3]:
        step(x, y)
    for optimizer in pair[:1]:
        optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.warns(UserWarning, match="does other operations"):
        step(*data[3])
    for x, y in data[4:]:
        step(x, y)
    step.sync()
    torch_steps(twin, pair[1], data[:3])
    pair[1].param_groups[0]["weight_decay"] = 0.1
    torch_steps(twin, pair[1], data[3:])
    assert distance(model, twin, start) < 0.005


def test_a_learning_rate_that_grows_a_thousandfold_is_scaled_anew() -> None:
    model = mlp()
    twin, start, data = copy.deepcopy(model), copy.deepcopy(model), batches(8)
    pair = [user.HandAdam(m.parameters(), lr=1e-6) for m in (model, twin)]
    step = compiled(model, pair[0])
    for number, batch in enumerate(data):
        if number == 4:
            for optimizer in pair:
                optimizer.param_groups[0]["lr"] = 1e-3
        step(*batch)
        torch_steps(twin, pair[1], [batch])
    step.sync()
    assert (step.compiles, step.optimizer_on, step.applied_steps) == (2, "engine", 8)
    assert distance(model, twin, start) < 0.005


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("name", ["adam", "lamb"])
def test_small_and_large_gradients(name: str, factor: float) -> None:
    model = mlp()
    twin, start, data = copy.deepcopy(model), copy.deepcopy(model), batches(6)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target) * factor

    step = compile_step(model, loss, SMOOTH[name](model), data[0], fidelity="fast", sync="lazy")
    for x, y in data:
        step(x, y)
    step.sync()
    reference = SMOOTH[name](twin)
    for x, y in data:
        reference.zero_grad()
        loss(twin(x), y).backward()
        reference.step()
    assert step.skipped_steps == 0
    assert distance(model, twin, start) < 0.01


def test_the_trainer_resumes_it(tmp_path: Path) -> None:
    data = batches(6)
    model = mlp()
    trainer = Trainer(model, "cross_entropy", user.Adan(model.parameters()), device="sim", fidelity="fast")
    trainer.fit(data, epochs=2)
    path = trainer.save(tmp_path / "run")
    trainer.fit(data, epochs=1)
    other = mlp()
    resumed = Trainer.resume(path, model=other, optimizer=user.Adan(other.parameters()))
    resumed.fit(data, epochs=1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
