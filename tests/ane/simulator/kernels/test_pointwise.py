"""pointwise.py against float64 within each op's bound, hardware vectors and the published edge rules."""

import csv
import math
from collections.abc import Callable
from math import erf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.chips.lookup import op_status
from ane_trainer.ane.mil.opset import Builder, bind, known_ops
from ane_trainer.ane.mil.program import TensorType, Value, literal
from ane_trainer.ane.simulator import KERNELS, make_context, prepare
from ane_trainer.ane.simulator.numbers.fp16 import decode, encode, round_half_away

GOLDEN = Path(__file__).parents[3] / "data" / "golden_vectors.csv"
PATTERNS = np.arange(1 << 16, dtype=np.uint16)
DECODED = decode(PATTERNS)
FINITE = DECODED[np.abs(DECODED) < 65536]
INF = np.float32(65536)
NAN = np.float32(98304)
CONTEXT = make_context("m4")
erf_of = np.vectorize(erf, otypes=[np.float64])

BINARY = (
    "add sub mul real_div floor_div maximum minimum pow equal not_equal greater greater_equal less less_equal"
)
LOGICAL = "logical_and logical_or logical_xor"


def run(kind: str, *operands: object, **parameters: object) -> np.ndarray:
    """A kernel on decoded arrays; parameters are MIL's, numbers as fp16 literals; no epsilon unless given."""
    arrays = [np.asarray(v) if np.asarray(v).dtype == bool else np.asarray(v, np.float32) for v in operands]
    names = {3: ("cond", "a", "b"), 2: ("x", "y"), 1: ("x",)}[len(arrays)]
    args: dict[str, object] = {
        n: Value(n, TensorType("bool" if a.dtype == bool else "fp16", a.shape))
        for n, a in zip(names, arrays, strict=True)
    }
    if kind in ("inverse", "rsqrt", "log"):
        parameters = {"epsilon": 0.0, **parameters}
    for name, value in parameters.items():
        args[name] = literal(value, "string" if isinstance(value, str) else "fp16")
    call = bind(kind, args)  # type: ignore[arg-type]
    return np.asarray(KERNELS[kind].run(CONTEXT, call, *arrays))


