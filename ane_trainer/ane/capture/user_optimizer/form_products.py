"""Rules for sums, products, quotients, roots and powers of forms.

Sums only change coefficients. Products, quotients and roots compute a tensor and move the coefficients past the
operation: sqrt(c * v) = sqrt(c) * sqrt(v), with sqrt(c) from the host.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

from ane_trainer.ane.capture.user_optimizer import coefficients as co
from ane_trainer.ane.capture.user_optimizer.coefficients import NOUGHT, UNIT, number
from ane_trainer.ane.capture.user_optimizer.following import NotFollowed
from ane_trainer.ane.capture.user_optimizer.form_registry import (
    constant,
    fixed,
    numeric,
    of,
    rule,
    spread,
    unchanging,
)
from ane_trainer.ane.capture.user_optimizer.forms import (
    Atom,
    Form,
    Workshop,
    combine,
    difference,
    root_of,
    scaled,
    shifted,
)

_MINUS = number(-1.0)

# -- linear


@rule("add")
def add(w: Workshop, shape: Any, self: Any, other: Any, alpha: Any = 1) -> Form:
    """self + alpha * other."""
    a, b = spread(numeric(self), shape), spread(numeric(other), shape)
    factor = fixed(alpha)
    assert factor is not None
    return combine(a, b, factor, shape)


@rule("sub", "subtract")
def subtract(w: Workshop, shape: Any, self: Any, other: Any, alpha: Any = 1) -> Form:
    """self - alpha * other."""
    return add(w, shape, self, scaled(numeric(other), _MINUS), alpha)


@rule("rsub")
def _rsub(w: Workshop, shape: Any, self: Any, other: Any, alpha: Any = 1) -> Form:
    return subtract(w, shape, other, self, alpha)


@rule("neg", "negative")
def _neg(w: Workshop, shape: Any, self: Any) -> Form:
    return scaled(numeric(self), _MINUS)


@rule("lerp")
def _lerp(w: Workshop, shape: Any, self: Any, end: Any, weight: Any) -> Form:
    """self + weight * (end - self)"""
    a = numeric(self)
    return add(w, shape, a, multiply(w, shape, difference(spread(numeric(end), shape), a), weight))


@rule("addcmul")
def _addcmul(w: Workshop, shape: Any, self: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Form:
    return add(w, shape, self, multiply(w, shape, tensor1, tensor2), value)


@rule("addcdiv")
def _addcdiv(w: Workshop, shape: Any, self: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Form:
    return add(w, shape, self, divide(w, shape, tensor1, tensor2), value)


# -- products and quotients


@rule("mul", "multiply")
def multiply(w: Workshop, shape: Any, self: Any, other: Any) -> Form:
    """self * other; of a form with itself the square, which is not computed before it must be."""
    a, b = numeric(self), numeric(other)
    for this, that in ((a, b), (b, a)):
        factor = fixed(that)
        if factor is not None:
            return spread(scaled(this, factor), shape)
    (x, cx), (y, cy) = w.single(a), w.single(b)
    if x is y:
        return of(Atom(x.tensor, x.exponent, x.peak, True, True, x.states), co.times(cx, cy), shape)
    apart = w.decide(lambda: -(x.peak + y.peak - 5) if not -1 <= x.peak + y.peak <= 9 else 0)
    tensor = x.tensor * 2.0**apart * y.tensor if apart else x.tensor * y.tensor
    made = Atom(
        tensor, x.exponent + y.exponent + apart, w.peak(tensor, x.peak + y.peak + apart),
        x.positive and y.positive, states=x.states | y.states,
    )  # fmt: skip
    return of(made, co.times(cx, cy), shape)


@rule("div", "divide", "true_divide")
def divide(w: Workshop, shape: Any, self: Any, other: Any, rounding_mode: Any = None) -> Form:
    """self / other, with a least denominator where it cannot be negative."""
    if rounding_mode is not None:
        raise NotFollowed("divides with rounding, which has no rule", place=False)
    a, b = numeric(self), numeric(other)
    factor = fixed(b)
    if factor is not None:
        return spread(scaled(a, co.over(UNIT, factor)), shape)
    y, cy = w.single(w.raised(b))
    y = w.centered(y)
    below = torch.clamp(y.tensor, min=w.floor) if y.positive and w.floor else y.tensor
    if (top := fixed(a)) is not None:
        tensor = torch.ones_like(below) / below
        made = Atom(tensor, -y.exponent, w.peak(tensor, -y.peak), y.positive, states=y.states)
        return of(made, co.over(top, cy), shape)
    x, cx = w.single(a)
    raw = x.tensor / below
    expected = w.peak(raw, x.peak - y.peak)
    factor = co.over(cx, cy)

    def choose() -> float:
        if w.limit is not None:  # what is above the limit may overflow: it becomes the limit
            return 6 - (w.limit - w.bound(factor) + x.exponent - y.exponent)
        return 4 - expected if not -5 <= expected <= 10 else 0

    apart = w.decide(choose)
    tensor = shifted(x.tensor, apart) / below if apart > 0 else shifted(raw, apart)
    made = Atom(
        tensor, x.exponent + apart - y.exponent, min(expected + apart, 15.0), x.positive and y.positive,
        states=x.states | y.states,
    )  # fmt: skip
    return of(made, factor, shape)


@rule("reciprocal")
def reciprocal(w: Workshop, shape: Any, self: Any) -> Form:
    """1 / self."""
    return divide(w, shape, constant(UNIT, ()), self)


@rule("square")
def square(w: Workshop, shape: Any, self: Any) -> Form:
    """self * self."""
    return multiply(w, shape, self, self)


@rule("sqrt")
def square_root(w: Workshop, shape: Any, self: Any) -> Form:
    """The root; of a square the magnitude."""
    form = numeric(self)
    if not form.terms:
        return constant(root_of(form.constant), shape)
    if len(form.terms) == 1 and form.constant == NOUGHT:
        ((atom, coefficient),) = form.terms.items()
        if atom.squared:
            absolute = atom.tensor.abs()
            made = Atom(absolute, atom.exponent, atom.peak, True, states=atom.states)
            return of(made, root_of(coefficient), shape)
    atom, coefficient = w.single(form)
    if w.sign_of(coefficient) < 0:
        atom, coefficient = w.atom(form), UNIT
    atom = w.centered(atom, multiple=2)
    tensor = torch.sqrt(atom.tensor)
    made = Atom(
        tensor,
        atom.exponent // 2,
        w.peak(tensor, atom.peak / 2),
        True,
        states=atom.states,
        least=atom.least / 2,
    )
    return of(made, root_of(coefficient), shape)


@rule("rsqrt")
def _rsqrt(w: Workshop, shape: Any, self: Any) -> Form:
    return reciprocal(w, shape, square_root(w, shape, self))


@rule("pow")
def _pow(w: Workshop, shape: Any, self: Any, exponent: Any) -> Form:
    base = fixed(self)
    if base is not None and fixed(exponent) is not None:
        wanted = fixed(exponent)
        assert wanted is not None
        return constant(co.raised(base, wanted), shape)
    wanted_power = unchanging(exponent)
    if wanted_power == 1.0:
        return numeric(self)
    if wanted_power in (2.0, 3.0, 4.0):
        squared = square(w, shape, self)
        if wanted_power == 2.0:
            return squared
        return multiply(w, shape, squared, self if wanted_power == 3.0 else squared)
    if abs(wanted_power) == 0.5:
        return (square_root if wanted_power > 0 else _rsqrt)(w, shape, self)
    if wanted_power in (-1.0, -2.0):
        return reciprocal(w, shape, self if wanted_power == -1.0 else square(w, shape, self))
    return _fraction(w, shape, numeric(self), wanted_power)


def _fraction(w: Workshop, shape: Any, form: Form, wanted: float) -> Form:
    """A power like 1/3 or 0.75 of numbers that are not negative; the unit's power must be divisible for it."""
    share = Fraction(wanted).limit_denominator(8)
    if abs(float(share) - wanted) > 1e-12 or not w.positive(form):
        raise NotFollowed(f"takes tensors to the power of {wanted:g}, which has no rule", place=False)
    atom, coefficient = w.single(form)
    atom = w.centered(atom, multiple=share.denominator)
    tensor = torch.pow(atom.tensor, wanted)
    exponent = atom.exponent * share.numerator // share.denominator
    least = atom.least * wanted
    made = Atom(tensor, exponent, w.peak(tensor, atom.peak * wanted), True, states=atom.states, least=least)
    return of(made, co.power(coefficient, wanted), shape)
