"""The engine's 33-knot activation tables: knots, range reduction and the order of roundings.

A table maps its (reduced) input affinely onto 32 segments and evaluates `anchor + fraction * delta`, where
`anchor` is the segment's knot nearer to zero input (sin: the knot that a growing angle passes first), `delta`
the difference of its two knots; fraction, delta, product and sum are each rounded to fp16. This order was found
by trying over a hundred against the figures published for M6 (M6 data/06_numerics/f3_lut_m6.txt and
lut_ulp_m6.txt: largest errors, where the error is least, and how often). Of those tried it alone gives all
figures of tanh, gelu, exp, log, sqrt, rsqrt, inverse and sin; sin alone tells that the fraction is rounded.
"Exact" below means that, an aggregate over each sweep of some 18,000 inputs: the results point by point are
not in the sources used. That a
table holds 33 knots and 32 rounded deltas is said of M1 too (ANE guide chapter 26). Knots, domains and range
reductions: M6 notes/numerics.md, read from compiled programs.

`lookup(name)` gives a table's results for all 65,536 fp16 patterns; `evaluate(name, x)` gathers from it.

The knots of gelu and silu are fitted by the engine's compiler; the other tables hold samples of their function. Only
a few of the fitted ones are published; these are reconstructed in two steps:

- least squares of the function over all normal fp16 inputs of the domain (gelu's ends held at 0 and 4). This
  alone gives the published knots gelu(0.25) = 0.1436 and silu(0.5) = 0.296 and, within 1 %, the published
  values left of 0, so it is probably what the compiler does;
- knots 0 to 10 (the left tail) moved by a few units in the last place until the published zero crossings of
  the error come out (M6 data/06_numerics/f3_lut_m6.txt, the first 20 of each function).

Maximum absolute error, maximum ulp error and all 20 crossings then equal the published ones. A knot that
those figures do not fix may be off by about two units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import erf, inf

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ane_trainer.ane.simulator.numbers.fp16 import F32, INF, decode, encode, round_half_away

F64 = NDArray[np.float64]

#: gelu at -4, -3.75, ..., 4.
GELU_KNOTS: tuple[float, ...] = (
    0.0, -0.0003989, -0.0007544, -0.001792, -0.003876, -0.00794, -0.01513, -0.02704,
    -0.0449, -0.06964, -0.10004, -0.1324, -0.1599, -0.1724, -0.1567, -0.1064,
    -0.000754, 0.1436, 0.3433, 0.5776, 0.84, 1.117, 1.4, 1.681,
    1.955, 2.223, 2.484, 2.742, 2.996, 3.248, 3.5, 3.75, 4.0,
)  # fmt: skip

#: silu at -8, -7.5, ..., 8.
SILU_KNOTS: tuple[float, ...] = (
    -0.002352, -0.00426, -0.006245, -0.009636, -0.01461, -0.02211, -0.03305, -0.04898,
    -0.07117, -0.10187, -0.1416, -0.1895, -0.2394, -0.2773, -0.2734, -0.2036,
    -0.001704, 0.2964, 0.7266, 1.223, 1.761, 2.31, 2.86, 3.398,
    3.93, 4.45, 4.97, 5.477, 5.984, 6.492, 6.992, 7.496, 7.996,
)  # fmt: skip

LOG2E = np.float64(np.float16(1.4426950408889634))
"""Factor of exp's input, as fp16: with the exact constant the published errors of exp do not come out."""
LN2 = np.float64(np.float16(0.6931471805599453))
"""Factor of log's result, as fp16: log(0) = -65536 LN2 = -45440, as measured on M1 (ANE guide chapter 3)."""


@dataclass(frozen=True)
class Tail:
    """What a table gives beyond its domain: from the end knot a line of `slope`, then `value` past `clamp`.

    `value` None means the input itself; a `clamp` at the domain's end means no line.
    """

    clamp: float
    value: float | None
    slope: float = 0.0


@dataclass(frozen=True)
class Table:
    """One activation table: 33 fp16 `knots`, equally spaced over `low`..`high` of the reduced input.

    `symmetry` is "odd" (the sign is set aside first) or "none"; `reduction` names how the input is reduced:
    "none", "mantissa" (m in [0.5, 1) and an exponent), "mantissa pair" (m in [0.5, 2), even exponent),
    "power of two" (integer and fraction) or "quarter wave". `below` and `above` hold for reduction "none".
    `at_zero` overrides the result at +-0 where that was measured separately.
    """

    name: str
    knots: tuple[float, ...]
    low: float
    high: float
    level: str
    evidence: str
    bound: str = ""
    symmetry: str = "none"
    reduction: str = "none"
    below: Tail = Tail(-inf, 0.0)
    above: Tail = Tail(inf, 1.0)
    at_zero: float | None = None

    def position(self, reduced: F64) -> F64:
        """Where a reduced input lies on the knots, 0 to 32."""
        return np.clip((reduced - self.low) * (32.0 / (self.high - self.low)), 0.0, 32.0)

    def interpolate(self, position: F64, negative: NDArray[np.bool_] | bool = False) -> F64:
        """The table at `position`, a decoded fp16 value; where `negative`, the right knot is the anchor."""
        values = np.asarray(self.knots, dtype=np.float64)
        left = np.clip(np.floor(position).astype(np.int64), 0, 31)
        right = np.clip(np.ceil(position).astype(np.int64), 1, 32)
        from_left = _rounded(_rounded(position - left) * _rounded(values[left + 1] - values[left]))
        from_right = _rounded(_rounded(right - position) * _rounded(values[right] - values[right - 1]))
        return _rounded(np.where(negative, values[right] - from_right, values[left] + from_left))


