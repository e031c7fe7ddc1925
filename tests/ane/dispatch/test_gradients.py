"""Clipping, accumulation, schedulers and host-side optimizers in whole steps, against PyTorch fp32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ane_trainer import compile_step
from ane_trainer.ane.dispatch import TrainingStep
from ane_trainer.ane.errors import UnsupportedModel, UsageError

Make = Callable[[Any], torch.optim.Optimizer]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 12, generator=generator), torch.randint(0, 5, (16,), generator=generator))
        for _ in range(count)
    ]


class Lion(torch.optim.Optimizer):
    """A user's optimizer made of tensor operations."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                beta1, beta2 = group["betas"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((m * beta1 + p.grad * (1 - beta1)).sign(), alpha=-group["lr"])
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def distance(model: nn.Module, twin: nn.Module, start: nn.Module) -> float:
    """The largest error of a parameter relative to how far it moved."""
    pairs = zip(model.parameters(), twin.parameters(), start.parameters(), strict=True)
    return max(float(((a - b).norm() / (b - c).norm()).detach()) for a, b, c in pairs)


def run(
    make: Make, steps: int, *, norm: float | None = None, value: float | None = None, accumulate: int = 1,
    scheduler: Any = None, **options: Any,
) -> tuple[float, TrainingStep, nn.Module]:  # fmt: skip
    """`steps` batches on the engine and in PyTorch: (distance, step, PyTorch's model)."""
    model = mlp()
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    own, reference = make(model.parameters()), make(twin.parameters())
    schedulers = [scheduler(own), scheduler(reference)] if scheduler else []
    data = batches(steps)
    step = compile_step(
        model, "cross_entropy", own, data[0], fidelity="fast", sync="lazy", clip_grad_norm=norm,
        clip_grad_value=value, accumulate=accumulate, **options,
    )  # fmt: skip
    for number, (x, y) in enumerate(data, 1):
        step(x, y)
        (F.cross_entropy(twin(x), y) / accumulate).backward()
        if number % accumulate == 0:
            if value is not None:
                nn.utils.clip_grad_value_(twin.parameters(), value)
            if norm is not None:
                nn.utils.clip_grad_norm_(twin.parameters(), norm)
            reference.step()
            reference.zero_grad()
            for item in schedulers:
                item.step()
    step.sync()
    return distance(model, twin, start), step, twin


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-3)


OPTIM = torch.optim
RULES: dict[str, Make] = {
    "adamax": lambda p: OPTIM.Adamax(p, lr=2e-3),
    "nadam": lambda p: OPTIM.NAdam(p, lr=2e-3),
    "radam": lambda p: OPTIM.RAdam(p, lr=2e-3),
    "rmsprop": lambda p: OPTIM.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: OPTIM.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: OPTIM.Adadelta(p, lr=1.0),
}


@pytest.mark.parametrize("name", RULES)
def test_the_path_in_fp16_is_pytorchs_and_so_is_the_state(name: str) -> None:
    # fp16 gradients are right to 2^-11 each; over 12 steps the path to a per cent of its length
    error, step, twin = run(RULES[name], 12)
    assert step.optimizer_on == "engine"
    assert error < 0.01
    own = step._subject.optimizer.state_dict()["state"][0]
    reference = RULES[name](twin.parameters())
    reference.load_state_dict(step._subject.optimizer.state_dict())  # torch takes the state for its own
    assert float(own["step"]) == 12


@pytest.mark.parametrize("norm", [0.05, 0.5, 100.0])
@pytest.mark.parametrize("make", [sgd, adam])
def test_clipping_by_norm(make: Make, norm: float) -> None:
    assert run(make, 8, norm=norm)[0] < 0.02


def test_clipping_by_value_and_both() -> None:
    assert run(sgd, 8, value=0.02)[0] < 0.02
    assert run(sgd, 8, value=0.02, norm=0.1)[0] < 0.02


