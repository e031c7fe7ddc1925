"""Numbers published about the engine's arithmetic, and the programs that give them on the simulator.

Inputs are the seeded ones of ANEForge's benchmarks (bench/device_saturation_sweep.py,
device_bandwidth_roofline.py, numeric_cliffs.py); figures are those of its result files for each chip. Table
errors: M6 data/06_numerics/f3_lut_m6.txt and lut_ulp_m6.txt. A relative error is |engine - reference| /
|reference| in the L2 norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Value
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.verify.vectors import dispatch, gemm_error, matmul_cliff, sum_of_integers, width_slice

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Figure:
    """One published number: on which chips, its digits as printed, and how the simulator's is measured.

    Every published digit is claimed to come out, unless a `note` says why not. `seconds` is roughly what a
    measurement takes.
    """

    name: str
    chips: tuple[str, ...]
    published: str
    measure: Callable[[str], float]
    source: str
    note: str = ""
    seconds: float = 1.0

    def simulated(self, chip: str) -> str:
        """The simulator's number with as many decimals as the published one."""
        mantissa, _, exponent = self.published.partition("e")
        decimals = len(mantissa.partition(".")[2])
        return f"{self.measure(chip):.{decimals}{'e' if exponent else 'f'}}"


def relative(got: ArrayLike, want: ArrayLike) -> float:
    """|got - want| / |want| in the L2 norm."""
    wide = np.asarray(want, np.float64)
    return float(np.linalg.norm(np.asarray(got, np.float64) - wide) / np.linalg.norm(wide))


SIX = ("m1", "m1-max", "m2-pro", "m4", "m5", "m5-pro")
_SWEEP = "ANEForge device_saturation_sweep"
_ROOF = "ANEForge device_bandwidth_roofline"
_COMPARE = "ANEForge device_compare_wattcomplete"


def _conv_error(size: int, batch: int, channels: tuple[int, ...], relu: bool) -> Callable[[str], float]:
    """3x3 convolutions, He-normal weights, seed 1, one after the other: error of the first image.

    `channels` are those of the images and of each result; `relu` follows each convolution.
    """

    def measure(chip: str) -> float:
        rng = np.random.default_rng(1)
        x = rng.standard_normal((batch, channels[0], size, size)).astype(np.float32)[:1]
        weights = [_he_normal(rng, *pair) for pair in pairwise(channels)]

        def make(b: Builder, value: Value) -> Value:
            for w in weights:
                weight = from_array(w.astype(np.float16))
                value = b.op("conv", x=value, weight=weight, pad_type="custom", pad=[1, 1, 1, 1])
                value = b.op("relu", x=value) if relu else value
            return value

        got = dispatch(make, x.astype(np.float16), chip)
        want = torch.from_numpy(x).double()
        for w in weights:
            want = torch.conv2d(want, torch.from_numpy(w).double(), padding=1)
            want = want.relu() if relu else want
        return relative(got, want.numpy())

    return measure


def _he_normal(rng: np.random.Generator, inputs: int, outputs: int) -> NDArray[Any]:
    drawn = rng.standard_normal((outputs, inputs, 3, 3)).astype(np.float32)
    return np.asarray(drawn * np.sqrt(2.0 / (inputs * 9)))


#: The row counts that ANEForge's roofline draws one after the other from one generator.
_FULL, _QUICK = (64, 256, 1024, 2048), (256, 2048)


def _rows(rows: int, draws: tuple[int, ...]) -> F32:
    rng = np.random.default_rng(11)
    for count in draws:
        x = rng.standard_normal((count, 4096)).astype(np.float32)
        if count == rows:
            return x
    raise ValueError(f"rows: needs one of {draws}; got {rows}")


def _roofline(kind: str, rows: int) -> Callable[[str], float]:
    """Relative error of one op over `[rows, 4096]` normal numbers; M1 and M2 ran the short list of sizes."""

    def measure(chip: str) -> float:
        x = _rows(rows, _QUICK if chip.startswith(("m1", "m2")) else _FULL)
        make, want = _ARCHETYPES[kind]
        return relative(dispatch(make, x.astype(np.float16), chip), want(x))

    return measure


