"""ANEForge's mathematics on the simulator, within the errors its documentation gives for silicon."""

from __future__ import annotations

from typing import Any

import aneforge as af
import numpy as np
import pytest
from aneforge import dsp, fft, linalg
from aneforge import special as ane
from scipy import special

from tests.interop.harness import QUIET, Array, run

pytestmark = pytest.mark.filterwarnings(QUIET)


def error(got: Any, want: Any) -> float:
    """Relative error in the 2-norm."""
    got, want = np.asarray(got, np.complex128).ravel(), np.asarray(want, np.complex128).ravel()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


SPECIAL = [
    (ane.sin, np.sin, -1.5, 1.5, 4e-3),
    (ane.cos, np.cos, -1.5, 1.5, 4e-3),
    (ane.erfc, special.erfc, 0, 6, 4e-3),
    (ane.erf, special.erf, -1, 1, 3e-3),
    (ane.expm1, np.expm1, -0.7, 0.7, 2e-3),
    (ane.log1p, np.log1p, -0.5, 1, 2e-3),
    (ane.lgamma, special.gammaln, 2.5, 8, 2e-3),
    (ane.gamma, special.gamma, 1, 2, 2e-3),
    (ane.gamma_via_lgamma, special.gamma, 1, 7.5, 5e-3),
    (ane.bessel_j0, special.j0, 0, 3, 2e-3),
    (ane.bessel_i0, special.i0, 0, 3.75, 2e-3),
    (ane.bessel_k0, special.k0, 0.1, 2, 3e-3),
    (ane.exp_wide, np.exp, -5, 5, 5e-3),
    (ane.log_wide, np.log, 0.1, 100, 3e-3),
]


@pytest.mark.parametrize(
    ("function", "reference", "low", "high", "bound"), SPECIAL, ids=[s[0].__name__ for s in SPECIAL]
)
def test_special_functions(function: Any, reference: Any, low: float, high: float, bound: float) -> None:
    x = np.linspace(low, high, 64).astype(np.float16).astype(np.float32).reshape(1, 64)
    assert error(run(function, x), reference(x)) < bound


SIGNAL = np.random.default_rng(3).standard_normal(256).astype(np.float32)


def test_fourier_transforms() -> None:
    real, imaginary = fft.fft(SIGNAL, np.zeros_like(SIGNAL), 256)
    assert error(real + 1j * imaginary, np.fft.fft(SIGNAL)) < 1.5e-3
    back, _ = fft.ifft(real, imaginary, 256)
    assert error(back, SIGNAL) < 2e-3
    real, imaginary = fft.rfft(SIGNAL, 256)
    count = len(np.ravel(real))
    assert error(real + 1j * imaginary, np.fft.fft(SIGNAL)[:count]) < 1.5e-3
    image = SIGNAL.reshape(16, 16)
    real, imaginary = fft.fft2(image)
    assert error(real + 1j * imaginary, np.fft.fft2(image)) < 2e-3
    assert error(fft.ifft2(real, imaginary)[0], image) < 3e-3


def test_signal_processing() -> None:
    taps = np.hanning(9) / np.hanning(9).sum()
    assert error(dsp.fir_filter(SIGNAL, taps, "full"), np.convolve(SIGNAL, taps)) < 2e-3
    assert error(dsp.fft_convolve(SIGNAL, taps), np.convolve(SIGNAL, taps)) < 4e-3
    spectrum = np.asarray(dsp.spectrogram(np.tile(SIGNAL, 4), win=64))
    assert np.isfinite(spectrum).all()
    assert spectrum.max() > 0
    lags = (
        len(SIGNAL) // 8
    )  # of a prefix of the signal, by its definition: not of the signal padded with zeros
    want = np.correlate(SIGNAL, SIGNAL[: len(SIGNAL) - lags], "valid")
    assert error(dsp.autocorrelate(SIGNAL, lags), want) < 3e-3
    smooth = np.asarray(dsp.freq_filter(SIGNAL, "lowpass", 0.2))
    assert np.abs(np.diff(smooth)).mean() < 0.5 * np.abs(np.diff(SIGNAL)).mean()


def positive_definite(n: int, condition: float, seed: int) -> Array:
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    return (q * np.geomspace(1, condition, n)) @ q.T


SPD = positive_definite(8, 10, 1)
GENERAL = SPD + 0.3 * np.random.default_rng(2).standard_normal((8, 8))
B = np.random.default_rng(4).standard_normal(8)


def half(x: Array) -> Array:
    return np.asarray(x, np.float16)


def test_solvers() -> None:
    want = np.linalg.solve(SPD, B)
    assert error(linalg.conjugate_gradient(half(SPD), half(B), iters=12), want) < 1e-2
    assert error(linalg.gmres(half(SPD), half(B)), want) < 3e-2
    assert error(linalg.lsqr(half(SPD), half(B)), want) < 5e-2
    lower = np.tril(GENERAL)
    assert error(linalg.solve_triangular(half(lower), half(B)), np.linalg.solve(lower, B)) < 2e-2


def test_factorizations() -> None:
    q, r = linalg.qr(half(GENERAL))
    assert error(q @ r, GENERAL) < 1e-2
    assert error(q.T @ q, np.eye(8)) < 1e-2
    lower = linalg.cholesky(half(SPD))
    assert error(lower @ lower.T, SPD) < 1e-2
    lower, upper = linalg.lu(half(SPD))
    assert error(lower @ upper, SPD) < 1e-2


