"""Ops that move, repeat or only re-read elements; bit patterns pass through unchanged.

A result that can be a view of its operand's memory is one (`view_of`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.opset.movement import index_slices
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.loops.compiled import Pass, Step, copies
from ane_trainer.ane.simulator.numbers.fp16 import INF, round_half_away
from ane_trainer.ane.simulator.registry import EngineContext, kernel, writes


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


MOVES = "moves bit patterns: ANEForge vocabulary sweep, relative error 0 on M5"


@kernel("transpose reshape expand_dims squeeze", "exact", MOVES)
def moved(ctx: EngineContext, call: Call, x: Array) -> Array:
    """x in another shape or order, a view where one will do."""
    views = view_of(call, x)
    return views[0] if views is not None else view_of(call, np.ascontiguousarray(x))[0]  # type: ignore[index]


@writes("transpose reshape expand_dims squeeze")
def moved_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `moved`."""
    if call.op.kind == "transpose":
        return copies([(outputs[0], x.transpose(call.integers("perm")))], ctx.threads)
    return copies([(outputs[0].reshape(x.shape), x)], ctx.threads)


@kernel("concat", "exact", MOVES)
def concat(ctx: EngineContext, call: Call, values: tuple[Array, ...]) -> Array:
    """The values one after the other along `axis`, or interleaved."""
    (type_,) = call.op.infer(call)
    out = np.empty(type_.shape, values[0].dtype)
    concat_into(ctx, call, [out], values)()
    return out


@writes("concat")
def concat_into(ctx: EngineContext, call: Call, outputs: list[Array], values: tuple[Array, ...]) -> Step:
    """Each value is copied to its place; interleaved, the elements along `axis` alternate."""
    out, axis = outputs[0], call.integer("axis") % outputs[0].ndim
    places, start = [], 0
    for number, value in enumerate(values):
        where: list[slice] = [slice(None)] * out.ndim
        if call.flag("interleave"):
            where[axis] = slice(number, None, len(values))
        else:
            where[axis] = slice(start, start + value.shape[axis])
            start += value.shape[axis]
        places.append((out[tuple(where)], value))

    return copies(places, ctx.threads)


@kernel("tile", "exact", MOVES)
def tile(ctx: EngineContext, call: Call, x: Array) -> Array:
    """x repeated `reps` times along each axis."""
    return np.tile(x, call.integers("reps"))


@writes("tile")
def tile_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """x copied to each of the `reps` places along each axis."""
    apart = [n for pair in zip(call.integers("reps"), x.shape, strict=True) for n in pair]
    spread = x.reshape([n for extent in x.shape for n in (1, extent)])
    return copies([(outputs[0].reshape(apart), np.broadcast_to(spread, apart))], ctx.threads)


_PAD_MODES = {"reflect": "reflect", "replicate": "edge"}


@kernel("pad", "exact", MOVES)
def pad(ctx: EngineContext, call: Call, x: Array) -> Array:
    """x with constant, reflected or replicated elements around it."""
    pairs, mode = _amounts(call, x.ndim), call.text("mode")
    if mode == "constant":
        return np.pad(x, pairs, constant_values=_filling(call, x))
    return np.pad(x, pairs, mode=_PAD_MODES[mode])  # type: ignore[call-overload, no-any-return]


@writes("pad")
def pad_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """x copied to the middle; around it constant elements, or others copied from there, axis by axis."""
    out, amounts, mode = outputs[0], _amounts(call, x.ndim), call.text("mode")
    middle = [slice(b, b + n) for n, (b, _) in zip(x.shape, amounts, strict=True)]
    pairs = [(out[tuple(middle)], x)]
    if mode == "constant":
        border = [
            (part, np.full((1,) * out.ndim, _filling(call, x), x.dtype)) for part in _border(out, middle)
        ]
        return copies(border + pairs, ctx.threads)
    for axis, ((before, after), extent) in enumerate(zip(amounts, x.shape, strict=True)):
        done = (*(slice(None),) * axis,)
        for place, source in _edges(mode, before, after, extent):
            pairs.append(
                (out[(*done, place, *middle[axis + 1 :])], out[(*done, source, *middle[axis + 1 :])])
            )
    return copies([pair for pair in pairs if pair[0].size], ctx.threads)


def _border(out: Array, middle: list[slice]) -> list[Array]:
    """What is around the middle: before and after it along each axis, within it along the axes before."""
    parts = []
    for axis, place in enumerate(middle):
        lead = tuple(middle[:axis])
        parts += [out[(*lead, slice(0, place.start))], out[(*lead, slice(place.stop, None))]]
    return [part for part in parts if part.size]


def _amounts(call: Call, rank: int) -> list[tuple[int, int]]:
    """(before, after) of each axis; the parameter covers the last ones."""
    amounts = call.integers("pad")
    return [(0, 0)] * (rank - len(amounts) // 2) + list(zip(amounts[::2], amounts[1::2], strict=True))


def _filling(call: Call, x: Array) -> Any:
    value = call.number("constant_val")
    return round_half_away(value) if x.dtype == np.float32 else value


def _edges(mode: str, before: int, after: int, extent: int) -> list[tuple[slice, slice]]:
    """Along one axis of the padded tensor: where the elements before and after go, and where they come from."""
    last = before + extent - 1
    if mode == "replicate":
        sources = slice(before, before + 1), slice(last, last + 1)
    else:
        sources = slice(2 * before, before, -1), slice(last - 1, last - 1 - after, -1)
        if last - 1 - after < 0:
            sources = sources[0], slice(last - 1, None, -1)
    return list(zip((slice(0, before), slice(last + 1, last + 1 + after)), sources, strict=True))


@kernel(
    "slice_by_size slice_by_index",
    "exact",
    "ANEForge numeric_cliffs (six chips): last-axis offset, 16 x value in fp16",
)
def sliced(ctx: EngineContext, call: Call, x: Array) -> Array:
    """A slice; one that starts inside the last axis goes through the crop unit, which clamps before A16."""
    (result,) = view_of(call, x) or ()
    return through_crop_unit(ctx, result) if offset_on_last_axis(call) else np.asarray(result)


@writes("slice_by_size slice_by_index")
def sliced_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """See `sliced`."""
    (result,) = view_of(call, x) or ()
    return (crop_into if offset_on_last_axis(call) else copy_into)(ctx, result, outputs[0])


def copy_into(ctx: EngineContext, x: Array, out: Array) -> Step:
    """`out` = x."""
    return copies([(out, x)], ctx.threads)


def crop_into(ctx: EngineContext, x: Array, out: Array) -> Step:
    """See `through_crop_unit`."""
    clamp = ctx.chip.width_slice_clamp
    if clamp is None or x.dtype != np.float32:
        return copy_into(ctx, x, out)
    work = Pass(ctx)
    value = work.load(x)
    beyond = work.add("gt", work.add("abs", value), work.number(clamp))
    return work.store(work.add("select", beyond, work.add("copysign", work.number(INF), value), value), out)


def through_crop_unit(ctx: EngineContext, x: Array) -> Array:
    """What a slice that starts inside the last axis gives: on chips before A16 inf above 4094 (16 x value
    in fp16).
    """
    clamp = ctx.chip.width_slice_clamp
    if clamp is None or x.dtype != np.float32:
        return x
    return np.where(np.abs(x) > clamp, np.copysign(INF, x), x)
