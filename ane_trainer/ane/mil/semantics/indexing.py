"""Ops that pick by index or order. A negative index counts from the end; one out of range goes to the near end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.semantics.registry import meaning, result_type, wide_dtype
from ane_trainer.ane.mil.weights import Array


def _inside(indices: Array, extent: int) -> Array:
    whole = indices.astype(np.int64)
    return np.clip(np.where(whole < 0, whole + extent, whole), 0, extent - 1)


@meaning("gather")
def gather(call: Call, x: Array, indices: Array) -> Array:
    """Slices of x along an axis; leading batch axes go together."""
    batch, axis = call.integer("batch_dims"), call.integer("axis") % x.ndim
    found = _inside(indices, x.shape[axis])
    if not batch:
        return np.take(x, found, axis)
    out = np.empty(result_type(call).shape, x.dtype)
    for at in np.ndindex(x.shape[:batch]):
        out[at] = np.take(x[at], found[at], axis - batch)
    return out


@meaning("gather_along_axis")
def gather_along_axis(call: Call, x: Array, indices: Array) -> Array:
    """Elements of x along an axis."""
    axis = call.integer("axis") % x.ndim
    return np.take_along_axis(x, _inside(indices, x.shape[axis]), axis)


@meaning("gather_nd")
def gather_nd(call: Call, x: Array, indices: Array) -> Array:
    """indices `[..., K]` address the K axes after the batch axes."""
    batch, depth = call.integer("batch_dims"), indices.shape[-1]
    if not batch:
        return x[_address(indices, x.shape[:depth])]
    out = np.empty(result_type(call).shape, x.dtype)
    for at in np.ndindex(x.shape[:batch]):
        out[at] = x[at][_address(indices[at], x.shape[batch : batch + depth])]
    return out


def _address(indices: Array, shape: tuple[int, ...]) -> tuple[Array, ...]:
    return tuple(_inside(indices[..., k], extent) for k, extent in enumerate(shape))


def _written(old: Array, new: Array) -> Array:
    return new


_MODES: dict[str, Callable[[Any, Any], object]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum,
    "min": np.minimum, "update": _written,
}  # fmt: skip


def _scattered(call: Call, data: Array, places: tuple[Array, ...], updates: Array) -> Array:
    """`data` changed at each place in turn."""
    out, change = data.copy(), _MODES[call.text("mode")]
    for at in np.ndindex(places[0].shape):
        where = tuple(p[at] for p in places)
        out[where] = change(out[where], updates[at])
    return out


@meaning("scatter")
def scatter(call: Call, data: Array, indices: Array, updates: Array) -> Array:
    """Slices along an axis changed."""
    axis = call.integer("axis") % data.ndim
    own = tuple(range(axis, axis + indices.ndim))
    rows = np.moveaxis(updates, own, tuple(range(indices.ndim)))
    changed = _scattered(call, np.moveaxis(data, axis, 0), (_inside(indices, data.shape[axis]),), rows)
    return np.moveaxis(changed, 0, axis)


@meaning("scatter_along_axis")
def scatter_along_axis(call: Call, data: Array, indices: Array, updates: Array) -> Array:
    """Elements along an axis changed."""
    axis = call.integer("axis") % data.ndim
    places: list[Array] = list(np.indices(indices.shape))
    places[axis] = _inside(indices, data.shape[axis])
    return _scattered(call, data, tuple(places), updates)


@meaning("scatter_nd")
def scatter_nd(call: Call, data: Array, indices: Array, updates: Array) -> Array:
    """Places `[..., K]` changed."""
    return _scattered(call, data, _address(indices, data.shape[: indices.shape[-1]]), updates)


@meaning("one_hot")
def one_hot(call: Call, indices: Array) -> Array:
    """A new axis: on_value at the index, off_value elsewhere."""
    type_ = result_type(call)
    axis = call.integer("axis") % type_.rank
    places = np.arange(type_.shape[axis]).reshape(-1, *(1,) * (type_.rank - 1 - axis))
    chosen = np.where(
        np.expand_dims(indices, axis) == places, call.number("on_value"), call.number("off_value")
    )
    return chosen.astype(wide_dtype(type_.dtype))


@meaning("non_zero")
def non_zero(call: Call, x: Array) -> Array:
    """The places of non-zero elements, `[count, rank]`."""
    return np.argwhere(x != 0)


def _order(x: Array, axis: int, ascending: bool) -> Array:
    """Positions in sorted order, equal values by position."""
    signed = x.astype(np.int64) if x.dtype == np.bool_ else x
    return np.argsort(signed if ascending else -signed, axis=axis, kind="stable")


@meaning("argsort")
def argsort(call: Call, x: Array) -> Array:
    """Positions in sorted order, largest first unless `ascending`."""
    return _order(x, call.integer("axis"), call.flag("ascending"))


@meaning("topk")
def topk(call: Call, x: Array) -> Array | tuple[Array, Array]:
    """The k largest (smallest when ascending) in order, and their positions unless switched off."""
    axis = call.integer("axis") % x.ndim
    order = np.take(_order(x, axis, call.flag("ascending")), range(call.integer("k")), axis)
    values = np.take_along_axis(x, order, axis)
    return (values, order) if call.flag("return_indices") else values


@meaning("non_maximum_suppression")
def non_maximum_suppression(call: Call, boxes: Array, scores: Array) -> tuple[Array, ...]:
    """Boxes (centre x, centre y, width, height) by falling best score, without those that overlap one chosen.

    boxes `[N, B, 4]`, scores `[N, B, K]` with a score_threshold; `[N, 4, B]`, `[N, K, B]` without.
    """
    last = call.has("score_threshold")
    if not last:
        boxes, scores = np.swapaxes(boxes, 1, 2), np.swapaxes(scores, 1, 2)
    images, count = len(scores), call.integer("max_boxes")
    boxes = np.broadcast_to(boxes, (images, *boxes.shape[1:]))
    kept_boxes, kept_scores = np.zeros((images, count, 4)), np.zeros((images, count, scores.shape[2]))
    indices, numbers = np.full((images, count), -1), np.zeros(images, np.int64)
    for n in range(images):
        found = _kept(call, boxes[n], scores[n])
        numbers[n], indices[n, : len(found)] = len(found), found
        kept_boxes[n, : len(found)], kept_scores[n, : len(found)] = boxes[n][found], scores[n][found]
    if last:
        return kept_boxes, kept_scores, indices, numbers
    return np.swapaxes(kept_boxes, 1, 2), np.swapaxes(kept_scores, 1, 2), indices


def _kept(call: Call, boxes: Array, scores: Array) -> list[int]:
    """Positions of the boxes kept, best first."""
    best, label = scores.max(axis=1), scores.argmax(axis=1)
    lowest = call.number("score_threshold") if call.has("score_threshold") else -np.inf
    found: list[int] = []
    for i in np.argsort(-best, kind="stable"):
        rivals = [j for j in found if not call.flag("per_class_suppression") or label[j] == label[i]]
        alone = all(_overlap(boxes[i], boxes[j]) <= call.number("iou_threshold") for j in rivals)
        if alone and len(found) < call.integer("max_boxes") and best[i] >= lowest:
            found.append(int(i))
    return found


def _overlap(a: Array, b: Array) -> float:
    """Intersection over union of two boxes."""
    low = np.maximum(a[:2] - a[2:] / 2, b[:2] - b[2:] / 2)
    high = np.minimum(a[:2] + a[2:] / 2, b[:2] + b[2:] / 2)
    shared = float(np.prod(np.maximum(high - low, 0)))
    return shared / max(float(a[2] * a[3] + b[2] * b[3]) - shared, 1e-12)