def _exponential(a: Array) -> Array:
    values, vectors = np.linalg.eigh(a)
    return (vectors * np.exp(values)) @ vectors.T


def test_spectra_and_functions_of_matrices() -> None:
    assert error(np.sort(linalg.eigh(half(SPD), sweeps=4)), np.linalg.eigvalsh(SPD)) < 1e-2
    assert error(linalg.expm(half(SPD / 20)), _exponential(SPD / 20)) < 1e-2
    assert error(linalg.matrix_power(half(SPD / 10), 3), np.linalg.matrix_power(SPD / 10, 3)) < 1e-2
    assert error(linalg.norm(half(SPD)), np.linalg.norm(SPD)) < 5e-3


def test_paired_values_keep_what_one_fp16_loses() -> None:
    high, low = np.full((1, 8), 1.0, np.float32), np.full((1, 8), 2.0**-13, np.float32)

    def graph(a: Any, b: Any) -> Any:
        total = af.paired(a, b) + af.paired(a, b)
        return (total - af.paired(a + a)).to_tensor()

    np.testing.assert_array_equal(run(graph, high, low), 2.0**-12)


def test_paired_dot() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 64)).astype(np.float16).astype(np.float32)
    y = rng.standard_normal((2, 64)).astype(np.float16).astype(np.float32)
    got = run(lambda a, b: af.paired(a).dot(af.paired(b)).to_tensor(), x, y)
    np.testing.assert_allclose(got.ravel(), (x * y).sum(-1), rtol=2e-3, atol=2e-3)


EINSUMS = [
    ("ij,jk->ik", (4, 6), (6, 5)),
    ("bij,bjk->bik", (3, 4, 6), (3, 6, 5)),
    ("i,j->ij", (4,), (6,)),
    ("ij,j->i", (4, 6), (6,)),
    ("ij,ij->i", (4, 6), (4, 6)),
    ("i,i->", (6,), (6,)),
    ("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("ijk,jl->ikl", (3, 4, 5), (4, 6)),
    ("ii,ij->j", (5, 5), (5, 6)),
    ("ij->ji", (4, 6)),
    ("bii->bi", (2, 5, 5)),
    ("...ij->...ji", (2, 3, 4)),
]


@pytest.mark.parametrize("case", EINSUMS, ids=lambda case: case[0])
def test_einsum(case: tuple[Any, ...]) -> None:
    equation, *shapes = case
    rng = np.random.default_rng(0)
    operands = [rng.uniform(-1, 1, s).astype(np.float16).astype(np.float32) for s in shapes]
    got = run(lambda *t: af.einsum(equation, *t), *operands)
    want = np.einsum(equation, *operands)
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=2e-3, atol=3e-3)


def test_attention_helpers() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (6, 8)).astype(np.float16).astype(np.float32)
    w = [rng.uniform(-0.5, 0.5, (8, 8)).astype(np.float16).astype(np.float32) for _ in range(4)]

    def heads(t):
        return t.reshape(6, 2, 4).transpose(1, 0, 2)

    q, k, v = (heads(x @ m.T) for m in w[:3])
    scores = special.softmax(q @ k.transpose(0, 2, 1) / 2, -1)
    want = (scores @ v).transpose(1, 0, 2).reshape(6, 8) @ w[3].T
    none = [None] * 4
    got = run(
        lambda t: af.mha(t, *(part for pair in zip(w, none, strict=True) for part in pair), n_heads=2), x
    )
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=1e-2)
    got = run(lambda t, c: af.cross_attention(t, c, *w, n_heads=2), x, x)
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=1e-2)
    gate = rng.uniform(-0.5, 0.5, (12, 8)).astype(np.float16).astype(np.float32)
    value, door = x @ gate[:6].T, x @ gate[6:].T
    np.testing.assert_allclose(
        run(lambda t: af.geglu(t, gate, None), x), value * door * special.ndtr(door), atol=1e-2
    )


def test_attention_that_has_a_fused_form_compiles_to_one_program() -> None:
    """Beyond the sizes of the native layer ANEForge itself falls back to products and softmax."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.uniform(-1, 1, (1, 1, 512, 8)).astype(np.float16).astype(np.float32) for _ in range(3))
    want = special.softmax(q @ k.transpose(0, 1, 3, 2) / 8**0.5, -1) @ v
    np.testing.assert_allclose(run(af.sdpa, q, k, v), want, atol=1e-2)


def test_rewrites_and_optimizer_keep_the_result() -> None:
    x = np.random.default_rng(0).uniform(0, 1, (4, 64)).astype(np.float16).astype(np.float32)
    graph = af.input((4, 64))
    net = af.compile(af.reduce_sum_to_matmul((graph * 2.0).sum(1)))
    np.testing.assert_allclose(net(x), 2 * x.sum(1, keepdims=True), rtol=2e-3)
    net.release()
    w = np.random.default_rng(1).uniform(-0.5, 0.5, (64, 8)).astype(np.float32)
    for level in (0, 1, "routes"):
        np.testing.assert_allclose(run(lambda t: t @ w, x, opt=level), x @ w, atol=3e-2)
    tuned = af.tune(af.input((4, 64)) @ w)
    np.testing.assert_allclose(tuned(x), x @ w, atol=3e-2)
    tuned.release()
