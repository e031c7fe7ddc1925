"""ANEForge's ONNX importer on the simulator, op by op, against ONNX's own reference evaluator."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import aneforge as af
import numpy as np
import pytest

from tests.interop.harness import QUIET, Array, values

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(QUIET), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

X = values(3, 8)
POSITIVE = values(3, 8, low=0.2, high=3)
IMAGE = values(1, 4, 6, 6)
FILTER = values(6, 4, 3, 3, seed=1, low=-0.5, high=0.5)
FOUR = values(4, seed=2, low=0.5, high=1.5)


def ints(*items: int) -> Array:
    return np.array(items, np.int64)


def node_model(
    op: str, x: Array, constants: list[Array | None], opset: int, attributes: dict[str, Any]
) -> Any:
    """A model of one node: x is the input, the constants are initializers (None: left out)."""
    names = ["" if c is None else f"c{i}" for i, c in enumerate(constants)]
    tensors = [numpy_helper.from_array(c, n) for c, n in zip(constants, names, strict=True) if c is not None]
    node = helper.make_node(op, ["x", *names], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def agree(model: Any, x: Array, folder: Path, tolerance: float) -> None:
    path = folder / "model.onnx"
    onnx.save(model, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = np.asarray(ReferenceEvaluator(model).run(None, {"x": x})[0], np.float64)
    net = af.load_onnx(str(path))
    got = np.asarray(net(x))
    net.release()
    assert got.size == want.size
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=2e-2, atol=tolerance)


UNARY = (
    "Relu",
    "Sigmoid",
    "Tanh",
    "Erf",
    "Exp",
    "Abs",
    "Sign",
    "Sin",
    "Cos",
    "Softplus",
    "Floor",
    "Ceil",
    "Neg",
    "Softsign",
    "Atan",
    "Selu",
    "Celu",
    "Mish",
    "HardSwish",
    "HardSigmoid",
    "Identity",
    "Flatten",
    "LogSoftmax",
    "Softmax",
    "Elu",
    "LeakyRelu",
    "Gelu",
    "ThresholdedRelu",
)

#: op, input, constants, attributes, largest absolute difference.
CASES: list[tuple[str, Array, list[Array | None], dict[str, Any], float]] = [
    *((op, X, [], {}, 2e-2) for op in UNARY),
    *((op, POSITIVE, [], {}, 2e-2) for op in ("Log", "Sqrt", "Reciprocal")),
    *(
        (op, X, [Y], {}, 1e-2)
        for Y in (values(3, 8, seed=3), values(1, 8, seed=4))
        for op in ("Add", "Sub", "Mul", "Max", "Min")
    ),
    ("Div", X, [POSITIVE], {}, 2e-2),
    ("Sum", X, [POSITIVE], {}, 1e-2),
    ("Mean", X, [POSITIVE], {}, 1e-2),
    ("Pow", POSITIVE, [np.array(2.0, np.float32)], {}, 5e-2),
    ("PRelu", IMAGE, [values(4, 1, 1, low=0, high=1)], {}, 1e-2),
    ("Clip", X, [np.array(-0.5, np.float32), np.array(1.0, np.float32)], {}, 1e-3),
    ("MatMul", X, [values(8, 5)], {}, 1e-2),
    ("Gemm", X, [values(5, 8), values(5)], {"transB": 1}, 1e-2),
    ("Conv", IMAGE, [FILTER], {"pads": [1, 1, 1, 1]}, 2e-2),
    ("Conv", IMAGE, [FILTER, values(6)], {"strides": [2, 2]}, 2e-2),
    ("Conv", IMAGE, [values(4, 1, 3, 3)], {"group": 4, "pads": [1, 1, 1, 1]}, 2e-2),
    ("MaxPool", IMAGE, [], {"kernel_shape": [2, 2], "strides": [2, 2]}, 1e-3),
    ("AveragePool", IMAGE, [], {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]}, 1e-2),
    (
        "AveragePool",
        IMAGE,
        [],
        {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        1e-2,
    ),
    ("GlobalAveragePool", IMAGE, [], {}, 1e-2),
    ("GlobalMaxPool", IMAGE, [], {}, 1e-3),
    ("BatchNormalization", IMAGE, [FOUR, values(4, seed=5), values(4, seed=6), FOUR], {}, 2e-2),
    ("InstanceNormalization", IMAGE, [FOUR, values(4, seed=5)], {}, 2e-2),
    ("LayerNormalization", X, [values(8, seed=5), values(8, seed=6)], {"axis": -1}, 2e-2),
    ("LpNormalization", X, [], {"axis": -1, "p": 2}, 1e-2),
    ("Reshape", X, [ints(4, 6)], {}, 1e-3),
    ("Transpose", IMAGE, [], {"perm": [0, 2, 3, 1]}, 1e-3),
    ("Squeeze", IMAGE, [ints(0)], {}, 1e-3),
    ("Unsqueeze", X, [ints(0)], {}, 1e-3),
    ("Slice", X, [ints(1, 2), ints(3, 7), ints(0, 1)], {}, 1e-3),
    ("Gather", X, [ints(2, 0)], {"axis": 0}, 1e-3),
    ("Tile", X, [ints(2, 3)], {}, 1e-3),
    ("Expand", values(1, 8), [ints(3, 8)], {}, 1e-3),
    ("Pad", IMAGE, [ints(0, 0, 1, 2, 0, 0, 1, 0)], {}, 1e-3),
    ("Trilu", values(5, 5), [], {"upper": 1}, 1e-3),
    ("DepthToSpace", IMAGE, [], {"blocksize": 2}, 1e-3),
    ("SpaceToDepth", IMAGE, [], {"blocksize": 2}, 1e-3),
    ("CumSum", X, [np.array(1, np.int64)], {}, 1e-2),
    (
        "Resize",
        IMAGE,
        [None, None, ints(1, 4, 12, 12)],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        1e-3,
    ),
    (
        "Resize",
        IMAGE,
        [None, None, ints(1, 4, 12, 12)],
        {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
        1e-2,
    ),
    (
        "Resize",
        IMAGE,
        [None, None, ints(1, 4, 11, 11)],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        1e-2,
    ),
    ("Shrink", X, [], {"lambd": 0.5, "bias": 0.25}, 1e-2),
    ("Dropout", X, [], {}, 1e-3),
    *(
        (op, X, [ints(1)], {}, 2e-2)
        for op in (
            "ReduceMax",
            "ReduceMin",
            "ReduceMean",
            "ReduceSum",
            "ReduceL1",
            "ReduceL2",
            "ReduceSumSquare",
            "ReduceLogSumExp",
        )
    ),
    ("ReduceLogSum", POSITIVE, [ints(1)], {}, 2e-2),
    ("ReduceMean", X, [ints(0, 1)], {"keepdims": 0}, 1e-2),
    ("Mod", POSITIVE, [np.full((1, 8), 0.75, np.float32)], {"fmod": 1}, 2e-2),
]


@pytest.mark.parametrize(
    ("op", "x", "constants", "attributes", "tolerance"),
    CASES,
    ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)],
)
def test_one_op(
    op: str,
    x: Array,
    constants: list[Array | None],
    attributes: dict[str, Any],
    tolerance: float,
    tmp_path: Path,
) -> None:
    agree(
        node_model(op, x, constants, 12 if op == "SpaceToDepth" else 20, attributes), x, tmp_path, tolerance
    )


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(op: str, gates: int, tmp_path: Path) -> None:
    x = values(5, 1, 4, low=-1, high=1)
    rng = np.random.default_rng(0)
    w, r = (rng.uniform(-0.5, 0.5, (1, gates * 6, n)).astype(np.float32) for n in (4, 6))
    b = rng.uniform(-0.5, 0.5, (1, gates * 12)).astype(np.float32)
    extra = {"linear_before_reset": 1} if op == "GRU" else {}
    agree(node_model(op, x, [w, r, b], 20, {"hidden_size": 6, **extra}), x, tmp_path, 4e-2)


def test_a_small_network_and_its_features(tmp_path: Path) -> None:
    weights = {
        "w1": FILTER,
        "b1": values(6, seed=3),
        "w2": values(10, 54, seed=4, low=-0.2, high=0.2),
        "b2": values(10, seed=5),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["g"], transB=1),
        helper.make_node("Softmax", ["g"], ["y"], axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    agree(model, IMAGE, tmp_path, 1e-2)
    _, features = af.onnx_to_features(str(tmp_path / "model.onnx"))
    net = af.compile(features)
    assert net(IMAGE).shape == (1, 54)
    net.release()
