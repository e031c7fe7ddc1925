"""Exact arithmetic on integers in two numbers, remainder and quotient by 1024, with fp16 operations.

Every intermediate number is an integer up to 2048 in magnitude, or one that is only estimated with. Constants fold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS
from ane_trainer.ane.compiler.lower.operands import Encoded, Operand, as_tensor, broadcast_shape, shape_of
from ane_trainer.ane.mil.program import MAX_FP16, Value
from ane_trainer.ane.stages import PAIR

_BASE = float(PAIR)
#: Bits of the remainder, and of the quotient without its sign.
_LOW_BITS, _HIGH_BITS = 10, 11
_TOP = 2.0**_HIGH_BITS
_HALF = 32.0  # root of PAIR


def pair(low: Operand, high: Operand) -> Encoded:
    """Integers `1024 high + low`."""
    parts = [x if isinstance(x, Value) else as_tensor(x) for x in (low, high)]
    return Encoded((parts[0], parts[1]), "split")


def as_pair(ctx: Context, x: Operand) -> Encoded:
    """Integers that fp16 holds, or constants, in two numbers."""
    if isinstance(x, Encoded):
        return x
    if isinstance(x, Value):
        x = ctx.number(x)
        high = floor(ctx, ctx.mul(x, 1.0 / _BASE))
        return pair(ctx.sub(x, ctx.mul(high, _BASE)), high)
    numbers = as_tensor(ctx.number(x))
    return pair(torch.remainder(numbers, _BASE), torch.floor(numbers / _BASE))


def joined(ctx: Context, x: Operand) -> Operand:
    """The integers as one number: exact up to 2048, rounded beyond."""
    return plus(ctx, times(ctx, x.parts[1], _BASE), x.parts[0]) if isinstance(x, Encoded) else x


def floor(ctx: Context, x: Operand) -> Operand:
    """The largest whole number that is not above x."""
    return ctx.unary("floor", x) if isinstance(x, Value) else torch.floor(as_tensor(x))


def _filled(x: Operand, number: float, shape: tuple[int, ...]) -> bool:
    """Whether a constant is `number` throughout and adds nothing to the result's shape."""
    if isinstance(x, (Value, Encoded)):
        return False
    return bool((as_tensor(x) == number).all()) and broadcast_shape(shape_of(x), shape) == shape


def plus(ctx: Context, x: Operand, y: Operand) -> Operand:
    """x + y; nothing is emitted for a constant 0."""
    if _filled(y, 0.0, shape_of(x)):
        return x
    return y if _filled(x, 0.0, shape_of(y)) else ctx.add(x, y)


def times(ctx: Context, x: Operand, y: Operand) -> Operand:
    """x * y; nothing is emitted for a constant 0 or 1."""
    for a, b in ((x, y), (y, x)):
        if _filled(a, 0.0, shape_of(b)):
            return torch.zeros(shape_of(b), dtype=torch.float64)
        if _filled(a, 1.0, shape_of(b)):
            return b
    return ctx.mul(x, y)


def holds(ctx: Context, kind: str, x: Operand, y: Operand) -> Operand:
    """A comparison as 1 and 0."""
    return ctx.number(ctx.binary(kind, x, y))


def carried(ctx: Context, low: Operand, high: Operand) -> Encoded:
    """`low` below 2048 in magnitude normalised to 0 ... 1023: `c = floor(low / 1024); low - 1024 c, high + c`"""
    c = floor(ctx, ctx.mul(low, 1.0 / _BASE))
    return pair(ctx.sub(low, times(ctx, c, _BASE)), plus(ctx, high, c))


def add(ctx: Context, x: Operand, y: Operand) -> Encoded:
    """`low = lx + ly; c = greater_equal(low, 1024); low - 1024 c, hx + hy + c`"""
    (lx, hx), (ly, hy) = as_pair(ctx, x).parts, as_pair(ctx, y).parts
    if _filled(ly, 0.0, shape_of(lx)):
        return pair(lx, plus(ctx, hx, hy))
    low = ctx.add(lx, ly)
    c = holds(ctx, "greater_equal", low, _BASE)
    return pair(ctx.sub(low, ctx.mul(c, _BASE)), ctx.add(plus(ctx, hx, hy), c))


def negative(ctx: Context, x: Operand) -> Encoded:
    """-x"""
    low, high = as_pair(ctx, x).parts
    return carried(ctx, ctx.mul(low, -1.0), ctx.mul(high, -1.0))


def subtract(ctx: Context, x: Operand, y: Operand) -> Encoded:
    """x - y"""
    (lx, hx), (ly, hy) = as_pair(ctx, x).parts, as_pair(ctx, y).parts
    return carried(ctx, ctx.sub(lx, ly), ctx.sub(hx, hy))


