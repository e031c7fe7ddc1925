# ruff: noqa: E501  (a table of graphs)
"""The installed aneforge package's emitter as a witness: we read its text, and write the same statements."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Arg, Function, Op, Program, TensorType, Value, literal
from ane_trainer.ane.mil.text.parser import parse_program
from ane_trainer.ane.mil.text.printer import print_program
from ane_trainer.ane.mil.weights import from_array

af = pytest.importorskip("aneforge")
from aneforge import _compile as emitter  # noqa: E402
from aneforge import autograd, graph  # noqa: E402

rng = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) / 8).astype(np.float16)


def emitted(outputs: list[graph.Tensor], folder: Path, compress: str | None = None) -> tuple[str, bytes]:
    """aneforge's text and blob for a graph, by its own emitter."""
    order = emitter._topo_multi(*outputs)
    inputs = sorted((t for t in order if t.op == "input"), key=lambda t: t.attrs.get("idx", 0))
    for i, tensor in enumerate(order):
        tensor._name = f"t{i}"
    state = emitter._Emitter(False, compress=compress, compress_atol=1.0, block_size=4)
    for tensor in order:
        if tensor.op != "input":
            emitter._EMIT[tensor.op](state, tensor, tensor._name, [source._name for source in tensor.srcs])
    names = ", ".join(tensor._name for tensor in outputs)
    emitter._emit_program_dir(state, inputs, names, None, str(folder))
    return (folder / "model.mil").read_text(), (folder / "weights.bin").read_bytes()


def mlp_step() -> list[graph.Tensor]:
    """Forward, cross-entropy, backward and Adam of a two-layer MLP, as in aneforge's resident training step."""
    x, target, lr = graph.input((4, 8)), graph.input((4, 3)), graph.input((1, 1))
    params = [autograd.parameter(weights(*s)) for s in ((8, 5), (1, 5), (5, 3), (1, 3))]
    logits = ((x @ params[0]) + params[1]).gelu() @ params[2] + params[3]
    loss = autograd.softmax_cross_entropy(logits, target)
    grads = autograd.backward_from(loss.seed(256.0), loss.logits, params)
    moments = [[graph.input(p.shape) for p in params] for _ in range(2)]
    outputs: list[graph.Tensor] = []
    for p, m, v in zip(params, *moments, strict=True):
        outputs += autograd._adam_update(p, m, v, grads[p], lr)
    return outputs


def image() -> graph.Tensor:
    return graph.input((1, 4, 8, 8))


def vector() -> graph.Tensor:
    return graph.input((2, 8))


def one(make: Callable[[], graph.Tensor]) -> Callable[[], list[graph.Tensor]]:
    return lambda: [make()]