Reference = Callable[[np.ndarray], np.ndarray]
# op: (reference, inputs, relative bound, absolute bound, parameters). Half a unit is 2^-11 = 4.9e-4 relative.
HALF, ONE = 2.0**-11, 2.0**-10
UNARY: dict[str, tuple[Reference, tuple[float, float], float, float, dict[str, object]]] = {
    "abs": (np.abs, (-65504, 65504), 0, 0, {}),
    "sign": (np.sign, (-65504, 65504), 0, 0, {}),
    "square": (np.square, (-255, 255), HALF, 2.0**-25, {}),
    "floor": (np.floor, (-65504, 65504), 0, 0, {}),
    "ceil": (np.ceil, (-65504, 65504), 0, 0, {}),
    "round": (lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x), (-1023.5, 1023.5), 0, 0, {}),
    "relu": (lambda x: np.maximum(x, 0), (-65504, 65504), 0, 0, {}),
    "relu6": (lambda x: np.clip(x, 0, 6), (-65504, 65504), 0, 0, {}),
    "clip": (lambda x: np.clip(x, -0.5, 2), (-65504, 65504), 0, 0, {"alpha": -0.5, "beta": 2.0}),
    "threshold": (lambda x: np.maximum(x, 0.25), (-65504, 65504), 0, 0, {"alpha": 0.25}),
    "thresholded_relu": (lambda x: np.where(x >= 0.25, x, 0), (-65504, 65504), 0, 0, {"alpha": 0.25}),
    "leaky_relu": (lambda x: np.where(x >= 0, x, 0.25 * x), (-65504, 65504), 0, 2.0**-25, {"alpha": 0.25}),
    "clamped_relu": (
        lambda x: np.minimum(np.where(x >= 0, x, 0.5 * x), 3), (-65504, 65504), 0, 2.0**-25,
        {"alpha": 0.5, "beta": 3.0},
    ),
    "linear_activation": (lambda x: 3 * x + 0.5, (-9, 9), ONE, 8e-3, {"alpha": 3.0, "beta": 0.5}),
    "sigmoid_hard": (
        lambda x: np.clip(0.25 * x + 0.5, 0, 1), (-99, 99), 0, 5e-4, {"alpha": 0.25, "beta": 0.5},
    ),
    "sqrt": (np.sqrt, (0, 65504), 1.3 * ONE, 0, {}),
    "rsqrt": (lambda x: 1 / np.sqrt(x), (2.0**-24, 65504), 2.2 * ONE, 0, {}),
    "inverse": (lambda x: 1 / x, (2.0**-14, 65504), ONE, 2.0**-24, {}),
    "log": (np.log, (2.0**-24, 65504), HALF, 8e-3, {}),
    "exp": (np.exp, (-9, 11), 1e-2, 0, {}),
    "exp2": (np.exp2, (-13.9, 15.9), ONE, 0, {}),
    "erf": (erf_of, (-65504, 65504), 0, 8.65e-4, {}),
    "tanh": (np.tanh, (-65504, 65504), 0, 1.62e-3, {}),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-np.maximum(x, -99))), (-65504, 65504), 0, 3.4e-3, {}),
    "silu": (lambda x: x / (1 + np.exp(-np.maximum(x, -99))), (-65504, 65504), 0, 1.5e-2, {}),
    "gelu": (lambda x: 0.5 * x * (1 + erf_of(x / 2**0.5)), (-65504, 65504), 0, 6.2e-3, {"mode": "EXACT"}),
    "elu": (lambda x: np.where(x > 0, x, 0.5 * np.expm1(np.minimum(x, 0))), (-9, 9), 0, 2e-3, {"alpha": 0.5}),
    "scaled_tanh": (lambda x: 2 * np.tanh(0.5 * x), (-99, 99), 0, 3.4e-3, {"alpha": 2.0, "beta": 0.5}),
    "softplus": (lambda x: np.log1p(np.exp(x)), (-65504, 10.375), ONE, 8e-3, {}),
    "softsign": (lambda x: x / (1 + np.abs(x)), (-65000, 65000), 4 * ONE, 2e-7, {}),
    "sin": (np.sin, (-8, 8), 0, 6.4e-4, {}),
    "cos": (np.cos, (-8, 8), 0, 6.4e-4, {}),
    "atan": (np.arctan, (-65504, 65504), HALF, 2.0**-25, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNARY)
def test_unary_ops_stay_within_their_bound_on_every_fp16_of_the_range(kind: str) -> None:
    reference, (low, high), relative, absolute, parameters = UNARY[kind]
    x = FINITE[(low <= FINITE) & (high >= FINITE)]
    with np.errstate(over="ignore"):
        exact = reference(x.astype(np.float64))
    error = np.abs(run(kind, x, **parameters) - exact)
    worst = np.argmax(error - relative * np.abs(exact))
    assert error[worst] <= relative * abs(exact[worst]) + absolute, (x[worst], exact[worst], error[worst])


def test_softplus_parametric_and_prelu_take_one_number_per_channel() -> None:
    x = np.float32([[[1.0, -2.0], [1.0, -2.0]]])
    assert run("prelu", x, alpha=[0.5, 0.25]).tolist() == [[[1, -1], [1, -0.5]]]
    ours = run("softplus_parametric", x, alpha=[1.0, 2.0], beta=[2.0, 1.0])
    exact = [[np.log1p(np.exp([2.0, -4.0])), 2 * np.log1p(np.exp([1.0, -2.0]))]]
    assert np.abs(ours - exact).max() < 3e-3


BINARY_REFERENCE: dict[str, tuple[Callable[[float, float], float], float]] = {
    "add": (lambda x, y: x + y, 0.5),
    "sub": (lambda x, y: x - y, 0.5),
    "mul": (lambda x, y: x * y, 0.5),
    "maximum": (max, 0),
    "minimum": (min, 0),
}


