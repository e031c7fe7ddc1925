"""What simulate refuses, with chip and path, and what just passes."""

from __future__ import annotations

import numpy as np
import pytest

from ane_trainer.ane.chips.lookup import get_chip
from ane_trainer.ane.errors import UnsupportedModel
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.ane.simulator import make_context, prepare, simulate
from ane_trainer.ane.simulator.refusal import refused_ops


def program(kind: str, source: str = "fp16", **params: object) -> Program:
    b = Builder()
    return Program((b.finish((b.op(kind, x=b.input("x", TensorType(source, (2, 3))), **params),)),))


def test_an_op_the_backend_lacks_is_refused_with_chip_path_and_source() -> None:
    made = program("cumsum", axis=0)
    with pytest.raises(UnsupportedModel, match=r"M5 .*path e5rt.*\n.*cumsum.*not implemented") as refusal:
        simulate(made, {"x": np.ones((2, 3), np.float16)}, chip="m5")
    assert refusal.value.exit_code == 3
    got = simulate(made, {"x": np.ones((2, 3), np.float16)}, chip="m5", path=None)
    assert next(iter(got.values())).tolist() == [[1, 1, 1], [2, 2, 2]]


def test_every_refused_op_is_named_at_once() -> None:
    b = Builder()
    x = b.input("x", TensorType("fp16", (2, 3)))
    out = b.op("add", x=b.op("tan", x=x), y=b.op("sinh", x=x))
    findings = refused_ops(b.finish((out,)), get_chip("m4"), "e5rt")
    assert [f.op for f in findings] == ["tan", "sinh"]


def test_sine_needs_a15() -> None:
    made = program("sin")
    with pytest.raises(UnsupportedModel, match="sin: refused on M1"):
        simulate(made, {"x": np.ones((2, 3), np.float16)}, chip="m1")
    assert simulate(made, {"x": np.ones((2, 3), np.float16)}, chip="m5")


def test_uint8_image_ports_are_cast_on_the_engine() -> None:
    image = np.array([[0, 1, 2], [128, 254, 255]], np.uint8)
    made = program("cast", "uint8", dtype="fp16")
    assert np.array_equal(next(iter(simulate(made, {"x": image}, chip="m1").values())), image)
    with pytest.raises(UnsupportedModel, match="cast"):
        simulate(program("cast", dtype="int32"), {"x": image.astype(np.float16)}, chip="m1")


def test_random_numbers_are_refused_on_every_path() -> None:
    b = Builder()
    x = b.input("x", TensorType("fp16", (2,)))
    out = b.op("add", x=x, y=b.op("random_uniform", shape=[2], low=0.0, high=1.0))
    for path in ("e5rt", "coreml", None):
        with pytest.raises(UnsupportedModel, match="random_uniform"):
            simulate(Program((b.finish((out,)),)), {"x": np.ones(2, np.float16)}, chip="m5", path=path)


def test_what_a_compiler_folds_is_not_held_against_a_program() -> None:
    b = Builder()
    x = b.input("x", TensorType("fp16", (3,)))
    folded = b.op("cumsum", x=from_array(np.ones(3, np.float16)), axis=0)
    got = simulate(
        Program((b.finish((b.op("add", x=x, y=folded),)),)), {"x": np.zeros(3, np.float16)}, chip="m5"
    )
    assert next(iter(got.values())).tolist() == [1, 2, 3]


def test_a_mask_is_ignored_on_the_direct_path() -> None:
    """Orion and maderix/ANE; elsewhere it is applied."""
    b = Builder()
    q, k, v = (b.input(n, TensorType("fp16", (1, 2, 4))) for n in "qkv")
    mask = b.input("m", TensorType("bool", (2, 2)))
    out = b.op("scaled_dot_product_attention", query=q, key=k, value=v, attn_mask=mask)
    function = b.finish((out,))
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal((1, 2, 4)).astype(np.float16) for n in "qkv"} | {
        "m": np.array([[True, False]] * 2)
    }
    masked = prepare(function, make_context("m4")).run(feeds)[out.name]
    ignored = prepare(function, make_context("m4", path="direct")).run(feeds)[out.name]
    whole = prepare(function, make_context("m4")).run(feeds | {"m": np.ones((2, 2), bool)})[out.name]
    assert np.array_equal(ignored, whole)
    assert not np.array_equal(masked, whole)
