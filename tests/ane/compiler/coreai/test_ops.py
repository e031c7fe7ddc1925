"""Every Core AI translation against MIL's meaning in float64, on Apple's runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coreai")

from ane_trainer.ane.compiler.coreai import open_asset, save_asset
from ane_trainer.ane.errors import UnsupportedModel, UsageError
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType, Value
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.stages import Lowered, Port
from tests.ane.reference import evaluate

SHAPES = {
    "x": (2, 4, 6, 6),
    "y": (2, 4, 6, 6),
    "p": (2, 4, 6, 6),
    "row": (6,),
    "w": (6, 4, 3, 3),
    "m": (4, 6),
    "s": (2, 4, 6),
}
Case = Callable[[Builder, dict[str, Value]], Any]


def build(case: Case) -> Lowered:
    builder = Builder()
    inputs = {name: builder.input(name, TensorType("fp32", shape)) for name, shape in SHAPES.items()}
    result = case(builder, inputs)
    if result.type.dtype == "bool":
        ones = {"a": from_array(np.ones(result.type.shape, np.float32)), "b": from_array(np.float32(0))}
        result = builder.op("select", cond=result, **ones)
    function = builder.finish((result,))
    ports = tuple(Port(v.name, v.type.shape, "batch") for v in function.inputs)
    return Lowered(Program((function,)), ports, (Port(result.name, result.type.shape, "result"),), ())


def op(kind: str, *operands: str, **args: Any) -> Case:
    """A case that calls `kind` with inputs by name: `x=p` gives the input p as x."""
    pairs = [operand.split("=") for operand in operands]

    def make(b: Builder, v: dict[str, Value]) -> Any:
        return b.op(kind, **{name: v[source] for name, source in pairs}, **args)

    return make


def lit(*values: float) -> Any:
    return from_array(np.float32(values[0]) if len(values) == 1 else np.asarray(values, np.float32))


POOL = {"kernel_sizes": [3, 2], "strides": [2, 1], "pad_type": "custom", "pad": [1, 1, 0, 1]}
CONV = {"strides": [2, 1], "pad_type": "custom", "pad": [1, 2, 0, 1], "dilations": [1, 2], "groups": 1}
EPS = {"epsilon": lit(0.25)}
AB = {"alpha": lit(0.2), "beta": lit(0.5)}

UNARY = (
    "abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "relu", "relu6", "sigmoid", "sign", "silu", "sin",
    "square", "tanh", "atan", "softplus",
)  # fmt: skip
BINARY = (
    "add", "sub", "mul", "maximum", "minimum", "equal", "not_equal", "greater", "greater_equal", "less",
    "less_equal",
)  # fmt: skip
REDUCE = ("sum", "mean", "max", "min", "l1_norm", "l2_norm")

CASES: dict[str, Case] = {
    **{k: op(k, "x=x") for k in UNARY},
    **{k: op(k, "x=p") for k in ("sqrt",)},
    **{k: op(k, "x=p", **EPS) for k in ("rsqrt", "inverse", "log")},
    **{k: op(k, "x=x", "y=row") for k in BINARY},
    "real_div": op("real_div", "x=x", "y=p"), "pow": op("pow", "x=p", "y=y"),
    "equal_ties": op("equal", "x=x", "y=x"), "greater_equal_ties": op("greater_equal", "x=x", "y=x"),
    "less_equal_ties": op("less_equal", "x=x", "y=x"),
    "gelu": op("gelu", "x=x", mode="EXACT"), "gelu_tanh": op("gelu", "x=x", mode="TANH_APPROXIMATION"),
    "leaky_relu": op("leaky_relu", "x=x", alpha=lit(0.1)), "elu": op("elu", "x=x", alpha=lit(0.7)),
    "sigmoid_hard": op("sigmoid_hard", "x=x", **AB),
    "logical_not": lambda b, v: b.op("logical_not", x=b.op("greater", x=v["x"], y=v["y"])),
    "select": lambda b, v: b.op("select", cond=b.op("greater", x=v["x"], y=v["y"]), a=v["p"], b=lit(0.0)),
    "matmul": op("matmul", "x=x", "y=y", transpose_y=True),
    "matmul_x": op("matmul", "x=x", "y=y", transpose_x=True),
    "matmul_vector": op("matmul", "x=m", "y=s", transpose_x=True),
    "conv": op("conv", "x=x", "weight=w", **CONV),
    "conv_bias": lambda b, v: b.op("conv", x=v["x"], weight=v["w"], bias=lit(1, 2, 3, 4, 5, 6), **CONV),
    "conv_groups": lambda b, v: b.op(
        "conv", x=v["x"], weight=from_array(np.ones((4, 2, 2, 2), np.float32)), **{**CONV, "groups": 2}),
    "avg_pool": op("avg_pool", "x=x", **POOL, exclude_padding_from_average=False),
    "avg_pool_inside": op("avg_pool", "x=x", **POOL, exclude_padding_from_average=True),
    "max_pool": op("max_pool", "x=x", **POOL),
    "max_pool_1d": op("max_pool", "x=s", kernel_sizes=[2], strides=[2], pad_type="custom", pad=[1, 1]),
    "avg_pool_1d": op("avg_pool", "x=s", kernel_sizes=[3], strides=[1], pad_type="custom", pad=[0, 0]),
    **{f"reduce_{k}": op(f"reduce_{k}", "x=x", axes=[1, 3], keep_dims=True) for k in REDUCE},
    "reduce_flat": op("reduce_sum", "x=x", axes=[0, -1], keep_dims=False),
    "softmax": op("softmax", "x=x", axis=1), "reshape": op("reshape", "x=x", shape=[8, 36]),
    "transpose": op("transpose", "x=x", perm=[2, 0, -1, 1]),
    "slice_by_size": op("slice_by_size", "x=x", begin=[0, 1, 2, 3], size=[2, 2, 3, 1]),
    "slice_by_index": op("slice_by_index", "x=x", begin=[0, 1, 0, 1], end=[2, 4, 5, 6], stride=[1, 2, 2, 3]),
    "concat": lambda b, v: b.op("concat", values=(v["x"], v["y"]), axis=-2),
    "tile": op("tile", "x=s", reps=[1, 3, 2]),
    "pad": op("pad", "x=s", pad=[1, 0, 2, 3], mode="constant", constant_val=lit(0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_translation(name: str, tmp_path: Path) -> None:
    lowered = build(CASES[name])
    draw = np.random.default_rng(0)
    feeds = {key: draw.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}
    feeds["p"] = np.abs(feeds["p"]) + np.float32(0.5)
    feeds["row"][:3] = feeds["x"][0, 0, 0, :3]
    wanted = evaluate(lowered.program.main, feeds)
    asset = open_asset(save_asset(tmp_path / "case.aimodel", lowered))
    got = asset.run({name: array for name, array in feeds.items() if name in asset.ports["inputs"]})
    asset.close()
    for key, value in wanted.items():
        assert got[key].shape == value.shape
        np.testing.assert_allclose(got[key], value, rtol=2e-5, atol=2e-6)


BETWEEN: dict[str, Callable[[Builder, Value], Any]] = {
    "nothing": lambda b, flat: flat,
    "transposed twice": lambda b, flat: b.op("transpose", x=b.op("transpose", x=flat, perm=[1, 0]), perm=[1, 0]),
    "a sum": lambda b, flat: b.op("add", x=flat, y=lit(0.0)),
    "a difference": lambda b, flat: b.op("sub", x=flat, y=lit(0.0)),
    "a slice": lambda b, flat: b.op("slice_by_size", x=flat, begin=(0, 0), size=flat.type.shape),
    "a tile": lambda b, flat: b.op("tile", x=flat, reps=(1, 1)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "between"),
    [((8, 8, 4), each) for each in BETWEEN]
    + [(each, "nothing") for each in ((8, 1, 8, 8), (8, 4, 8, 4), (5, 5, 7), (8, 4, 4), (8, 8, 4, 4))],
)
def test_products_of_reshaped_operands(shape: tuple[int, ...], between: str, tmp_path: Path) -> None:
    """A product of what was reshaped from axes as long as its sum, which Core AI's compiler folds wrongly."""
    builder, rows = Builder(), shape[0]
    a, b = (builder.input(n, TensorType("fp32", s)) for n, s in (("a", (3, rows)), ("b", shape)))
    flat = builder.op("reshape", x=builder.op("mul", x=b, y=b), shape=(rows, math.prod(shape[1:])))
    result = builder.op("matmul", x=a, y=BETWEEN[between](builder, flat))
    function = builder.finish((result,))
    ports = tuple(Port(v.name, v.type.shape, "batch") for v in function.inputs)
    made = Lowered(Program((function,)), ports, (Port(result.name, result.type.shape, "result"),), ())
    draw = np.random.default_rng(0)
    feeds = {p.name: draw.standard_normal(p.shape).astype(np.float32) for p in ports}
    asset = open_asset(save_asset(tmp_path / "case.aimodel", made))
    (got,) = asset.run(feeds).values()
    asset.close()
    wanted = feeds["a"] @ (feeds["b"] ** 2).reshape(rows, -1)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)


def test_an_op_without_translation_is_refused_by_name(tmp_path: Path) -> None:
    lowered = build(op("l2_norm", "x=x", epsilon=lit(1e-6)))
    with pytest.raises(UnsupportedModel, match="l2_norm: has no Core AI translation") as caught:
        save_asset(tmp_path / "no.aimodel", lowered)
    assert caught.value.code == "ANE305"
    with pytest.raises(UsageError, match=r"ends in \.aimodel"):
        save_asset(tmp_path / "no.model", lowered)
    with pytest.raises(UsageError, match=r"needs an \.aimodel folder"):
        open_asset(tmp_path / "absent.aimodel")
