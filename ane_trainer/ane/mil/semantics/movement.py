"""Ops that move, repeat or make elements."""

from __future__ import annotations

import numpy as np

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.movement import index_slices
from ane_trainer.ane.mil.opset.shapes import axes
from ane_trainer.ane.mil.semantics.registry import constant, meaning, result_type, wide_dtype
from ane_trainer.ane.mil.weights import Array


@meaning("reshape reshape_like expand_dims squeeze flatten2d")
def reshape(call: Call, x: Array, *references: object) -> Array:
    """The same elements in another shape."""
    return x.reshape(result_type(call).shape)


@meaning("transpose")
def transpose(call: Call, x: Array) -> Array:
    """Result axis i is input axis perm[i]."""
    return x.transpose(call.integers("perm"))


@meaning("slice_by_size")
def slice_by_size(call: Call, x: Array) -> Array:
    """x[begin : begin + size]."""
    pairs = zip(call.integers("begin"), result_type(call).shape, strict=True)
    return x[tuple(slice(b, b + n) for b, n in pairs)]


@meaning("slice_by_index")
def slice_by_index(call: Call, x: Array) -> Array:
    """x[begin : end : stride]; squeezed axes go."""
    return x[index_slices(call)[0]].reshape(result_type(call).shape)


@meaning("slice_update")
def slice_update(call: Call, x: Array, update: Array) -> Array:
    """x with a slice replaced."""
    out, slices = x.copy(), index_slices(call)[0]
    out[slices] = update.reshape(out[slices].shape)
    return out


@meaning("concat")
def concat(call: Call, values: tuple[Array, ...]) -> Array:
    """Joined along an axis; interleave takes one index of each in turn."""
    axis = call.integer("axis") % values[0].ndim
    if call.flag("interleave"):
        return np.stack(values, axis + 1).reshape(result_type(call).shape)
    return np.concatenate(values, axis)


@meaning("stack")
def stack(call: Call, values: tuple[Array, ...]) -> Array:
    """Joined along a new axis."""
    return np.stack(values, call.integer("axis"))


@meaning("split")
def split(call: Call, x: Array) -> tuple[Array, ...]:
    """Parts along an axis."""
    axis = call.integer("axis") % x.ndim
    sizes = [t.shape[axis] for t in call.op.infer(call)]
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))


@meaning("tile")
def tile(call: Call, x: Array) -> Array:
    """Each axis repeated."""
    return np.tile(x, call.integers("reps"))


@meaning("pad")
def pad(call: Call, x: Array) -> Array:
    """Elements before and after, constant or from x."""
    amounts = call.integers("pad")
    pairs = [(0, 0)] * (x.ndim - len(amounts) // 2) + list(zip(amounts[::2], amounts[1::2], strict=True))
    mode = call.text("mode")
    if mode == "constant":
        return np.pad(x, pairs, constant_values=x.dtype.type(call.number("constant_val")))
    if mode == "reflect":
        return np.pad(x, pairs, mode="reflect")
    return np.pad(x, pairs, mode="edge")


@meaning("crop")
def crop(call: Call, x: Array) -> Array:
    """(top, bottom) rows and (left, right) columns cut."""
    top, left = call.integers("crop_height")[0], call.integers("crop_width")[0]
    height, width = result_type(call).shape[-2:]
    return x[..., top : top + height, left : left + width]


@meaning("reverse")
def reverse(call: Call, x: Array) -> Array:
    """The given axes backwards, all when absent."""
    return np.flip(x, axes(call, "axes", x.ndim))


@meaning("reverse_sequence")
def reverse_sequence(call: Call, x: Array, lengths: Array) -> Array:
    """The first lengths[i] entries of each sequence backwards."""
    rank = x.ndim
    out = x.copy()
    rows = np.moveaxis(out, (call.integer("batch_axis") % rank, call.integer("seq_axis") % rank), (0, 1))
    for row, length in zip(rows, lengths.astype(int), strict=True):
        row[:length] = row[:length][::-1].copy()
    return out


@meaning("pixel_shuffle depth_to_space")
def depth_to_space(call: Call, x: Array) -> Array:
    """Channels become blocks: (c, i, j) in PyTorch's pixel_shuffle, (i, j, c) in depth_to_space."""
    shuffled = call.op.kind == "pixel_shuffle"
    b = call.integer("upscale_factor" if shuffled else "block_size")
    n, c, h, w = x.shape
    if shuffled:
        parts = x.reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        parts = x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    return parts.reshape(result_type(call).shape)


@meaning("pixel_unshuffle space_to_depth")
def space_to_depth(call: Call, x: Array) -> Array:
    """The inverse of `depth_to_space`."""
    shuffled = call.op.kind == "pixel_unshuffle"
    b = call.integer("downscale_factor" if shuffled else "block_size")
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 1, 3, 5, 2, 4) if shuffled else (0, 3, 5, 1, 2, 4)
    return parts.transpose(order).reshape(result_type(call).shape)


