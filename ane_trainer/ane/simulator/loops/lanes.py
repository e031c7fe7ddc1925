"""The engine's elementwise arithmetic and its multiply-accumulate law on vectors of decoded fp16, as LLVM IR.

Every function takes and returns values of any number of lanes. Results of `rounded`, `saturated` and all built on
them lie within the engine's range, +-65536 (its inf); no NaN occurs.

The multiply-accumulate (law: `mac/product.py`) is for sums of few products, as in depthwise convolution: its
accumulator is a float64 that counts multiples of 2^-16, exact to 2^51. Once its magnitude is 2^31 (32768) it stays,
and `mac_end` makes inf of it.
"""

from __future__ import annotations

from ane_trainer.ane.simulator.loops.ir import F32, F64, HALF, I16, I32, I64, Value


def rounded(x: Value) -> Value:
    """Half away from zero to 11 bits, as `fp16.round_half_away` does, on the CPU's half conversion.

    The CPU rounds ties to even. A tie ends in zero bits, so setting the last bit moves it outward; the
    float32 just below a tie ends in one and stays. Overflow gives the CPU's inf, which is clamped to the
    engine's (65536).
    """
    return saturated((x.bits(I32) | 1).bits(F32).to(HALF).to(F32))


def to_11_bits(x: Value) -> Value:
    """A sum of decoded fp16 numbers half away from zero to 11 bits, of any size: multiples of 2^-24 have no more bits
    below 2^-13, so the step is right there, too.
    """
    return (x.bits(I32) + (1 << 12) & -(1 << 13)).bits(F32)


def saturated(x: Value) -> Value:
    """No result lies beyond the engine's inf, 65536 (operands may: NaN patterns decode to more)."""
    return x.call("minnum", 65536.0, flags="nnan ").call("maxnum", -65536.0, flags="nnan ")


def quotient(x: Value, y: Value) -> Value:
    """x / y in float32, rounded; a divisor below 2^-16 counts as that, because its inverse would be inf, and -0
    as 0.
    """
    size = y.call("fabs").call("maxnum", 2.0**-16, flags="nnan ")
    return rounded(x / size.call("copysign", y + 0.0))


def affine(x: Value, scale: Value, offset: Value) -> Value:
    """x * scale + offset with one rounding. The product is exact; the sum's float32 rounding matters only
    where it hits a tie that the true sum stays below: there the tie is moved inward before it rounds.
    """
    product = x * scale
    total = product + offset
    part = total - product
    lost = (product - (total - part)) + (offset - part)
    below = (lost * total < 0.0).to(I32)
    return rounded((total.bits(I32) - below).bits(F32))


def mean(total: Value, count: float) -> Value:
    """A float64 total over `count`, as the float32 next to it towards zero: `rounded` then rounds it as if it were
    exact, because it moves outward what ends in a zero bit, and no float32 but a tie itself ends in a tie.
    """
    exact = total / count
    near = exact.to(F32)
    beyond = near.to(F64).call("fabs") > exact.call("fabs")
    return (near.bits(I32) - beyond.to(I32)).bits(F32)


def pattern(x: Value) -> Value:
    """The fp16 pattern of decoded values, as i32.

    A product by 2^-112 moves the exponent's bias to that of fp16, in the subnormals too; then bits 13 on are
    the pattern but for the sign.
    """
    return _pattern((x * 2.0**-112).bits(I32))


def _pattern(bits: Value) -> Value:
    return (bits >> 13 & 0x7FFF) | (bits >> 16 & 0x8000)


def decoded(patterns: Value) -> Value:
    """The values of fp16 patterns (i16): exponent and fraction move up by 13 bits; a product by 2^112 moves the
    bias, in every exponent field.
    """
    wide = patterns.to(I32)
    magnitude = ((wide & 0x7FFF) << 13).bits(F32) * 2.0**112
    return (magnitude.bits(I32) | ((wide & 0x8000) << 16)).bits(F32)


def encoded(x: Value) -> tuple[Value, Value]:
    """The fp16 patterns (i16) of decoded values, and an i32 that is not 0 where x is no decoded value: what decodes
    back to other bits.
    """
    bits = (x * 2.0**-112).bits(I32)
    back = (bits & -0x70002000).bits(F32) * 2.0**112
    return _pattern(bits).to(I16), back.bits(I32) ^ x.bits(I32)


def looked_up(x: Value, table: Value) -> Value:
    """The entries of a float32[65536] at the fp16 patterns of decoded values, lane by lane: that is faster than the
    CPU's gather (a million numbers with AVX-512: 420 us against 530).
    """
    index = pattern(x)
    found = [table.at(index.lane(i).to(I64), F32).load(F32) for i in range(x.type.lanes)]
    return joined(found)


def joined(scalars: list[Value]) -> Value:
    """A vector of these numbers; of one number itself."""
    lanes = len(scalars)
    if lanes == 1:
        return scalars[0]
    function, kind = scalars[0].function, scalars[0].type.of(lanes)
    vector = Value(function, kind, "poison")
    for i, scalar in enumerate(scalars):
        text = f"insertelement {kind.text} {vector.name}, {scalar.type.text} {scalar.name}, i32 {i}"
        vector = function.emit(kind, text)
    return vector


def mac_rounded(x: Value) -> Value:
    """A multiply-accumulate result: 32768 and beyond become inf (65536), -0 becomes +0, then rounding."""
    over = x.call("fabs") >= 32768.0
    return rounded(over.choose(x * 4.0, x)) + 0.0


def mac_start(bias: Value) -> Value:
    """The accumulator's first value."""
    return _whole(bias * 65536.0)


def mac_add(total: Value, x: Value, weight: Value) -> Value:
    """The accumulator after one more product, which is dropped where its exponents sum to -17 or less."""
    product = x * weight * 65536.0
    kept = (_exponent(x) + _exponent(weight)).above((254 - 17) << 23)
    more = total + _whole(kept.choose(product, 0.0))
    return (total.call("fabs") >= 2.0**31).choose(total, more)


def mac_end(total: Value) -> Value:
    """The engine's result. Bits beyond float32 are cut: they lie below every tie of the fp16 rounding."""
    near = (total.bits(I64) & -(1 << 29)).bits(F64).to(F32)
    return mac_rounded(near * 2.0**-16)


def _whole(scaled: Value) -> Value:
    """The nearest whole number, ties away from zero, as float64."""
    return half_away(scaled.to(F64))


def half_away(x: Value) -> Value:
    """Float64 rounded to whole numbers, ties away from zero."""
    half = x.function.constant(x.type, 0.5).call("copysign", x)
    return (x + half).call("trunc")


def _exponent(x: Value) -> Value:
    """The float32 exponent field of a decoded number; subnormal fp16 counts as 2^-14."""
    return (x.bits(I32) & 0x7F800000).call("umax", 113 << 23)