def test_the_norm_does_not_overflow() -> None:
    """70,000 equal gradients of 200: the sum of squares is 2.8e9, the norm 52,915."""
    model = nn.Linear(280, 250, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x, y = torch.ones(1, 280), torch.zeros(1, 250)
    step = compile_step(
        model, lambda output, target: 200 * (output - target).sum(), optimizer, (x, y),
        fidelity="fast", clip_grad_norm=1.0,
    )  # fmt: skip
    step(x, y)
    assert step.applied_steps == 1
    torch.testing.assert_close(model.weight.norm().item(), 1.0, atol=0.01, rtol=0)


def blunt_adam(parameters: Any) -> torch.optim.Optimizer:
    """Adam whose first steps do not hang on the signs of gradients near 0."""
    return torch.optim.Adam(parameters, lr=2e-3, eps=1e-2)


@pytest.mark.parametrize("make", [sgd, blunt_adam])
def test_accumulation(make: Make) -> None:
    error, step, _ = run(make, 12, accumulate=3, norm=0.5)
    assert error < 0.02
    assert (step.steps, step.applied_steps, step.compiles) == (12, 4, 1)


@pytest.mark.filterwarnings("ignore::ane_trainer.NumericsWarning")
def test_an_overflow_while_accumulating_skips_the_whole_update() -> None:
    model, data = nn.Linear(12, 5), [(1e4 * x, y) for x, y in batches(2)]
    before = [p.detach().clone() for p in model.parameters()]
    example = data[0][0] / 1e4, data[0][1]  # the batches that follow are beyond what it shows
    step = compile_step(
        model, "cross_entropy", sgd(model.parameters()), example,
        loss_scale=2.0**15, accumulate=2, fidelity="fast",
    )  # fmt: skip
    for x, y in data[:2]:
        step(x, y)
    assert (step.applied_steps, step.skipped_steps) == (0, 1)
    # hi and lo together hold a weight to 2^-21
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach(), atol=1e-6, rtol=1e-6)


LR = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Any] = {
    "step": lambda o: LR.StepLR(o, 3, 0.1),
    "cosine": lambda o: LR.CosineAnnealingLR(o, 10),
    "one-cycle": lambda o: LR.OneCycleLR(o, 0.2, total_steps=20),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_act_without_a_new_program(name: str) -> None:
    model = mlp()
    optimizer = sgd(model.parameters())
    data, twin, start = batches(10), copy.deepcopy(model), copy.deepcopy(model)
    reference = sgd(twin.parameters())
    schedules = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)
    step = compile_step(model, "cross_entropy", optimizer, data[0], fidelity="fast")
    for x, y in data:
        step(x, y)
        reference.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        reference.step()
        for schedule in schedules:
            schedule.step()
    assert step.compiles == 1
    assert distance(model, twin, start) < 0.02


def test_an_optimizer_on_the_host_says_so() -> None:
    error, step, _ = run(lambda p: Lion(p), 10, norm=1.0, accumulate=2, optimizer_on="host")
    # a sign that flips where the gradient is near 0 moves a weight by two whole steps
    assert error < 0.2
    assert step.optimizer_on == "host"
    assert "Lion on the host" in step.placement()["where"]
    assert 0.5 < step.engine_flop_fraction < 1.0
    assert step.dispatches_per_step == 1
    gradients = sum(2 * p.numel() for p in mlp().parameters())
    assert step.host_bytes_per_step > 2 * gradients


def test_a_known_optimizer_on_the_host_equals_the_engines() -> None:
    assert run(adam, 10, optimizer_on="host")[0] < 0.01
    assert run(adam, 10, optimizer_on="engine")[1].engine_flop_fraction == 1.0


def test_engine_only_is_refused_without_a_rule() -> None:
    with pytest.raises(UnsupportedModel, match='optimizer_on="host"'):
        run(lambda p: torch.optim.Rprop(p), 1, optimizer_on="engine")


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"LBFGS.*closure"):
        run(lambda p: torch.optim.LBFGS(p), 1)