@meaning("space_to_batch")
def space_to_batch(call: Call, x: Array) -> Array:
    """Block position (i, j) of every image comes before the images: batch entry (i bw + j) N + n."""
    (bh, bw), p = call.integers("block_shape"), call.integers("paddings")
    wide = np.pad(x, [(0, 0), (0, 0), (p[0], p[1]), (p[2], p[3])])
    n, c, h, w = wide.shape
    parts = wide.reshape(n, c, h // bh, bh, w // bw, bw).transpose(3, 5, 0, 1, 2, 4)
    return parts.reshape(result_type(call).shape)


@meaning("batch_to_space")
def batch_to_space(call: Call, x: Array) -> Array:
    """The inverse of `space_to_batch`, then crops."""
    (bh, bw), p = call.integers("block_shape"), call.integers("crops")
    n, c, h, w = x.shape
    parts = x.reshape(bh, bw, n // (bh * bw), c, h, w).transpose(2, 3, 4, 0, 5, 1)
    whole = parts.reshape(n // (bh * bw), c, h * bh, w * bw)
    return whole[:, :, p[0] : h * bh - p[1], p[2] : w * bw - p[3]]


@meaning("sliding_windows")
def sliding_windows(call: Call, x: Array) -> Array:
    """The axis becomes two: the window's number, and the place in it."""
    axis, size, stride = call.integer("axis") % x.ndim, call.integer("size"), call.integer("stride")
    count = (x.shape[axis] - size) // stride + 1
    places = np.arange(count)[:, None] * stride + np.arange(size)
    return np.take(x, places, axis)


@meaning("band_part")
def band_part(call: Call, x: Array) -> Array:
    """A band around the diagonal of the last two axes; a negative width keeps that side."""
    lower, upper = call.integer("lower"), call.integer("upper")
    distance = np.arange(x.shape[-1]) - np.arange(x.shape[-2])[:, None]
    kept = ((lower < 0) | (distance >= -lower)) & ((upper < 0) | (distance <= upper))
    return np.where(kept, x, x.dtype.type(0))


@meaning("cumsum")
def cumsum(call: Call, x: Array) -> Array:
    """Running sums, each with its own element unless `exclusive`."""
    axis = call.integer("axis") % x.ndim
    source = np.flip(x, axis) if call.flag("reverse") else x
    total = np.cumsum(source, axis) - (source if call.flag("exclusive") else 0)
    return np.flip(total, axis) if call.flag("reverse") else np.asarray(total)


@meaning("fill fill_like")
def fill(call: Call, reference: Array | None = None) -> Array:
    """A tensor of one value."""
    type_ = result_type(call)
    return np.full(type_.shape, call.const("value"), wide_dtype(type_.dtype))


@meaning("range_1d")
def range_1d(call: Call) -> Array:
    """start, start + step, ... below end."""
    return np.asarray(call.number("start") + np.arange(result_type(call).size) * call.number("step"))


@meaning("shape")
def shape(call: Call, x: Array) -> Array:
    """x's extents."""
    return np.asarray(x.shape, np.int64)


@meaning("const")
def const(call: Call) -> Array | None:
    """The constant itself."""
    return constant(call, "val")
