"""What a model needs before it is compiled: parameters that hold numbers, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import ane_trainer as at
from ane_trainer.ane.dispatch import StepOptions

X, Y = torch.randn(16, 8), torch.randint(0, 3, (16,))


def _step(model: nn.Module) -> object:
    return at.compile_step(model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), (X, Y))


def _forward(model: nn.Module) -> object:
    return at.compile_forward(model, X)


def _trained(model: nn.Module) -> object:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return at.Trainer(model, "cross_entropy", optimizer, report=at.Reporter()).fit([(X, Y)])


@pytest.mark.parametrize("use", [_step, _forward, _trained])
@pytest.mark.parametrize(
    "model",
    [lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)), lambda: nn.Linear(8, 3, device="meta")],
)
def test_parameters_without_numbers_are_named(
    model: Callable[[], nn.Module], use: Callable[[nn.Module], object]
) -> None:
    with pytest.raises(at.AneTrainerError, match=r"ANE103 .*weight.* without .*Run the model once"):
        use(model())


def test_numbers_of_numpy_count_as_whole_ones() -> None:
    options = StepOptions(verify=np.int64(5))  # type: ignore[arg-type]
    assert [options.verifies(step) for step in (0, 4, 5)] == [True, False, True]


def test_a_loss_given_as_a_class_is_told_how_to_write_it() -> None:
    model = nn.Linear(8, 3)
    with pytest.raises(at.AneTrainerError, match=r"ANE100 .*Write CrossEntropyLoss\(\)"):
        at.Trainer(model, nn.CrossEntropyLoss, torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]


def test_one_hot_whole_numbers_are_told_both_ways_out() -> None:
    model = nn.Linear(8, 3)
    trainer = at.Trainer(
        model, "cross_entropy", torch.optim.SGD(model.parameters(), lr=0.1), report=at.Reporter()
    )
    with pytest.raises(at.AneTrainerError, match=r"DATA105 .*y\.argmax\(1\).*y\.float\(\)"):
        trainer.fit([(X, nn.functional.one_hot(Y, 3))])
