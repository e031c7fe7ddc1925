"""A prepared program computes what its ops compute one by one, whatever is fused, a view or written in place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.errors import SimulationError
from ane_trainer.ane.mil.opset import Builder, bind
from ane_trainer.ane.mil.program import Function, Literal, TensorType, Value
from ane_trainer.ane.simulator import KERNELS, make_context, prepare
from ane_trainer.ane.simulator.arrays import literal_array
from ane_trainer.ane.simulator.numbers.fp16 import decode, encode


def one_by_one(function, feeds, context):
    """The function evaluated op by op from the registered kernels, without plan, fusion or views."""
    values = {v.name: decode(feeds[v.name]) for v in function.inputs}

    def array(argument):
        if isinstance(argument, Literal):
            return literal_array(argument)
        return tuple(map(array, argument)) if isinstance(argument, tuple) else values[argument.name]

    for op in function.ops:
        call = bind(op.kind, dict(op.args))
        operands = [
            array(call.args[p.name]) if call.has(p.name) else None
            for p in call.op.params
            if p.role != "const"
        ]
        result = KERNELS[op.kind].run(context, call, *operands)
        for value, item in zip(op.results, result if isinstance(result, tuple) else (result,), strict=True):
            values[value.name] = np.broadcast_to(item, value.type.shape)
    return {v.name: values[v.name] for v in function.outputs}


def same(plan_outputs, reference):
    for name, expected in reference.items():
        got = plan_outputs[name]
        want = encode(expected) if expected.dtype == np.float32 else expected
        got, want = (
            a.view(np.uint16) if a.dtype == np.float16 else a for a in (got, np.ascontiguousarray(want))
        )
        assert np.array_equal(got, want), name


UNARY = ["abs", "relu", "square", "sqrt", "exp", "tanh", "sigmoid", "gelu", "erf", "inverse", "silu"]
BINARY = ["add", "sub", "mul", "real_div", "maximum", "minimum"]
MOVES = ["transpose", "reshape", "slice", "reduce"]


@st.composite
def random_functions(draw):
    """A random program over a few shapes: pointwise ops, broadcasts, comparisons, views and reductions."""
    b = Builder()
    pool = [
        b.input(f"x{i}", TensorType("fp16", shape))
        for i, shape in enumerate([(3, 5), (3, 5), (1, 5), (3, 1)])
    ]
    for _ in range(draw(st.integers(3, 25))):
        x = draw(st.sampled_from(pool))
        kind = draw(st.sampled_from(UNARY + BINARY + MOVES + ["select", "const"]))
        if kind in UNARY:
            value = b.op(kind, x=x)
        elif kind in BINARY:
            y = draw(st.sampled_from([v for v in pool if _fits(v.type.shape, x.type.shape)]))
            value = b.op(kind, x=x, y=y)
        elif kind == "const":
            value = b.op(draw(st.sampled_from(BINARY)), x=x, y=draw(st.sampled_from([0.5, -3.0, 1e-3, 0.0])))
        elif kind == "select":
            same_shape = [v for v in pool if v.type.shape == x.type.shape]
            y = draw(st.sampled_from(same_shape))
            value = b.op("select", cond=b.op("less", x=x, y=y), a=x, b=y)
        elif kind == "transpose":
            value = b.op("transpose", x=x, perm=[1, 0])
        elif kind == "reshape":
            value = b.op("reshape", x=x, shape=[x.type.shape[1], x.type.shape[0]])
        elif kind == "slice":
            value = b.op("slice_by_size", x=x, begin=[x.type.shape[0] // 2, 0], size=[1, x.type.shape[1]])
        else:
            value = b.op("reduce_sum", x=x, axes=[draw(st.integers(0, 1))], keep_dims=True)
        pool.append(value)
    outputs = draw(st.lists(st.sampled_from(pool[4:]), min_size=1, max_size=4, unique_by=lambda v: v.name))
    return b.finish(tuple(outputs))


def _fits(a, b):
    return all(m == n or 1 in (m, n) for m, n in zip(a, b, strict=True))


@given(function=random_functions(), seed=st.integers(0, 2**32 - 1), wild=st.booleans())
@settings(max_examples=60, deadline=None)
def test_plan_equals_ops_one_by_one(function, seed, wild):
    context = make_context("m4", threads=1)
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in function.inputs:
        bits = rng.integers(0, 1 << 16, value.type.shape, dtype=np.uint16).view(np.float16)
        feeds[value.name] = bits if wild else rng.standard_normal(value.type.shape).astype(np.float16)
    same(prepare(function, context).run(feeds), one_by_one(function, feeds, context))


def counter_function():
    """state' = state + x, result = 2 * state'."""
    b = Builder()
    state, x = b.input("state", TensorType("fp16", (4,))), b.input("x", TensorType("fp16", (4,)))
    new = b.op("add", name="new", x=state, y=x)
    return b.finish((new, b.op("mul", name="twice", x=new, y=2.0)))


def test_resident_state_stays_between_runs_and_is_written_in_place():
    plan = prepare(counter_function(), make_context("m4"), [("new", "state")])
    assert plan.buffers["new"] is plan.buffers["state"]
    plan.write("state", np.zeros(4, np.float16))
    for count in range(1, 4):
        outputs = plan.run({"x": np.ones(4, np.float16)})
        assert list(outputs) == ["twice"]
        assert (outputs["twice"] == 2 * count).all()
    assert (plan.read("state") == 3).all()


def test_a_state_that_is_read_later_is_not_overwritten_early():
    b = Builder()
    state = b.input("state", TensorType("fp16", (3, 3)))
    new = b.op("add", name="new", x=state, y=1.0)
    late = b.op("matmul", name="late", x=b.op("reshape", x=new, shape=[3, 3]), y=state)
    plan = prepare(b.finish((new, late)), make_context("m4"), [("new", "state")])
    plan.write("state", np.eye(3, dtype=np.float16))
    late_value = plan.run({})["late"]
    assert np.array_equal(late_value, (np.eye(3) + 1) @ np.eye(3))
    assert np.array_equal(plan.read("state"), np.eye(3) + 1)


def test_a_transposed_reader_in_the_same_loop_forbids_writing_in_place():
    b = Builder()
    state = b.input("state", TensorType("fp16", (2, 2)))
    new = b.op("add", name="new", x=state, y=b.op("transpose", x=state, perm=[1, 0]))
    plan = prepare(b.finish((new,)), make_context("m4"), [("new", "state")])
    plan.write("state", np.array([[1, 2], [3, 4]], np.float16))
    plan.run({})
    assert np.array_equal(plan.read("state"), [[2, 5], [5, 8]])


def test_swapped_states_exchange_their_values():
    b = Builder()
    p, q = b.input("p", TensorType("fp16", (2,))), b.input("q", TensorType("fp16", (2,)))
    function = Function("main", (p, q), (), (q, p))
    plan = prepare(function, make_context("m4"), [("q", "p"), ("p", "q")])
    plan.write("p", np.array([1, 2], np.float16))
    plan.write("q", np.array([3, 4], np.float16))
    plan.run({})
    assert plan.read("p").tolist() == [3, 4]
    assert plan.read("q").tolist() == [1, 2]


def test_threads_do_not_change_a_bit():
    b = Builder()
    x = b.input("x", TensorType("fp16", (700, 301)))
    function = b.finish((b.op("mul", x=b.op("exp", x=x), y=b.op("add", x=x, y=0.1)),))
    array = np.random.default_rng(0).standard_normal((700, 301)).astype(np.float16)
    one, two = (
        next(iter(prepare(function, make_context("m4", threads=n)).run({"x": array}).values()))
        for n in (1, 2)
    )
    assert np.array_equal(one.view(np.uint16), two.view(np.uint16))


def test_bad_feeds_are_named():
    plan = prepare(counter_function(), make_context("m4"))
    with pytest.raises(SimulationError, match=r"SIM101.*x.*missing"):
        plan.run({"state": np.zeros(4, np.float16)})
    with pytest.raises(SimulationError, match=r"SIM103.*shape"):
        plan.run({"state": np.zeros(4, np.float16), "x": np.zeros(5, np.float16)})
    with pytest.raises(SimulationError, match="SIM102"):
        plan.write("nothing", np.zeros(4, np.float16))


def test_width_offset_slices_clamp_before_a16_only():
    b = Builder()
    x = b.input("x", TensorType("fp16", (1, 4)))
    width = b.op("slice_by_size", x=x, begin=[0, 1], size=[1, 3])
    whole = b.op("slice_by_size", x=x, begin=[0, 0], size=[1, 3])
    function = b.finish((width, whole))
    array = np.array([[5000, 4094, 4096, -5000]], np.float16)
    for chip, clamps in (("m1", True), ("m2-pro", True), ("m4", False), ("m5", False)):
        offset, zero_offset = prepare(function, make_context(chip)).run({"x": array}).values()
        assert offset.tolist() == [[4094, np.inf, -np.inf] if clamps else [4094, 4096, -5000]], chip
        assert zero_offset.tolist() == [[5000, 4094, 4096]]


def test_a_value_without_readers_but_an_output_is_returned():
    b = Builder()
    x = b.input("x", TensorType("fp16", (2,)))
    assert isinstance(x, Value)
    function = b.finish((b.op("relu", name="y", x=x),))
    assert prepare(function, make_context("m4")).run({"x": np.array([-1, 2], np.float16)})["y"].tolist() == [
        0,
        2,
    ]
