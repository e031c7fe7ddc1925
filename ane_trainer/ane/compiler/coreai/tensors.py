"""MIL's contractions, windows, reductions and movement as operations of Core AI; importing it registers the rules."""

from __future__ import annotations

import itertools
import math

import numpy as np

from ane_trainer.ane.compiler.coreai.ops import NUMPY, Site, constant_of, rule
from ane_trainer.ane.errors import Finding, UnsupportedModel
from ane_trainer.ane.mil.opset.movement import index_slices
from ane_trainer.ane.mil.opset.shapes import axes, axis, spatial_padding

Ints = tuple[int, ...]

# --- contractions ---


@rule("matmul")
def _matmul(s: Site) -> object:
    sides = []
    for name in ("x", "y"):
        side, rank = s[name], s.call.type(name).rank
        if s.call.flag(f"transpose_{name}"):
            side = s.api.transpose(side, np.asarray([*range(rank - 2), rank - 1, rank - 2], np.uint32))
        sides.append(side)
    return s.api.broadcasting_batch_matmul(*sides)


@rule("linear")
def _linear(s: Site) -> object:
    weight = s.api.transpose(s["weight"], np.asarray([1, 0], np.uint32))
    product = s.api.broadcasting_batch_matmul(s["x"], weight)
    return s.add(product, s["bias"]) if s.call.has("bias") else product


def _window(s: Site, kernel: Ints) -> tuple[Ints, Ints, tuple[tuple[int, int], ...]]:
    """(strides, dilations, padding) of a convolution or pooling with their defaults filled in."""
    ones = (1,) * len(kernel)
    strides = s.call.integers("strides") if s.call.has("strides") else ones
    dilations = s.call.integers("dilations") if s.call.has("dilations") else ones
    sizes = s.call.type("x").shape[2:]
    return strides, dilations, spatial_padding(s.call, sizes, kernel, strides, dilations)


def _padded(s: Site, padding: tuple[tuple[int, int], ...], value: float) -> object:
    """x with its spatial axes padded, as rank 4 or 5 (one spatial axis becomes two)."""
    x, shape = s["x"], s.call.type("x").shape
    if len(padding) == 1:
        x, padding = s.shaped(x, (*shape[:2], 1, shape[2])), ((0, 0), *padding)
    if not any(itertools.chain(*padding)):
        return x
    amounts = [0, 0, 0, 0, *itertools.chain(*padding)]
    return s.api.pad(x, np.asarray(amounts, np.uint32), s.number(value))


def _pairs(values: tuple[int, ...]) -> object:
    return np.asarray(values if len(values) > 1 else (1, *values), np.uint32)


@rule("conv")
def _conv(s: Site) -> object:
    kernel = s.call.type("weight").shape
    strides, dilations, padding = _window(s, kernel[2:])
    weight = s["weight"] if len(kernel) > 3 else s.shaped(s["weight"], (*kernel[:2], 1, kernel[2]))
    convolve = s.api.conv3d if len(kernel) == 5 else s.api.conv2d
    groups = np.uint32(s.call.integer("groups"))
    y = convolve(_padded(s, padding, 0.0), weight, _pairs(strides), _pairs(dilations), groups)
    y = s.shaped(y)
    return s.add(y, s.shaped(s["bias"], (-1, *(1,) * (len(kernel) - 2)))) if s.call.has("bias") else y


@rule("avg_pool")
def _avg_pool(s: Site) -> object:
    kernel = s.call.integers("kernel_sizes")
    strides, _, padding = _pool_window(s, kernel)
    pool = s.api.sumpool3d if len(kernel) == 3 else s.api.sumpool2d
    ones = constant_of(np.ones(max(2, len(kernel)), np.uint32))
    total = s.shaped(pool(_padded(s, padding, 0.0), _pairs(kernel), _pairs(strides), ones))
    if not s.call.flag("exclude_padding_from_average"):
        return s.div(total, s.number(math.prod(kernel)))
    counts = np.ones((), np.float64)
    for size, k, step, pad, out in zip(
        s.call.type("x").shape[2:], kernel, strides, padding, s.result.shape[2:], strict=True
    ):
        starts = np.arange(out) * step - pad[0]
        inside = np.minimum(starts + k, size) - np.maximum(starts, 0)
        counts = np.multiply.outer(counts, inside)
    return s.div(total, counts.astype(NUMPY[s.result.dtype]))


