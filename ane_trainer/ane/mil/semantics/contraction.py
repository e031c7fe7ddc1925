"""Matrix products, convolutions and attention in double precision."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.shapes import spatial_padding
from ane_trainer.ane.mil.semantics.reduction import softmax_over
from ane_trainer.ane.mil.semantics.registry import meaning, result_type
from ane_trainer.ane.mil.weights import Array


@meaning("matmul")
def matmul(call: Call, x: Array, y: Array) -> Array:
    """x @ y after the transpose flags; leading axes broadcast."""
    x = np.swapaxes(x, -1, -2) if call.flag("transpose_x") else x
    y = np.swapaxes(y, -1, -2) if call.flag("transpose_y") else y
    return np.asarray(np.matmul(x, y))


@meaning("linear")
def linear(call: Call, x: Array, weight: Array, bias: Array | None) -> Array:
    """x @ weight.T + bias."""
    return np.asarray(x @ weight.T + (0.0 if bias is None else bias))


@meaning("einsum")
def einsum(call: Call, values: tuple[Array, ...]) -> Array:
    """For each h a product `[c, w]` @ `[w, u]`; n and h broadcast."""
    x, y = values
    product = np.matmul(np.moveaxis(x, -2, -3), np.moveaxis(y, -2, -3))
    return np.moveaxis(product, -3, -2)


def _steps(call: Call, name: str, spatial: int) -> tuple[int, ...]:
    return call.integers(name) if call.has(name) else (1,) * spatial


@meaning("conv")
def conv(call: Call, x: Array, weight: Array, bias: Array | None) -> Array:
    """One matrix product a tap of the kernel, groups side by side."""
    spatial, groups, kernel = x.ndim - 2, call.integer("groups"), weight.shape[2:]
    strides, dilations = _steps(call, "strides", spatial), _steps(call, "dilations", spatial)
    padding = spatial_padding(call, x.shape[2:], kernel, strides, dilations)
    extents = result_type(call).shape[2:]
    image = np.pad(x, [(0, 0), (0, 0), *padding])
    w = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    total = np.zeros((len(x), groups, w.shape[1], math.prod(extents)))
    for tap in itertools.product(*map(range, kernel)):
        rows = zip(tap, dilations, extents, strides, strict=True)
        window = tuple(slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in rows)
        part = image[(slice(None), slice(None), *window)].reshape(len(x), groups, w.shape[2], -1)
        total += np.matmul(_at(w, tap), part)
    return _biased(total.reshape(len(x), weight.shape[0], *extents), bias)


def _at(weight: Array, tap: tuple[int, ...]) -> Array:
    """The weights `[G, out or in, in or out]` at one place of the kernel."""
    place: Any = (..., *tap)
    return np.asarray(weight[place])


def _biased(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias.reshape(-1, *(1,) * (y.ndim - 2))


@meaning("conv_transpose")
def conv_transpose(call: Call, x: Array, weight: Array, bias: Array | None) -> Array:
    """Every input element adds its kernel to the result, of which the padding cuts the edges."""
    spatial, groups, kernel = x.ndim - 2, call.integer("groups"), weight.shape[2:]
    strides, dilations = _steps(call, "strides", spatial), _steps(call, "dilations", spatial)
    shape = result_type(call).shape
    begins = _cut(call, x, kernel, strides, dilations)
    reach = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(x.shape[2:], strides, kernel, dilations, strict=True)
    ]
    whole = [max(r, b + e) for r, b, e in zip(reach, begins, shape[2:], strict=True)]
    w = weight.reshape(groups, -1, *weight.shape[1:])  # [G, Cin/G, Cout/G, *kernel]
    part = x.reshape(len(x), groups, w.shape[1], -1)
    total = np.zeros((len(x), shape[1], *whole))
    for tap in itertools.product(*map(range, kernel)):
        made = np.matmul(np.swapaxes(_at(w, tap), -1, -2), part)
        rows = zip(tap, dilations, x.shape[2:], strides, strict=True)
        window = tuple(slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in rows)
        total[(slice(None), slice(None), *window)] += made.reshape(len(x), shape[1], *x.shape[2:])
    kept = tuple(slice(b, b + e) for b, e in zip(begins, shape[2:], strict=True))
    return _biased(total[(slice(None), slice(None), *kept)], bias)


def _cut(
    call: Call, x: Array, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[int, ...]:
    """How much of the full result lies before what is kept, on each spatial axis."""
    if call.text("pad_type") == "same":
        rows = zip(kernel, strides, dilations, strict=True)
        return tuple(max((k - 1) * d + 1 - s, 0) // 2 for k, s, d in rows)
    return tuple(p[0] for p in spatial_padding(call, x.shape[2:], kernel, strides, dilations))


@meaning("scaled_dot_product_attention")
def attention(call: Call, query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """softmax(query @ key.T / sqrt(E)) @ value; a bool mask keeps, a float mask is added."""
    scores = query @ np.swapaxes(key, -1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    return np.asarray(softmax_over(scores, -1) @ value)