def unit(value: float) -> float:
    return 2.0 ** (max(math.floor(math.log2(abs(value))) if value else -14, -14) - 10)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(BINARY_REFERENCE)),
    st.integers(0, len(FINITE) - 1),
    st.integers(0, len(FINITE) - 1),
)
def test_binary_arithmetic_is_correctly_rounded(kind: str, i: int, j: int) -> None:
    reference, units = BINARY_REFERENCE[kind]
    exact = reference(float(FINITE[i]), float(FINITE[j]))
    ours = float(run(kind, FINITE[i], FINITE[j]))
    if abs(exact) >= 65520:
        assert ours == math.copysign(65536, exact)
    else:
        assert abs(ours - exact) <= units * unit(exact)


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-7, 200, width=16), st.floats(2.0**-7, 100, width=16))
def test_division_and_powers_are_near(x: float, y: float) -> None:
    assert float(run("real_div", x, y)) == pytest.approx(x / y, rel=3 * ONE)
    assert float(run("pow", x, 0.5)) == pytest.approx(x**0.5, rel=6 * ONE)
    quotient = float(run("floor_div", x, y))
    if abs(x / y - round(x / y)) > 3 * ONE * x / y:
        assert quotient == pytest.approx(math.floor(x / y), rel=ONE)


@pytest.mark.parametrize(("x", "y", "expected"), [(-2, 3, -8), (-2, 2, 4), (0, 2, 0), (3, 0, 1), (4, 0.5, 2)])
def test_pow_keeps_signs_and_small_integers(x: float, y: float, expected: float) -> None:
    assert run("pow", x, y) == pytest.approx(expected, rel=6 * ONE)


@pytest.mark.parametrize(
    ("kind", "operands", "expected"),
    [
        ("add", (NAN, 1), INF),
        ("add", (INF, -INF), 0),
        ("sub", (INF, INF), 0),
        ("mul", (0, INF), 0),
        ("mul", (256, 256), INF),
        ("add", (16384, 16384), 32768),
        ("real_div", (0.5, 0), 32768),
        ("real_div", (0, 0), 0),
        ("real_div", (1, -0.0), INF),
        ("maximum", (NAN, 1), INF),
        ("relu", (NAN,), INF),
        ("abs", (-INF,), INF),
        ("square", (256,), INF),
        ("square", (255.75,), 65408),
        ("inverse", (-0.0,), INF),
        ("rsqrt", (-0.0,), INF),
        ("sqrt", (-1,), 0),
        ("rsqrt", (-1,), 0),
        ("log", (-1,), 0),
        ("log", (0,), -45440),
        ("exp", (11.09375,), INF),
        ("exp", (11.0859375,), 65184),
        ("exp", (NAN,), INF),
        ("tanh", (NAN,), 1),
        ("sigmoid", (NAN,), 1),
        ("erf", (NAN,), 1),
        ("softplus", (INF,), 0),
        ("softplus", (11,), 0),
        ("softplus", (10,), 10),
        ("softsign", (INF,), 0),
        ("round", (2.5,), 3),
        ("round", (-2.5,), -3),
        ("round", (1023.5,), 1024),
        ("round", (1024,), 1025),
        ("round", (1025,), 1026),
        ("round", (-2047,), -2048),
        ("round", (2050,), 2050),
    ],
)
def test_published_edge_rules(kind: str, operands: tuple[float, ...], expected: float) -> None:
    assert run(kind, *operands) == expected


def test_log_and_inverse_add_their_epsilon_as_a_bias() -> None:
    assert run("inverse", 2.0**-6, epsilon=1e-4) == 63.5625  # published maximum error 0.4375 at 1/64
    assert run("inverse", 0.0, epsilon=1e-4) == 9360  # the inverse of 7 * 2^-16
    assert run("inverse", 0.0, epsilon=1e-12) == INF
    assert run("log", 0.0, epsilon=0.5) == pytest.approx(math.log(0.5), rel=ONE)


def test_gelu_has_one_table_for_exact_and_tanh_and_another_meaning_for_sigmoid() -> None:
    exact, tanh, sigmoid = (
        run("gelu", DECODED, mode=mode) for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    )
    assert np.array_equal(exact, tanh)
    x = FINITE[np.abs(FINITE) < 8].astype(np.float64)
    ours = sigmoid[np.abs(DECODED) < 8]
    assert not np.array_equal(exact, sigmoid)
    assert np.abs(ours - x / (1 + np.exp(-1.702 * x))).max() < 2e-2


