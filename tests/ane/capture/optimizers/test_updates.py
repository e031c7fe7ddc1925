"""Captured updates against the real torch.optim, three steps; the graphs run in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ane_trainer.ane.capture import capture_training
from ane_trainer.ane.capture.optimizers.momentum import SGD, orthogonal
from ane_trainer.ane.capture.optimizers.rule import RESIDUAL_SCALE, two_term_add
from ane_trainer.ane.capture.optimizers.table import rule_for, scalar_values, structure
from ane_trainer.ane.errors import UnsupportedModel, UsageError
from tests.ane.capture.harness import FxStep, torch_step

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 12, generator=generator), torch.randint(0, 5, (8,), generator=generator))
        for _ in range(count)
    ]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for n, p in model.named_parameters() if n.endswith("weight")], "weight_decay": 0.05},
        {"params": [p for n, p in model.named_parameters() if n.endswith("bias")], "lr": 0.004},
    ]


CASES: dict[str, Optimizers] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "sgd-momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "sgd-nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "sgd-dampening": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.8, dampening=0.3),
    "sgd-decay": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd-maximize": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True, weight_decay=0.01),
    "sgd-groups": lambda m: torch.optim.SGD(groups(m), lr=0.02, momentum=0.9),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, eps=1e-4),
    "adam-decay": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.01),
    "adam-amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, eps=1e-4, amsgrad=True),
    "adam-maximize": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, eps=1e-4, maximize=True),
    "adam-betas": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, eps=1e-4, betas=(0.5, 0.9)),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.1),
    "adamw-groups": lambda m: torch.optim.AdamW(groups(m), lr=1e-3, eps=1e-4),
    "adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=2e-3, eps=1e-4, weight_decay=0.01),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=2e-3, eps=1e-4, weight_decay=0.01),
    "nadam-decoupled": lambda m: torch.optim.NAdam(
        m.parameters(), eps=1e-4, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "radam": lambda m: torch.optim.RAdam(m.parameters(), lr=2e-3, eps=1e-4, weight_decay=0.01),
    "radam-rectified": lambda m: torch.optim.RAdam(m.parameters(), lr=2e-3, eps=1e-4, betas=(0.5, 0.9)),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.01),
    "rmsprop-all": lambda m: torch.optim.RMSprop(
        m.parameters(), lr=1e-3, eps=1e-4, momentum=0.9, centered=True
    ),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2, eps=1e-4, lr_decay=0.1),
    "adam-amsgrad-decay": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-4, amsgrad=True),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2, weight_decay=0.1),
    "adafactor-groups": lambda m: torch.optim.Adafactor(groups(m), lr=3e-2, eps=(1e-3, 1e-2), d=2.0),
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters(), lr=1.0, weight_decay=0.01),
    "adadelta-groups": lambda m: torch.optim.Adadelta(groups(m), lr=0.5, maximize=True),
    "adamw-tensor-lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-3), eps=1e-4),
}


@pytest.mark.parametrize("name", CASES)
def test_some_steps_equal_torch(name: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, reference = CASES[name](model), CASES[name](twin)
    data = batches(10 if name.startswith("radam") else 4)  # RAdam changes its rule at the sixth step
    step = FxStep(capture_training(model, "cross_entropy", optimizer, data[0]), model, optimizer)
    start = {n: p.detach().clone() for n, p in twin.named_parameters()}
    for x, y in data[1:]:
        expected = torch_step(twin, F.cross_entropy, reference, x, y)
        loss, applied = step.step({"x": x, "y": y})
        assert applied == 1.0
        assert loss == pytest.approx(expected, rel=1e-5)
    for parameter_name, parameter in twin.named_parameters():
        moved = (parameter.detach() - start[parameter_name]).abs().max().item()
        error = (step.value(parameter_name) - parameter.detach()).abs().max().item()
        assert error <= 2e-5 * moved + 1e-8 * len(data), parameter_name  # float32 on both sides


def test_default_epsilon_differs_only_by_the_floor_under_the_root() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, reference = (torch.optim.Adam(m.parameters()) for m in (model, twin))
    (x, y), *_ = batches(1)
    capture = capture_training(model, "cross_entropy", optimizer, (x, y))
    step = FxStep(capture, model, optimizer)
    torch_step(twin, F.cross_entropy, reference, x, y)
    step.step({"x": x, "y": y})
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        peak = parameter.grad.abs().max()
        # one step moves every weight by lr; the floor, at most 2^-17 of the largest gradient, shortens it
        shortened = 1e-3 * (2.0**-17 * peak / (parameter.grad.abs() + 2.0**-17 * peak))
        error = (step.value(name) - parameter.detach()).abs()
        assert (error <= shortened + 1e-7).all(), name


def test_moments_are_torch_moments_in_their_units() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    make = CASES["adam"]
    optimizer, reference = make(model), make(twin)
    (x, y), *_ = batches(1)
    step = FxStep(capture_training(model, "cross_entropy", optimizer, (x, y)), model, optimizer)
    torch_step(twin, F.cross_entropy, reference, x, y)
    step.step({"x": x, "y": y})
    for (name, _), own in zip(model.named_parameters(), twin.parameters(), strict=True):
        state = reference.state[own]
        for slot in ("exp_avg", "exp_avg_sq"):
            (kept,) = (
                s for s in rule_for(optimizer).slots(optimizer.param_groups[0], (1,)) if s.name == slot
            )
            value = step.value(f"{name}/{slot}") * kept.bias(optimizer.param_groups[0], 1)
            largest = state[slot].abs().max().item()
            torch.testing.assert_close(value.float(), state[slot], rtol=1e-4, atol=1e-6 * largest)


def rates(optimizer: torch.optim.Optimizer, step: int) -> list[float]:
    """Of SGD, for one parameter whose unit is 256."""
    return scalar_values(optimizer, SGD, step, [[256.0]])["rate"]


def test_schedulers_act_without_a_new_capture() -> None:
    optimizer = CASES["sgd"](mlp())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = rates(optimizer, 1)[0]
    optimizer.step()
    scheduler.step()
    assert rates(optimizer, 2)[0] == before / 2


def test_a_changed_value_is_no_other_structure() -> None:
    optimizer = CASES["sgd-momentum"](mlp())
    compiled = structure(optimizer, SGD)
    optimizer.param_groups[0]["momentum"] = 0.95
    assert structure(optimizer, SGD) == compiled
    optimizer.param_groups[0]["weight_decay"] = 0.01
    assert structure(optimizer, SGD) != compiled


def test_a_scalar_beyond_fp16_is_refused() -> None:
    model = mlp()
    limit = 65504.0 * 256 / RESIDUAL_SCALE
    assert rates(torch.optim.SGD(model.parameters(), lr=limit), 1) == [-65504.0]
    with pytest.raises(UsageError, match="smaller learning rate"):
        rates(torch.optim.SGD(model.parameters(), lr=limit * 1.01), 1)


def test_unknown_optimizer_names_the_supported_ones() -> None:
    class Mine(torch.optim.SGD):
        pass

    for optimizer in (Mine(mlp().parameters(), lr=0.1), torch.optim.Rprop(mlp().parameters())):
        with pytest.raises(UnsupportedModel, match=r"torch\.optim\.AdamW") as caught:
            rule_for(optimizer)
        assert type(optimizer).__name__ in str(caught.value)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (16, 16)])
def test_orthogonal_maps_singular_values_by_its_polynomial(shape: tuple[int, int]) -> None:
    """The witness: U p(s) V^T, the polynomial iterated on singular values in double precision."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    a, b, c = factors = (3.4445, -4.7750, 2.0315)
    left, s, right = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    found, power = orthogonal(x, factors, 5)
    torch.testing.assert_close(
        found.double() * 2.0**-power, left @ torch.diag(s) @ right, rtol=1e-4, atol=1e-5
    )


def test_two_terms_keep_steps_that_half_precision_loses() -> None:
    hi, lo = torch.ones(1, dtype=torch.float16), torch.zeros(1, dtype=torch.float16)
    for _ in range(1000):  # 1e-5 is a fiftieth of half an ulp of 1.0
        hi, lo = two_term_add(hi, lo, torch.tensor([1e-5 * RESIDUAL_SCALE], dtype=torch.float16))
    assert float(hi) + float(lo) / RESIDUAL_SCALE == pytest.approx(1.01, rel=2e-5)
