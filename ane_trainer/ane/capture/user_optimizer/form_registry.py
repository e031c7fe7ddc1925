"""The registry of the rules for forms, and what they share: arguments as forms, numbers, masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ane_trainer.ane.capture.user_optimizer import coefficients as co
from ane_trainer.ane.capture.user_optimizer.coefficients import UNIT, Coefficient, number
from ane_trainer.ane.capture.user_optimizer.following import NotFollowed
from ane_trainer.ane.capture.user_optimizer.forms import Atom, Form, Mask

Value = Form | Mask
Rule = Callable[..., Value]
Given = TypeVar("Given", bound=Rule)
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Given], Given]:
    """Register a rule under ATen's names without overloads."""

    def register(function: Given) -> Given:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def constant(value: Coefficient, shape: tuple[int, ...]) -> Form:
    """The same number everywhere."""
    return Form({}, shape, value)


def numeric(value: Any) -> Form:
    """A form of an argument that may be a truth value, 0 and 1."""
    if isinstance(value, Mask):
        tensor = value.tensor.to(torch.float32)
        return of(Atom(tensor, 0, 0.0, positive=True, states=value.states), UNIT, value.shape)
    return value if isinstance(value, Form) else constant(number(value), ())


def of(atom: Atom, coefficient: Coefficient, shape: tuple[int, ...]) -> Form:
    """coefficient * atom"""
    return Form({atom: coefficient}, shape)


def fixed(form: Any) -> Coefficient | None:
    """The coefficient of a form that is the same number everywhere."""
    return (
        numeric(form).constant if isinstance(form, (Form, int, float)) and not numeric(form).terms else None
    )


def unchanging(form: Any) -> float:
    """A number that is compiled in."""
    found = fixed(form)
    if found is None or not co.is_number(found):
        raise NotFollowed("uses a changing number where one is compiled in", place=False)
    return float(found[1])


def spread(form: Form, shape: Any) -> Form:
    """The form with the shape that broadcasting gives it; sums of tensors broadcast by themselves."""
    return Form(form.terms, tuple(shape), form.constant)
