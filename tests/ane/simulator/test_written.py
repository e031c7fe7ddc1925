"""Ops in their in-place form, compiled as loops, give the bits of their NumPy definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_trainer.ane.mil.opset import Builder, bind
from ane_trainer.ane.mil.program import TensorType
from ane_trainer.ane.simulator import KERNELS, make_context, prepare
from ane_trainer.ane.simulator.kernels import convolution, resampling, resize
from ane_trainer.ane.simulator.loops.compiled import Pass, total_for
from ane_trainer.ane.simulator.numbers.fp16 import decode, encode, round_half_away
from ane_trainer.ane.simulator.registry import WRITES
from tests.ane.simulator.mac.reference import mac_matmul_reference

REDUCTIONS = [kind for kind in WRITES if kind.startswith("reduce_")]


def by_kernel_and_in_place(kind, x, threads, **arguments):
    """The op's result by its NumPy kernel and by its written form."""
    b = Builder()
    value = b.input("x", TensorType("fp16", x.shape))
    result = b.op(kind, x=value, **arguments)
    (op,) = b.finish((result,)).ops
    call, context = bind(op.kind, dict(op.args)), make_context("m4", threads=threads)
    out = np.empty(result.type.shape, np.float32)
    WRITES[kind](context, call, [out], x)()
    return np.asarray(KERNELS[kind].run(context, call, x)).reshape(out.shape), out


