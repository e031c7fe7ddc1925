"""Ops that pick by index or order: gather, scatter, sort, topk, one_hot, non-maximum suppression.

Values pass through; only scatter's arithmetic modes compute, rounding after each update. Indices are int32 or
uint16 arrays; a negative index counts from the end, one out of range is clamped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.movement import index_slices
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.arrays import storage_dtype
from ane_trainer.ane.simulator.kernels.contraction import as_tensor
from ane_trainer.ane.simulator.loops.compiled import Step
from ane_trainer.ane.simulator.numbers.fp16 import round_half_away
from ane_trainer.ane.simulator.registry import EngineContext, kernel, writes

_SWEEP = "ANEForge vocabulary sweep: relative error 0 on M5"
_HOST = "refused on the e5rt path (ANEForge sweep, M5), runs on the host in Core ML; "
_MOVED = _HOST + "moves bit patterns"


def _inside(indices: Array, extent: int) -> Array:
    wide = indices.astype(np.int64)
    return np.clip(np.where(wide < 0, wide + extent, wide), 0, extent - 1)


@kernel("gather", "exact", _MOVED)
def gather(ctx: EngineContext, call: Call, x: Array, indices: Array) -> Array:
    """x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis+1:]; leading batch axes go together."""
    batch, axis = call.integer("batch_dims"), call.integer("axis") % x.ndim
    found = _inside(indices, x.shape[axis])
    if not batch:
        return np.take(x, found, axis=axis)
    out = np.empty(call.op.infer(call)[0].shape, x.dtype)
    for at in np.ndindex(x.shape[:batch]):
        out[at] = np.take(x[at], found[at], axis=axis - batch)
    return out


@writes("gather")
def gather_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array, indices: Array) -> Step:
    """See `gather`; without batch axes PyTorch picks, on its threads."""
    out, axis = outputs[0], call.integer("axis") % x.ndim
    if call.integer("batch_dims") or x.dtype not in (np.float32, np.int32):
        return lambda: np.copyto(out, gather(ctx, call, x, indices))
    source, target = as_tensor(x), torch.from_numpy(out.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :]))

    def run() -> None:
        found = torch.from_numpy(_inside(indices, x.shape[axis]).reshape(-1))
        torch.index_select(source, axis, found, out=target)

    return run


@kernel("gather_along_axis", "exact", _MOVED)
def gather_along_axis(ctx: EngineContext, call: Call, x: Array, indices: Array) -> Array:
    """x[..., indices[...], ...] along `axis`, element by element."""
    axis = call.integer("axis") % x.ndim
    return np.take_along_axis(x, _inside(indices, x.shape[axis]), axis)


def _address(indices: Array, shape: tuple[int, ...]) -> tuple[Array, ...]:
    """`indices` `[..., K]` as one index array for each of the K axes of `shape`."""
    return tuple(_inside(indices[..., k], extent) for k, extent in enumerate(shape))


@kernel("gather_nd", "exact", _MOVED)
def gather_nd(ctx: EngineContext, call: Call, x: Array, indices: Array) -> Array:
    """indices `[..., K]` address the K axes after the batch axes."""
    batch, depth = call.integer("batch_dims"), indices.shape[-1]
    if not batch:
        return x[_address(indices, x.shape[:depth])]
    out = np.empty(call.op.infer(call)[0].shape, x.dtype)
    for at in np.ndindex(x.shape[:batch]):
        out[at] = x[at][_address(indices[at], x.shape[batch : batch + depth])]
    return out


_MODES: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "update": lambda old, new: new,
}


def _scattered(call: Call, data: Array, where: tuple[Array, ...], updates: Array, lead: int) -> Array:
    """`data` with `updates` written at `where`, one after the other; each result is rounded."""
    out, change = data.copy(), _MODES[call.text("mode")]
    for at in np.ndindex(where[0].shape[:lead]):
        place = tuple(part[at] for part in where)
        new = change(out[place], updates[at])
        out[place] = round_half_away(new) if data.dtype == np.float32 else new
    return out


@kernel("scatter", "assumed", _HOST + "in the order of the updates")
def scatter(ctx: EngineContext, call: Call, data: Array, indices: Array, updates: Array) -> Array:
    """data[..., indices, ...] changed by updates of the shape that `gather` would give."""
    axis = call.integer("axis") % data.ndim
    first = np.moveaxis(data, axis, 0)
    places = tuple(range(axis, axis + indices.ndim))
    rows = np.moveaxis(updates, places, tuple(range(indices.ndim)))
    changed = _scattered(call, first, (_inside(indices, data.shape[axis]),), rows, indices.ndim)
    return np.moveaxis(changed, 0, axis)


@kernel("scatter_along_axis", "assumed", _HOST + "in the order of the updates")
def scatter_along_axis(ctx: EngineContext, call: Call, data: Array, indices: Array, updates: Array) -> Array:
    """data changed at indices along `axis`, element by element."""
    axis = call.integer("axis") % data.ndim
    where: list[Array] = list(np.indices(indices.shape))
    where[axis] = _inside(indices, data.shape[axis])
    return _scattered(call, data, tuple(where), updates, indices.ndim)


@kernel("scatter_nd", "assumed", _HOST + "in the order of the updates")
def scatter_nd(ctx: EngineContext, call: Call, data: Array, indices: Array, updates: Array) -> Array:
    """data changed at the places that `gather_nd` with these indices would read."""
    where = _address(indices, data.shape[: indices.shape[-1]])
    return _scattered(call, data, where, updates, indices.ndim - 1)


@kernel("slice_update", "exact", _MOVED)
def slice_update(ctx: EngineContext, call: Call, x: Array, update: Array) -> Array:
    """x with the part that `slice_by_index` would take replaced."""
    slices, squeezed = index_slices(call)
    out = x.copy()
    out[slices] = update.reshape(
        [1 if gone else n for gone, n in zip(squeezed, out[slices].shape, strict=True)]
    )
    return out


@kernel("one_hot", "exact", _MOVED)
def one_hot(ctx: EngineContext, call: Call, indices: Array) -> Array:
    """A new axis of `one_hot_vector_size`: on_value at the index, off_value elsewhere."""
    (type_,) = call.op.infer(call)
    on, off = (np.asarray(call.const(name), np.float64) for name in ("on_value", "off_value"))
    axis = call.integer("axis") % type_.rank
    numbers = np.arange(type_.shape[axis]).reshape(-1, *(1,) * (type_.rank - 1 - axis))
    chosen = np.where(np.expand_dims(indices, axis) == numbers, on, off)
    return round_half_away(chosen) if type_.dtype == "fp16" else chosen.astype(storage_dtype(type_))


@kernel("non_zero", "exact", _MOVED)
def non_zero(ctx: EngineContext, call: Call, x: Array) -> Array:
    """The places of non-zero elements, `[count, rank]`."""
    return np.argwhere(x != 0)


def _order(x: Array, axis: int, ascending: bool) -> Array:
    """Positions in sorted order; equal values keep theirs."""
    if x.dtype == np.float32:
        return torch.sort(as_tensor(x), dim=axis, descending=not ascending, stable=True).indices.numpy()
    wide = x.astype(np.int64)
    return np.argsort(wide if ascending else -wide, axis=axis, kind="stable")


def _first(x: Array, axis: int, count: int, ascending: bool) -> Array:
    """The first `count` positions of `_order`, by keys that hold the value and, below it, the position."""
    if x.dtype != np.float32 or 4 * count > x.shape[axis]:
        return np.take(_order(x, axis, ascending), range(count), axis=axis)
    bits = (x + np.float32(0)).view(np.int32)  # -0 equals 0
    rank = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    last = x.shape[axis] - 1
    place = np.arange(last, -1, -1).reshape(-1, *(1,) * (x.ndim - 1 - axis))
    keys = ((~rank if ascending else rank).astype(np.int64) << 32) | place
    return np.asarray(last - (torch.topk(torch.from_numpy(keys), count, axis).values.numpy() & 0xFFFFFFFF))


@kernel("argsort", "exact", _MOVED + "; the order of equal values is assumed")
def argsort(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Positions in sorted order, largest first unless `ascending`."""
    return _order(x, call.integer("axis"), call.flag("ascending"))