def order(ctx: Context, x: Operand, y: Operand) -> Operand:
    """Negative, 0 or positive as x is below, equal to or above y: `2 sign(hx - hy) + sign(lx - ly)`"""
    (lx, hx), (ly, hy) = as_pair(ctx, x).parts, as_pair(ctx, y).parts
    signs = [_sign(ctx, ctx.sub(a, b)) for a, b in ((hx, hy), (lx, ly))]
    return plus(ctx, times(ctx, signs[0], 2.0), signs[1])


def _sign(ctx: Context, x: Operand) -> Operand:
    return ctx.unary("sign", x) if isinstance(x, Value) else torch.sign(as_tensor(x))


def chosen(ctx: Context, cond: Operand, x: Operand, y: Operand) -> Encoded:
    """x where cond holds, else y."""
    (lx, hx), (ly, hy) = as_pair(ctx, x).parts, as_pair(ctx, y).parts
    return pair(ctx.where(cond, lx, ly), ctx.where(cond, hx, hy))


def magnitude(ctx: Context, x: Operand) -> tuple[Encoded, Operand]:
    """(|x|, whether x is negative)"""
    x = as_pair(ctx, x)
    below = ctx.binary("less", x.parts[1], 0.0)
    return chosen(ctx, below, negative(ctx, x), x), below


def multiply(ctx: Context, x: Operand, y: Operand, *, signed: bool) -> Encoded:
    """The product, below 2^21: both numbers in halves of five bits, whose products fp16 holds."""
    if not signed:
        return _product(ctx, as_pair(ctx, x), as_pair(ctx, y))
    (a, below_a), (b, below_b) = magnitude(ctx, x), magnitude(ctx, y)
    product = _product(ctx, a, b)
    flip = ctx.binary("not_equal", ctx.number(below_a), ctx.number(below_b))
    return chosen(ctx, flip, negative(ctx, product), product)


def _product(ctx: Context, x: Encoded, y: Encoded) -> Encoded:
    (lx, hx), (ly, hy) = x.parts, y.parts
    x1, y1 = (floor(ctx, times(ctx, low, 1.0 / _HALF)) for low in (lx, ly))
    x0, y0 = (ctx.sub(low, times(ctx, top, _HALF)) for low, top in ((lx, x1), (ly, y1)))
    middle = plus(ctx, times(ctx, x1, y0), times(ctx, x0, y1))
    top = floor(ctx, times(ctx, middle, 1.0 / _HALF))
    low = plus(ctx, times(ctx, ctx.sub(middle, times(ctx, top, _HALF)), _HALF), times(ctx, x0, y0))
    high = plus(ctx, times(ctx, x1, y1), top)
    for part in (times(ctx, hx, ly), times(ctx, lx, hy), times(ctx, times(ctx, hx, hy), _BASE)):
        high = plus(ctx, high, part)
    return carried(ctx, low, high)


def small_divmod(ctx: Context, x: Operand, y: Operand) -> tuple[Operand, Operand]:
    """Quotient and remainder of integers 0 ... 2048 by such from 1 on: an estimate from below, corrected twice."""
    quotient = floor(ctx, ctx.mul(x, 1.0 / as_tensor(y)) if not isinstance(y, Value) else ctx.div(x, y))
    quotient = ctx.binary("maximum", ctx.sub(quotient, 1.0), 0.0)
    rest = ctx.sub(x, ctx.mul(quotient, y))
    for _ in range(2):
        more = holds(ctx, "greater_equal", rest, y)
        quotient, rest = ctx.add(quotient, more), ctx.sub(rest, ctx.mul(more, y))
    return quotient, rest


def signed_divmod(ctx: Context, x: Operand, y: Operand, *, truncated: bool) -> tuple[Operand, Operand]:
    """Quotient (rounded down, or towards 0) and remainder of integers up to 2048 in magnitude."""
    ax, ay = (ctx.unary("abs", v) if isinstance(v, Value) else as_tensor(v).abs() for v in (x, y))
    quotient, rest = small_divmod(ctx, ax, ay)
    below = holds(ctx, "less", ctx.mul(_sign(ctx, x), _sign(ctx, y)), 0.0)
    if not truncated:
        quotient = ctx.add(quotient, ctx.mul(below, holds(ctx, "greater", rest, 0.0)))
    quotient = ctx.mul(quotient, ctx.sub(1.0, ctx.mul(below, 2.0)))
    return quotient, ctx.sub(x, ctx.mul(quotient, y))


