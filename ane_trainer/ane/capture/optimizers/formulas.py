"""The host's scalars of a rule as formulas: the rule's own Python, traced with floats that remember their formula.

A formula is a Python expression over `lr`, `beta1`, `eps`, ... (the group's settings), `t` (the update's number, 1 for
the first) and `unit` (of the parameter's gradient) with `+ - * / **`, `sqrt`, `min`, `max`, `power_above` (the least
power of two above a number, from 2^-24 to 1), `product(lambda i: ..., t)` over i = 1 ... t, and `a if t <= 5 else b`.
It gives the same float64 as the rule, bit for bit, so that drivers in other languages need no table of optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ane_trainer.ane.errors import UsageError

#: Update numbers at which rules are traced: the early ones take branches of their own.
_STEPS = (*range(1, 17), 100, 2000)

_SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(5)


class Traced(float):
    """A float that knows its formula; what is done to it with `float()` or `math` is forgotten."""

    text: str
    _binding: int

    def __new__(cls, value: float, text: str, binding: int = _ATOM) -> Traced:
        made = super().__new__(cls, value)
        made.text, made._binding = text, binding
        return made

    def _shown(self, least: int) -> str:
        return self.text if self._binding >= least else f"({self.text})"

    def __add__(self, other: float) -> Traced:
        return _binary(float.__add__, "+", _SUM, self, other)

    def __radd__(self, other: float) -> Traced:
        return _binary(float.__add__, "+", _SUM, other, self)

    def __sub__(self, other: float) -> Traced:
        return _binary(float.__sub__, "-", _SUM, self, other)

    def __rsub__(self, other: float) -> Traced:
        return _binary(float.__sub__, "-", _SUM, other, self)

    def __mul__(self, other: float) -> Traced:
        return _binary(float.__mul__, "*", _PRODUCT, self, other)

    def __rmul__(self, other: float) -> Traced:
        return _binary(float.__mul__, "*", _PRODUCT, other, self)

    def __truediv__(self, other: float) -> Traced:
        return _binary(float.__truediv__, "/", _PRODUCT, self, other)

    def __rtruediv__(self, other: float) -> Traced:
        return _binary(float.__truediv__, "/", _PRODUCT, other, self)

    def __pow__(self, other: float, modulus: None = None) -> Traced:
        return _raised(self, other)

    def __rpow__(self, other: float, modulus: None = None) -> Traced:
        return _raised(other, self)

    def __neg__(self) -> Traced:
        return Traced(-float(self), f"-{self._shown(_SIGN)}", _SIGN)

    def __abs__(self) -> Traced:
        return Traced(abs(float(self)), f"abs({self.text})")


def _operand(value: float, least: int) -> str:
    if isinstance(value, Traced):
        return value._shown(least)
    return repr(float(value)) if value >= 0 else f"({float(value)!r})"


def _binary(compute: Callable[[float, float], float], sign: str, binding: int, a: float, b: float) -> Traced:
    value = compute(float(a), float(b))
    return Traced(value, f"{_operand(a, binding)} {sign} {_operand(b, binding + 1)}", binding)


def _raised(a: float, b: float) -> Traced:
    return Traced(float(a) ** float(b), f"{_operand(a, _ATOM)} ** {_operand(b, _ATOM)}", _POWER)


def _called(name: str, compute: Callable[..., float], *values: float) -> float:
    result = compute(*map(float, values))
    if any(isinstance(value, Traced) for value in values):
        return Traced(result, f"{name}({', '.join(_operand(value, _SUM) for value in values)})")
    return result


# -- What rules use in the place of float, math.sqrt, min, max -------------------------------------------------


def number(value: float) -> float:
    """The value as a float; one that is traced stays so."""
    return value if isinstance(value, Traced) else float(value)


def sqrt(value: float) -> float:
    """The square root."""
    return _called("sqrt", math.sqrt, value)


def least(*values: float) -> float:
    """The smallest."""
    return _called("min", min, *values)


def most(*values: float) -> float:
    """The largest."""
    return _called("max", max, *values)


def power_above(value: float) -> float:
    """The least power of two above the magnitude, from 2^-24 to 1; 1 for 0."""
    return _called("power_above", _power_above, value)


def _power_above(value: float) -> float:
    return 2.0 ** min(0, max(-24, math.frexp(value)[1])) if value else 1.0


def product(term: Callable[[float], float], count: float) -> float:
    """term(1) * ... * term(count), in this order."""
    value = 1.0
    for i in range(1, int(count) + 1):
        value *= float(term(float(i)))
    shown = term(Traced(1.0, "i"))
    if isinstance(count, Traced) and isinstance(shown, Traced):
        return Traced(value, f"product(lambda i: {shown.text}, {count.text})")
    return value


# -- Formulas -----------------------------------------------------------------------------------------------------

#: What a formula may call.
FUNCTIONS: dict[str, Callable[..., float]] = {
    "sqrt": math.sqrt, "min": min, "max": max, "abs": abs, "power_above": _power_above, "product": product,
}  # fmt: skip


def evaluate(formula: str, values: Mapping[str, float]) -> float:
    """The value of a formula of this module (trusted text: it is given to Python)."""
    return float(eval(formula, {"__builtins__": {}, **FUNCTIONS, **values}))


def settings(group: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a parameter group by the names that formulas use: tuples are counted (betas -> beta1, beta2)."""
    found: dict[str, float] = {}
    for key, value in group.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = float(value)
        elif isinstance(value, (tuple, list)) and all(map(_numeric, value)):
            found |= {f"{key.rstrip('s')}{i}": float(part) for i, part in enumerate(value, 1)}
    return found


def _numeric(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def traced_group(group: Mapping[str, object]) -> dict[str, object]:
    """The group with its numbers traced."""
    known = {name: Traced(value, name) for name, value in settings(group).items()}
    made: dict[str, object] = {}
    for key, value in group.items():
        if isinstance(value, (tuple, list)) and all(map(_numeric, value)):
            made[key] = tuple(known[f"{key.rstrip('s')}{i + 1}"] for i in range(len(value)))
        else:
            made[key] = known.get(key, value)
    return made


def formula(compute: Callable[..., float]) -> str:
    """The formula of a function of the update's number; it is traced on both sides of each branch.

    Raises: UsageError for one that has no formula of this kind.
    """
    texts = [_text(compute(Traced(float(step), "t"))) for step in _STEPS]
    found, borders = [texts[0]], []
    for step, text in zip(_STEPS[1:], texts[1:], strict=True):
        if text != found[-1]:
            found.append(text)
            borders.append(step - 1)
    if len(found) > 3:
        raise UsageError(
            "optimizer: a scalar of its rule has no formula. Use the optimizer's own values.", code="ANE116"
        )
    joined = found[-1]
    for border, text in zip(reversed(borders), reversed(found[:-1]), strict=True):
        joined = f"{text} if t <= {border} else {joined}"
    return joined


def _text(value: float) -> str:
    return value.text if isinstance(value, Traced) else repr(float(value))
