"""What follows a sum, and its partial sums beyond fp16's range."""

from __future__ import annotations

import numpy as np
import pytest

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType
from ane_trainer.ane.simulator import make_context, prepare
from ane_trainer.ane.verify.profiling import profile

ROWS = (np.linspace(3000, 20000, 8)[:, None] * np.ones(16)).astype(np.float16)  # totals from 48000 to 320000
INF = np.float16(np.inf)


def function(make, shape=ROWS.shape):
    b = Builder()
    found = make(b, b.input("x", TensorType("fp16", shape)))
    return b.finish(found if isinstance(found, tuple) else (found,))


def run(make, x=ROWS, fidelity="exact"):
    plan = prepare(function(make, x.shape), make_context("m5", fidelity, threads=1))
    return list(plan.run({"x": x}).values())


def total(b, x, kind="reduce_sum"):
    return b.op(kind, x=x, axes=[1], keep_dims=True)


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
@pytest.mark.parametrize("left", [False, True])
def test_a_number_meets_the_total_before_it_is_rounded(fidelity, left):
    def make(b, x):
        found = total(b, x)
        return b.op("mul", x=0.0625, y=found) if left else b.op("mul", x=found, y=0.0625)

    (got,) = run(make, fidelity=fidelity)
    assert np.array_equal(got, (ROWS.astype(np.float64).sum(1, keepdims=True) / 16).astype(np.float16))


def _read_twice(b, x):
    found = total(b, x)
    return b.op("maximum", x=b.op("mul", x=found, y=0.0625), y=b.op("mul", x=found, y=0.5))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(total, np.inf, id="alone"),
        pytest.param(_read_twice, 32768, id="read twice"),
        pytest.param(
            lambda b, x: b.op("mul", x=total(b, x), y=b.op("slice_by_size", x=x, begin=[0, 0], size=[8, 1])),
            np.inf,
            id="times a tensor",
        ),
        pytest.param(lambda b, x: b.op("add", x=total(b, x), y=-60000.0), 65536 - 60000, id="plus a number"),
    ],
)
def test_a_total_that_is_not_folded_counts_as_65536(make, expected):
    (got,) = run(make)
    beyond = ROWS.astype(np.float64).sum(1) > 65520
    assert 0 < beyond.sum() < len(beyond)
    assert (got[beyond] == expected).all()


def test_partial_sums_have_eleven_bits_and_no_limit():
    x = np.array([[60000, 60000, -60000, -60000], [40000, 40000, 40000, -60000]], np.float16)
    (got,) = run(total, x)
    exact = x.astype(np.float64).sum(1)
    assert got[0, 0] == exact[0] == 0
    assert got[1, 0] == np.float16(exact[1])
    ones = np.concatenate([[4096], np.ones(1024)]).astype(np.float16)[None]
    assert run(total, ones)[0][0, 0] == 5116  # M1, ANE guide chapter 3


def test_the_sum_itself_is_shown_too_where_a_profile_asks():
    shown = profile(
        Program((function(lambda b, x: b.op("mul", x=total(b, x), y=0.0625)),)), {"x": ROWS}, chip="m5"
    )
    first, second = shown.ops
    assert (first.kind, second.kind) == ("reduce_sum", "mul")
    assert first.overflows > 0
    assert second.high == 20000
    assert shown.outputs[0].infinities == 0


@pytest.mark.parametrize(("channels", "size"), [(640, 64), (512, 128)])
def test_group_norm_at_the_sizes_of_stable_diffusion(channels, size):
    """As ANEForge 0.4.0 writes it; right to 0.03 on M5 (its device tests), with sums of squares up to 262144."""
    depth, positions = channels // 32, size * size
    inverse = float(np.float16(1 / (depth * positions)))

    def mean(b, x):
        rows = b.op("reduce_sum", x=x, axes=[3], keep_dims=True)
        return b.op("mul", x=b.op("reduce_sum", x=rows, axes=[2], keep_dims=True), y=inverse)

    def make(b, x):
        centred = b.op("sub", x=x, y=mean(b, x))
        variance = mean(b, b.op("mul", x=centred, y=centred))
        root = b.op("rsqrt", x=b.op("add", x=variance, y=1e-5), epsilon=0.0)
        return b.op("mul", x=b.op("mul", x=centred, y=root), y=2.25)

    x = np.random.default_rng(0).standard_normal((1, 32, depth, positions)).astype(np.float16)
    (got,) = run(make, x)
    wide = x.astype(np.float64)
    wide -= wide.mean((2, 3), keepdims=True)
    expected = 2.25 * wide / np.sqrt(np.square(wide).mean((2, 3), keepdims=True) + 1e-5)
    assert np.abs(got - expected).max() < 0.03
