"""Rules that look at entries one by one: signs, functions, comparisons, choices, limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ane_trainer.ane.capture.user_optimizer import coefficients as co
from ane_trainer.ane.capture.user_optimizer.coefficients import NOUGHT, UNIT
from ane_trainer.ane.capture.user_optimizer.following import NotFollowed
from ane_trainer.ane.capture.user_optimizer.form_registry import RULES, constant, fixed, numeric, of, rule
from ane_trainer.ane.capture.user_optimizer.forms import (
    Atom,
    Form,
    Mask,
    Workshop,
    combine,
    common,
    difference,
)

# -- elementwise


@rule("sign", "sgn")
def _sign(w: Workshop, shape: Any, self: Any) -> Form:
    form = numeric(self)
    if not form.terms:
        return constant(co.sign(form.constant), shape)
    atom, coefficient = w.single(form)
    made = Atom(torch.sign(atom.tensor), 0, 0.0, atom.positive, states=atom.states)
    return of(made, co.sign(coefficient), shape)


@rule("abs", "absolute")
def absolute(w: Workshop, shape: Any, self: Any) -> Form:
    """|self|."""
    form = numeric(self)
    if not form.terms:
        return constant(co.size(form.constant), shape)
    atom, coefficient = w.single(form)
    made = Atom(atom.tensor.abs(), atom.exponent, atom.peak, True, states=atom.states)
    return of(made, co.size(coefficient), shape)


def _function(w: Workshop, shape: Any, self: Any, name: str = "tanh") -> Form:
    """Functions of the number itself: it must be of a size that fp16 holds as it is."""
    form = numeric(self)
    if w.given is None and not -8 <= w.magnitude(form) <= 14:
        raise NotFollowed(f"takes the {name} of numbers too large or small for fp16", place=False)
    tensor = getattr(torch, name)(w.total(form, 0))
    return of(Atom(tensor, 0, w.peak(tensor, 0.0), states=form.states), UNIT, shape)


def _pair(w: Workshop, a: Form, b: Form) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Both in one unit."""
    top = max(w.magnitude(a), w.magnitude(b))
    exponent = w.decide(lambda: 6 - top if math.isfinite(top) else 0)
    return w.total(a, exponent), w.total(b, exponent), exponent


def _choice(w: Workshop, shape: Any, a: Form, b: Form, pick: Callable[..., torch.Tensor]) -> Form:
    """One of the two entry by entry; what both have of a weight or state stays outside."""
    shared = common(a, b)
    rest = [a, b] if shared is None else [difference(a, shared), difference(b, shared)]
    x, y, exponent = _pair(w, *rest)
    tensor = pick(x, y)
    positive = w.positive(rest[0]) and w.positive(rest[1])
    states = rest[0].states | rest[1].states
    made = of(Atom(tensor, exponent, 6.0, positive, states=states, chosen=True), UNIT, shape)
    return made if shared is None else combine(made, shared, UNIT, shape)


@rule("where")
def _where(w: Workshop, shape: Any, condition: Any, self: Any, other: Any) -> Form:
    if not isinstance(condition, Mask):
        raise NotFollowed("chooses by a tensor that holds no truth values", place=False)
    mask = condition.tensor
    return _choice(w, shape, numeric(self), numeric(other), lambda x, y: torch.where(mask, x, y))


@rule("masked_fill")
def _masked_fill(w: Workshop, shape: Any, self: Any, mask: Any, value: Any) -> Form:
    return _where(w, shape, mask, value, self)


@rule("maximum", "fmax")
def larger(w: Workshop, shape: Any, self: Any, other: Any) -> Form:
    """max(self, other)."""
    return _choice(w, shape, numeric(self), numeric(other), torch.maximum)


@rule("minimum", "fmin")
def _minimum(w: Workshop, shape: Any, self: Any, other: Any) -> Form:
    return _choice(w, shape, numeric(self), numeric(other), torch.minimum)


