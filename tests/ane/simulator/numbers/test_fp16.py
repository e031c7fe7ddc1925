"""fp16.py against exact rational arithmetic: every pattern, every tie, and float32 double rounding."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.simulator.numbers.fp16 import INF, decode, encode, round_half_away

PATTERNS = np.arange(1 << 16, dtype=np.uint16)
DECODED = decode(PATTERNS)
MAGNITUDES = np.sort(DECODED[:0x7C01])  # 0 .. 65536, the values a result can take


def exact_half_away(value: Fraction) -> float:
    """Half away from zero on the fp16 grid, by search over the grid in exact rationals."""
    magnitude = abs(value)
    above = int(np.searchsorted(MAGNITUDES, float(magnitude)))
    candidates = MAGNITUDES[max(above - 2, 0) : above + 2]
    best = min(candidates, key=lambda c: (abs(Fraction(float(c)) - magnitude), -c))
    return float(best) if value >= 0 else -float(best)


def test_every_pattern_round_trips_with_its_sign() -> None:
    assert np.array_equal(encode(DECODED).view(np.uint16), PATTERNS)
    assert len(np.unique(DECODED[:0x8000])) == 0x8000
    assert np.signbit(DECODED[0x8000])
    assert DECODED[0x8000] == 0


def test_decode_agrees_with_ieee_where_ieee_is_finite_and_has_no_inf_or_nan() -> None:
    ieee = PATTERNS.view(np.float16).astype(np.float32)
    finite = np.isfinite(ieee)
    assert np.array_equal(DECODED[finite], ieee[finite])
    assert np.isfinite(DECODED).all()


@pytest.mark.parametrize(
    ("pattern", "value"), [(0x7C00, 65536.0), (0xFC00, -65536.0), (0x7E00, 98304.0), (0x7FFF, 131008.0)]
)
def test_exponent_field_31_is_an_ordinary_exponent(pattern: int, value: float) -> None:
    assert decode(np.uint16(pattern)) == value
    assert encode(np.float32(value)).view(np.uint16) == pattern


def test_decode_takes_float16_and_refuses_other_dtypes() -> None:
    assert decode(np.float16(1.5)) == 1.5
    with pytest.raises(TypeError, match="got float32"):
        decode(np.float32(1.5))


@pytest.mark.parametrize("value", [1.0 + 2.0**-11, 2.0**-25, 131072.0, np.inf, np.nan])
def test_encode_refuses_what_no_pattern_decodes_to(value: float) -> None:
    with pytest.raises(ValueError, match="round_half_away"):
        encode(np.float32(value))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_keeps_every_value_up_to_inf_and_saturates_above(dtype: type) -> None:
    kept = np.abs(DECODED) <= INF
    assert np.array_equal(round_half_away(DECODED.astype(dtype))[kept], DECODED[kept])
    patterns = encode(round_half_away(DECODED.astype(dtype))).view(np.uint16)
    assert np.array_equal(patterns[kept], PATTERNS[kept])
    assert (np.abs(round_half_away(DECODED.astype(dtype))[~kept]) == INF).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_tie_goes_away_from_zero_and_its_neighbours_do_not(dtype: type) -> None:
    low, high = MAGNITUDES[:-1], MAGNITUDES[1:]
    tie = ((low.astype(np.float64) + high) / 2).astype(dtype)
    for sign in (1, -1):
        assert np.array_equal(round_half_away(dtype(sign) * tie), sign * high)
        assert np.array_equal(round_half_away(dtype(sign) * np.nextafter(tie, dtype(0))), sign * low)
        assert np.array_equal(round_half_away(dtype(sign) * np.nextafter(tie, dtype(1e9))), sign * high)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saturation_starts_at_65520(dtype: type) -> None:
    below = np.nextafter(dtype(65520), dtype(0))
    assert round_half_away(dtype(65520)) == 65536
    assert round_half_away(below) == 65504
    assert round_half_away(dtype(-1e30)) == -65536
    assert round_half_away(dtype(np.inf)) == 65536


@pytest.mark.parametrize(
    ("value", "expected"), [(2049, 2050), (-2049, -2050), (4098, 4100), (1 + 2.0**-11, 1.0009765625)]
)
def test_published_roundings(value: float, expected: float) -> None:
    assert round_half_away(value) == expected


def _pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(DECODED[rng.integers(0, 1 << 16, (2, count))])  # type: ignore[return-value]


def test_one_float32_sum_then_rounding_is_the_correctly_rounded_sum() -> None:
    """float64 holds every fp16 sum exactly (41 bits), so rounding it once is the witness: 4 million pairs."""
    a, b = _pairs(4_000_000)
    assert np.array_equal(round_half_away(a + b), round_half_away(a.astype(np.float64) + b))


def test_one_float32_product_then_rounding_is_the_correctly_rounded_product() -> None:
    a, b = _pairs(4_000_000)
    assert np.array_equal((a * b).astype(np.float64), a.astype(np.float64) * b)  # exact: 22 bits
    assert np.array_equal(round_half_away(a * b), round_half_away(a.astype(np.float64) * b))


def test_sums_near_ties_are_not_rounded_twice() -> None:
    """Every value plus every value up to 13 binades below it whose sum lands beside a midpoint."""
    big = DECODED[0x3C00:0x4000]  # 1 .. 2
    for exponent in range(-24, 1):
        small = np.float32(2.0**exponent) * (1 + np.float32([0, 1, 511, 512, 513, 1023]) / 1024)
        small = np.unique(round_half_away(small))
        a, b = np.meshgrid(big, np.concatenate([small, -small]))
        assert np.array_equal(round_half_away(a + b), round_half_away(a.astype(np.float64) + b))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 65535), st.integers(0, 65535))
def test_sum_and_product_against_exact_rationals(i: int, j: int) -> None:
    a, b = DECODED[i], DECODED[j]
    p, q = Fraction(float(a)), Fraction(float(b))
    for ours, exact in ((a + b, p + q), (a * b, p * q)):
        expected = exact_half_away(exact) if abs(exact) < 65520 else (65536.0 if exact > 0 else -65536.0)
        assert round_half_away(ours) == expected


def test_zero_keeps_its_sign() -> None:
    for dtype in (np.float32, np.float64):
        assert np.signbit(round_half_away(dtype(-0.0)))
        assert not np.signbit(round_half_away(dtype(0.0)))
        assert np.signbit(round_half_away(dtype(-(2.0**-26))))
        assert round_half_away(dtype(-(2.0**-26))) == 0