@kernel("topk", "exact", _SWEEP + "; the order of equal values is assumed")
def topk(ctx: EngineContext, call: Call, x: Array) -> Array | tuple[Array, Array]:
    """The k largest (smallest when ascending) in order, and their indices."""
    axis = call.integer("axis") % x.ndim
    order = _first(x, axis, call.integer("k"), call.flag("ascending"))
    values = np.take_along_axis(x, order, axis)
    return (values, order) if call.flag("return_indices") else values


@kernel(
    "reduce_argmax reduce_argmin",
    "exact",
    _HOST + "native from A15 on other paths; the first of equal values",
)
def reduce_arg(ctx: EngineContext, call: Call, x: Array) -> Array:
    """The position of the largest (smallest) element along `axis`."""
    pick = np.argmax if call.op.kind == "reduce_argmax" else np.argmin
    return np.asarray(pick(x, axis=call.integer("axis"), keepdims=call.flag("keep_dims")))


@kernel("non_maximum_suppression", "assumed", "ANEForge vocabulary sweep: runs on M5, values not checked")
def non_maximum_suppression(ctx: EngineContext, call: Call, boxes: Array, scores: Array) -> tuple[Array, ...]:
    """Boxes (centre x, centre y, width, height) by falling best score, without those that overlap a chosen
    one.

        boxes `[N, B, 4]`, scores `[N, B, K]` with a score_threshold; `[N, 4, B]`, `[N, K, B]` without.
    """
    channels_first = not call.has("score_threshold")
    if channels_first:
        boxes, scores = boxes.swapaxes(1, 2), scores.swapaxes(1, 2)
    count, batch = call.integer("max_boxes"), scores.shape[0]
    boxes = np.broadcast_to(boxes, (batch, *boxes.shape[1:]))
    chosen_boxes = np.zeros((batch, count, 4), np.float32)
    chosen_scores = np.zeros((batch, count, scores.shape[2]), np.float32)
    indices, numbers = np.full((batch, count), -1, np.int32), np.zeros(batch, np.int32)
    for n in range(batch):
        picked = _suppressed(call, boxes[n].astype(np.float64), scores[n])
        numbers[n] = len(picked)
        indices[n, : len(picked)] = picked
        chosen_boxes[n, : len(picked)], chosen_scores[n, : len(picked)] = boxes[n, picked], scores[n, picked]
    if channels_first:
        return chosen_boxes.swapaxes(1, 2), chosen_scores.swapaxes(1, 2), indices
    return chosen_boxes, chosen_scores, indices, numbers


def _suppressed(call: Call, boxes: NDArray[np.float64], scores: Array) -> list[int]:
    """Indices of the boxes kept, best first."""
    best, label = scores.max(axis=1), scores.argmax(axis=1)
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    area = boxes[:, 2] * boxes[:, 3]
    alive = best >= call.number("score_threshold") if call.has("score_threshold") else best > -np.inf
    kept: list[int] = []
    for i in np.argsort(-best.astype(np.float64), kind="stable"):
        if not alive[i] or len(kept) == call.integer("max_boxes"):
            continue
        kept.append(int(i))
        sides = np.maximum(np.minimum(high, high[i]) - np.maximum(low, low[i]), 0)
        shared = sides[:, 0] * sides[:, 1]
        overlap = shared / np.maximum(area + area[i] - shared, 1e-12)
        rivals = label == label[i] if call.flag("per_class_suppression") else np.ones(len(best), bool)
        alive = alive & ~(rivals & (overlap > call.number("iou_threshold")))
    return kept