def _scale_and_shift() -> tuple[F32, F32]:
    rng = np.random.default_rng(13)
    gamma = rng.standard_normal(4096).astype(np.float32) * 0.1 + 1.0
    return gamma.astype(np.float32), (rng.standard_normal(4096).astype(np.float32) * 0.1).astype(np.float32)


def _layer_norm(b: Builder, x: Value) -> Value:
    gamma, beta = (from_array(v.astype(np.float16)) for v in _scale_and_shift())
    return b.op("layer_norm", x=x, axes=[-1], gamma=gamma, beta=beta, epsilon=1e-5)


def _layer_norm_of(x: F32) -> F32:
    gamma, beta = _scale_and_shift()
    mean = x.mean(-1, keepdims=True)
    return np.asarray((x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5) * gamma + beta)


def _softmax_of(x: F32) -> F32:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def _gelu_of(x: F32) -> F32:
    return np.asarray(x * 0.5 * (1.0 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


_ARCHETYPES: dict[str, tuple[Callable[[Builder, Value], Value], Callable[[F32], Any]]] = {
    "relu": (lambda b, x: b.op("relu", x=x), lambda x: np.maximum(x, 0)),
    "gelu": (lambda b, x: b.op("gelu", x=x, mode="EXACT"), _gelu_of),
    "reduce_sum": (
        lambda b, x: b.op("reduce_sum", x=x, axes=[-1], keep_dims=True),
        lambda x: x.sum(-1, keepdims=True),
    ),
    "softmax": (lambda b, x: b.op("softmax", x=x, axis=-1), _softmax_of),
    "layer_norm": (_layer_norm, _layer_norm_of),
}


def table_sweep(kind: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The published sweep of a table: its fp16 inputs, the simulated results and the exact ones, as float64."""
    exact, low, high, _, _ = TABLE_SWEEPS[kind]
    points = np.geomspace(low, high, 1 << 19) if low > 0 else np.linspace(low, high, 1 << 19)
    x = np.unique(points.astype(np.float16))
    op, parameters = ("gelu", {"mode": "TANH_APPROXIMATION"}) if kind == "gelu_tanh" else (kind, {})
    got = dispatch(lambda b, value: b.op(op, x=value, **parameters), x, "m6")
    wide = x.astype(np.float64)
    return wide, got.astype(np.float64), exact(torch.from_numpy(wide)).numpy()


def _table_error(kind: str) -> Callable[[str], float]:
    """Largest absolute error over the published sweep."""

    def measure(chip: str) -> float:
        _, got, exact = table_sweep(kind)
        return float(np.abs(got - exact).max())

    return measure


def _table_ulps(kind: str) -> Callable[[str], float]:
    """Largest error over the published sweep, in fp16's spacing at the exact value."""

    def measure(chip: str) -> float:
        _, got, exact = table_sweep(kind)
        exponent = np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-14)))
        return float((np.abs(got - exact) / np.exp2(exponent - 10)).max())

    return measure


def _first_wrong_sum(chip: str) -> float:
    return float(next(t for t in range(2040, 2080) if sum_of_integers(t)(chip).item() != t) - 1)


def _slice_limit(chip: str) -> float:
    """Largest value of 4090 ... 4096 that a width-offset slice keeps; inf when 60,000 passes."""
    if np.isfinite(width_slice(60000)(chip).item()):
        return float("inf")
    return max(float(v) for v in range(4088, 4100, 2) if np.isfinite(width_slice(v)(chip).item()))


def _stored_product(b: Builder, x: Value) -> Value:
    """x [1, 1] times a weight of 1 / 64 that is stored as int8."""
    weight = b.op(
        "constexpr_affine_dequantize",
        quantized_data=from_array(np.ones((1, 1), np.int8)),
        scale=from_array(np.full(1, 1 / 64, np.float16)),
        zero_point=from_array(np.zeros(1, np.int8)),
        axis=0,
    )
    return b.op("matmul", x=x, y=weight, transpose_x=False, transpose_y=True)