@st.composite
def arrays(draw, least=1):
    """Decoded fp16 of any rank up to 4 in any memory order, ordinary numbers or any patterns."""
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=least, max_size=4)))
    while np.prod(shape) > 20_000:
        shape = tuple(max(1, n // 2) for n in shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        x = decode(rng.integers(0, 1 << 16, shape, dtype=np.uint16))
    else:
        x = decode(rng.standard_normal(shape).astype(np.float16))
    order = draw(st.permutations(range(x.ndim)))
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


@given(x=arrays(), data=st.data(), threads=st.sampled_from([1, 2]))
@settings(max_examples=30, deadline=None)
def test_reductions(x, data, threads):
    kind = data.draw(st.sampled_from(REDUCTIONS))
    axes = data.draw(st.lists(st.integers(0, x.ndim - 1), min_size=1, unique=True))
    kept = data.draw(st.booleans())
    want, got = by_kernel_and_in_place(kind, x, threads, axes=axes, keep_dims=kept)
    assert np.array_equal(want, got)


@given(x=arrays(), data=st.data())
@settings(max_examples=20, deadline=None)
def test_softmax(x, data):
    want, got = by_kernel_and_in_place("softmax", x, 1, axis=data.draw(st.integers(-x.ndim, x.ndim - 1)))
    assert np.array_equal(want, got)


@given(x=arrays(least=3), data=st.data())
@settings(max_examples=20, deadline=None)
def test_normalisations(x, data):
    kind = data.draw(st.sampled_from(["layer_norm", "instance_norm", "l2_norm"]))
    arguments = {"epsilon": data.draw(st.sampled_from([1e-5, 1e-2]))}
    if kind == "layer_norm":
        arguments["axes"] = [x.ndim - 1]
    if kind != "l2_norm" and data.draw(st.booleans()):
        channels = x.shape[-1 if kind == "layer_norm" else 1]
        arguments |= dict.fromkeys(["gamma", "beta"], np.linspace(-1, 2, channels).tolist())
    want, got = by_kernel_and_in_place(kind, x, 1, **arguments)
    assert np.array_equal(want, got)


@given(x=arrays(least=3), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_batch_norm_rounds_once_in_a_fused_loop(x, seed):
    rng = np.random.default_rng(seed)
    b = Builder()
    value = b.input("x", TensorType("fp16", x.shape))
    line = {n: rng.standard_normal(x.shape[1]).tolist() for n in ("mean", "gamma", "beta")}
    spread = rng.uniform(1e-3, 4, x.shape[1]).tolist()
    function = b.finish((b.op("batch_norm", x=value, variance=spread, epsilon=1e-5, **line),))
    context, (op,) = make_context("m4", threads=1), function.ops
    (got,) = prepare(function, context).run({"x": encode(x)}).values()
    want = encode(KERNELS["batch_norm"].run(context, bind(op.kind, dict(op.args)), x))
    assert np.array_equal(want.view(np.uint16), got.view(np.uint16))


@pytest.mark.parametrize("mask", [None, "bool", "fp16"])
def test_attention_is_its_products_and_a_softmax(mask):
    rng, context = np.random.default_rng(0), make_context("m4", threads=1)
    q, k, v = (decode(rng.standard_normal((2, 3, 20, 8)).astype(np.float16)) for _ in range(3))
    b = Builder()
    names = [b.input(n, TensorType("fp16", q.shape)) for n in "qkv"]
    feeds = {"q": encode(q), "k": encode(k), "v": encode(v)}
    extra = {}
    if mask:
        extra["attn_mask"] = b.input("m", TensorType(mask, (20, 20)))
        feeds["m"] = rng.random((20, 20)) > 0.3 if mask == "bool" else rng.random((20, 20)).astype(np.float16)
    whole = b.op("scaled_dot_product_attention", query=names[0], key=names[1], value=names[2], **extra)
    scores = b.op("matmul", x=names[0], y=names[1], transpose_y=True)
    scores = b.op("mul", x=scores, y=float(np.float16(1 / np.sqrt(8))))
    if mask == "fp16":
        scores = b.op("add", x=scores, y=extra["attn_mask"])
    elif mask:
        full = b.op("tile", x=b.op("expand_dims", x=extra["attn_mask"], axes=[0, 1]), reps=[2, 3, 1, 1])
        low = b.op("sub", x=b.op("mul", x=scores, y=0.0), y=float("inf"))
        scores = b.op("select", cond=full, a=scores, b=low)
    parts = b.op("matmul", x=b.op("softmax", x=scores, axis=-1), y=names[2])
    one, other = prepare(b.finish((whole, parts)), context).run(feeds).values()
    assert np.array_equal(one.view(np.uint16), other.view(np.uint16))


def test_a_total_over_every_element_and_one_over_none():
    x = decode(np.arange(1, 1 + 3 * 70, dtype=np.float16).reshape(3, 70))
    for axes in ((0, 1), (0,), (1,)):
        ctx = make_context("m4", threads=2)
        total, work = total_for(ctx, x, axes), Pass(ctx)
        work.fold("sum", work.load(x), total)()
        assert np.array_equal(total, x.sum(axis=axes, keepdims=True, dtype=np.float64)), axes


@given(
    x=arrays(least=2), height=st.integers(1, 40), width=st.integers(1, 40), threads=st.sampled_from([1, 2])
)
@settings(max_examples=20, deadline=None)
def test_interpolation_along_both_axes_is_that_along_one_and_the_other(x, height, width, threads):
    places = {-2: resize.positions("UNALIGN_CORNERS", x.shape[-2], height)}
    places[-1] = resize.positions("UNALIGN_CORNERS", x.shape[-1], width)
    wide = x.astype(np.float64)
    for axis, at in places.items():
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        part = (at - low)[:, None] if axis == -2 else at - low
        wide = np.take(wide, low, axis) * (1 - part) + np.take(wide, high, axis) * part
    out = np.empty(wide.shape, np.float32)
    resampling.interpolation(np.ascontiguousarray(x), places[-2], places[-1], out, threads)()
    assert np.array_equal(round_half_away(wide), out)


@given(x=arrays(least=4), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_transposed_convolution_is_a_convolution_of_the_spread_image(x, seed):
    rng = np.random.default_rng(seed)
    x = np.ascontiguousarray(x[:2, :4, :9, :9])
    strides, kernel, cut = (tuple(rng.integers(low, 4, 2)) for low in (1, 1, 0))
    weight = decode(rng.standard_normal((x.shape[1], 3, *kernel)).astype(np.float16))
    extents = [
        (n - 1) * s + k - 2 * min(c, k - 1)
        for n, s, k, c in zip(x.shape[2:], strides, kernel, cut, strict=True)
    ]
    if min(extents) < 1:
        return
    b, context = Builder(), make_context("m4", threads=1)
    names = [b.input("x", TensorType("fp16", x.shape)), b.input("w", TensorType("fp16", weight.shape))]
    cut = [min(c, k - 1) for c, k in zip(cut, kernel, strict=True)]
    pad = [int(cut[0])] * 2 + [int(cut[1])] * 2
    y = b.op("conv_transpose", x=names[0], weight=names[1], strides=[int(s) for s in strides],
             pad_type="custom", pad=pad)  # fmt: skip
    (got,) = prepare(b.finish((y,)), context).run({"x": encode(x), "w": encode(weight)}).values()
    spread = np.zeros(
        (*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True))), np.float32
    )
    spread[:, :, :: strides[0], :: strides[1]] = x
    around = [(k - 1 - c, k - 1 - c) for k, c in zip(kernel, cut, strict=True)]
    spread = np.ascontiguousarray(np.pad(spread, ((0, 0), (0, 0), *around)))
    mirrored = np.ascontiguousarray(weight[:, :, ::-1, ::-1].swapaxes(0, 1))
    geometry = convolution.ConvGeometry((1, 1), (1, 1), ((0, 0), (0, 0)), 1)
    want = np.empty(got.shape, np.float32)
    convolution.convolve_into(context, geometry, spread, mirrored, None, want)()
    assert np.array_equal(encode(want).view(np.uint16), got.view(np.uint16))


@given(
    seed=st.integers(0, 2**32 - 1),
    wild=st.booleans(),
    size=st.sampled_from([0.01, 1, 120]),
    channels=st.sampled_from([(2, 2), (3, 6)]),
    bias=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_depthwise_convolution_follows_the_law_of_the_accumulator(seed, wild, size, channels, bias):
    rng = np.random.default_rng(seed)
    kernel, image = rng.integers(1, 4, 2), rng.integers(4, 40, 2)
    strides, pad = tuple(int(s) for s in rng.integers(1, 3, 2)), [int(p) for p in rng.integers(0, 2, 4)]

    def numbers(*shape):
        if wild:
            return decode(rng.integers(0, 1 << 16, shape, dtype=np.uint16))
        return round_half_away(size * rng.standard_normal(shape))

    x, weight = numbers(2, channels[0], *image), numbers(channels[1], 1, *kernel)
    start = numbers(channels[1]) if bias else None
    places = tuple((pad[i], pad[i + 1]) for i in (0, 2))
    geometry = convolution.ConvGeometry(strides, (1, 1), places, channels[0])
    padded = np.pad(x, ((0, 0), (0, 0), *places))
    taps = convolution.windows(padded, tuple(kernel), strides, (1, 1))
    out = np.empty((2, channels[1], *taps.shape[2:4]), np.float32)
    convolution.convolve_into(make_context("m4", threads=1), geometry, x, weight, start, out)()
    for o in range(channels[1]):
        columns = taps[:, o * channels[0] // channels[1]].reshape(-1, int(np.prod(kernel)))
        first = None if start is None else start[o]
        want = mac_matmul_reference(columns, weight[o].reshape(-1, 1), first)
        assert np.array_equal(out[:, o].reshape(-1, 1).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_totals_do_not_depend_on_threads(axes):
    x = decode(np.random.default_rng(0).standard_normal((301, 407)).astype(np.float16))
    results = []
    for threads in (1, 2):
        for view in (x, np.asfortranarray(x)):
            ctx = make_context("m4", threads=threads)
            total, work = total_for(ctx, view, axes), Pass(ctx)
            work.fold("sum_square", work.load(view), total)()
            results.append(total)
    assert np.allclose(results[0], np.square(x.astype(np.float64)).sum(axis=axes, keepdims=True), rtol=1e-14)
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(results[1], results[3])