@rule("max_pool")
def _max_pool(s: Site) -> object:
    kernel = s.call.integers("kernel_sizes")
    strides, _, padding = _pool_window(s, kernel)
    shape = s.result.shape if len(kernel) > 1 else (*s.result.shape[:2], 1, s.result.shape[2])
    output = s.api.TensorType(shape, NUMPY[s.result.dtype])
    pool = s.api.maxpool3d if len(kernel) == 3 else s.api.maxpool2d
    ones = constant_of(np.ones(max(2, len(kernel)), np.uint32))
    x = _padded(s, padding, -math.inf)
    return s.shaped(pool(output, x, _pairs(kernel), _pairs(strides), ones, np.bool_(False)))


def _pool_window(s: Site, kernel: tuple[int, ...]) -> tuple[Ints, Ints, tuple[tuple[int, int], ...]]:
    if s.call.flag("ceil_mode"):
        raise UnsupportedModel(
            "Core AI: needs ops that can be translated:",
            [Finding(s.op.source or s.op.name, s.op.kind, "has ceil_mode.", 'Use device="sim".')],
            code="ANE305",
        )
    return _window(s, kernel)


# --- reductions ---


@rule("reduce_sum reduce_mean reduce_max reduce_min reduce_l1_norm reduce_l2_norm reduce_sum_square")
def _reduce(s: Site) -> object:
    along = np.asarray(axes(s.call, "axes", s.call.type().rank), np.int32)
    kind, x = s.op.kind.removeprefix("reduce_"), s["x"]
    if kind in ("sum", "mean", "max", "min"):
        return s.shaped(getattr(s.api, f"reduce_{kind}")(x, along))
    total = s.shaped(s.api.reduce_sum(s.api.abs_(x) if kind == "l1_norm" else s.mul(x, x), along))
    return s.api.sqrt(total) if kind == "l2_norm" else total


@rule("reduce_argmax")
def _argmax(s: Site) -> object:
    found = s.api.argmax(s["x"], np.int32(axis(s.call, s.call.integer("axis"), s.call.type().rank)))
    return s.shaped(s.api.cast(found, NUMPY[s.result.dtype]))


@rule("softmax")
def _softmax(s: Site) -> object:
    return s.api.softmax(s["x"], np.int32(axis(s.call, s.call.integer("axis"), s.call.type().rank)))


# --- movement ---


@rule("reshape expand_dims squeeze")
def _reshape(s: Site) -> object:
    return s.shaped(s["x"])


@rule("transpose")
def _transpose(s: Site) -> object:
    rank = s.call.type().rank
    perm = [axis(s.call, p, rank) for p in s.call.integers("perm")]
    return s.api.transpose(s["x"], np.asarray(perm, np.uint32))


@rule("slice_by_size")
def _slice_by_size(s: Site) -> object:
    begin = np.asarray(s.call.integers("begin"), np.int32)
    end = begin + np.asarray(s.result.shape, np.int32)
    return s.api.slice_(s["x"], begin, end, np.ones_like(begin))


@rule("slice_by_index")
def _slice_by_index(s: Site) -> object:
    slices, _ = index_slices(s.call)
    ranges = [range(*cut.indices(n)) for cut, n in zip(slices, s.call.type().shape, strict=True)]
    forward = [r if r.step > 0 else r[::-1] for r in ranges]
    bounds = np.asarray([(r[0], r[-1] + 1, r.step) for r in forward], np.int32).reshape(-1, 3).T
    part = s.api.slice_(s["x"], bounds[0].copy(), bounds[1].copy(), bounds[2].copy())
    back = [i for i, r in enumerate(ranges) if r.step < 0]
    return s.shaped(s.api.reverse(part, np.asarray(back, np.int32)) if back else part)


@rule("concat")
def _concat(s: Site) -> object:
    rank = s.result.rank
    along = axis(s.call, s.call.integer("axis"), rank)
    parts = s["values"]
    assert isinstance(parts, list)
    if s.call.flag("interleave"):
        shape = s.call.types("values")[0].shape
        parts = [s.shaped(part, (*shape[: along + 1], 1, *shape[along + 1 :])) for part in parts]
        along += 1
    return s.shaped(s.api.concat(np.int32(along), parts))


@rule("tile")
def _tile(s: Site) -> object:
    return s.api.tile(s["x"], np.asarray(s.call.integers("reps"), np.uint32))


@rule("pad")
def _pad(s: Site) -> object:
    amounts = s.call.integers("pad")
    every = [0] * (2 * s.call.type().rank - len(amounts)) + list(amounts)
    mode = s.call.text("mode")
    value = s.parameter("constant_val") if mode == "constant" else s.number(0)
    return s.api.pad(s["x"], np.asarray(every, np.uint32), value, mode)
