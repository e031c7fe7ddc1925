"""Reductions, softmax, pooling and normalisations in double precision."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.shapes import axes, spatial_padding
from ane_trainer.ane.mil.semantics.registry import along, constant, meaning, result_type
from ane_trainer.ane.mil.weights import Array


@meaning("reduce_sum reduce_mean reduce_l1_norm reduce_l2_norm reduce_sum_square reduce_log_sum")
def reduce_by_sum(call: Call, x: Array) -> Array:
    """A function of the sum of a function of the elements, over `axes` (all when absent).

    Sums are products with a vector of ones, so that this witness shares no code with the kernels.
    """
    lines, shape = _lines(call, x)
    kind = call.op.kind
    terms = np.abs(lines) if kind == "reduce_l1_norm" else lines
    other = lines if kind in ("reduce_l2_norm", "reduce_sum_square") else np.ones_like(lines)
    total = np.einsum("ij,ij->i", terms, other).reshape(shape)
    if kind == "reduce_mean":
        return np.asarray(total / lines.shape[1])
    if kind == "reduce_l2_norm":
        return np.asarray(total**0.5)
    return np.asarray(np.log(total)) if kind == "reduce_log_sum" else total


@meaning("reduce_max reduce_min reduce_prod reduce_log_sum_exp")
def reduce_in_turn(call: Call, x: Array) -> Array:
    """One element after the other: the larger, the smaller, the product, or log(exp(a) + exp(b))."""
    step = {"max": np.maximum, "min": np.minimum, "prod": np.multiply, "log_sum_exp": np.logaddexp}[
        call.op.kind.removeprefix("reduce_")
    ]
    lines, shape = _lines(call, x)
    return np.asarray(step.reduce(lines, axis=1)).reshape(shape)


def _lines(call: Call, x: Array) -> tuple[Array, tuple[int, ...]]:
    """x as `[results, elements of each]`, and the result's shape."""
    over = axes(call, "axes", x.ndim)
    stay = [i for i in range(x.ndim) if i not in over]
    lines = x.transpose(*stay, *over).reshape(math.prod(x.shape[i] for i in stay), -1)
    return lines, result_type(call).shape


@meaning("reduce_argmax reduce_argmin")
def reduce_arg(call: Call, x: Array) -> Array:
    """The first position of the largest (smallest) element."""
    pick = np.argmax if call.op.kind == "reduce_argmax" else np.argmin
    return np.asarray(pick(x, axis=call.integer("axis"), keepdims=call.flag("keep_dims")))


def softmax_over(x: Array, axis: int) -> Array:
    """exp(x) over its sum along one axis."""
    weights = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return np.asarray(weights / np.sum(weights, axis=axis, keepdims=True))


@meaning("softmax")
def softmax(call: Call, x: Array) -> Array:
    """exp(x) over its sum along one axis."""
    return softmax_over(x, call.integer("axis"))


@meaning("max_pool avg_pool l2_pool")
def pool(call: Call, x: Array) -> Array:
    """Largest, mean or root of squares of each window; a mean counts padding unless it is excluded."""
    kind, kernel = call.op.kind, call.integers("kernel_sizes")
    strides = call.integers("strides") if call.has("strides") else (1,) * len(kernel)
    padding = spatial_padding(call, x.shape[2:], kernel, strides, (1,) * len(kernel))
    extents = result_type(call).shape[2:]
    rows = zip(x.shape[2:], padding, extents, strides, kernel, strict=True)
    pads = [
        (before, max(after, (count - 1) * s + k - n - before)) for n, (before, after), count, s, k in rows
    ]
    image = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=-np.inf if kind == "max_pool" else 0.0)
    parts = _windows(image, kernel, strides, extents)
    if kind == "max_pool":
        return np.asarray(np.max(parts, axis=0))
    if kind == "l2_pool":
        return np.asarray(np.sqrt(np.sum(np.square(parts), axis=0)))
    if not call.flag("exclude_padding_from_average"):
        return np.asarray(np.sum(parts, axis=0) / math.prod(kernel))
    inside = np.pad(np.ones(x.shape[2:]), pads)[None, None]
    return np.asarray(np.sum(parts, axis=0) / np.sum(_windows(inside, kernel, strides, extents), axis=0))


def _windows(
    image: Array, kernel: tuple[int, ...], strides: tuple[int, ...], extents: tuple[int, ...]
) -> list[Array]:
    """For each place in the window, its element for every result."""
    parts = []
    for tap in itertools.product(*map(range, kernel)):
        rows = zip(tap, extents, strides, strict=True)
        window: Any = (..., *(slice(t, t + (n - 1) * s + 1, s) for t, n, s in rows))
        parts.append(image[window])
    return parts


def _scaled(call: Call, y: Array, shape: tuple[int, ...]) -> Array:
    """y times gamma plus beta, both of `shape` where given."""
    gamma, beta = constant(call, "gamma"), constant(call, "beta")
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def _normalized(call: Call, x: Array, over: tuple[int, ...]) -> Array:
    variance = np.var(x, axis=over, keepdims=True)
    return np.asarray((x - np.mean(x, axis=over, keepdims=True)) / np.sqrt(variance + call.number("epsilon")))


@meaning("layer_norm")
def layer_norm(call: Call, x: Array) -> Array:
    """Over `axes`; gamma and beta have the extents of those axes."""
    over = axes(call, "axes", x.ndim)
    return _scaled(
        call, _normalized(call, x, over), tuple(n if i in over else 1 for i, n in enumerate(x.shape))
    )


@meaning("instance_norm")
def instance_norm(call: Call, x: Array) -> Array:
    """Over the spatial axes of x `[N, C, *spatial]`."""
    return _scaled(call, _normalized(call, x, tuple(range(2, x.ndim))), (-1, *(1,) * (x.ndim - 2)))


@meaning("batch_norm")
def batch_norm(call: Call, x: Array) -> Array:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta with the given statistics."""
    mean, variance = (along(constant(call, name), 1, x.ndim) for name in ("mean", "variance"))
    y = (x - mean) / np.sqrt(np.asarray(variance) + call.number("epsilon"))
    return _scaled(call, y, (-1, *(1,) * (x.ndim - 2)))


@meaning("l2_norm")
def l2_norm(call: Call, x: Array) -> Array:
    """x / sqrt(sum of squares + epsilon) over the last three axes."""
    total = np.sum(np.square(x), axis=(-3, -2, -1), keepdims=True)
    return np.asarray(x / np.sqrt(total + call.number("epsilon")))


@meaning("local_response_norm")
def local_response_norm(call: Call, x: Array) -> Array:
    """x / (k + alpha / size * sum of squares over `size` channels around)^beta."""
    size, channels = call.integer("size"), x.shape[1]
    squares = np.pad(np.square(x), [(0, 0), (size // 2, (size - 1) // 2), *[(0, 0)] * (x.ndim - 2)])
    total = np.sum([squares[:, i : i + channels] for i in range(size)], axis=0)
    return np.asarray(x / (call.number("k") + call.number("alpha") / size * total) ** call.number("beta"))
