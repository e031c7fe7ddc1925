"""Accumulated batches: their update is compared with fp32 as one, since each alone makes none."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import ane_trainer as at

COUNT = 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 8), torch.randint(0, 4, (16,))) for _ in range(3 * COUNT)]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_an_accumulated_update_is_compared(optimizer: type[torch.optim.Optimizer]) -> None:
    model = net()
    step = at.compile_step(
        model, "cross_entropy", optimizer(model.parameters(), lr=1e-2), batches()[0], device="sim",
        accumulate=COUNT, clip_grad_norm=1.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in batches():
            step(x, y)
            x.zero_()  # the loop's own buffer
    assert step.agreement is not None
    assert step.agreement.step == COUNT
    assert set(step.agreement.updates) == {name for name, _ in model.named_parameters()}
    assert step.agreement.update < 0.02


@pytest.mark.parametrize("first", [1.0, 300.0])
def test_an_accumulated_update_that_departs_is_told(first: float) -> None:
    """Entries clipped a million times below the gradients: updates 91 % off, without a word."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    found = [
        (x * (1.0 if number == 0 and first == 1.0 else 300.0), y) for number, (x, y) in enumerate(batches())
    ]
    step = at.compile_step(
        model, "cross_entropy", torch.optim.Adam(model.parameters()), found[0], device="sim", fidelity="fast",
        accumulate=COUNT, clip_grad_value=1e-5,
    )  # fmt: skip
    step(*found[0])
    with pytest.warns(at.NumericsWarning, match=f"step {COUNT} departs from fp32: .* updates 9"):
        step(*found[1])


def test_an_update_with_a_later_batch_of_another_size_has_the_next_compared() -> None:
    model, found = net(), batches()
    step = at.compile_step(
        model,
        "cross_entropy",
        torch.optim.SGD(model.parameters(), 1e-3),
        found[0],
        device="sim",
        accumulate=COUNT,
    )
    steps = []
    for number, (x, y) in enumerate(found):
        step(x * (100.0 if number == COUNT + 1 else 1.0), y)
        steps.append(step.agreement.step if step.agreement is not None and step.agreement.updates else 0)
    assert steps[1] == COUNT
    assert steps[-1] == 3 * COUNT


def test_a_model_that_changed_between_the_batches_has_the_next_update_compared() -> None:
    """The gradients of the first batch are those of other weights."""
    model, found = net(), batches()
    step = at.compile_step(
        model,
        "cross_entropy",
        torch.optim.SGD(model.parameters(), 0.1),
        found[0],
        device="sim",
        accumulate=COUNT,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*found[0])
        with torch.no_grad():
            model[0].weight.neg_()
        step(*found[1])
        assert step.agreement is not None
        assert step.agreement.updates == {}
        step(*found[2])
        step(*found[3])
    assert step.agreement.step == 2 * COUNT
    assert step.agreement.updates
