"""Numbers that the host computes before each step, as expressions over what a user's optimizer passes to ops.

An expression is a tuple: `("number", 2.0)`, `("leaf", 3)` (a number of the optimizer's `step`, see
`probing.py`), `("kappa", key, when)` (what a mean of a state is to be multiplied with, see `updating.py`), or
`(operation, *operands)`. Equal expressions are equal tuples, so parameters that share settings share ports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Coefficient = tuple[Any, ...]
#: Values of leaves and kappas: ("leaf", 3) -> 0.001.
Environment = Mapping[Coefficient, float]

NOUGHT: Coefficient = ("number", 0.0)
UNIT: Coefficient = ("number", 1.0)


def number(value: float) -> Coefficient:
    """A constant."""
    return ("number", float(value))


def plus(a: Coefficient, b: Coefficient) -> Coefficient:
    """a + b"""
    if a == NOUGHT or b == NOUGHT:
        return b if a == NOUGHT else a
    return _made("plus", a, b)


def minus(a: Coefficient, b: Coefficient) -> Coefficient:
    """a - b"""
    if a == b:
        return NOUGHT
    return a if b == NOUGHT else _made("minus", a, b)


def times(a: Coefficient, b: Coefficient) -> Coefficient:
    """a * b"""
    if NOUGHT in (a, b):
        return NOUGHT
    if a == UNIT or b == UNIT:
        return b if a == UNIT else a
    return _made("times", a, b)


def over(a: Coefficient, b: Coefficient) -> Coefficient:
    """a / b"""
    if a == b:
        return UNIT
    return a if b == UNIT else _made("over", a, b)


def power(a: Coefficient, exponent: float) -> Coefficient:
    """a ** exponent"""
    return a if exponent == 1.0 or a == UNIT else _made("power", a, number(exponent))


def raised(a: Coefficient, b: Coefficient) -> Coefficient:
    """a ** b"""
    return _made("power", a, b)


def size(a: Coefficient) -> Coefficient:
    """|a|"""
    return _made("size", a)


def sign(a: Coefficient) -> Coefficient:
    """-1, 0 or 1"""
    return _made("sign", a)


def largest(a: Coefficient, b: Coefficient) -> Coefficient:
    """max(a, b)"""
    return _made("largest", a, b)


def smallest(a: Coefficient, b: Coefficient) -> Coefficient:
    """min(a, b)"""
    return _made("smallest", a, b)


def is_number(a: Coefficient) -> bool:
    """Whether it is known at compile time."""
    return bool(a[0] == "number")


def evaluate(a: Coefficient, environment: Environment, known: dict[Coefficient, float]) -> float:
    """The value in float64; NaN where there is none (0/0, the root of a negative number). `known` is a memo."""
    if a[0] == "number":
        return float(a[1])
    if a[0] in ("leaf", "kappa"):
        return environment[a]
    value = known.get(a)
    if value is None:
        operands = [evaluate(b, environment, known) for b in a[1:]]
        value = known[a] = _computed(a[0], operands)
    return value


def _made(name: str, *operands: Coefficient) -> Coefficient:
    if all(map(is_number, operands)):
        value = _computed(name, [float(b[1]) for b in operands])
        if math.isfinite(value):
            return number(value)
    return (name, *operands)


def _computed(name: str, operands: list[float]) -> float:
    try:
        value = _OPERATIONS[name](*operands)
    except (ZeroDivisionError, OverflowError, ValueError):
        return math.nan
    return math.nan if isinstance(value, complex) else float(value)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "times": lambda a, b: a * b,
    "over": lambda a, b: a / b,
    "power": lambda a, b: a**b,
    "size": abs,
    "sign": lambda a: float((a > 0) - (a < 0)),
    "largest": max,
    "smallest": min,
}
