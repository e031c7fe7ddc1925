"""The programs of the suite: every op family, over all bit patterns where an op has one operand, and cliffs.

The suite is versioned: reports of one version hold the same programs and inputs. Change `VERSION` with any
case. Ops that the e5rt path refuses are not in it (`chips.op_status`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ane_trainer.ane.mil.program import Value, literal
from ane_trainer.ane.mil.weights import from_array
from ane_trainer.commands.conformance.case import Build, Case, Sheet

VERSION = 2

_UNARY = (
    "abs sign square floor ceil round sigmoid tanh erf silu sqrt exp2 sin cos atan rsqrt inverse log exp "
    "softplus softsign relu relu6"
).split()
_ACTIVATIONS: dict[str, dict[str, object]] = {
    "elu": {"alpha": 0.5}, "leaky_relu": {"alpha": 0.25}, "thresholded_relu": {"alpha": 0.5},
    "threshold": {"alpha": 0.5}, "clip": {"alpha": -0.5, "beta": 2.0},
    "clamped_relu": {"alpha": 0.25, "beta": 6.0}, "linear_activation": {"alpha": 0.3, "beta": 0.7},
    "scaled_tanh": {"alpha": 1.7, "beta": 0.6}, "sigmoid_hard": {"alpha": 0.2, "beta": 0.5},
}  # fmt: skip
_BINARY = "add sub mul maximum minimum real_div floor_div pow".split()
_COMPARISONS = "equal not_equal greater greater_equal less less_equal".split()
_REDUCTIONS = (
    "reduce_sum reduce_mean reduce_max reduce_min reduce_l1_norm reduce_l2_norm reduce_sum_square "
    "reduce_log_sum reduce_log_sum_exp"
).split()


def suite() -> tuple[Case, ...]:
    """Every case, in the order of a run; names are unique."""
    families = {
        "pointwise": _pointwise(), "reduction": _reduction(), "contraction": _contraction(),
        "convolution": _convolution(), "movement": _movement(), "pooling": _pooling(),
        "normalization": _normalization(), "resizing": _resizing(), "quantized": _quantized(),
        "cliff": _cliffs(), "sums": _sums(),
    }  # fmt: skip
    return tuple(Case(name, family, build) for family, cases in families.items() for name, build in cases)


Cases = Iterator[tuple[str, Build]]


def _call(kind: str, **params: object) -> Build:
    """The op over all bit patterns."""
    return lambda s: s.op(kind, x=s.patterns(), **params)


def _pair(kind: str) -> Build:
    return lambda s: s.op(kind, x=s.patterns(), y=s.patterns())


def _on(kind: str, *shape: int, **params: object) -> Build:
    """The op over numbers from -1 to 1."""
    return lambda s: s.op(kind, x=s.spread(*shape), **params)


def _moved(kind: str, *shape: int, **params: Any) -> Build:
    """The op over random bit patterns."""
    return lambda s: s.b.multi(kind, x=s.bits(*shape), **params)


def _pointwise() -> Cases:
    yield from ((kind, _call(kind)) for kind in _UNARY)
    yield from ((kind, _call(kind, **params)) for kind, params in _ACTIVATIONS.items())
    for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"):
        yield f"gelu {mode.lower()}", _call("gelu", mode=mode)
    for kind in ("rsqrt", "inverse", "log"):
        yield f"{kind} epsilon", _call(kind, epsilon=0.0078125)
    yield from ((kind, _pair(kind)) for kind in (*_BINARY, *_COMPARISONS))
    yield "prelu", lambda s: s.op("prelu", x=s.patterns(1, 4, 128, 128), alpha=s.weight(4))
    yield (
        "softplus_parametric",
        lambda s: s.op(
            "softplus_parametric", x=s.patterns(1, 4, 128, 128), alpha=s.positive(4), beta=s.positive(4)
        ),
    )
    yield (
        "select",
        lambda s: s.op(
            "select", cond=s.op("greater", x=s.bits(64, 64), y=0.0), a=s.bits(64, 64), b=s.bits(64, 64)
        ),
    )
    yield "logical_not", lambda s: s.op("logical_not", x=s.op("greater", x=s.bits(64, 64), y=0.0))
    yield "add broadcast", lambda s: s.op("add", x=s.bits(8, 1, 16), y=s.bits(4, 1))
    yield (
        "chain mul add",
        lambda s: s.op("add", x=s.op("mul", x=s.spread(64, 64), y=s.spread(64, 64)), y=s.spread(64, 64)),
    )
    yield (
        "chain square sqrt div",
        lambda s: s.op("real_div", x=s.spread(64, 64), y=s.op("sqrt", x=s.op("square", x=s.spread(64, 64)))),
    )


def _reduction() -> Cases:
    for kind in _REDUCTIONS:
        yield kind, _on(kind, 2, 4, 6, 8, axes=[1, -1], keep_dims=True)
        yield f"{kind} 512", _on(kind, 4, 512, axes=[-1], keep_dims=False)
    yield "reduce_sum rows", _on("reduce_sum", 128, 10, axes=[0], keep_dims=True)
    yield "softmax", _on("softmax", 64, 10, axis=-1)
    yield "softmax wide", lambda s: s.op("softmax", x=s.spread(16, 256, scale=8.0), axis=-1)


def _product(rows: int, inner: int, columns: int, scale: float = 1.0, **params: object) -> Build:
    return lambda s: s.op(
        "matmul", x=s.spread(rows, inner, scale=scale), y=s.spread(inner, columns, scale=scale), **params
    )


def _contraction() -> Cases:
    for inner in (4, 64, 512, 2048):
        yield f"matmul {inner}", _product(16, inner, 24)
        yield f"matmul small {inner}", _product(16, inner, 24, scale=2.0**-6)
    yield "matmul transposed", _product(24, 24, 24, transpose_x=True, transpose_y=True)
    yield "matmul batch", lambda s: s.op("matmul", x=s.spread(2, 3, 8, 16), y=s.spread(2, 3, 16, 8))
    yield "matmul weight", lambda s: s.op("matmul", x=s.spread(16, 64), y=s.weight(64, 32))
    yield "linear", lambda s: s.op("linear", x=s.spread(16, 64), weight=s.weight(32, 64), bias=s.weight(32))
    yield (
        "einsum",
        lambda s: s.op(
            "einsum", values=(s.spread(2, 3, 4, 5), s.spread(2, 5, 4, 6)), equation="nchw,nwhu->nchu"
        ),
    )
    yield (
        "scaled_dot_product_attention",
        lambda s: s.op(
            "scaled_dot_product_attention",
            query=s.spread(1, 4, 8, 16),
            key=s.spread(1, 4, 8, 16),
            value=s.spread(1, 4, 8, 16),
        ),
    )


def _conv(
    weight: tuple[int, ...], *shape: int, bias: bool = False, kind: str = "conv", **params: object
) -> Build:
    def build(s: Sheet) -> Value:
        start = s.weight(weight[0]) if bias else None
        return s.op(kind, x=s.spread(*shape), weight=s.weight(*weight), bias=start, **params)

    return build


def _convolution() -> Cases:
    image = (1, 16, 12, 12)
    yield "conv 1x1", _conv((32, 16, 1, 1), *image)
    yield "conv 3x3", _conv((16, 16, 3, 3), *image, pad_type="same")
    yield "conv 3x3 bias", _conv((16, 16, 3, 3), *image, bias=True, pad_type="same")
    yield "conv 3x3 stride", _conv((16, 16, 3, 3), *image, strides=[2, 2])
    yield "conv 3x3 dilated", _conv((16, 16, 3, 3), *image, dilations=[2, 2])
    yield "conv 5x5", _conv((8, 16, 5, 5), *image)
    yield "conv groups", _conv((16, 4, 3, 3), *image, groups=4)
    yield "conv depthwise", _conv((16, 1, 3, 3), *image, groups=16, pad_type="same")
    yield "conv_transpose", _conv((16, 8, 2, 2), *image, kind="conv_transpose", strides=[2, 2])


def _movement() -> Cases:
    shape = (2, 4, 6, 8)
    yield "transpose", _moved("transpose", *shape, perm=[0, 2, 3, 1])
    yield "reshape", _moved("reshape", *shape, shape=[8, 48])
    yield "expand_dims", _moved("expand_dims", 6, 8, axes=[0, 2])
    yield "squeeze", _moved("squeeze", 1, 6, 1, 8, axes=[0, 2])
    yield "concat", lambda s: s.op("concat", values=(s.bits(2, 3, 8), s.bits(2, 5, 8)), axis=1)
    yield "concat last", lambda s: s.op("concat", values=(s.bits(2, 3, 8), s.bits(2, 3, 5)), axis=2)
    yield "stack", lambda s: s.op("stack", values=(s.bits(4, 8), s.bits(4, 8)), axis=1)
    yield "split", _moved("split", 6, 8, num_splits=3, axis=0)
    yield "tile", _moved("tile", 2, 4, 6, reps=[1, 2, 3])
    for mode in ("constant", "reflect", "replicate"):
        yield f"pad {mode}", _moved("pad", *shape, pad=[1, 2, 2, 1], mode=mode)
    yield "slice_by_size rows", _moved("slice_by_size", *shape, begin=[0, 1, 2, 0], size=[2, 2, 3, 8])
    yield (
        "slice_by_index stride",
        _moved("slice_by_index", *shape, begin=[0, 0, 0, 0], end=list(shape), stride=[1, 1, 2, 2]),
    )
    yield "reverse", _moved("reverse", *shape, axes=[2])
    yield "flatten2d", _moved("flatten2d", *shape, axis=2)
    yield "crop", _moved("crop", *shape, crop_height=[1, 2], crop_width=[0, 3])
    yield "depth_to_space", _moved("depth_to_space", 1, 8, 4, 4, block_size=2)
    yield "space_to_depth", _moved("space_to_depth", 1, 2, 4, 8, block_size=2)
    yield "pixel_shuffle", _moved("pixel_shuffle", 1, 8, 4, 4, upscale_factor=2)
    yield "pixel_unshuffle", _moved("pixel_unshuffle", 1, 2, 4, 8, downscale_factor=literal(2, "uint32"))
    grid = {"block_shape": [2, 2]}
    yield "space_to_batch", _moved("space_to_batch", 2, 3, 4, 6, **grid, paddings=_pairs((0, 0), (1, 1)))
    yield "batch_to_space", _moved("batch_to_space", 8, 3, 4, 6, **grid, crops=_pairs((0, 0), (1, 1)))
    yield "topk", lambda s: s.b.multi("topk", x=s.spread(4, 16), k=5, axis=-1, return_indices=False)


def _pairs(*rows: tuple[int, int]) -> Any:
    return from_array(np.array(rows, np.int32))


def _pooling() -> Cases:
    for kind in ("max_pool", "avg_pool", "l2_pool"):
        yield kind, _on(kind, 1, 8, 12, 12, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid")
        yield (
            f"{kind} overlapping",
            _on(kind, 1, 8, 12, 12, kernel_sizes=[3, 3], strides=[2, 2], pad_type="valid"),
        )


def _normalization() -> Cases:
    yield (
        "layer_norm",
        lambda s: s.op("layer_norm", x=s.spread(8, 64), axes=[-1], gamma=s.positive(64), beta=s.weight(64)),
    )
    yield (
        "instance_norm",
        lambda s: s.op("instance_norm", x=s.spread(2, 4, 8, 8), gamma=s.positive(4), beta=s.weight(4)),
    )
    yield (
        "batch_norm",
        lambda s: s.op(
            "batch_norm", x=s.spread(2, 4, 8, 8), mean=s.weight(4), variance=s.positive(4),
            gamma=s.positive(4), beta=s.weight(4),
        ),
    )  # fmt: skip
    yield "l2_norm", _on("l2_norm", 2, 4, 8, 8)
    yield "local_response_norm", _on("local_response_norm", 2, 8, 6, 6, size=3)


def _resizing() -> Cases:
    image = (1, 4, 6, 8)
    factors = {"scale_factor_height": 2, "scale_factor_width": 2}
    sizes = {"target_size_height": 9, "target_size_width": 12}
    yield "upsample_nearest_neighbor", _on("upsample_nearest_neighbor", *image, **factors)
    yield "upsample_bilinear", _on("upsample_bilinear", *image, **factors)
    yield "resize_nearest_neighbor", _on("resize_nearest_neighbor", *image, **sizes)
    yield "resize_bilinear", _on("resize_bilinear", *image, **sizes)


def _quantized() -> Cases:
    def integers(s: Sheet, *shape: int) -> Any:
        return from_array(np.round(s.even(*shape, scale=127.0).astype(np.float32)).astype(np.int8))

    def w8a8(s: Sheet) -> Value:
        q = s.op("quantize", input=s.spread(1, 16, 8, 8), scale=0.0078125, output_dtype="int8")
        scale = from_array(np.full((8, 1, 1, 1), 0.0078125, np.float16))
        weight = s.op("constexpr_blockwise_shift_scale", data=integers(s, 8, 16, 1, 1), scale=scale)
        return s.op("conv", x=s.op("dequantize", input=q, scale=0.0078125), weight=weight)

    yield "quantize", lambda s: s.op("quantize", input=s.patterns(), scale=0.5, output_dtype="int8")
    yield "w8a8 conv", w8a8

    def decoded(kind: str, make: Callable[[Sheet], dict[str, object]]) -> Build:
        """A compressed weight of 8 x 16, added to numbers."""
        return lambda s: s.op("add", x=s.spread(8, 16), y=s.op(kind, **make(s)))

    zero = literal(0, "int8")
    kind = "constexpr_affine_dequantize"
    yield (
        kind,
        decoded(
            kind,
            lambda s: {
                "quantized_data": integers(s, 8, 16),
                "axis": 0,
                "scale": s.positive(8),
                "zero_point": zero,
            },
        ),
    )
    nibbles = from_array(np.arange(128, dtype=np.uint8).reshape(8, 16) * 7 % 16, dtype="uint4")
    kind = "constexpr_lut_to_dense"
    yield kind, decoded(kind, lambda s: {"indices": nibbles, "lut": s.weight(1, 1, 16, 1)})
    mask = from_array((np.arange(128, dtype=np.uint8).reshape(8, 16) % 2), dtype="uint1")
    kind = "constexpr_sparse_to_dense"
    yield kind, decoded(kind, lambda s: {"nonzero_data": s.weight(64), "mask": mask})


def _cliffs() -> Cases:
    """Numbers around the published limits (ANEForge numeric_cliffs, M6 notes/numerics.md)."""
    around = np.arange(32000, 33024, 4, dtype=np.float32)  # the accumulator ends at 32768
    yield (
        "matmul near 32768",
        lambda s: s.op(
            "matmul",
            x=s.given((around / 8)[:, None] * np.ones(8, np.float32)),
            y=from_array(np.ones((8, 16), np.float16)),
        ),
    )

    def products(s: Sheet) -> Value:
        """Single products from 2^-8 to 2^-32, where small ones are discarded whole."""
        exponents = 2.0 ** -np.arange(4, 17, dtype=np.float64)
        x = (1 + np.abs(s.even(13, 64)).astype(np.float64)) * exponents[:, None]
        w = (1 + np.abs(s.even(13, 64)).astype(np.float64)) * exponents[:, None]
        a, b = np.repeat(x, 13, axis=0), np.tile(w, (13, 1))
        return s.op("matmul", x=s.given(a.reshape(-1, 1, 1)), y=s.given(b.reshape(-1, 1, 1)))

    yield "matmul tiny products", products
    column = np.concatenate([np.arange(4064, 4128, 0.5), [8192, 32768, 65504]]).astype(np.float16)

    def width_slice(s: Sheet) -> Value:
        x = np.repeat(np.concatenate([column, -column])[:, None], 8, axis=1)
        return s.op(
            "slice_by_size", x=s.given(x.reshape(1, 1, -1, 8)), begin=[0, 0, 0, 1], size=[1, 1, x.shape[0], 7]
        )

    yield "slice_by_size last axis", width_slice
    totals = np.arange(2040, 2104)
    terms = (totals[:, None] // 8 + (np.arange(8) < totals[:, None] % 8)).astype(np.float16)
    yield "reduce_sum near 2048", lambda s: s.op("reduce_sum", x=s.given(terms), axes=[1], keep_dims=True)
    yield "softplus near 11", lambda s: s.op("softplus", x=s.given(np.arange(10, 12, 1 / 128)))
    yield "square near 256", lambda s: s.op("square", x=s.given(np.arange(250, 262, 1 / 8)))


def _sums() -> Cases:
    """How a sum runs inside: the width and order of its partial sums, and what follows it (docs/simulator.md, Sums)."""

    def total(s: Sheet, terms: object, kind: str = "reduce_sum") -> Value:
        return s.op(kind, x=s.given(np.asarray(terms)), axes=[1], keep_dims=True)

    place, depth = np.arange(16), np.arange(1040)
    one_large = np.where(
        depth == place[:, None], 4096.0, 1.0
    )  # 5116 to 5120 by the stage where 4096 meets ones
    yield "reduce_sum of 4096 and ones", lambda s: total(s, one_large)
    size = 2.0 ** np.arange(10, 16)
    survivors = np.stack([np.concatenate([[m], np.ones(16), [-m]]) for m in (*size, *(size * 0.75))])
    yield "reduce_sum survivors", lambda s: total(s, survivors)
    large = np.array(
        [[60000, 60000, -60000, -60000], [60000, -60000, 60000, -60000], [40000, 20000, 10000, -40000]]
    )
    yield "reduce_sum partials beyond 65504", lambda s: total(s, large)
    rows = np.linspace(3000, 20000, 64)[:, None] * np.ones(16)  # totals from 48000 to 320000
    for kind in ("reduce_sum", "reduce_mean", "reduce_sum_square", "reduce_l1_norm"):
        terms = np.sqrt(rows) if kind == "reduce_sum_square" else rows
        yield f"{kind} beyond 65504 times a number", partial(_scaled, kind=kind, terms=terms)

    def read_twice(s: Sheet) -> Value:
        found = total(s, rows)
        return s.op("maximum", x=s.op("mul", x=found, y=0.0625), y=s.op("mul", x=found, y=0.03125))

    yield "reduce_sum beyond 65504 read twice", read_twice
    yield "reduce_sum beyond 65504 plus a number", lambda s: s.op("add", x=total(s, rows), y=-60000.0)
    yield (
        "reduce_sum beyond 65504 times a tensor",
        lambda s: s.op("mul", x=total(s, rows), y=s.given(np.full((64, 1), 0.0625))),
    )
    yield "reduce_sum times a number", lambda s: s.op("mul", x=total(s, s.even(64, 100, scale=8.0)), y=0.01)


def _scaled(s: Sheet, kind: str, terms: Any) -> Value:
    """Totals of rows, times 1/16."""
    return s.op("mul", x=s.op(kind, x=s.given(terms), axes=[1], keep_dims=True), y=0.0625)
