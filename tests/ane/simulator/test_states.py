"""Core ML states: read, update and read again, across runs."""

from __future__ import annotations

import numpy as np

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Function, Op, TensorType, Value
from ane_trainer.ane.simulator import make_context, prepare
from ane_trainer.ane.simulator.states import without_states

HALF = TensorType("fp16", (2,))


def counter() -> tuple[Function, Value, Value]:
    """old = read(s); s = old + x; new = read(s); returns (old, 2 new)."""
    b = Builder()
    state, x = b.input("s", TensorType("fp16", (2,), state=True)), b.input("x", HALF)
    old = b.op("read_state", input=state)
    updated = b.op("coreml_update_state", state=state, value=b.op("add", x=old, y=x))
    again = b.op("read_state", input=state)
    doubled = b.op("mul", x=b.op("add", x=updated, y=again), y=1.0)
    return b.finish((old, doubled)), old, doubled


def test_states_keep_their_value_between_runs() -> None:
    function, old, doubled = counter()
    plan = prepare(function, make_context("m5"))
    one = np.ones(2, np.float16)
    seen = [(out[old.name][0], out[doubled.name][0]) for out in (plan.run({"x": one}) for _ in range(3))]
    assert seen == [(0, 2), (1, 4), (2, 6)]
    plan.write("s", np.full(2, 10, np.float16))
    assert plan.run({"x": one})[doubled.name].tolist() == [22, 22]
    assert plan.read("s").tolist() == [11, 11]


def test_write_state_without_a_result() -> None:
    b = Builder()
    state, x = b.input("s", TensorType("fp16", (2,), state=True)), b.input("x", HALF)
    old = b.op("read_state", input=state)
    function = b.finish((b.op("relu", x=old),))
    write = Op("write_state", (("input", state), ("data", x)), ())
    function = Function(function.name, function.inputs, (*function.ops, write), function.outputs)
    plan = prepare(function, make_context("m1"))
    assert [plan.run({"x": np.full(2, v, np.float16)})[function.outputs[0].name][0] for v in (5, 6, 7)] == [
        0,
        5,
        6,
    ]


def test_swapped_states() -> None:
    b = Builder()
    one, two = (b.input(n, TensorType("fp16", (2,), state=True)) for n in "ab")
    first, second = b.op("read_state", input=one), b.op("read_state", input=two)
    b.op("coreml_update_state", state=one, value=second)
    b.op("coreml_update_state", state=two, value=first)
    plan = prepare(b.finish((first, second)), make_context("m2"))
    plan.write("a", np.ones(2, np.float16))
    runs = [plan.run({}) for _ in range(3)]
    assert [[out[v.name][0] for v in (first, second)] for out in runs] == [
        [1, 0],
        [0, 1],
        [1, 0],
    ]


def test_a_function_without_states_is_left_alone() -> None:
    b = Builder()
    function = b.finish((b.op("relu", x=b.input("x", HALF)),))
    assert without_states(function) == (function, ())
