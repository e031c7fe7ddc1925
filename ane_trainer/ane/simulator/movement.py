"""Ops that move or repeat elements; bit patterns pass through unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.opset import Call
from ane_trainer.ane.simulator.compiled import copies
from ane_trainer.ane.simulator.fp16 import INF, round_half_away
from ane_trainer.ane.simulator.registry import Context, kernel, writes
from ane_trainer.ane.simulator.views import offset_on_last_axis, view_of

Array = NDArray[Any]

MOVES = "moves bit patterns: ANEForge vocabulary sweep, relative error 0 on M5"


@kernel("transpose reshape expand_dims squeeze", "exact", MOVES)
def moved(ctx: Context, call: Call, x: Array) -> Array:
    """x in another shape or order, a view where one will do."""
    views = view_of(call, x)
    return views[0] if views is not None else view_of(call, np.ascontiguousarray(x))[0]  # type: ignore[index]


@kernel("concat", "exact", MOVES)
def concat(ctx: Context, call: Call, values: tuple[Array, ...]) -> Array:
    """The values one after the other along `axis`, or interleaved."""
    (type_,) = call.op.infer(call)
    out = np.empty(type_.shape, values[0].dtype)
    concat_into(ctx, call, [out], values)()
    return out


@writes("concat")
def concat_into(
    ctx: Context, call: Call, outputs: list[Array], values: tuple[Array, ...]
) -> Callable[[], None]:
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

    if out.dtype == np.float32:
        return copies(places, ctx.threads)

    def step() -> None:
        for place, value in places:
            np.copyto(place, value)

    return step


@kernel("tile", "exact", MOVES)
def tile(ctx: Context, call: Call, x: Array) -> Array:
    """x repeated `reps` times along each axis."""
    return np.tile(x, call.integers("reps"))


_PAD_MODES = {"reflect": "reflect", "replicate": "edge"}


@kernel("pad", "exact", MOVES)
def pad(ctx: Context, call: Call, x: Array) -> Array:
    """x with constant, reflected or replicated elements around it."""
    amounts = call.integers("pad")
    pairs = [(0, 0)] * (x.ndim - len(amounts) // 2)
    pairs += [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)]
    mode = call.text("mode")
    if mode == "constant":
        fill = (
            round_half_away(call.number("constant_val"))
            if x.dtype == np.float32
            else call.number("constant_val")
        )
        return np.pad(x, pairs, constant_values=fill)
    return np.pad(x, pairs, mode=_PAD_MODES[mode])  # type: ignore[call-overload, no-any-return]


@kernel(
    "slice_by_size slice_by_index",
    "exact",
    "ANEForge numeric_cliffs (six chips): last-axis offset, 16 x value in fp16",
)
def sliced(ctx: Context, call: Call, x: Array) -> Array:
    """A slice; one that starts inside the last axis goes through the crop unit, which clamps before A16."""
    (result,) = view_of(call, x) or ()
    return through_crop_unit(ctx, result) if offset_on_last_axis(call) else np.asarray(result)


def through_crop_unit(ctx: Context, x: Array) -> Array:
    """What a slice that starts inside the last axis gives: on chips before A16 inf above 4094 (16 x value
    in fp16).
    """
    clamp = ctx.chip.width_slice_clamp
    if clamp is None or x.dtype != np.float32:
        return x
    return np.where(np.abs(x) > clamp, np.copysign(INF, x), x)
