"""Published hardware vectors as MIL programs: what was put into the engine, as one dispatch each.

The keys of `PROGRAMS` are the `inputs` texts of the published table (tests/data/golden_vectors.csv), which
has the expected outputs. A value runs the program on a chip by `simulate`; sources: M6 notes/numerics.md
(H11, H12, H50), ANEForge bench/results (GEMM errors, numeric_cliffs), ANE guide chapter 3, M6 lut_ulp_m6.txt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType, Value
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.simulator import simulate

Array = NDArray[np.float16]
INF, NAN = float("inf"), float("nan")

Engine = str | Callable[[Program, Mapping[str, Array]], Mapping[str, NDArray[Any]]]
"""What runs a program: the simulator of a chip, by its name, or a call (program, inputs) -> outputs."""

Run = Callable[[Engine], NDArray[np.floating]]
"""Engine -> results."""


def half(*values: float) -> Array:
    """Numbers as float16, out of range as inf."""
    with np.errstate(over="ignore"):
        return np.array(values, np.float64).astype(np.float16)


def dispatch(make: Callable[[Builder, Value], Value], x: Array, engine: Engine) -> Array:
    """Results of the program `make` builds around one input; simulated on the e5rt path."""
    b = Builder()
    value = make(b, b.input("x", TensorType("fp16", x.shape)))
    program = Program((b.finish((value,)),))
    results = (
        simulate(program, {"x": x}, chip=engine) if isinstance(engine, str) else engine(program, {"x": x})
    )
    (result,) = results.values()
    return result


def conv1x1(x: list[float], w: list[float] | None = None, bias: float | None = None) -> Run:
    """One output of a 1x1 convolution over len(x) channels."""
    weight = from_array(half(*(w or [1.0] * len(x))).reshape(1, -1, 1, 1))
    start = None if bias is None else from_array(half(bias))

    def run(chip: Engine) -> Array:
        image = half(*x).reshape(1, -1, 1, 1)
        return dispatch(lambda b, v: b.op("conv", x=v, weight=weight, bias=start), image, chip)

    return run


def unary(kind: str, x: float, **params: Any) -> Run:
    """An op of one number."""
    return lambda chip: dispatch(lambda b, v: b.op(kind, x=v, **params), half(x), chip)


def binary(kind: str, x: float, y: float) -> Run:
    """An op of a number and a constant."""

    def run(chip: Engine) -> Array:
        return dispatch(lambda b, v: b.op(kind, x=v, y=from_array(half(y))), half(x), chip)

    return run


def w8a8(channels: int, q: int, exponent: int, taps: int = 1) -> Run:
    """quantize -> dequantize -> conv of an int8 weight; activation and weight are all `q`, scales
    2^-exponent.
    """
    scale = 2.0**-exponent
    data = from_array(np.full((1, channels, taps, 1), q, np.int8))

    def make(b: Builder, x: Value) -> Value:
        integers = b.op("quantize", input=x, scale=scale, output_dtype="int8")
        image = b.op("dequantize", input=integers, scale=scale)
        weight = b.op(
            "constexpr_blockwise_shift_scale",
            data=data,
            scale=from_array(np.full((1,) * 4, scale, np.float16)),
        )
        return b.op("conv", x=image, weight=weight)

    return lambda chip: dispatch(make, np.full((1, channels, taps, 1), q * scale, np.float16), chip)


def together(*runs: Run) -> Run:
    """The results of several programs, one after the other."""
    return lambda chip: np.concatenate([np.ravel(run(chip)) for run in runs])


def bisected(finite: Callable[[float], bool], low: float, high: float) -> float:
    """The largest magnitude that stays finite, to 2, as ANEForge's numeric_cliffs looks for it."""
    assert finite(low)
    assert not finite(high)
    while high - low > 2.0:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if finite(middle) else (low, middle)
    return round(low, 1)