def _int8_limit(chip: str) -> float:
    """Largest value of 4088 ... 4098 that a product with an int8 weight keeps."""
    values = [float(v) for v in range(4088, 4100, 2)]
    return max(
        v for v in values if np.isfinite(dispatch(_stored_product, np.full((1, 1), v, np.float16), chip))
    )


def _one(kind: str, x: float) -> Callable[[str], float]:
    """The result of an op without parameters for one number."""
    return lambda chip: float(dispatch(lambda b, v: b.op(kind, x=v), np.array([x], np.float16), chip).item())


_UNKNOWN = "the order of the engine's partial sums is unknown; the simulator "
_FOURS, _ORDER = f"{_UNKNOWN}takes four terms in fp16, then goes wide", f"{_UNKNOWN}rounds once"

_CLIFFS = "ANEForge numeric_cliffs"

_GEMM = {512: "0.002578", 1024: "0.00552835", 2048: "0.0121319", 4096: "0.0272376", 8192: "0.0616381"}

#: channels, batch drawn, chips, published
_CONVOLUTIONS = (
    (64, 16, ("m4",), "0.000367135"),
    (128, 16, ("m4",), "0.000373511"),
    (256, 8, ("m4",), "0.000390346"),
    (128, 8, ("m1", "m1-max"), "0.000375204"),
    (512, 2, ("m1", "m1-max"), "0.000419058"),
    (64, 16, ("m5-pro",), "0.000513417"),
    (128, 16, ("m5-pro",), "0.00052178"),
    (256, 8, ("m5-pro",), "0.000532035"),
    (512, 4, ("m5-pro",), "0.000554226"),
)

#: channels of image and results, chips, published (ANEForge device_compare_wattcomplete)
_STACKS = (
    ((16, 64), ("m1-max", "m4"), "0.000366366"),
    ((16, 64), ("m5-pro",), "0.000510249"),
    ((64, *[256] * 16), ("m1-max", "m4"), "0.0014397"),
    ((64, *[256] * 16), ("m5-pro",), "0.00334322"),
)

#: op, rows, chips, published, remark
_ROOFLINES = (
    ("relu", 64, ("m5-pro",), "0.000208669", ""),
    ("relu", 256, ("m4", "m5-pro"), "0.000207561", ""),
    ("relu", 256, ("m1", "m1-max"), "0.000207801", ""),
    ("gelu", 64, ("m4", "m5-pro"), "0.00240773", ""),
    ("gelu", 256, ("m4", "m5-pro"), "0.00239551", ""),
    ("gelu", 1024, ("m4", "m5-pro"), "0.00240121", ""),
    ("gelu", 2048, ("m4", "m5-pro"), "0.00239986", ""),
    ("gelu", 256, ("m1", "m1-max"), "0.00239913", ""),
    ("gelu", 2048, ("m1", "m1-max"), "0.00240107", ""),
    ("reduce_sum", 64, ("m5-pro",), "0.000759227", _FOURS),
    ("reduce_sum", 256, ("m5-pro",), "0.000819289", _FOURS),
    ("reduce_sum", 256, ("m1", "m1-max"), "0.000722422", _FOURS),
    ("softmax", 64, ("m5-pro",), "0.00104537", _ORDER),
    ("softmax", 256, ("m4", "m5-pro"), "0.00103026", _ORDER),
    ("softmax", 256, ("m1", "m1-max"), "0.00102407", _ORDER),
    ("layer_norm", 64, ("m4", "m5-pro"), "0.000659704", _ORDER),
    ("layer_norm", 256, ("m5-pro",), "0.000671227", _ORDER),
)

#: Single results on M5: number, result.
_SOFTPLUS = {5: "5.008", 10: "10.0", 11: "0", 12: "0", 88: "0", 1000: "0"}
_ROUND = {1024: "1025", 1025: "1026", -2047: "-2048"}

