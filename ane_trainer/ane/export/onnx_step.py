"""Writes a training step as an ONNX model in fp32: the lowered program op by op, state as inputs and outputs.

An fp32 runtime has none of the engine's rounding: what such a step computes is what PyTorch computes. Ops without an
entry in `_OPS` are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ane_trainer.ane.errors import Finding, MissingDependency, UnsupportedModel
from ane_trainer.ane.export.manifest import manifest, write_manifest
from ane_trainer.ane.export.step import SingleStep, replay_beside
from ane_trainer.ane.mil.program import Function, Literal, Op, Value
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.arrays import literal_array

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

_OPSET = 18
_Attribute = int | float | Sequence[int]


class _Graph:
    """Nodes and constants of the model while it is written."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self._count = 0

    def constant(self, array: Array) -> str:
        """The name of a constant."""
        from onnx import numpy_helper

        self._count += 1
        name = f"constant_{self._count}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], out: str = "", **attributes: _Attribute) -> str:
        """Add a node; the name of its result."""
        from onnx import helper

        self._count += 1
        out = out or f"inner_{self._count}"
        make: Callable[..., NodeProto] = helper.make_node
        self.nodes.append(make(kind, list(inputs), [out], **attributes))
        return out


class _Call:
    """One op of the program: its operands by name, its parameters as Python values."""

    def __init__(self, graph: _Graph, op: Op) -> None:
        self.graph, self.op, self.out = graph, op, op.result.name

    def of(self, name: str) -> str:
        """The name of an operand."""
        return self._name(self.op.arg(name))

    def all(self, name: str) -> list[str]:
        """The names of several operands."""
        found = self.op.arg(name)
        assert isinstance(found, tuple)
        return [self._name(item) for item in found]

    def _name(self, arg: object) -> str:
        if isinstance(arg, Value):
            return arg.name
        assert isinstance(arg, Literal)
        array = literal_array(arg)
        return self.graph.constant(array.astype(np.float32) if array.dtype.kind == "f" else array)

    def value(self, name: str) -> Array:
        """A parameter."""
        arg = self.op.arg(name)
        assert isinstance(arg, Literal)
        return literal_array(arg)

    def integers(self, values: Array | Sequence[int]) -> str:
        """A constant of int64."""
        return self.graph.constant(np.asarray(values, np.int64).reshape(-1))

    def make(self, kind: str, *inputs: str, **attributes: _Attribute) -> str:
        """The node that gives the op's result."""
        return self.graph.node(kind, inputs, self.out, **attributes)


def _binary(kind: str) -> Callable[[_Call], str]:
    return lambda c: c.make(kind, c.of("x"), c.of("y"))


def _unary(kind: str) -> Callable[[_Call], str]:
    return lambda c: c.make(kind, c.of("x"))


def _sloped(kind: str) -> Callable[[_Call], str]:
    return lambda c: c.make(kind, c.of("x"), alpha=float(c.value("alpha")))


def _reduction(kind: str) -> Callable[[_Call], str]:
    return lambda c: c.make(kind, c.of("x"), c.integers(c.value("axes")), keepdims=int(c.value("keep_dims")))


def _matmul(c: _Call) -> str:
    names = []
    for name in ("x", "y"):
        arg = c.op.arg(name)
        assert isinstance(arg, (Value, Literal))
        rank = arg.type.rank
        flipped = bool(c.value(f"transpose_{name}"))
        perm = [*range(rank - 2), rank - 1, rank - 2]
        names.append(c.graph.node("Transpose", [c.of(name)], perm=perm) if flipped else c.of(name))
    return c.make("MatMul", *names)


def _root(c: _Call) -> str:
    return c.make("Reciprocal", c.graph.node("Sqrt", [_shifted(c)]))


def _shifted(c: _Call) -> str:
    """x + epsilon."""
    epsilon = float(c.value("epsilon")) if c.op.arg("epsilon") is not None else 0.0
    return (
        c.graph.node("Add", [c.of("x"), c.graph.constant(np.asarray(epsilon, np.float32))])
        if epsilon
        else c.of("x")
    )


def _slice(c: _Call) -> str:
    begin, size = c.value("begin"), c.value("size")
    return c.make("Slice", c.of("x"), c.integers(begin), c.integers(np.add(begin, size)))


def _strided(c: _Call) -> str:
    begin, end = c.value("begin"), c.value("end")
    stride = c.value("stride") if c.op.arg("stride") is not None else np.ones_like(begin)
    axes = c.integers(range(len(np.atleast_1d(begin))))
    return c.make("Slice", c.of("x"), c.integers(begin), c.integers(end), axes, c.integers(stride))


def _pad(c: _Call) -> str:
    """MIL has (before, after) for the last axes, ONNX all befores, then all afters."""
    pairs = np.atleast_1d(c.value("pad")).reshape(-1, 2)
    x = c.op.arg("x")
    assert isinstance(x, Value)
    whole = np.concatenate([np.zeros((x.type.rank - len(pairs), 2), np.int64), pairs])
    return c.make("Pad", c.of("x"), c.integers(whole.T), c.of("constant_val"))


def _not_equal(c: _Call) -> str:
    return c.make("Not", c.graph.node("Equal", [c.of("x"), c.of("y")]))


def _cast(c: _Call) -> str:
    from onnx import TensorProto

    kinds = {"bool": TensorProto.BOOL, "int32": TensorProto.INT32}
    return c.make("Cast", c.of("x"), to=kinds.get(c.op.result.type.dtype, TensorProto.FLOAT))


