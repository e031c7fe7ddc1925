"""Memory is handed on only when nobody reads it, and no op counts on what it finds in its results' memory."""

from __future__ import annotations

import numpy as np
import pytest

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import TensorType
from ane_trainer.ane.simulator import make_context, prepare
from ane_trainer.ane.simulator.lifetimes import Pool, last_uses
from ane_trainer.ane.simulator.schedule import schedule
from ane_trainer.commands.conformance.case import Case
from ane_trainer.commands.conformance.suite import suite


def spoiled_run(function, feeds, fidelity):
    """Results of a second run whose shared memory held something else before."""
    plan = prepare(function, make_context("m5", fidelity, threads=1))
    plan.run(feeds)
    for block in plan.shared:
        block[...] = 0x7F  # a large float
    made = {value.name for op in function.ops if any(True for _ in op.operands()) for value in op.results}
    for value in function.outputs:
        if value.name in made:
            plan.buffers[value.name][...] = 77
    return list(plan.run(feeds).values())


def showing_all(function):
    """The function with every result an output: each has memory of its own."""
    shown = dict.fromkeys([*function.outputs, *(v for op in function.ops for v in op.results)])
    return type(function)(**{**vars(function), "outputs": tuple(shown)})


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
@pytest.mark.parametrize("family", sorted({case.family for case in suite()}))
def test_every_op_writes_all_of_its_result(family: str, fidelity: str) -> None:
    for case in suite():
        if case.family == family:
            check(case, fidelity)


def check(case: Case, fidelity: str) -> None:
    program, feeds = case.make()
    plan = prepare(showing_all(program.main), make_context("m5", fidelity, threads=1))
    own = plan.run(feeds)
    for value, got in zip(program.main.outputs, spoiled_run(program.main, feeds, fidelity), strict=True):
        assert own[value.name].tobytes() == got.tobytes(), case.name


def chain(length: int):
    """Sums over each row in turn with views between: nothing fuses."""
    b = Builder()
    x = value = b.input("x", TensorType("fp16", (64, 64)))
    for _ in range(length):
        value = b.op("softmax", x=b.op("transpose", x=value, perm=[1, 0]), axis=1)
    return b.finish((b.op("add", x=value, y=x),))


def test_a_chain_of_values_takes_two_blocks() -> None:
    plan = prepare(chain(12), make_context("m4", threads=1))
    assert len(plan.shared) == 2
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    (own,) = [
        prepare(showing_all(chain(12)), make_context("m4", threads=1)).run({"x": x})[plan.results[0].name]
    ]
    assert np.array_equal(*plan.run({"x": x}).values(), own)


def test_a_value_lives_as_long_as_its_views_and_concatenations() -> None:
    b = Builder()
    x = b.input("x", TensorType("fp16", (4, 8)))
    early = b.op("softmax", x=x, axis=1)
    view = b.op("reshape", x=early, shape=[8, 4])
    later = b.op("softmax", x=b.op("softmax", x=x, axis=0), axis=0)
    joined = b.op("concat", values=(view, view), axis=1, interleave=False)  # [8, 8]
    product = b.op("matmul", x=joined, y=later, transpose_x=True, transpose_y=True)
    function = b.finish((product,))
    entries = schedule(function)
    last = last_uses(function, entries, {})
    position = {value.name: i for i, entry in enumerate(entries) for op in entry.ops for value in op.results}
    assert last[early.name] == last[joined.name] == position[product.name]
    assert last[product.name] == len(entries)


def test_a_pool_gives_blocks_of_a_fitting_size_only() -> None:
    pool = Pool({"a": 0, "b": 1, "c": 2, "end": 9}, 9)
    first = pool.take("a", (100,), np.float32)
    assert not np.may_share_memory(first, pool.take("b", (100,), np.float32))  # a is still read
    pool.release(0)
    assert not np.may_share_memory(first, pool.take("c", (10,), np.float32))  # far smaller
    assert np.may_share_memory(first, pool.take("d", (80,), np.float32))
    assert not np.may_share_memory(first, pool.take("end", (80,), np.float32))
    assert len(pool.blocks()) == 3