def _rounded(x: ArrayLike) -> F64:
    return round_half_away(np.asarray(x, dtype=np.float64)).astype(np.float64)


def _samples(function: Callable[[float], float], low: float, high: float) -> tuple[float, ...]:
    """33 equally spaced samples of a function, rounded to the nearest fp16."""
    return tuple(float(np.float16(function(x))) for x in np.linspace(low, high, 33))


def _fitted(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(float(np.float16(v)) for v in values)


_M6 = "M6 notes/numerics.md F3b, data/06_numerics/f3_lut_m6.txt and lut_ulp_m6.txt"
_FITTED = f"{_M6}; value at 0: ANE guide chapter 3 (M1); knots reconstructed, see tables.py"

_SIGMOID = _samples(lambda x: 1 / (1 + np.exp(-x)), -8, 8)

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        Table(
            "sigmoid", _SIGMOID, -8, 8, "bounded",
            f"{_M6}; clamps -9.938 and 8.320: ANE guide chapter 3 (M1); the lower line is fitted to them",
            "exact within -8..8; 2.5e-4 absolute beyond",
            below=Tail(-9.9375, 0.0, float(np.float16(_SIGMOID[0] / 1.9375))), above=Tail(8.3203125, 1.0),
        ),
        Table("tanh", _samples(np.tanh, 0, 4), 0, 4, "exact", _M6, symmetry="odd", above=Tail(4, 1.0)),
        Table(
            "erf", _samples(erf, 0, 2), 0, 2, "bounded", f"{_M6}; the line beyond 2 is fitted to them",
            "exact up to 2; 5e-4 absolute beyond", symmetry="odd",
            above=Tail(2.375, 1.0, float(np.float16(0.013))),
        ),
        Table(
            "gelu", _fitted(GELU_KNOTS), -4, 4, "bounded", _FITTED, "two units in the last place of a knot",
            below=Tail(-4, 0.0), above=Tail(4, None), at_zero=-1139 * 2.0**-21,
        ),
        Table(
            "silu", _fitted(SILU_KNOTS), -8, 8, "bounded", _FITTED, "two units in the last place of a knot",
            below=Tail(-10.203125, 0.0, float(np.float16(-0.001067))), above=Tail(8, None),
            at_zero=-1320 * 2.0**-20,
        ),
        Table("exp2", _samples(np.exp2, 0, 1), 0, 1, "exact", _M6, reduction="power of two"),
        Table("log2", _samples(np.log2, 0.5, 1), 0.5, 1, "exact", _M6, reduction="mantissa"),
        Table("sqrt", _samples(np.sqrt, 0.5, 2.5), 0.5, 2.5, "exact", _M6, reduction="mantissa pair"),
        Table(
            "rsqrt", _samples(lambda x: 1 / np.sqrt(x), 0.5, 2.5), 0.5, 2.5, "exact", _M6,
            reduction="mantissa pair",
        ),
        Table(
            "inverse", _samples(lambda x: 1 / x, 0.5, 1), 0.5, 1, "exact",
            f"{_M6} (measured with MIL's default epsilon)", symmetry="odd", reduction="mantissa",
        ),
        Table(
            "sin", _samples(np.sin, 0, np.pi / 2), 0, np.pi / 2, "exact",
            f"{_M6}, within -8..8; beyond, the reduction to a quarter wave is assumed exact",
            symmetry="odd", reduction="quarter wave",
        ),
    )
}  # fmt: skip


def plain(table: Table, x: F64) -> F64:
    """A table without range reduction, with its tails."""
    v = np.abs(x) if table.symmetry == "odd" else x
    y = table.interpolate(table.position(v), v < 0)
    for side, tail in ((-1, table.below), (1, table.above)):
        end, knot = (table.low, table.knots[0]) if side < 0 else (table.high, table.knots[-1])
        line = _rounded(knot + _rounded(tail.slope * (v - end)))
        y = np.where(side * v > side * end, line, y)
        y = np.where(side * v >= side * tail.clamp, v if tail.value is None else tail.value, y)
    if table.at_zero is not None:
        y = np.where(x == 0, table.at_zero, y)
    return np.sign(x) * y if table.symmetry == "odd" else y


