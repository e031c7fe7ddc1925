"""Loops on several threads, in chains, in strips and in a forked child give what one plain loop gives."""

import subprocess
import sys

import numpy as np
import pytest

from ane_trainer.ane.mil.opset import Builder, bind
from ane_trainer.ane.mil.program import TensorType
from ane_trainer.ane.simulator import KERNELS, make_context, prepare
from ane_trainer.ane.simulator.loops.compiled import Chain, Pass, Row, copies, extreme_for, in_rows, in_turn
from ane_trainer.ane.simulator.loops.nest import Nest, in_strips
from ane_trainer.ane.simulator.numbers.fp16 import decode, round_half_away

ROWS = (64, 32, 64)


def results(kind, x, fidelity="exact", threads=1, **arguments):
    """An op's result in a plan."""
    b = Builder()
    function = b.finish((b.op(kind, x=b.input("x", TensorType("fp16", x.shape)), **arguments),))
    plan = prepare(function, make_context("m4", fidelity, threads=threads))
    (found,) = plan.run({"x": x}).values()
    return plan, found


def drawn(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_softmax_is_the_same_on_two_threads(axis, fidelity):
    x = drawn(ROWS)
    one, two = (results("softmax", x, fidelity, threads, axis=axis)[1] for threads in (1, 2))
    assert np.array_equal(one.view(np.uint16), two.view(np.uint16))
    assert np.allclose(one.astype(np.float64).sum(axis), 1, atol=0.01)


@pytest.mark.parametrize(("axes", "chained"), [([2], True), ([1, 2], True), ([0], False), ([0, 1, 2], False)])
def test_norms_are_chains_where_the_outermost_axes_are_kept(axes, chained):
    x = drawn(ROWS, 1)
    plan, found = results("layer_norm", x, axes=axes, epsilon=1e-5)
    assert isinstance(plan.steps[0], Chain) == chained
    wide = x.astype(np.float64)
    centred = wide - wide.mean(tuple(axes), keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(tuple(axes), keepdims=True) + 1e-5)
    assert np.abs(found - expected).max() < 0.01


def test_square_matrices_are_no_chain_along_different_axes():
    x = drawn((96, 96), 2)
    _, found = results("softmax", x, axis=0)
    context = make_context("m4")
    b = Builder()
    (op,) = b.finish((b.op("softmax", x=b.input("x", TensorType("fp16", x.shape)), axis=0),)).ops
    expected = KERNELS["softmax"].run(context, bind(op.kind, dict(op.args)), decode(x))
    assert np.array_equal(decode(found), expected)


@pytest.mark.parametrize("kind", ["reduce_sum", "reduce_max", "reduce_l2_norm"])
@pytest.mark.parametrize("axes", [[0], [0, 1], [0, 1, 2]])
def test_few_totals_are_gathered_in_parts(kind, axes):
    x = (0.1 * drawn((2048, 2, 16), 3)).astype(np.float16)
    one, two = (results(kind, x, "fast", threads, axes=axes)[1].astype(np.float64) for threads in (1, 2))
    assert np.allclose(one, two, rtol=2.0**-10, atol=2.0**-10)


def test_few_long_columns_go_in_vectors():
    """A chain once took them one by one, fifteen times as slow."""
    x = (0.1 * drawn((4096, 16), 4)).astype(np.float16)
    plan, found = results("reduce_mean", x, "fast", axes=[0])
    (step,) = plan.steps
    assert isinstance(step, Chain)
    assert step.block >= x.shape[1]
    assert np.allclose(found.reshape(-1), x.astype(np.float64).mean(0), rtol=2.0**-9, atol=2.0**-11)


@pytest.mark.parametrize("threads", [1, 2])
def test_loops_in_a_row_are_one_call(threads):
    calls = []
    source = np.random.default_rng(5).standard_normal((3, 256, 300)).astype(np.float32)
    targets = [np.empty_like(source) for _ in range(3)]
    first, second, third = (
        copies([(a, b)], threads) for a, b in zip(targets, (source, *targets[:2]), strict=True)
    )
    row, between, alone = in_rows([first, in_turn(second), lambda: calls.append(1), third])
    assert isinstance(row, Row)
    for step in (row, between, alone):
        step()
    assert calls == [1]
    assert all(np.array_equal(target, source) for target in targets)


def test_strips_take_every_element_once():
    flat = Nest((40, 64), ((1, 40), (64, 1)))
    assert in_strips(flat) == Nest((8, 40, 8), ((320, 1, 40), (8, 64, 1)))
    assert in_strips(Nest((40, 63), ((1, 40), (63, 1)))).extents == (40, 63)
    source = np.random.default_rng(4).standard_normal((64, 3, 40)).astype(np.float32)
    target = np.empty((40, 3, 64), np.float32)
    copies([(target, source.T)], 2)()
    assert np.array_equal(target, source.T)


def test_numbers_of_other_sizes_are_copied_too():
    for dtype in (np.int32, np.int8, np.bool_):
        source = np.random.default_rng(5).integers(0, 2, (5, 7)).astype(dtype)
        target = np.empty((7, 5), dtype)
        copies([(target, source.T)], 1)()
        assert np.array_equal(target, source.T)


def test_a_total_over_a_count_is_rounded_once():
    rng = np.random.default_rng(6)
    totals = np.concatenate(
        [rng.standard_normal(5000) * 10.0 ** rng.uniform(-9, 9, 5000), [0.0, -0.0, 2049, 1e300]]
    )
    for count in (1.0, 3.0, 1000.0):
        out, work = extreme_for(totals, ()), Pass(make_context("m4", threads=1))
        work.store(work.total(totals, count), out)()
        assert np.array_equal(out.view(np.uint32), round_half_away(totals / count).view(np.uint32))


FORKED = """
import os, numpy as np, torch
from ane_trainer.ane.mil.program import TensorType
from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.simulator import make_context, prepare
b = Builder()
x = b.input("x", TensorType("fp16", (512, 512)))
plan = prepare(b.finish((b.op("add", x=x, y=1.0),)), make_context("m4", threads=2))
feeds = {"x": np.ones((512, 512), np.float16)}
(before,) = plan.run(feeds).values()
child = os.fork()
if child == 0:
    (after,) = plan.run(feeds).values()
    os._exit(0 if np.array_equal(before, after) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork")
def test_a_forked_child_has_threads_of_its_own():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=120)
