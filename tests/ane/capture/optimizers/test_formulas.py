"""Formulas of the rules' scalars: the same float64 as the rule, for each optimizer, over steps, units and settings."""

from __future__ import annotations

import pytest
import torch

from ane_trainer.ane.capture.optimizers.formulas import (
    Traced,
    evaluate,
    formula,
    settings,
    sqrt,
    traced_group,
)
from ane_trainer.ane.capture.optimizers.rule import largest_gradient
from ane_trainer.ane.capture.optimizers.table import plain, rule_for
from ane_trainer.ane.errors import UsageError

WEIGHTS = [torch.nn.Parameter(torch.ones(3, 2))]
OPTIMIZERS = [
    torch.optim.SGD(WEIGHTS, lr=0.1),
    torch.optim.SGD(WEIGHTS, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=1e-3),
    torch.optim.Adam(WEIGHTS, lr=1e-3, weight_decay=0.1),
    torch.optim.AdamW(WEIGHTS, lr=3e-4, amsgrad=True),
    torch.optim.Adamax(WEIGHTS),
    torch.optim.NAdam(WEIGHTS),
    torch.optim.RAdam(WEIGHTS),
    torch.optim.RMSprop(WEIGHTS, momentum=0.5, centered=True),
    torch.optim.Adagrad(WEIGHTS, lr_decay=0.01),
    torch.optim.Adadelta(WEIGHTS),
    torch.optim.Adafactor(WEIGHTS),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_formulas_give_the_rules_numbers(optimizer: torch.optim.Optimizer) -> None:
    rule, group = rule_for(optimizer), plain(optimizer.param_groups[0])
    traced, known = traced_group(group), settings(group)
    names = rule.scalars(group, 1)
    formulas = {name: formula(lambda t, name=name: rule.scalars(traced, t)[name]) for name in names}
    unit = Traced(64.0, "unit")
    own = {
        name: formula(lambda t, name=name: rule.unit_scalars(traced, t, unit)[name])
        for name in rule.unit_scalars(group, 1, 64.0)
    }
    limit = formula(lambda t: largest_gradient(rule.scalars(traced, t), rule.unit_scalars(traced, t, unit)))
    assert any("lr" in text for text in (*formulas.values(), *own.values()))
    for lr, step, power in ((group["lr"], 1, 0.5), (0.37, 2, 2048.0), (1e-4, 6, 8.0), (0.02, 777, 2.0**-6)):
        now = {**group, "lr": lr}
        values = {**known, "lr": lr, "t": float(step), "unit": power}
        scalars, by_unit = rule.scalars(now, step), rule.unit_scalars(now, step, power)
        assert {name: evaluate(text, values) for name, text in formulas.items()} == scalars
        assert {name: evaluate(text, values) for name, text in own.items()} == by_unit
        assert evaluate(limit, values) == largest_gradient(scalars, by_unit)


def test_signs_and_brackets_stay() -> None:
    a, b = Traced(3.0, "a"), Traced(2.0, "b")
    for value in (
        a - (b - 1),
        (a + b) * -2.0,
        a / (b * a),
        -((a**2) ** b),
        1 - a / b,
        (-a) ** 2,
        sqrt(a + b) ** -1,
    ):
        assert evaluate(value.text, {"a": 3.0, "b": 2.0}) == float(value)


def test_a_scalar_without_a_formula_is_refused() -> None:
    with pytest.raises(UsageError, match="no formula"):
        formula(lambda t: float(t) + 0.5)
    assert formula(lambda t: 1.0 if t == 1 else 0.5) == "1.0 if t <= 1 else 0.5"