def exp2(x: F64) -> F64:
    """2^x: the integer part becomes the exponent, the table covers the fraction."""
    whole = np.floor(np.clip(x, -64, 64))
    table = TABLES["exp2"]
    mantissa = table.interpolate(table.position(np.clip(x, -64, 64) - whole), x < 0)
    return _rounded(np.ldexp(mantissa, whole.astype(np.int64)))


def exp(x: F64) -> F64:
    """e^x as 2^(x log2 e), the product rounded to fp16; inf from x = 11.094 (ANE guide chapter 3)."""
    return exp2(_rounded(x * LOG2E))


def log2(x: F64) -> F64:
    """log2: table of the mantissa, plus exponent; -65536 at 0, 0 at inf (the table's header), 0 below 0."""
    mantissa, exponent = np.frexp(np.where(x > 0, x, 1.0))
    table = TABLES["log2"]
    y = _rounded(table.interpolate(table.position(mantissa)) + exponent)
    return np.where(x == 0, -float(INF), np.where((x < 0) | (x >= INF), 0.0, y))


def log(x: F64) -> F64:
    """Natural logarithm, log2 times fp16(ln 2): log(0) = -45440 and log(-1) = 0 (M1, ANE guide chapter 3)."""
    return _rounded(log2(x) * LN2)


def _root(name: str, power: float, x: F64, zero: float, infinity: float) -> F64:
    mantissa, exponent = np.frexp(np.where(x > 0, x, 1.0))
    odd = exponent % 2 != 0
    table = TABLES[name]
    y = table.interpolate(table.position(np.where(odd, 2 * mantissa, mantissa)))
    y = _rounded(y * np.exp2(power * (exponent - np.where(odd, 1, 0))))
    return np.where(x < 0, 0.0, np.where(x == 0, zero, np.where(x >= INF, infinity, y)))


def sqrt(x: F64) -> F64:
    """Square root; of a negative number 0 (M1, ANE guide chapter 3)."""
    return _root("sqrt", 0.5, x, 0.0, float(INF))


def rsqrt(x: F64) -> F64:
    """1/sqrt; inf at +-0 and 0 of a negative number (M1, ANE guide chapter 3)."""
    return _root("rsqrt", -0.5, x, float(INF), 0.0)


def inverse(x: F64) -> F64:
    """1/x; +inf at both zeros (M1, ANE guide chapter 3), 0 at inf."""
    mantissa, exponent = np.frexp(np.where(x == 0, 1.0, np.abs(x)))
    table = TABLES["inverse"]
    y = _rounded(np.ldexp(table.interpolate(table.position(mantissa)), -exponent))
    return np.where(x == 0, float(INF), np.where(np.abs(x) >= INF, 0.0, np.copysign(y, x)))


def _quarter_wave(x: F64) -> F64:
    turn = np.mod(x, 2 * np.pi)
    half = np.mod(turn, np.pi)
    table = TABLES["sin"]
    falling = half > np.pi / 2
    y = table.interpolate(table.position(np.where(falling, np.pi - half, half)), falling)
    return np.where(turn >= np.pi, -y, y)


def sin(x: F64) -> F64:
    """Sine from a quarter wave (native on A15 and later: ANE guide appendix A)."""
    return np.copysign(1.0, x) * _quarter_wave(np.abs(x))


def cos(x: F64) -> F64:
    """Cosine as the sine table a quarter wave on; assumed."""
    return _quarter_wave(np.abs(x) + np.pi / 2)


FUNCTIONS: dict[str, Callable[[F64], F64]] = {
    "exp2": exp2, "exp": exp, "log2": log2, "log": log, "sqrt": sqrt, "rsqrt": rsqrt, "inverse": inverse,
    "sin": sin, "cos": cos,
}  # fmt: skip
FUNCTIONS |= {name: partial(plain, table) for name, table in TABLES.items() if table.reduction == "none"}


@cache
def lookup(name: str) -> F32:
    """The results of `name` for every fp16 pattern: decoded float32[65536], read-only, built once."""
    values = FUNCTIONS[name](decode(np.arange(1 << 16, dtype=np.uint16)).astype(np.float64))
    results = round_half_away(values)
    results.setflags(write=False)
    return results


def evaluate(name: str, x: ArrayLike) -> F32:
    """`name` of decoded values (any shape): a gather from `lookup(name)`."""
    return np.asarray(lookup(name)[encode(x).view(np.uint16)])


def real_div(x: F32, y: F32) -> F32:
    """x / y as the engine computes it: x times the inverse table of y, so x / 0 is 65536 x."""
    return round_half_away(x * evaluate("inverse", y))