def matmul_cliff(chip: Engine) -> Array:
    """The published search for each K; one number when all agree."""

    def finite(k: int, total: float) -> bool:
        weight = from_array(np.ones((k, 16), np.float16))
        x = np.full((1, k), total / k, np.float16)
        return bool(np.isfinite(dispatch(lambda b, v: b.op("matmul", x=v, y=weight), x, chip)).all())

    return np.unique([bisected(partial(finite, k), 30000.0, 40000.0) for k in (4, 8, 32, 64, 128)])


def width_slice(value: float) -> Run:
    """A value in the middle of a row, seen through a slice that starts at 1."""

    def run(chip: Engine) -> Array:
        x = np.zeros((1, 1, 1, 8), np.float16)
        x[..., 4] = value
        return dispatch(
            lambda b, v: b.op("slice_by_size", x=v, begin=[0, 0, 0, 1], size=[1, 1, 1, 7]), x, chip
        )[..., 3]

    return run


def sum_of_integers(total: int, terms: int = 8) -> Run:
    """reduce_sum of integers that sum to `total` (ANEForge numeric_cliffs)."""
    base, more = divmod(total, terms)
    x = np.array([base + (i < more) for i in range(terms)], np.float16)

    def make(b: Builder, v: Value) -> Value:
        return b.op("reduce_sum", x=b.op("reshape", x=v, shape=[1, terms]), axes=[1], keep_dims=True)

    return lambda chip: dispatch(make, x, chip)


def gemm_error(n: int) -> Run:
    """Relative L2 error of the first 256 rows of A @ W.T, both N(0, 1) / sqrt(n), seed 0
    (device_saturation_sweep).
    """

    def run(chip: Engine) -> Array:
        rng = np.random.default_rng(0)
        a, w = (rng.standard_normal((n, n)).astype(np.float32) / np.float32(np.sqrt(n)) for _ in range(2))
        x, weight = a[:256].astype(np.float16), from_array(np.ascontiguousarray(w.T).astype(np.float16))
        result = dispatch(lambda b, v: b.op("matmul", x=v, y=weight), x, chip).astype(np.float64)
        exact = a[:256].astype(np.float64) @ w.T.astype(np.float64)
        return np.array([np.linalg.norm(result - exact) / np.linalg.norm(exact)])

    return run


