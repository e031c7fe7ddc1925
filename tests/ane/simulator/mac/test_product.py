"""The multiply-accumulate kernel against published hardware vectors and the law spelled out in int64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ane_trainer.ane.simulator.mac import product as mac
from ane_trainer.ane.simulator.mac.product import mac_bind, mac_matmul
from ane_trainer.ane.simulator.numbers.fp16 import decode, round_half_away
from tests.ane.simulator.mac.reference import mac_matmul_reference

F32 = NDArray[np.float32]
INF = 65536.0


@pytest.fixture(params=[16, 8, 4])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Run the kernels of AVX-512, AVX2 and NEON machines; LLVM splits or joins vectors to fit this one."""
    monkeypatch.setattr(mac, "host_vector_width", lambda: request.param)
    mac._scratch.cache_clear()
    yield request.param
    mac._scratch.cache_clear()


def same_bits(x: F32, y: F32) -> bool:
    return x.shape == y.shape and np.array_equal(x.view(np.uint32), y.view(np.uint32))


def check(a: F32, b: F32, bias: F32 | None = None) -> None:
    expected = mac_matmul_reference(a, b, bias)
    for threads in (1, 2):
        assert same_bits(mac_matmul(a, b, bias, threads=threads), expected)


def normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> F32:
    return round_half_away(rng.normal(size=shape) * scale)


def any_patterns(rng: np.random.Generator, shape: tuple[int, ...]) -> F32:
    return decode(rng.integers(0, 1 << 16, shape).astype(np.uint16))


# M6 notes/numerics.md, measured on M4 and M6: x, w, bias, result.
HARDWARE = [
    ([32768], [1], 0, INF),
    ([16384, 16384], [1, 1], 0, INF),
    ([16384, 16384, -16384, -16384, 1], [1] * 5, 0, INF),
    ([16384, 2**-8, -16384], [1, 2**-8, 1], 0, 2**-16),
    ([16384, 2**-9, -16384], [1, 2**-9, 1], 0, 0),
    ([2048, 1], [1, 1], 0, 2050),
    ([-4096, -2], [1, 1], 0, -4100),
    ([4096, 2], [1, 1], 0, 4100),
    ([1, 2**-11], [1, 1], 0, 1.0009765625),
    ([65504], [2**-4], 0, 4094),
    ([65536], [2**-4], 0, 4096),
    ([-0.0], [1], 0, 0),
    ([2**-12], [-(2**-12)], 0, 0),
    ([16384, 16384], [1, 1], -16384, 16384),
    ([16384, 16384, 16384], [1, 1, 1], -16384, INF),
    ([32752], [1], 32, INF),
    ([32736], [1], 32, INF),
    ([0], [1], 2**-17, 2**-16),
    ([2**-17], [1], 2**-17, 2**-15),
    ([1.875 * 2**-14], [1.875 * 2**-3], 0, 0),
    ([1.9 * 2**-13], [1.5 * 2**-4], 0, 0),
    ([1.9375 * 2**-12], [1.9375 * 2**-5], 0, 0),
    ([0.99 * 2**-14], [0.2], 0, 0),
    ([1.5 * 2**-13], [0.125], 0, 2**-15),
    ([0.5 * 2**-14], [0.25], 0, 2**-16),
    ([-32768], [1], 0, -INF),
    ([32752], [1], 0, 32752),
    ([0], [1], 32768, INF),
    ([0], [1], -INF, -INF),
]


@pytest.mark.parametrize(("x", "w", "bias", "expected"), HARDWARE)
@pytest.mark.parametrize("swap", [False, True])
def test_hardware_vectors(x: list[float], w: list[float], bias: float, expected: float, swap: bool) -> None:
    a, b = round_half_away([x]), round_half_away([w]).T
    a, b = (b.T, a.T) if swap else (a, b)
    start = np.full(1, bias, np.float32)
    assert same_bits(mac_matmul(a, b, start, threads=1), np.array([[expected]], np.float32))
    assert same_bits(mac_matmul_reference(a, b, start), np.array([[expected]], np.float32))


