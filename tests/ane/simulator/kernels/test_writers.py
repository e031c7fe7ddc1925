"""Ops written into fused loops give, for every pattern, the bits of their NumPy kernels; fast mode's quotients."""

import numpy as np
import pytest

from ane_trainer.ane.mil.opset import Builder, bind
from ane_trainer.ane.mil.program import TensorType
from ane_trainer.ane.simulator import KERNELS, make_context, prepare
from ane_trainer.ane.simulator.kernels.fused import Compiler
from ane_trainer.ane.simulator.numbers.fp16 import decode, encode, round_half_away

PATTERNS = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(1, 4, -1)
LINE = {"alpha": -0.3, "beta": 0.7}
CHANNELS = {"alpha": [0.25, -1.5, 3.0, 1.0], "beta": [0.1, 1.0, -2.0, 5.0]}

CASES = [
    ("sign", {}), ("floor", {}), ("ceil", {}), ("round", {}), ("relu6", {}), ("clip", LINE),
    ("threshold", {"alpha": 0.3}), ("thresholded_relu", {"alpha": 0.3}), ("leaky_relu", {"alpha": 0.01}),
    ("leaky_relu", {"alpha": 3.0}),
    ("prelu", {"alpha": CHANNELS["alpha"]}), ("clamped_relu", LINE), ("linear_activation", LINE),
    ("sigmoid_hard", LINE), ("softplus_parametric", CHANNELS), ("inverse", {"epsilon": 1e-3}), ("tan", {}),
]  # fmt: skip


def by_plan_and_by_kernel(kind, arrays, fidelity="exact", **arguments):
    """The op's result in a plan and from its kernel, as patterns."""
    b, context = Builder(), make_context("m4", fidelity, threads=1)
    inputs = [b.input(f"x{i}", TensorType("fp16", a.shape)) for i, a in enumerate(arrays)]
    function = b.finish((b.op(kind, **dict(zip(("x", "y"), inputs, strict=False)), **arguments),))
    (found,) = prepare(function, context).run({f"x{i}": a for i, a in enumerate(arrays)}).values()
    call = bind(kind, dict(function.ops[0].args))
    expected = KERNELS[kind].run(context, call, *(decode(a) for a in arrays))
    return found.view(np.uint16), encode(np.ascontiguousarray(expected)).view(np.uint16)


@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_every_pattern(kind, arguments):
    found, expected = by_plan_and_by_kernel(kind, [PATTERNS], **arguments)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", ["pow", "real_div", "floor_div"])
def test_two_operands(kind):
    rng = np.random.default_rng(0)
    x, y = (rng.permutation(PATTERNS.reshape(-1)) for _ in range(2))
    y[:20_000] = rng.integers(-5, 6, 20_000)
    found, expected = by_plan_and_by_kernel(kind, [x, y])
    assert np.array_equal(found, expected)


def test_fast_quotients_are_rounded_once_and_keep_the_limit():
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal(50_000).astype(np.float16) for _ in range(2))
    y[:4] = 0.0, -0.0, 2.0**-24, -(2.0**-20)
    found, exact = (decode(v).astype(np.float64) for v in by_plan_and_by_kernel("real_div", [x, y], "fast"))
    assert np.array_equal(found[:4], exact[:4])  # an inverse is no more than 65536
    quotient = round_half_away(x.astype(np.float64) / np.where(y, y, 1)).astype(np.float64)
    normal = (np.abs(quotient) > 2.0**-14) & (np.abs(y) > 2.0**-16)
    assert np.abs(found / np.where(normal, quotient, 1) - 1)[normal].max() <= 2.0**-10
    assert np.abs(found / np.where(normal, exact, 1) - 1)[normal].max() < 0.002  # the table's own distance


def test_constants_of_0_and_minus_0_are_two():
    """One constant for both once gave the second product the first's sign."""
    x = np.array([1.0, -2.0, 3.0], np.float16)

    def run(*factors):
        b = Builder()
        value = b.input("x", TensorType("fp16", (3,)))
        results = tuple(b.op("mul", x=value, y=f) for f in factors)
        found = prepare(b.finish(results), make_context("m4", threads=1)).run({"x": x})
        return [found[r.name].view(np.uint16).tolist() for r in results]

    assert run(0.0, -0.0) == run(0.0) + run(-0.0)
    assert run(0.0) != run(-0.0)


def test_equal_chains_share_their_table():
    b = Builder()
    inputs = [b.input(name, TensorType("fp16", (64,))) for name in ("x", "y", "z")]
    compiler, loops = Compiler(make_context("m4", threads=1)), []
    for value, factor in zip(inputs, (3.0, 3.0, 5.0), strict=True):
        before = len(b._ops)
        result = b.op("mul", x=b.op("tanh", x=b.op("sigmoid", x=value)), y=factor)
        arrays = {each.name: np.zeros(64, np.float32) for each in (value, result)}
        loops.append(compiler.add(b._ops[before:], [result], lambda argument, a=arrays: a[argument.name]))
    tables = [[array for array in loop.memory if array.size == 1 << 16] for loop in loops]
    assert [len(each) for each in tables] == [1, 1, 1]
    assert tables[0][0] is tables[1][0]
    assert not np.array_equal(tables[0][0], tables[2][0])