def divmod_by(ctx: Context, x: Operand, divisor: Operand, least: float) -> tuple[Encoded, Encoded]:
    """(floor(x / c), the remainder) by positive constants c below 2^21; x is at least `least`.

    Negative numbers are raised by a multiple of c beforehand. `1024 h + l` by c up to 1024: first h by c, then what is
    left, whose quotient is below 1025: an estimate from below, corrected until the remainder is below c.
    """
    c = as_tensor(divisor)
    power = math.log2(float(c.reshape(-1)[0]))
    if bool((c == c.reshape(-1)[0]).all()) and power == int(power):
        return _by_power(ctx, as_pair(ctx, x), int(power))
    raised = torch.ceil(-min(least, 0.0) / c)
    lifted = bool((raised > 0).any())
    x = add(ctx, x, raised * c) if lifted else as_pair(ctx, x)
    whole: Operand = torch.zeros(1, dtype=torch.float64)
    if bool((c <= PAIR).all()):
        whole, rest_high = small_divmod(ctx, x.parts[1], c)
        x = pair(x.parts[0], rest_high)
    scaled = plus(ctx, x.parts[1], ctx.mul(x.parts[0], 1.0 / _BASE))  # the number by 1024, rounded
    estimate = ctx.binary("maximum", ctx.sub(floor(ctx, ctx.mul(scaled, _BASE / c)), 2.0), 0.0)
    rest = subtract(ctx, x, _product(ctx, as_pair(ctx, estimate), as_pair(ctx, c)))
    estimate, rest = _corrected(ctx, estimate, rest, c)
    quotient = add(ctx, pair(torch.zeros(1, dtype=torch.float64), whole), estimate)
    return (subtract(ctx, quotient, raised) if lifted else quotient), rest


def truncated_divmod(ctx: Context, x: Operand, divisor: Operand) -> tuple[Encoded, Encoded]:
    """(x / c towards 0, the remainder with the sign of x) by positive constants c: those of |x|"""
    size, below = magnitude(ctx, x)
    quotient, rest = divmod_by(ctx, size, divisor, 0.0)
    return chosen(ctx, below, negative(ctx, quotient), quotient), chosen(
        ctx, below, negative(ctx, rest), rest
    )


def _by_power(ctx: Context, x: Encoded, power: int) -> tuple[Encoded, Encoded]:
    """Quotient and remainder by 2^power: the bits of both numbers move apart."""
    low, high = x.parts
    if power >= _LOW_BITS:
        step = 2.0 ** (power - _LOW_BITS)
        quotient = floor(ctx, times(ctx, high, 1.0 / step))
        return as_pair(ctx, quotient), pair(low, ctx.sub(high, times(ctx, quotient, step)))
    step, rest = 2.0**power, _BASE / 2.0**power
    low_quotient, high_quotient = (floor(ctx, times(ctx, v, 1.0 / step)) for v in (low, high))
    high_rest = ctx.sub(high, times(ctx, high_quotient, step))
    quotient = pair(plus(ctx, times(ctx, high_rest, rest), low_quotient), high_quotient)
    return quotient, pair(ctx.sub(low, times(ctx, low_quotient, step)), torch.zeros(1, dtype=torch.float64))


def _corrected(ctx: Context, estimate: Operand, rest: Encoded, c: torch.Tensor) -> tuple[Operand, Encoded]:
    """An estimate up to 5 below the quotient and its remainder, corrected to the quotient."""
    if float(c.max()) <= 340:  # six times c is an integer that fp16 holds
        one = joined(ctx, rest)
        for _ in range(5):
            more = holds(ctx, "greater_equal", one, c)
            estimate, one = ctx.add(estimate, more), ctx.sub(one, ctx.mul(more, c))
        return estimate, pair(one, torch.zeros(1, dtype=torch.float64))
    for _ in range(5):
        more = holds(ctx, "greater_equal", order(ctx, rest, c), 0.0)
        estimate = ctx.add(estimate, more)
        low, high = (times(ctx, part, more) for part in as_pair(ctx, c).parts)
        rest = subtract(ctx, rest, pair(low, high))
    return estimate, rest