def test_published_gemm_error() -> None:
    """ANEForge bench device_saturation_sweep, N = 512: 0.00257800397023792 on M1, M2 Pro, M4, M5, M5 Pro."""
    rng, root = np.random.default_rng(0), np.float32(np.sqrt(512))
    x = rng.standard_normal((512, 512)).astype(np.float32) / root
    w = rng.standard_normal((512, 512)).astype(np.float32) / root
    exact = x[:256].astype(np.float64) @ w.T.astype(np.float64)
    result = mac_matmul(decode(x.astype(np.float16)), decode(w.astype(np.float16)).T, threads=2)[:256]
    error = np.linalg.norm(result.astype(np.float64) - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(0.00257800397023792, rel=1e-12)


@pytest.mark.parametrize("exponents", [-19, -18, -17, -16, -15, -12, -8, -4, 3])
@pytest.mark.parametrize("is_wide", [False, True])
def test_every_pair_of_significands(exponents: int, is_wide: bool) -> None:
    """One product per result: all 2^20 pairs, ties and the drop rule's border included, in both loops."""
    significands = np.arange(1024, 2048, dtype=np.float32) / 1024
    a = np.ldexp(significands, exponents // 2)[:, None]
    b = -np.ldexp(significands, exponents - exponents // 2)[None]
    if is_wide:  # terms that cancel, too large for the narrow loop
        a = np.hstack([a, np.full((1024, 2), 1024, np.float32)])
        b = np.vstack([b, np.full((1, 1024), 1, np.float32), np.full((1, 1024), -1, np.float32)])
    assert same_bits(mac_matmul(a, b, threads=2), mac_matmul_reference(a, b))


SHAPES = [(1, 1, 1), (5, 7, 3), (12, 256, 32), (13, 257, 33), (40, 300, 70), (3, 600, 100)]


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_and_shapes(lanes: int, shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    rng = np.random.default_rng(rows * lanes)
    for scale in (2.0**-8, 2.0**-5, 0.2, 1.0, 4.0, 30.0, 300.0):
        a = normal(rng, (rows, depth), scale)
        b = normal(rng, (depth, columns), rng.choice([0.02, 0.5, scale]))
        check(a, b)
        check(a, b, normal(rng, (columns,), scale))
    patterns = any_patterns(rng, (rows, depth))
    check(patterns, normal(rng, (depth, columns), 2.0**-10))
    check(patterns, any_patterns(rng, (depth, columns)), any_patterns(rng, (rows, columns)))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 70), st.integers(1, 70)),
    exponents=st.tuples(st.integers(-24, 15), st.integers(-24, 15)),
)
def test_random_exponents(seed: int, shape: tuple[int, int, int], exponents: tuple[int, int]) -> None:
    """Sparse operands over a range of exponents, subnormals among them; few significant bits make ties."""
    rng = np.random.default_rng(seed)
    rows, depth, columns = shape
    low, high = min(exponents), max(exponents)

    def draw(shape: tuple[int, int]) -> F32:
        significand = rng.integers(-7, 8, shape) / 4 + rng.choice([0, 2**-10], shape)
        return round_half_away(np.ldexp(significand, rng.integers(low, high + 1, shape)))

    check(draw((rows, depth)), draw((depth, columns)), draw((1, columns))[0])


def test_narrow_accumulator_filled_to_its_limit() -> None:
    """Eight products just below 64 in sum, then their opposites: the float accumulator must lose nothing."""
    magnitude = round_half_away(np.sqrt(63.89 / 8))
    signs = np.tile(np.repeat([1, -1], 8), 32).astype(np.float32)
    a = np.tile(np.full(512, magnitude, np.float32) * signs, (24, 1))
    b = np.full((512, 64), magnitude, np.float32)
    a[:, 511], b[511] = 0.25 + np.arange(24) / 64, 2.0**-15
    check(a, b)
    check(-a, b)


@pytest.mark.parametrize("first", [1, -1])
def test_overflow_sticks_in_ascending_order(first: int) -> None:
    """The sign of the first overflow wins over a later one; large terms that stay in range are finite."""
    rng = np.random.default_rng(5)
    b = np.ones((400, 50), np.float32)
    a = normal(rng, (30, 400), 1.0)
    a[3, 200:202] = first * 20000, first * 20000
    a[3, 300:304] = -first * 20000
    a[4, 10:14] = first * np.array([30000, -20000, 20000, -30000])
    result = mac_matmul(a, b, threads=1)
    assert np.all(result[3] == first * INF)
    assert np.all(np.abs(result[4]) < 100)
    check(a, b)


def test_many_suspicious_sums() -> None:
    """Sums of magnitudes far above the limit, some of which overflow and some not."""
    rng = np.random.default_rng(6)
    a, b = normal(rng, (30, 500), 100.0), normal(rng, (500, 90), 6.0)
    result = mac_matmul(a, b, threads=2)
    assert np.any(np.abs(result) == INF)
    assert np.any(np.abs(result) < INF)
    check(a, b, normal(rng, (30, 90), 8000.0))


def test_strides_batches_and_broadcasting() -> None:
    rng = np.random.default_rng(7)
    a, b = normal(rng, (2, 3, 20, 50), 1.0), normal(rng, (3, 50, 45), 0.3)
    bias = normal(rng, (20, 1), 1.0)
    expected = np.empty((2, 3, 20, 45), np.float32)
    for i, j in np.ndindex(2, 3):
        expected[i, j] = mac_matmul_reference(a[i, j], b[j], bias)
    for threads in (1, 2, 5):
        assert same_bits(mac_matmul(a, b, bias, threads=threads), expected)
    turned_a = np.ascontiguousarray(a.transpose(3, 0, 2, 1)).transpose(1, 3, 2, 0)
    turned_b = np.ascontiguousarray(b.transpose(2, 1, 0)).transpose(2, 1, 0)
    space = np.zeros((45, 2, 3, 40), np.float32)
    out = space[..., ::-2].transpose(1, 2, 3, 0)
    assert mac_matmul(turned_a[..., ::-1], turned_b[:, ::-1], bias, threads=2, out=out) is out
    assert same_bits(np.ascontiguousarray(out), expected)
    assert not space[..., ::2].any()


def test_block_cutting_changes_nothing() -> None:
    rng = np.random.default_rng(8)
    a, b = normal(rng, (1000, 5), 1.0), normal(rng, (5, 1100), 0.1)
    expected = mac_matmul_reference(a, b)
    for threads in (1, 2, 3):
        assert same_bits(mac_matmul(a, b, threads=threads), expected)


def test_out_may_be_an_operand() -> None:
    rng = np.random.default_rng(9)
    a, b = normal(rng, (40, 40), 1.0), normal(rng, (40, 40), 1.0)
    expected = mac_matmul_reference(a, b)
    assert same_bits(mac_matmul(a, b, threads=1, out=a), expected)


def test_bound_step_reads_the_arrays_again() -> None:
    rng = np.random.default_rng(10)
    a, b, out = np.zeros((9, 30), np.float32), normal(rng, (30, 20), 1.0), np.empty((9, 20), np.float32)
    step = mac_bind(a, b, threads=1, out=out)
    step()
    assert not out.any()
    a[:] = normal(rng, a.shape, 1.0)
    step()
    assert same_bits(out, mac_matmul_reference(a, b))


def test_empty_sums_and_empty_results() -> None:
    bias = np.array([1.0, 2.0**-17], np.float32)
    result = mac_matmul(np.empty((3, 0), np.float32), np.empty((0, 2), np.float32), bias, threads=1)
    assert same_bits(result, np.tile(np.array([1.0, 2.0**-16], np.float32), (3, 1)))
    assert mac_matmul(np.empty((0, 4), np.float32), np.empty((4, 2), np.float32), threads=2).shape == (0, 2)


@pytest.mark.parametrize(
    ("a", "b", "needs"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((4, 2), np.float32), "K, N"),
        (np.zeros(3, np.float32), np.zeros((3, 2), np.float32), "M, K"),
        (np.zeros((2, 3), np.float16), np.zeros((3, 2), np.float32), "float32"),
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float64), "float32"),
    ],
)
def test_refused_operands(a: F32, b: F32, needs: str) -> None:
    with pytest.raises(ValueError, match=needs):
        mac_matmul(a, b, threads=1)


def test_refused_out() -> None:
    a = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="out"):
        mac_matmul(a, a, threads=1, out=np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(37, 300, 16), (5, 20, 70), (500, 27, 16), (27, 700, 9)]
)
def test_gathered_operands(scale: float, rows: int, depth: int, columns: int) -> None:
    """Either operand by tables, or both; sums that pass the limit too."""
    rng = np.random.default_rng(0)
    memory = round_half_away(rng.standard_normal(4000) * scale)
    a = mac.Gathered(memory, rng.integers(0, 2000, rows), rng.integers(0, 2000, depth))
    b = mac.Gathered(memory, rng.integers(0, 2000, depth), rng.integers(0, 2000, columns))
    for left, right in ((a, b.dense()), (a.dense(), b), (a, b)):
        out = np.empty((rows, columns), np.float32)
        mac.mac_bind_gathered(left, right, threads=2, out=out)()
        assert np.array_equal(out.view(np.uint32), mac_matmul_reference(a.dense(), b.dense()).view(np.uint32))