#: table, exact function, range of the published sweep, published largest error: absolute, and in units in the
#: last place. The sweep of inverse has MIL's default epsilon, 1e-4.
TABLE_SWEEPS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float, float, str, str]] = {
    "sigmoid": (torch.sigmoid, -12, 12, "3.355e-03", "810.8"),
    "tanh": (torch.tanh, -6, 6, "1.613e-03", "11.0"),
    "gelu": (F.gelu, -8, 8, "6.159e-03", "12632.0"),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), -8, 8, "6.158e-03", "12632.0"),
    "silu": (F.silu, -12, 12, "1.491e-02", "28560.0"),
    "exp": (torch.exp, -12, 10, "1.008e+02", "9.1"),
    "log": (torch.log, 2**-10, 1000, "6.638e-03", "91.0"),
    "sqrt": (torch.sqrt, 2**-10, 1000, "1.810e-02", "1.2"),
    "rsqrt": (torch.rsqrt, 2**-6, 1000, "8.139e-03", "2.1"),
    "inverse": (torch.reciprocal, 2**-6, 1000, "4.375e-01", "13.5"),
    "erf": (torch.erf, -4, 4, "8.642e-04", "3.0"),
    "sin": (torch.sin, -8, 8, "6.329e-04", "45.3"),
}


def _gemm(n: int) -> Callable[[str], float]:
    return lambda chip: float(gemm_error(n)(chip)[0])


def _largest_product(chip: str) -> float:
    return float(matmul_cliff(chip)[0])


def _figures() -> Iterator[Figure]:
    for n, digits in _GEMM.items():
        name = f"matmul [N, N] @ [N, N], N = {n}: relative error"
        yield Figure(name, SIX, digits, _gemm(n), _SWEEP, seconds=(n / 1024) ** 2)
    for channels, batch, chips, digits in _CONVOLUTIONS:
        name = f"conv 3x3, {channels} channels, 64x64: relative error"
        measure = _conv_error(64, batch, (channels, channels), relu=False)
        yield Figure(name, chips, digits, measure, _SWEEP, seconds=channels / 32)
    for widths, chips, digits in _STACKS:
        name = f"{len(widths) - 1} x (conv 3x3, relu), {widths[-1]} channels, 32x32: relative error"
        measure = _conv_error(32, 1, widths, relu=True)
        yield Figure(name, chips, digits, measure, _COMPARE, seconds=len(widths))
    for kind, rows, chips, digits, note in _ROOFLINES:
        name = f"{kind} of [{rows}, 4096]: relative error"
        yield Figure(name, chips, digits, _roofline(kind, rows), _ROOF, note)
    name = "matmul: largest output that stays finite, K = 4 ... 128"
    yield Figure(name, SIX, "32758.8", _largest_product, _CLIFFS)
    yield Figure("reduce_sum of eight integers: largest exact total", SIX, "2048", _first_wrong_sum, _CLIFFS)
    name = "width-offset slice: largest value kept"
    yield Figure(name, SIX[:3], "4094", _slice_limit, _CLIFFS)
    yield Figure(name, SIX[3:], "inf", _slice_limit, _CLIFFS)
    name = "matmul with int8 weights: largest activation kept"
    yield Figure(name, ("m1-max", "m2-pro", "m5-pro"), "4094", _int8_limit, "ANEForge issue 153")
    for x, digits in _SOFTPLUS.items():
        yield Figure(f"softplus({x})", ("m5",), digits, _one("softplus", x), "ANEForge issue 113")
    for x, digits in _ROUND.items():
        yield Figure(f"round({x})", ("m5",), digits, _one("round", x), "ANEForge 0.4.0 _compile._e_round")
    for kind, (_, low, high, digits, ulps) in TABLE_SWEEPS.items():
        name = f"{kind} over {low:g} ... {high:g}: largest"
        yield Figure(f"{name} absolute error", ("m6",), digits, _table_error(kind), f"{_M6}f3_lut_m6.txt")
        yield Figure(f"{name} error in fp16 units", ("m6",), ulps, _table_ulps(kind), f"{_M6}lut_ulp_m6.txt")


_M6 = "M6 data/06_numerics/"

#: Every published number that the simulator can be held against.
FIGURES: tuple[Figure, ...] = tuple(_figures())
