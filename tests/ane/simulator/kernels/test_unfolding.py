"""Windows that are read where they lie give the products that the columns in memory give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.mil.opset import Builder
from ane_trainer.ane.mil.program import Program, TensorType
from ane_trainer.ane.simulator import make_context, prepare
from ane_trainer.ane.simulator.kernels import unfolding
from ane_trainer.ane.simulator.kernels.unfolding import Unfolded, joined, plain
from ane_trainer.ane.simulator.numbers.fp16 import decode
from ane_trainer.ane.simulator.schedule import lazy_values
from ane_trainer.ane.verify.profiling import profile
from tests.ane.simulator.mac.reference import mac_matmul_reference

N, SIZE, CHANNELS, OUT = 2, 9, 3, 4


def columns(b, x, kernel, stride, dilation, backwards=False):
    """As a convolution is lowered: slices and a concatenation for each axis, from the last."""
    extents = list(x.type.shape)
    for axis in (2, 1):
        count = (extents[axis] - (kernel - 1) * dilation - 1) // stride + 1
        parts = []
        for t in reversed(range(kernel)) if backwards else range(kernel):
            begin = [t * dilation if i == axis else 0 for i in range(4)]
            span = (count - 1) * stride + 1
            end = [begin[i] + span if i == axis else extents[i] for i in range(4)]
            steps = [stride if i == axis else 1 for i in range(4)]
            parts.append(b.op("slice_by_index", x=x, begin=begin, end=end, stride=steps))
        x = b.op("concat", values=tuple(parts), axis=3, interleave=False)
        extents = list(x.type.shape)
    return x


def program(kernel, stride, dilation, backwards, gradient, shown):
    """Padded image, columns, product with a matrix; `shown`: the columns are an output too."""
    b = Builder()
    x = b.input("x", TensorType("fp16", (N, SIZE, SIZE, CHANNELS)))
    padded = b.op("pad", x=x, pad=[0, 0, 1, 1, 1, 1, 0, 0], mode="constant", constant_val=0.0)
    found = columns(b, padded, kernel, stride, dilation, backwards)
    *lead, k = found.type.shape
    rows = int(np.prod(lead))
    matrix = b.op("reshape", x=found, shape=[rows, k])
    w = b.input("w", TensorType("fp16", (rows if gradient else k, OUT)))
    y = b.op("matmul", x=matrix, y=w, transpose_x=gradient, transpose_y=False)
    return b.finish((y, found) if shown else (y,))


def fed(function, scale):
    rng = np.random.default_rng(0)
    return {v.name: (scale * rng.standard_normal(v.type.shape)).astype(np.float16) for v in function.inputs}


def unfolded_image(x, kernel, stride, dilation, backwards):
    """The columns by torch: `[rows, kernel, kernel, C]`."""
    image = torch.from_numpy(np.pad(x.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))).permute(
        0, 3, 1, 2
    )
    cols = torch.nn.functional.unfold(image, kernel, dilation=dilation, stride=stride)
    cols = cols.reshape(N, CHANNELS, kernel, kernel, -1).permute(0, 4, 2, 3, 1)
    cols = cols.flip(2, 3) if backwards else cols
    return cols.reshape(-1, kernel * kernel * CHANNELS).numpy()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "backwards"),
    [(3, 1, 1, False), (3, 2, 1, False), (2, 1, 3, False), (3, 1, 1, True), (3, 3, 2, True)],
)
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_products_of_windows(monkeypatch, kernel, stride, dilation, backwards, gradient, scale):
    function = program(kernel, stride, dilation, backwards, gradient, False)
    feeds = fed(function, scale)
    cols = unfolded_image(feeds["x"], kernel, stride, dilation, backwards)
    left, w = (cols.T if gradient else cols), feeds["w"].astype(np.float32)
    plan = prepare(function, make_context("m4", threads=2))
    assert not any(op.kind == "concat" and op.result.name in plan.buffers for op in function.ops)
    for _ in range(2):
        (got,) = plan.run(feeds).values()
    assert np.array_equal(decode(got), mac_matmul_reference(left, w))
    exact = left.astype(np.float64) @ w.astype(np.float64)
    kept = np.abs(exact) < 32000
    for few in (0, unfolding._FEW_COLUMNS):  # as a convolution, and with columns in memory
        monkeypatch.setattr(unfolding, "_FEW_COLUMNS", few)
        (fast,) = prepare(function, make_context("m4", "fast", threads=2)).run(feeds).values()
        assert np.allclose(fast[kept].astype(np.float64), exact[kept], rtol=2e-3, atol=1e-2 * scale**2)
        assert np.isinf(fast[np.abs(exact) > 33000]).all()


def by_channel(kernel, stride, backwards, gradient):
    """Padded image, its columns channel by channel, as a depthwise convolution is lowered."""
    channels, b = 8, Builder()
    x = b.input("x", TensorType("fp16", (N, SIZE, SIZE, channels)))
    padded = b.op("pad", x=x, pad=[0, 0, 1, 1, 1, 1, 0, 0], mode="constant", constant_val=0.0)
    found = columns(b, padded, kernel, stride, 1, backwards)
    rows = int(np.prod(found.type.shape[:3]))
    shaped = b.op("reshape", x=found, shape=[rows, kernel * kernel, channels])
    matrix = b.op("transpose", x=shaped, perm=[2, 1, 0] if gradient else [2, 0, 1])
    w = b.input("w", TensorType("fp16", (channels, rows if gradient else kernel * kernel, 1)))
    return b.finish((b.op("matmul", x=matrix, y=w, transpose_x=False, transpose_y=False),))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "backwards"), [(3, 1, False), (3, 2, True), (2, 3, False)])
def test_windows_of_each_channel(monkeypatch, kernel, stride, backwards, gradient):
    function = by_channel(kernel, stride, backwards, gradient)
    feeds = fed(function, 1.0)
    (expected,) = prepare(function, make_context("m4", "fast")).run(feeds).values()
    monkeypatch.setattr(unfolding, "_SMALL_CHANNELS", 0)
    plan = prepare(function, make_context("m4", "fast"))
    assert not any(op.kind == "concat" and op.result.name in plan.buffers for op in function.ops)
    for _ in range(2):
        (got,) = plan.run(feeds).values()
    assert np.allclose(got.astype(np.float64), expected.astype(np.float64), rtol=2.0**-10, atol=2.0**-12)


def test_columns_that_someone_else_reads_are_in_memory():
    function = program(3, 1, 1, False, False, True)
    feeds = fed(function, 1.0)
    y, shown = prepare(function, make_context("m4")).run(feeds).values()
    assert np.array_equal(shown.reshape(len(y), -1), unfolded_image(feeds["x"], 3, 1, 1, False))
    plain_form = program(3, 1, 1, False, False, False)
    assert {op.result.name for op in plain_form.ops if op.kind == "concat"} <= lazy_values(plain_form)
    (other,) = prepare(plain_form, make_context("m4")).run(feeds).values()
    assert np.array_equal(y, other)
    assert profile(Program((plain_form,)), feeds).outputs[0].distance.relative < 1e-2


def test_a_state_is_not_read_after_it_has_changed():
    """Windows of an input that the step overwrites are put into memory first."""
    b = Builder()
    x = b.input("x", TensorType("fp16", (8, 4)))
    parts = tuple(b.op("slice_by_size", x=x, begin=[t, 0], size=[6, 4]) for t in range(3))
    cols = b.op("concat", values=parts, axis=1, interleave=False)
    new = b.op("add", x=x, y=1.0)
    w = b.op("reshape", x=new, shape=[4, 8])
    w = b.op(
        "slice_by_size",
        x=b.op("concat", values=(w, w, w), axis=0, interleave=False),
        begin=[0, 0],
        size=[12, 8],
    )
    y = b.op("matmul", x=cols, y=w, transpose_x=False, transpose_y=False)
    function = b.finish((y, new))
    assert cols.name not in prepare(function, make_context("m4")).buffers
    plan = prepare(function, make_context("m4"), [(new.name, "x")])
    assert cols.name in plan.buffers
    start = np.arange(32, dtype=np.float16).reshape(8, 4) / 8
    plan.write("x", start)
    (got,) = plan.run({}).values()
    left = np.concatenate([start[t : t + 6] for t in range(3)], axis=1).astype(np.float32)
    right = np.concatenate([(start + 1).reshape(4, 8)] * 3).astype(np.float32)
    assert np.array_equal(got.astype(np.float32), mac_matmul_reference(left, right))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_reshapes_that_succeed_are_those_of_numpy(shape, data):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    order = data.draw(st.permutations(range(len(shape))))
    x = plain(array).transposed(order)
    left, wanted = int(array.size), []
    while left > 1:
        part = data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
        wanted.append(part)
        left //= part
    found = x.reshaped(wanted or [1])
    if found is not None:
        assert found.shape == tuple(wanted or [1])
        assert np.array_equal(found.dense(), array.transpose(order).reshape(wanted or [1]))


def test_parts_that_are_not_evenly_apart_are_no_windows():
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    even = joined([plain(x[t : t + 4]) for t in (0, 2, 4)], 1)
    assert isinstance(even, Unfolded)
    assert np.array_equal(even.dense(), np.concatenate([x[t : t + 4] for t in (0, 2, 4)], 1))
    assert joined([plain(x[t : t + 4]) for t in (0, 1, 4)], 1) is None
    assert joined([plain(x[:4]), plain(x[:4])], 1) is None
    assert joined([plain(x[:4]), plain(x[1:4])], 0) is None
