"""The first step against fp32: what it says of steps that agree, and of one whose norms overflow."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.capture import step as capture_step


def batch(scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 8) * scale, torch.randint(0, 3, (16,))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Dropout(0.2), nn.Linear(32, 3))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_a_step_in_range_agrees(optimizer: type[torch.optim.Optimizer]) -> None:
    model, (x, y) = net(), batch()
    step = at.compile_step(model, "cross_entropy", optimizer(model.parameters(), lr=1e-2), (x, y))
    assert step.agreement is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x, y)
    agreement = step.agreement
    assert agreement.agrees
    assert agreement.loss < 5e-3
    assert agreement.update < 0.02
    assert set(agreement.updates) == {name for name, _ in model.named_parameters()}
    assert str(agreement).startswith("agrees with fp32: loss ")
    assert json.loads(json.dumps(agreement.to_json()))["step"] == 1


def test_a_step_that_leaves_the_range_is_announced_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_step, "scale_rows", lambda graph: 0)
    monkeypatch.setattr(capture_step, "keep_in_range", lambda captured, examples: captured)
    model, (x, y) = net(), batch(3000.0)
    step = at.compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=1e-2), (x, y))
    with pytest.warns(
        at.NumericsWarning, match=r"departs from fp32.* First 1: mul reaches .* beyond what fp16"
    ):
        step(x, y)
    assert not step.agreement.agrees


@pytest.mark.parametrize(("verify", "compared"), [("first", [1]), ("off", []), (2, [1, 3])])
def test_verify_says_which_steps_are_compared(verify: str | int, compared: list[int]) -> None:
    model, (x, y) = net(), batch()
    step = at.compile_step(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=1e-2), (x, y), verify=verify
    )
    seen = []
    for _ in range(4):
        step(x, y)
        number = step.agreement.step if step.agreement else None
        seen += [number] if number is not None and number not in seen else []
    assert seen == compared
    assert step.agreement is None or step.agreement.agrees


def test_verify_must_be_a_rhythm() -> None:
    model, example = net(), batch()
    with pytest.raises(at.AneTrainerError, match="verify"):
        at.compile_step(
            model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=1e-2), example, verify=0
        )


def test_clipping_and_the_host_optimizer_are_compared() -> None:
    for options in ({"clip_grad_norm": 0.1}, {"clip_grad_value": 0.01}, {"optimizer_on": "host"}):
        model, (x, y) = net(), batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        step = at.compile_step(model, "cross_entropy", optimizer, (x, y), **options)
        step(x, y)
        assert step.agreement.agrees, options
        assert step.agreement.update > 0.0