def total(ctx: Context, x: Operand, axes: Sequence[int], largest: float) -> Encoded:
    """The sum over axes (kept, of extent 1); `largest` bounds the magnitude of an element that is one number."""
    shape = shape_of(x)
    gone = sorted(a % len(shape) for a in axes)
    stay = [i for i in range(len(shape)) if i not in gone]
    count = math.prod(shape[i] for i in gone)
    lines = math.prod(shape[i] for i in stay)
    flat = ctx.reshape(
        ctx.transpose(x if isinstance(x, Encoded) else ctx.number(x), [*stay, *gone]), (lines, count)
    )
    group = max(1, int(2048 // max(1.0, largest)))
    if not isinstance(flat, Encoded) and group > 1:
        groups = -(-count // group)
        flat = ctx.pad_axis(flat, 1, 0, groups * group - count)
        flat = ctx.reshape(ctx.sum(ctx.reshape(flat, (lines, groups, group)), [2]), (lines, groups))
        count = groups
    value = as_pair(ctx, flat)
    while count > 1:
        half = count // 2
        pairs = add(ctx, _part(ctx, value, 0, half), _part(ctx, value, half, 2 * half))
        value = _joined_lines(ctx, pairs, _part(ctx, value, 2 * half, count)) if count % 2 else pairs
        count = half + count % 2
    kept = tuple(1 if i in gone else n for i, n in enumerate(shape))
    return value.each(lambda part: ctx.reshape(part, kept))


def _part(ctx: Context, x: Encoded, start: int, stop: int) -> Encoded:
    return x.each(lambda part: ctx.slice(part, 1, start, stop))


def _joined_lines(ctx: Context, x: Encoded, y: Encoded) -> Encoded:
    parts = [ctx.concat([a, b], 1) for a, b in zip(x.parts, y.parts, strict=True)]
    return pair(parts[0], parts[1])


def running_total(ctx: Context, x: Operand, axis: int) -> Encoded:
    """The cumulative sum: `x + (x shifted by 1, 2, 4, ...)`, log2(n) times."""
    value = as_pair(ctx, x)
    extent, shift = shape_of(value)[axis], 1
    while shift < extent:
        behind = value.each(
            lambda part, s=shift: ctx.pad_axis(ctx.slice(part, axis, 0, extent - s), axis, s, 0)  # type: ignore[misc]
        )
        value, shift = add(ctx, value, behind), 2 * shift
    return value


def bitwise(ctx: Context, kind: str, x: Operand, y: Operand) -> Encoded:
    """`and`, `or` or `xor` of two's complements, bit by bit."""
    (lx, hx), (ly, hy) = as_pair(ctx, x).parts, as_pair(ctx, y).parts
    low = _bits(ctx, kind, lx, ly, _LOW_BITS)
    below = [holds(ctx, "less", h, 0.0) for h in (hx, hy)]
    unsigned = [plus(ctx, h, times(ctx, b, _TOP)) for h, b in zip((hx, hy), below, strict=True)]
    high = _bits(ctx, kind, unsigned[0], unsigned[1], _HIGH_BITS)
    return pair(low, ctx.sub(high, times(ctx, _bit(ctx, kind, below[0], below[1]), _TOP)))


def _bit(ctx: Context, kind: str, a: Operand, b: Operand) -> Operand:
    both = times(ctx, a, b)
    if kind == "and":
        return both
    return ctx.sub(plus(ctx, a, b), both if kind == "or" else times(ctx, both, 2.0))


def _bits(ctx: Context, kind: str, x: Operand, y: Operand, count: int) -> Operand:
    result: Operand = torch.zeros(1, dtype=torch.float64)
    for k in range(count):
        half_x, half_y = floor(ctx, ctx.mul(x, 0.5)), floor(ctx, ctx.mul(y, 0.5))
        a, b = ctx.sub(x, ctx.mul(half_x, 2.0)), ctx.sub(y, ctx.mul(half_y, 2.0))
        result, x, y = plus(ctx, result, times(ctx, _bit(ctx, kind, a, b), 2.0**k)), half_x, half_y
    return result


def first_place(
    ctx: Context, kind: str, x: Operand, dim: int, taken: Operand | None = None
) -> tuple[Operand, Encoded, Operand]:
    """(the extremum along an axis, where it is first, 1 there and 0 elsewhere): what is `taken` (1) does not count.

    The place's quotient is found first, then the remainder among those that have it.
    """
    shape = shape_of(x)
    axis, extent = dim % len(shape), shape[dim]
    places = torch.arange(extent, dtype=torch.float64)
    places = places.reshape([extent if i == axis else 1 for i in range(len(shape))])
    open_to = x if taken is None else ctx.where(ctx.boolean_of_01(taken), _LOWEST[kind], x)
    best = ctx.reduce(kind, open_to, [axis], keep=True)
    hit = ctx.number(ctx.binary("equal", x, best))
    if taken is not None:
        hit = ctx.mul(hit, ctx.sub(1.0, taken))
    found: list[Operand] = []
    for part in (torch.floor(places / PAIR), places % PAIR):
        candidates = ctx.where(ctx.boolean_of_01(hit), part.expand(shape), float(EXACT_INTEGERS))
        found.append(ctx.reduce("min", candidates, [axis], keep=True))
        hit = ctx.mul(hit, ctx.number(ctx.binary("equal", candidates, found[-1])))
    return best, pair(found[1], found[0]), hit


_LOWEST = {"max": -MAX_FP16, "min": MAX_FP16}