def test_the_hosts_state_is_saved_and_restored() -> None:
    data = batches(6)
    model = mlp()
    options: Any = {"fidelity": "fast", "optimizer_on": "host"}
    step = compile_step(model, "cross_entropy", Lion(model.parameters()), data[0], **options)
    for x, y in data[:3]:
        step(x, y)
    kept, weights = step.state_dict(), copy.deepcopy(model.state_dict())
    for x, y in data[3:]:
        step(x, y)
    other = mlp()
    other.load_state_dict(weights)
    again = compile_step(other, "cross_entropy", Lion(other.parameters()), data[0], state=kept, **options)
    for x, y in data[3:]:
        again(x, y)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [{"clip_grad_norm": 0.0}, {"clip_grad_value": -1.0}, {"accumulate": 0}, {"optimizer_on": "gpu"}],
)
def test_wrong_settings_are_refused(options: dict[str, Any]) -> None:
    model, data = mlp(), batches(1)
    with pytest.raises(UsageError):
        compile_step(model, "cross_entropy", sgd(model.parameters()), data[0], **options)


def test_frozen_parameters_keep_their_bits() -> None:
    model, data = mlp(), batches(2)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    step = compile_step(model, "cross_entropy", sgd(model.parameters()), data[0], fidelity="fast")
    step(*data[0])
    assert torch.equal(model[0].weight, before)


class Weighed(nn.Module):
    """a * x + b"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a * x[:4]).sum() + (self.b * x[4:]).sum()


@pytest.mark.parametrize("name", ["Adagrad", "RMSprop", "Adam"])
def test_a_norm_that_falls_a_thousandfold_clips_less(name: str) -> None:
    """The small gradient is the same, and what is left of it 1,000 times larger: its square left fp16, and Adagrad went
    ten times too far.
    """
    small = torch.tensor([0.1, -0.2, 0.3])
    batches = [torch.cat((torch.linspace(400.0, 1000.0, 4) * size, small)) for size in (1.0, 1.0, 1e-3)]
    model = Weighed()
    plain = copy.deepcopy(model)
    make = getattr(torch.optim, name)
    optimizer, reference = make(model.parameters(), lr=1e-2), make(plain.parameters(), lr=1e-2)
    loss = lambda o, y: (o * y).sum()  # noqa: E731
    one = torch.ones(())
    step = compile_step(model, loss, optimizer, (batches[0], one), clip_grad_norm=0.06)
    for x in batches:
        step(x, one)
        reference.zero_grad()
        loss(plain(x), one).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.06)
        reference.step()
    step.sync()
    assert step.skipped_steps == 0
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((got - want).detach().norm()) < 0.02 * float(want.detach().norm())


@pytest.mark.parametrize("clip", [{"clip_grad_norm": 0.1}, {"clip_grad_value": 1e-3}], ids=["norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.Adagrad])
def test_clipping_keeps_gradients_and_moments_of_batches_of_other_sizes(
    make: Make, accumulate: int, clip: dict[str, float]
) -> None:
    """Inputs of 1, of 300 and of 1 again: what clipping leaves was squared in a unit a thousand times too small."""
    if accumulate > 1 and "clip_grad_value" in clip:
        pytest.skip("sums of gradients are clipped in the unit that batches need")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    twin = copy.deepcopy(model)
    own, reference = make(model.parameters(), lr=1e-3), make(twin.parameters(), lr=1e-3)
    data = [(torch.randn(16, 8) * s, torch.randn(16, 3)) for s in (1, 300, 1, 300) for _ in range(accumulate)]
    step = compile_step(model, F.mse_loss, own, data[0], accumulate=accumulate, device="sim", **clip)
    for number, (x, y) in enumerate(data, 1):
        start, wanted = copy.deepcopy(model), copy.deepcopy(twin)
        step(x, y)
        step.sync()
        (F.mse_loss(twin(x), y) / accumulate).backward()
        if number % accumulate == 0:
            if "clip_grad_value" in clip:
                nn.utils.clip_grad_value_(twin.parameters(), clip["clip_grad_value"])
            else:
                nn.utils.clip_grad_norm_(twin.parameters(), clip["clip_grad_norm"])
            reference.step()
            reference.zero_grad()
            moved = [p - q for p, q in zip(model.parameters(), start.parameters(), strict=True)]
            right = [p - q for p, q in zip(twin.parameters(), wanted.parameters(), strict=True)]
            apart = torch.cat([(a - b).flatten() for a, b in zip(moved, right, strict=True)])
            assert apart.norm() < 0.1 * torch.cat([b.flatten() for b in right]).norm()
    assert step.skipped_steps == 0
