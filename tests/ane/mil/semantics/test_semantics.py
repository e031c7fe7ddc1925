"""The double-precision meaning of every op against PyTorch in double precision, and states."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.opset import Builder, known_ops
from ane_trainer.ane.mil.program import Literal, Program, TensorType, Value
from ane_trainer.ane.mil.semantics import MEANINGS, WITHOUT_MEANING, evaluate, trace
from ane_trainer.ane.mil.text.parser import parse_program
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.simulator import simulate
from tests.ane.simulator.kernels import test_ops_fp64 as witnesses
from tests.ane.simulator.kernels.witness import OPS, Drawn

#: Importing the module registers the witnesses of the simulator's kernels.
assert witnesses.WITNESSES

DTYPES = {"float16": "fp16", "bool": "bool", "int32": "int32", "int8": "int8", "uint8": "uint8"}


def test_every_op_with_a_type_rule_has_a_meaning_or_a_reason() -> None:
    assert set(known_ops()) == set(MEANINGS) | set(WITHOUT_MEANING)
    assert not set(MEANINGS) & set(WITHOUT_MEANING)


def program_of(kind: str, drawn: Drawn) -> tuple[Program, dict[str, np.ndarray]]:
    """A program of one drawn call, and its feeds."""
    b = Builder()
    feeds: dict[str, np.ndarray] = {}

    def fed(name: str, array: np.ndarray) -> Value:
        feeds[name] = array
        return b.input(name, TensorType(DTYPES[array.dtype.name], array.shape))

    args: dict[str, object] = {}
    for name, array in drawn.inputs.items():
        many = isinstance(array, tuple)
        args[name] = tuple(fed(f"{name}{i}", a) for i, a in enumerate(array)) if many else fed(name, array)
    params = {k: from_array(v) if isinstance(v, np.ndarray) else v for k, v in drawn.params.items()}
    return Program((b.finish(b.multi(kind, **args, **params)),)), feeds


def computed(kind: str, drawn: Drawn) -> tuple[np.ndarray, ...]:
    program, feeds = program_of(kind, drawn)
    outputs = evaluate(program.main, feeds)
    return tuple(outputs[v.name] for v in program.main.outputs)


@pytest.mark.parametrize("kind", sorted(OPS))
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_pytorch_in_double_precision(kind: str, seed: int) -> None:
    drawn = OPS[kind](np.random.default_rng(seed))
    # A parameter given as a number is fp16 in the program: PyTorch is told the number itself.
    loose = {"epsilon", "alpha", "spatial_scale"} & {
        k for k, v in drawn.params.items() if isinstance(v, float)
    }
    for got, want in zip(computed(kind, drawn), drawn.want, strict=True):
        assert got.dtype in (np.float64, np.int64, np.bool_)
        # Differences that nearly cancel (a normalised element near the mean) keep the parameter's absolute error.
        np.testing.assert_allclose(got, want, rtol=1e-3 if loose else 1e-9, atol=1e-5 if loose else 1e-12)


def one(kind: str, **params: object) -> tuple[Program, tuple[np.ndarray, ...]]:
    b = Builder()
    results = b.multi(
        kind, **{k: from_array(v) if isinstance(v, np.ndarray) else v for k, v in params.items()}
    )
    function = b.finish(results)
    outputs = evaluate(function, {})
    return Program((function,)), tuple(outputs[v.name] for v in results)


BYTES = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
MASK = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]], np.uint8)


@pytest.mark.parametrize(
    ("kind", "params", "want"),
    [
        (
            "constexpr_affine_dequantize",
            {
                "quantized_data": BYTES,
                "zero_point": np.int8([1, 2, 3]),
                "scale": np.float16([1, 2, 4]),
                "axis": 0,
            },
            (BYTES - np.array([[1], [2], [3]])) * np.array([[1.0], [2], [4]]),
        ),
        (
            "constexpr_blockwise_shift_scale",
            {"data": BYTES, "scale": np.float16([[1, 2]]), "offset": np.int8([[1, -1]])},
            (BYTES - np.array([1, 1, -1, -1])) * np.array([1.0, 1, 2, 2]),
        ),
        (
            "constexpr_lut_to_dense",
            {
                "indices": np.uint8([0b11100100]),
                "lut": np.float16([10, 20, 30, 40]),
                "shape": np.uint32([2, 2]),
            },
            np.array([[10.0, 20], [30, 40]]),
        ),
        (
            "constexpr_sparse_to_dense",
            {"nonzero_data": np.float16([7, 8]), "mask": np.uint8([0b101]), "shape": np.uint32([1, 4])},
            np.array([[7.0, 0, 8, 0]]),
        ),
        ("constexpr_cast", {"source_val": np.float16([1.5]), "output_dtype": "fp32"}, np.array([1.5])),
        ("const", {"val": np.float16([1.5, 2])}, np.array([1.5, 2])),
        ("fill", {"shape": [2, 2], "value": np.array(3, np.float16)}, np.full((2, 2), 3.0)),
        (
            "range_1d",
            {"start": np.float16(1), "end": np.float16(3), "step": np.float16(0.5)},
            np.array([1.0, 1.5, 2, 2.5]),
        ),
        ("non_zero", {"x": np.float16([[1, 0], [0, 2]])}, np.array([[0, 0], [1, 1]])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ops_on_constants(kind: str, params: dict, want: np.ndarray) -> None:
    arrays = {k: np.asarray(v) if isinstance(v, np.generic) else v for k, v in params.items()}
    program, (got,) = one(kind, **arrays)
    assert np.array_equal(got, want)
    simulated = simulate(program, {}, chip="m4", path=None)
    assert np.array_equal(simulated[program.main.outputs[0].name], want)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (
            "constexpr_sparse_blockwise_shift_scale",
            {
                "data_mask": (MASK, "uint1"),
                "nonzero_data": (BYTES.ravel()[: MASK.sum()], "int8"),
                "scale": np.float16([[1, 2]]),
                "offset": (np.int8([[1, -1]]), "int8"),
            },
        ),
        (
            "constexpr_lut_to_sparse",
            {
                "indices_mask": (MASK, "uint1"),
                "indices_nonzero_data": (np.uint8([0, 1, 1, 0, 1]), "uint1"),
                "lut": np.float16([[[[1, 2], [3, 4]]]]),
                "vector_axis": 1,
            },
        ),
        (
            "non_maximum_suppression",
            {
                "boxes": np.float16([[[0, 0, 2, 2], [0.25, 0, 2, 2], [5, 5, 1, 1], [5, 5.5, 1, 1]]]),
                "scores": np.float16([[[0.5, 0.1], [0.7, 0.2], [0.1, 0.9], [0.3, 0.2]]]),
                "iou_threshold": np.array(0.5, np.float16),
                "score_threshold": np.array(0.25, np.float16),
                "max_boxes": 3,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_agrees_with_the_simulator_where_nothing_is_rounded(kind: str, params: dict) -> None:
    typed = {
        k: Literal(TensorType(v[1], v[0].shape), v[0].tobytes()) if isinstance(v, tuple) else v
        for k, v in params.items()
    }
    program, results = one(kind, **typed)
    simulated = simulate(program, {}, chip="m4", path=None)
    for value, got in zip(program.main.outputs, results, strict=True):
        assert np.array_equal(got, simulated[value.name])
    assert results[0].any()


STATEFUL = """program(1.3)
{
    func main<ios18>(tensor<fp16, [2]> x, state<tensor<fp16, [2]>> total) {
        tensor<fp16, [2]> old = read_state(input = total)[name = string("old")];
        tensor<fp16, [2]> sum = add(x = old, y = x)[name = string("sum")];
        write_state(data = sum, input = total)[name = string("w")];
        tensor<fp16, [2]> y = add(x = sum, y = sum)[name = string("y")];
    } -> (y);
}
"""


def test_states_start_at_zero_and_are_kept() -> None:
    function = parse_program(STATEFUL, {}).main
    first = trace(function, {"x": np.float16([1, 2])})
    assert first.states["total"].tolist() == [1, 2]
    second = trace(function, {"x": np.float16([1, 2])}, first.states)
    assert second.values["y"].tolist() == [4, 8]


def test_refuses_missing_and_misshapen_inputs_and_random_numbers() -> None:
    b = Builder()
    x = b.input("x", TensorType("fp16", (2,)))
    function = b.finish((b.op("relu", x=x),))
    assert evaluate(function, {"x": [-1, 1]})[function.outputs[0].name].tolist() == [0, 1]
    for feeds, code in (({}, "SIM101"), ({"x": np.zeros(3)}, "SIM103")):
        with pytest.raises(SimulationError) as caught:
            evaluate(function, feeds)
        assert caught.value.code == code
    with pytest.raises(SimulationError, match="no meaning"):
        one("random_uniform", shape=[2], low=0.0, high=np.array(1, np.float16))