_OPS: dict[str, Callable[[_Call], str]] = {
    "add": _binary("Add"), "sub": _binary("Sub"), "mul": _binary("Mul"), "real_div": _binary("Div"),
    "maximum": _binary("Max"), "minimum": _binary("Min"), "pow": _binary("Pow"), "equal": _binary("Equal"),
    "not_equal": _not_equal, "greater": _binary("Greater"), "greater_equal": _binary("GreaterOrEqual"),
    "less": _binary("Less"), "less_equal": _binary("LessOrEqual"), "logical_and": _binary("And"),
    "logical_or": _binary("Or"), "logical_not": _unary("Not"), "abs": _unary("Abs"), "erf": _unary("Erf"),
    "exp": _unary("Exp"), "relu": _unary("Relu"), "sigmoid": _unary("Sigmoid"), "sign": _unary("Sign"),
    "sqrt": _unary("Sqrt"), "tanh": _unary("Tanh"), "identity": _unary("Identity"), "floor": _unary("Floor"),
    **{kind.lower(): _unary(kind) for kind in "Ceil Cos Sin Tan Atan Softplus Softsign Round".split()},
    "elu": _sloped("Elu"), "leaky_relu": _sloped("LeakyRelu"),
    "clip": lambda c: c.make("Clip", c.of("x"), c.of("alpha"), c.of("beta")),
    "square": lambda c: c.make("Mul", c.of("x"), c.of("x")), "rsqrt": _root, "cast": _cast,
    "log": lambda c: c.make("Log", _shifted(c)), "inverse": lambda c: c.make("Reciprocal", _shifted(c)),
    "reduce_max": _reduction("ReduceMax"), "reduce_min": _reduction("ReduceMin"), "matmul": _matmul,
    "reduce_mean": _reduction("ReduceMean"), "reduce_sum": _reduction("ReduceSum"), "pad": _pad,
    "reshape": lambda c: c.make("Reshape", c.of("x"), c.integers(c.op.result.type.shape)),
    "expand_dims": lambda c: c.make("Reshape", c.of("x"), c.integers(c.op.result.type.shape)),
    "squeeze": lambda c: c.make("Reshape", c.of("x"), c.integers(c.op.result.type.shape)),
    "transpose": lambda c: c.make("Transpose", c.of("x"), perm=[int(i) for i in c.value("perm")]),
    "softmax": lambda c: c.make("Softmax", c.of("x"), axis=int(c.value("axis"))),
    "concat": lambda c: c.make("Concat", *c.all("values"), axis=int(c.value("axis"))),
    "select": lambda c: c.make("Where", c.of("cond"), c.of("a"), c.of("b")),
    "tile": lambda c: c.make("Tile", c.of("x"), c.integers(c.value("reps"))),
    "const": lambda c: c.make("Identity", c.of("val")), "slice_by_size": _slice, "slice_by_index": _strided,
}  # fmt: skip


def step_model(function: Function, metadata: Mapping[str, str]) -> ModelProto:
    """The program as an ONNX model in fp32.

    Raises: UnsupportedModel with every op that has no form here; MissingDependency without the extra `onnx`.
    """
    try:
        from onnx import helper
    except ImportError as fault:
        raise MissingDependency(
            "onnx: needs the extra; it is not installed. Type: pip install 'ane_trainer[onnx]'."
        ) from fault
    missing = list(dict.fromkeys(op.kind for op in function.ops if op.kind not in _OPS))
    if missing:
        found = [
            Finding("program", kind, "has no form in ONNX here.", "Use step-mlpackage.") for kind in missing
        ]
        raise UnsupportedModel("step in fp32: needs ops that are written; got others.", found)
    graph = _Graph()
    for op in function.ops:
        _OPS[op.kind](_Call(graph, op))
    made = helper.make_model(_assembled(function, graph), opset_imports=[helper.make_opsetid("", _OPSET)])
    made.ir_version = 10
    helper.set_model_props(made, dict(metadata))
    return made


def _assembled(function: Function, graph: _Graph) -> GraphProto:
    from onnx import TensorProto, helper

    def described(values: tuple[Value, ...]) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(v.name, TensorProto.FLOAT, v.type.shape) for v in values]

    return helper.make_graph(
        graph.nodes, "training_step", described(function.inputs), described(function.outputs), graph.constants
    )


def write_step_onnx(path: Path, step: SingleStep, about: Mapping[str, object]) -> Path:
    """A step in fp32, its manifest, and the state it starts from (`.safetensors`) beside it."""
    from onnx import save

    model = model_beside_state(path, step, about)
    save(model, str(path))
    return path


def model_beside_state(path: Path, step: SingleStep, about: Mapping[str, object]) -> ModelProto:
    """The model of a step in fp32, whose manifest and starting state are written beside `path`."""
    from safetensors.numpy import save_file

    model = step_model(step.lowered.program.main, {"description": str(about.get("description", ""))})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(path, manifest(step.lowered, "io", about))
    save_file(dict(step.start), path.with_suffix(".safetensors"))
    return model


def replay_step_onnx(
    path: Path, feeds: Sequence[Mapping[str, Array]]
) -> tuple[dict[str, Array], list[float]]:
    """(state, losses) after running what `write_step_onnx` wrote, on onnxruntime."""
    return replay_beside(runner(path), path, feeds)


def runner(path: Path) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """One call of the step on onnxruntime."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: np.asarray(array, np.float32) for name, array in feeds.items()}
        return dict(zip(names, session.run(names, given), strict=True))

    return run