def test_comparisons_and_logic_give_bool_arrays() -> None:
    x, y = np.float32([1, 2, 3, NAN]), np.float32([2, 2, 2, NAN])
    expected = {
        "equal": "0101",
        "not_equal": "1010",
        "greater": "0010",
        "greater_equal": "0111",
        "less": "1000",
    }
    for kind, bits in {**expected, "less_equal": "1101"}.items():
        result = run(kind, x, y)
        assert result.dtype == bool
        assert "".join(str(int(b)) for b in result) == bits
    p, q = np.array([True, True, False]), np.array([True, False, False])
    assert [run(k, p, q).tolist() for k in LOGICAL.split()] == [
        [True, False, False],
        [True, True, False],
        [False, True, False],
    ]
    assert run("logical_not", p).tolist() == [False, False, True]
    assert run("select", q, np.float32([1, 1, NAN]), np.float32([2, 2, NAN])).tolist() == [1, 2, NAN]


GOLDEN_PE = {
    "2048 + 1": (2048, 1), "40000 + 1": (40000, 1), "16384 + 16384": (16384, 16384),
    "2^-24 + 0": (2.0**-24, 0), "2^-12 * 2^-12": (2.0**-12, 2.0**-12), "NaN + 1": (NAN, 1),
}  # fmt: skip
GOLDEN_EDGE = {"1/(-0)": -0.0, "softplus(+inf)": 65536.0, "x >= 11.094": 11.09375}


def test_golden_rows_of_the_pointwise_unit_match() -> None:
    with GOLDEN.open() as file:
        rows = [row for row in csv.DictReader(file) if row["path"] in ("PE", "EDGE")]
    assert len(rows) == 9
    for row in rows:
        operands = GOLDEN_PE[row["inputs"]] if row["path"] == "PE" else (GOLDEN_EDGE[row["inputs"]],)
        expected = INF if row["expected_ane_output"] == "inf" else np.float32(row["expected_ane_output"])
        assert run(row["op"], *operands) == expected, row


@pytest.mark.parametrize("kind", [k for k in known_ops() if k in UNARY])
def test_unary_results_are_decoded_fp16_for_every_pattern(kind: str) -> None:
    result = run(kind, DECODED, **UNARY[kind][4])
    assert result.dtype == np.float32
    assert np.array_equal(decode(encode(result)), result)
    assert np.array_equal(round_half_away(result), result)


@pytest.mark.parametrize(
    "kind", [*UNARY, *BINARY.split(), *LOGICAL.split(), "prelu", "select", "logical_not"]
)
def test_every_op_states_its_fidelity_and_a_bound_where_bounded(kind: str) -> None:
    entry = KERNELS[kind]
    assert entry.evidence
    assert (entry.level == "bounded") == bool(entry.bound)


def test_mod_is_refused_and_pow_is_not() -> None:
    """On the e5rt path; Core ML runs mod on the host, so there is a kernel (test_refusal.py)."""
    assert op_status("mod", "m5").status == "refused"
    assert op_status("pow", "m5").status == "native"


def test_a_program_divides_by_small_numbers_without_the_epsilon_of_inverse() -> None:
    """`inverse` has a default epsilon of 1e-4; real_div and softmax share its table, not its epsilon."""
    b = Builder()
    x, y = (b.input(name, TensorType("fp16", (4,))) for name in "xy")
    function = b.finish((b.op("real_div", x=x, y=y), b.op("softmax", x=x, axis=0)))
    divided, weights = (
        prepare(function, CONTEXT)
        .run({"x": np.float16([1, 0.5, 2, 0]), "y": np.float16([2.0**-10, 0, 2.0**-14, 0])})
        .values()
    )
    assert divided.tolist() == [1024, 32768, 32768, 0]
    assert float(weights.sum()) == pytest.approx(1, abs=4 * HALF)