#: inputs text -> how the row is run. The expected value is the row's own.
LSB = 2.0**-16
PROGRAMS: dict[str, Run] = {
    "x=32768 w=1": conv1x1([32768]),
    "16384 + 16384": conv1x1([16384, 16384]),
    "16384+16384-16384-16384+1": conv1x1([16384, 16384, -16384, -16384, 1]),
    "16384 + 2^-16 - 16384": conv1x1([16384, LSB, -16384]),
    "16384 + 2^-18 - 16384": conv1x1([16384, 2.0**-18, -16384]),
    "2048 + 1": conv1x1([2048, 1]),
    "-4096 - 2": conv1x1([-4096, -2]),
    "2049 (exact sum)": conv1x1([2048, 0.5, 0.5]),
    "-2049 (exact sum)": conv1x1([-2048, -0.5, -0.5]),
    "4098 (exact sum)": conv1x1([4096, 1, 1]),
    "1 + 2^-11": conv1x1([1, 2.0**-11]),
    "65504 * 2^-4": conv1x1([65504], [2.0**-4]),
    "x=inf w=2^-4 (decodes as 65536)": conv1x1([INF], [2.0**-4]),
    "any result equal to -0": together(conv1x1([-0.0]), conv1x1([1, -1]), conv1x1([2.0**-24], [-(2.0**-3)])),
    "b=-16384; 16384+16384": conv1x1([16384, 16384], bias=-16384),
    "b=-16384; 3*16384": conv1x1([16384] * 3, bias=-16384),
    "b=32; x=32752": conv1x1([32752], bias=32),
    "b=32; x=32736": conv1x1([32736], bias=32),
    "b=2^-17; x=0": conv1x1([0], bias=2.0**-17),
    "b=2^-17; x=2^-17 w=1": conv1x1([2.0**-17], bias=2.0**-17),
    "w=1.875*2^-3 x=1.875*2^-14 (exp sum -17)": conv1x1([1.875 * 2.0**-14], [1.875 * 2.0**-3]),
    "w=1.99*2^-3 x=1.99*2^-14 (exp sum -17)": conv1x1([1.99 * 2.0**-14], [1.99 * 2.0**-3]),
    "w=1.5*2^-4 x=1.9*2^-13 (exp sum -17)": conv1x1([1.9 * 2.0**-13], [1.5 * 2.0**-4]),
    "w=1.9375*2^-5 x=1.9375*2^-12 (exp sum -17)": conv1x1([1.9375 * 2.0**-12], [1.9375 * 2.0**-5]),
    "w=0.2 x=0.99*2^-14 subnormal (exp sum -17)": conv1x1([0.99 * 2.0**-14], [0.2]),
    "w=0.125 x=1.5*2^-13 (exp sum -16; 1.5 LSB)": conv1x1([1.5 * 2.0**-13], [0.125]),
    "w=0.25 x=0.5*2^-14 subnormal (exp sum -16; 0.5 LSB)": conv1x1([0.5 * 2.0**-14], [0.25]),
    "add: 2048 + 1": binary("add", 2048, 1),
    "40000 + 1": binary("add", 40000, 1),
    "add: 16384 + 16384": binary("add", 16384, 16384),
    "2^-24 + 0": binary("add", 2.0**-24, 0),
    "2^-12 * 2^-12": binary("mul", 2.0**-12, 2.0**-12),
    "NaN + 1": binary("add", NAN, 1),
    "K=4096..16384 of 127*127, scales 2^-6 each (2^-12 total)": together(
        w8a8(4096, 127, 6), w8a8(16384, 127, 6)
    ),
    "K=65536 of (-128)*(-128) -> S=2^30, scale 2^-16": w8a8(65536, -128, 8),
    "S=2^31, scale 2^-18": w8a8(65536, -128, 9, taps=2),
    "N=512 seeded rng0 N(0,1)/sqrt(N) rel L2 err first 256 rows": gemm_error(512),
    "accumulation limit, largest finite ~": matmul_cliff,
    "|v|>4094 -> inf": together(width_slice(4096), width_slice(-4096), width_slice(60000)),
    "n<=2048 exact; 2049": sum_of_integers(2049),
    "1/(-0)": unary("inverse", -0.0, epsilon=0.0),
    "softplus(+inf)": unary("softplus", INF),
    "x >= 11.094": together(unary("exp", 11.09375 + 2**-7), unary("exp", 100)),
    "gelu: x=0": unary("gelu", 0),
    "x=-1.526e-05": unary("gelu", -1.526e-05),
    "silu: x=0": unary("silu", 0),
    "x=-2.289e-05": unary("silu", -2.289e-05),
    "x=-9.938": unary("sigmoid", -9.938),
    "x=9.703": unary("exp", 9.703),
    "x=0.0332": unary("rsqrt", 0.0332),
}  # fmt: skip

#: Rows whose published value has fewer digits than fp16 holds, or is approximate: how it is compared.
DIGITS: dict[str, Callable[[float], str]] = {
    "gelu: x=0": lambda v: f"{v:.6f}",
    "silu: x=0": lambda v: f"{v:.6f}",
    "x=-1.526e-05": lambda v: f"{v:.6f}",
    "x=-2.289e-05": lambda v: f"{v:.5f}",
    "x=9.703": lambda v: f"{v:.3g}",
    "x=0.0332": lambda v: f"{v:.3g}",
    "accumulation limit, largest finite ~": lambda v: f"{v:.0f}",
    "N=512 seeded rng0 N(0,1)/sqrt(N) rel L2 err first 256 rows": lambda v: f"{v:.12g}",
}