@rule("clamp", "clip")
def _clamp(w: Workshop, shape: Any, self: Any, min: Any = None, max: Any = None) -> Form:
    form = numeric(self)
    for limit, pick, host in ((max, torch.minimum, co.smallest), (min, torch.maximum, co.largest)):
        if limit is None:
            continue
        bound = fixed(limit)
        if not form.terms and bound is not None:
            form = constant(host(form.constant, bound), shape)
        else:
            form = _limited(w, shape, form, numeric(limit), pick)
    return form


def _limited(w: Workshop, shape: Any, form: Form, limit: Form, pick: Callable[..., torch.Tensor]) -> Form:
    """In the unit of the result: that of an upper limit, which often is far below the form, or of the form."""
    upper = pick is torch.minimum
    top = w.magnitude(limit) if upper else max(w.magnitude(form), w.magnitude(limit))
    exponent = w.decide(lambda: 6 - top)
    tensor = pick(w.total(form, exponent), w.total(limit, exponent))
    signs = w.positive(form), w.positive(limit)
    positive = all(signs) if upper else any(signs)
    return of(Atom(tensor, exponent, 6.0, positive, states=form.states | limit.states), UNIT, shape)


@rule("clamp_min")
def _clamp_min(w: Workshop, shape: Any, self: Any, min: Any) -> Form:
    return _clamp(w, shape, self, min)


@rule("clamp_max")
def _clamp_max(w: Workshop, shape: Any, self: Any, max: Any) -> Form:
    return _clamp(w, shape, self, None, max)


# -- truth values


def _compare(w: Workshop, shape: Any, self: Any, other: Any, name: str) -> Mask:
    a, b = numeric(self), numeric(other)
    compared = {
        "gt": torch.gt,
        "lt": torch.lt,
        "ge": torch.ge,
        "le": torch.le,
        "eq": torch.eq,
        "ne": torch.ne,
    }
    if fixed(b) == NOUGHT and a.terms:  # the sign says it: no sum of another size is needed
        atom, coefficient = w.single(a)
        tensor = atom.tensor if w.sign_of(coefficient) > 0 else -atom.tensor
        return Mask(compared[name](tensor, torch.zeros_like(tensor)), shape, a.states)
    x, y, _ = _pair(w, a, b)
    return Mask(compared[name](x, y), shape, a.states | b.states)


for _name in ("gt", "lt", "ge", "le", "eq", "ne"):
    RULES[_name] = lambda w, shape, self, other, name=_name: _compare(w, shape, self, other, name)
for _name in ("tanh", "exp", "log", "sigmoid", "erf", "atan", "sin", "cos", "relu"):
    RULES[_name] = lambda w, shape, self, name=_name: _function(w, shape, self, name)


def _logic(w: Workshop, shape: Any, self: Any, other: Any, operation: Callable[..., torch.Tensor]) -> Mask:
    if not isinstance(self, Mask) or not isinstance(other, Mask):
        raise NotFollowed("combines bits of numbers", place=False)
    return Mask(operation(self.tensor, other.tensor), shape, self.states | other.states)


for _names, _operation in (
    (("logical_and", "bitwise_and", "__and__"), torch.logical_and),
    (("logical_or", "bitwise_or", "__or__"), torch.logical_or),
):
    for _name in _names:
        RULES[_name] = lambda w, shape, self, other, o=_operation: _logic(w, shape, self, other, o)


@rule("logical_not", "bitwise_not")
def _not(w: Workshop, shape: Any, self: Any) -> Mask:
    if not isinstance(self, Mask):
        raise NotFollowed("negates bits of numbers", place=False)
    return Mask(torch.logical_not(self.tensor), shape, self.states)


@rule("_to_copy", "to")
def _to(w: Workshop, shape: Any, self: Any, dtype: Any = None, **options: Any) -> Form:
    if dtype is not None and not dtype.is_floating_point:
        raise NotFollowed(f"converts tensors to {dtype}", place=False)
    return numeric(self)