UNARY = [
    "relu",
    "gelu",
    "silu",
    "sigmoid",
    "tanh",
    "exp",
    "sqrt",
    "abs",
    "square",
    "sin",
    "cos",
    "erf",
    "softplus",
    "relu6",
    "softsign",
    "atan",
    "exp2",
    "log",
    "rsqrt",
    "inverse",
    "elu",
    "leaky_relu",
    "scaled_tanh",
    "threshold",
    "thresholded_relu",
    "clamped_relu",
    "sigmoid_hard",
    "linear_activation",
    "floor",
    "ceil",
    "round",
    "sign",
]
GRAPHS: dict[str, Callable[[], list[graph.Tensor]]] = {
    **{name: one(lambda name=name: getattr(vector(), name)()) for name in UNARY},
    **{name: one(lambda name=name: getattr(vector(), name)((1,)))
       for name in ("mean", "sum", "amax", "amin", "l1_norm", "log_sum", "sum_square", "reduce_log_sum_exp")},
    **{name: one(lambda name=name: getattr(vector(), name)(vector()))
       for name in ("__add__", "__sub__", "__mul__", "__truediv__", "__pow__", "greater", "less", "not_equal")},
    "clip": one(lambda: vector().clip(-1.0, 0.5)),
    "prelu": one(lambda: image().prelu(weights(4))),
    "scalars": one(lambda: (vector() * 0.1).adds(65504.0) * 0.0),
    "linear": one(lambda: vector().linear(weights(3, 8), weights(3)).softmax()),
    "matmul": one(lambda: graph.input((2, 3)) @ graph.input((3, 4))),
    "transpose": one(lambda: graph.input((2, 3, 4)).transpose([2, 0, 1])),
    "reshape": one(lambda: graph.input((2, 12)).reshape(4, 6).expand_dims([0]).squeeze([0]).flatten2d(1)),
    "slice": one(lambda: graph.input((4, 6)).slice_by_size([1, 2], [2, 3])),
    "reverse_tile": one(lambda: vector().reverse([1]).tile([2, 3])),
    "concat_stack": lambda: [graph.concat([vector(), vector()], axis=1), graph.stack([vector(), vector()], axis=0)],
    "split": lambda: graph.split(graph.input((4, 6)), 3, axis=1),
    "select": one(lambda: graph.select(vector().greater(vector()).logical_not(), vector(), vector())),
    "maximum": one(lambda: graph.maximum(vector(), graph.minimum(vector(), vector()))),
    "conv": one(lambda: graph.conv(image(), weights(6, 2, 3, 3), stride=2, pad=1, groups=2)),
    "conv_bias": one(lambda: graph.conv(image(), weights(6, 4, 3, 3), pad=(1, 0, 2, 1), dilation=2)),
    "dynamic_conv": one(lambda: graph.dynamic_conv(image(), graph.input((6, 4, 3, 3)), pad=1)),
    "conv_transpose": one(lambda: graph.conv_transpose(image(), weights(4, 6, 2, 2), stride=2)),
    "max_pool": one(lambda: image().max_pool(3, 2, 1, ceil_mode=True)),
    "avg_pool": one(lambda: image().avg_pool(2)),
    "batch_norm": one(lambda: graph.batch_norm(image(), *(abs(weights(4)) for _ in range(4)))),
    "instance_norm": one(lambda: graph.instance_norm(image(), weights(4), weights(4))),
    "layer_norm": one(lambda: vector().layer_norm(weights(8), weights(8))),
    "rms_norm": one(lambda: vector().rms_norm(weights(8))),
    "group_norm": one(lambda: image().group_norm(weights(4), weights(4), 2)),
    "channel_layer_norm": one(lambda: graph.input((1, 4, 1, 8)).channel_layer_norm(weights(4), weights(4))),
    "l2_norm": one(lambda: vector().l2_norm()),
    "local_response_norm": one(lambda: graph.local_response_norm(image())),
    "upsample": one(lambda: graph.upsample_bilinear(image().upsample(2))),
    "resize": one(lambda: graph.resize_bilinear(graph.resize_nearest_neighbor(image(), 5, 3), 9, 9)),
    "crop": one(lambda: graph.crop(image(), 1, 2, 0, 3)),
    "affine": one(lambda: graph.affine(image(), weights(1, 6), 5, 5)),
    "pixels": one(lambda: graph.pixel_unshuffle(graph.pixel_shuffle(image(), 2), 2)),
    "depth": one(lambda: graph.space_to_depth(graph.depth_to_space(image(), 2), 2)),
    "einsum": one(lambda: graph.einsum_native("nchw,nwhu->nchu", graph.input((1, 2, 3, 4)), weights(1, 4, 3, 5))),
    "image_input": one(lambda: graph.image_input((1, 3, 4, 4))),
    "attention": one(lambda: graph.mha(graph.input((4, 8)), *(weights(8, 8) if i % 2 == 0 else None for i in range(8)), 2)),
    "mlp_step": mlp_step,
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_reads_the_text_and_prints_the_same_program(name: str, tmp_path: Path) -> None:
    text, blob = emitted(GRAPHS[name](), tmp_path)
    program = parse_program(text, blob)
    printed = print_program(program)
    assert parse_program(*printed) == program
    assert statements(printed[0]) == statements(text) != []
    assert [v.name for v in program.main.outputs] == re.findall(r"\w+", text[text.rindex("->") :])


@pytest.mark.parametrize("compress", ["int8", "int4", "sparse", "blockwise"])
def test_reads_compressed_weights(compress: str, tmp_path: Path) -> None:
    matrix = weights(8, 16)
    if compress == "sparse":
        matrix[np.abs(matrix) < 0.15] = 0
    text, blob = emitted([graph.input((2, 16)).linear(matrix)], tmp_path, compress)
    program = parse_program(text, blob)
    assert any(op.kind.startswith("constexpr_") for op in program.main.ops)
    printed = print_program(program)
    assert parse_program(*printed) == program
    assert statements(printed[0]) == statements(text)


def statements(text: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(result types, op, parameters) of every statement but constants, spacing and order of parameters aside."""
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*(.*?)\s*=\s*(\w+)\((.*)\)\s*\[(.*)\];", line)
        if match and match[2] != "const":
            types = re.sub(r"(\w+)(, tensor|$)", r"\2", match[1].replace(" ", ""))
            given = match[3] or match[4]
            found.append(
                (
                    types,
                    match[2],
                    tuple(sorted(set(re.findall(r"(\w+)\s*=", given)) - {"name", "path", "offset"})),
                )
            )
    return found


def renamed(program: Program) -> Function:
    """The main function with values called v0, v1, ... in order of definition."""
    function = program.main
    names: dict[str, str] = {}

    def value(v: Value) -> Value:
        return Value(names.setdefault(v.name, f"v{len(names)}"), v.type)

    def argument(a: Arg) -> Arg:
        if isinstance(a, tuple):
            return tuple(value(i) if isinstance(i, Value) else i for i in a)
        return value(a) if isinstance(a, Value) else a

    inputs = tuple(value(v) for v in function.inputs)
    ops = tuple(
        Op(op.kind, tuple((k, argument(a)) for k, a in op.args), tuple(value(v) for v in op.results))
        for op in function.ops
    )
    return Function("main", inputs, ops, tuple(value(v) for v in function.outputs), function.opset)


def check_same(ours: Builder, results: tuple[Value, ...], theirs: list[graph.Tensor], folder: Path) -> None:
    text, blob = emitted(theirs, folder)
    program = Program((ours.finish(results),))
    assert renamed(parse_program(text, blob)) == renamed(program)
    assert statements(print_program(program)[0]) == statements(text)


def test_elementwise_built_by_hand_is_the_same(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", TensorType("fp16", (1, 4)))
    check_same(b, (b.op("relu", x=x),), [graph.input((1, 4)).relu()], tmp_path)


def test_linear_built_by_hand_is_the_same(tmp_path: Path) -> None:
    w, bias = weights(3, 8), weights(3)
    b = Builder()
    x = b.input("x", TensorType("fp16", (2, 8)))
    product = b.op("matmul", x=x, y=from_array(w), transpose_x=False, transpose_y=True)
    check_same(
        b, (b.op("add", x=product, y=from_array(bias.reshape(1, 3))),), [vector().linear(w, bias)], tmp_path
    )


def test_conv_and_pool_built_by_hand_are_the_same(tmp_path: Path) -> None:
    w = weights(6, 4, 3, 3)
    b = Builder()
    x = b.input("x", TensorType("fp16", (1, 4, 8, 8)))
    conv = b.op("conv", x=x, weight=from_array(w), strides=[1, 1], pad_type="custom", pad=[1] * 4, dilations=[1, 1],
                groups=1)  # fmt: skip
    pool = b.op("max_pool", x=b.op("relu", x=conv), kernel_sizes=[2, 2], strides=[2, 2], pad_type="custom",
                pad=[0] * 4, ceil_mode=False)  # fmt: skip
    flat = b.op("reshape", x=pool, shape=[1, 96])
    check_same(b, (flat,), [graph.conv(image(), w, pad=1).relu().max_pool(2).reshape(1, 96)], tmp_path)


def test_adam_update_built_by_hand_is_the_same(tmp_path: Path) -> None:
    inputs = [graph.input((4, 8)) for _ in range(4)]
    lr = graph.input((1, 1))
    theirs = list(autograd._adam_update(*inputs, lr))
    text, blob = emitted(theirs, tmp_path)
    names = {v.name: v for v in parse_program(text, blob).main.inputs}
    b = Builder()
    w, m, v, g, rate = (b.input(t._name, names[t._name].type) for t in (*inputs, lr))

    def scaled(x: Value, k: float) -> Value:
        return b.op("mul", x=x, y=literal(float(np.float16(k)), "fp16"))

    m2 = b.op("add", x=scaled(m, 0.9), y=scaled(g, 1 - 0.9))
    v2 = b.op("add", x=scaled(v, 0.999), y=scaled(b.op("mul", x=g, y=g), 1 - 0.999))
    top = b.op("mul", x=rate, y=m2)
    low = b.op("add", x=b.op("sqrt", x=v2), y=literal(float(np.float16(1e-8)), "fp16"))
    new = b.op("sub", x=w, y=b.op("real_div", x=top, y=low))
    program = Program((b.finish((new, m2, v2)),))
    ours, read = renamed(program), renamed(parse_program(text, blob))
    assert sorted(map(shape_of, ours.ops)) == sorted(map(shape_of, read.ops))


def shape_of(op: Op) -> str:
    """An op without its names: kind, constants and operand types."""
    return (
        f"{op.kind} {[(k, str(lit.data)) for k, lit in op.literals()]} {[str(v.type) for v in op.operands()]}"
    )
