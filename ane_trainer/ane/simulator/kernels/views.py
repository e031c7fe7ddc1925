"""Ops that only re-read memory, as NumPy views; None where the result cannot be a view."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.movement import index_slices

Array = NDArray[Any]


def view_of(call: Call, x: Array) -> tuple[Array, ...] | None:
    """The results of a view op on `x` without copying, or None when a copy is needed."""
    kind = call.op.kind
    if kind == "transpose":
        return (x.transpose(call.integers("perm")),)
    if kind in ("reshape", "expand_dims", "squeeze"):
        (type_,) = call.op.infer(call)
        view = x.reshape(type_.shape)
        return (view,) if np.shares_memory(view, x) or x.size == 0 else None
    if kind == "slice_by_size":
        (type_,) = call.op.infer(call)
        begin = call.integers("begin")
        return (x[tuple(slice(b, b + s) for b, s in zip(begin, type_.shape, strict=True))],)
    if kind == "slice_by_index":
        slices, squeezed = index_slices(call)
        kept = x[slices]
        return (kept.reshape(tuple(n for n, gone in zip(kept.shape, squeezed, strict=True) if not gone)),)
    if kind == "split":
        return tuple(x[where] for where in split_slices(call))
    return None


def split_slices(call: Call) -> list[tuple[slice, ...]]:
    """Where each part of a `split` lies in its operand."""
    axis, starts = call.integer("axis") % call.type().rank, 0
    places = []
    for type_ in call.op.infer(call):
        extent = type_.shape[axis]
        places.append((*(slice(None),) * axis, slice(starts, starts + extent)))
        starts += extent
    return places


def offset_on_last_axis(call: Call) -> bool:
    """True when a slice op starts inside the last axis of its operand: the crop unit moves it, and may
    clamp.
    """
    if call.op.kind == "slice_by_size":
        return call.integers("begin")[-1] != 0
    if call.op.kind == "slice_by_index":
        slices, _ = index_slices(call)
        return slices[-1].indices(call.type().shape[-1])[0] != 0
    if call.op.kind == "split":
        return call.integer("axis") % call.type().rank == call.type().rank - 1
    return False
