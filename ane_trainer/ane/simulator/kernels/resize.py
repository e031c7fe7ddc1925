"""Resampling of images: upsample, resize, crop_resize, affine, resample.

Where a sample lies follows the MIL documentation (coremltools 9); how the engine rounds the two-axis
interpolation is not published: one rounding at the end is assumed. Pre-A14 engines have no texture unit
and run these ops as convolutions (ANEForge op catalog).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.weights import Array
from ane_trainer.ane.simulator.kernels.resampling import interpolation, picking
from ane_trainer.ane.simulator.loops.compiled import Step, copies, in_turn
from ane_trainer.ane.simulator.loops.convert import rounded
from ane_trainer.ane.simulator.numbers.fp16 import empty, round_half_away
from ane_trainer.ane.simulator.registry import KERNELS, EngineContext, kernel, writes

F64 = NDArray[np.float64]

_ZERO = "ANEForge vocabulary sweep: relative error 0 on M5 (whole factors)"
_RUNS = "ANEForge vocabulary sweep: runs on M5, values not checked; positions as coremltools documents them"
_HOST = "refused on the e5rt path (ANEForge sweep, M5), runs on the host in Core ML"


def positions(mode: str, size: int, count: int) -> F64:
    """Where `count` samples lie on an axis of `size`, by `sampling_mode`, clipped to the axis."""
    i = np.arange(count, dtype=np.float64)
    last = max(count - 1, 1)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        at = i * ((size - 1) / last) if count > 1 or mode == "STRICT_ALIGN_CORNERS" else i + (size - 1) / 2
    elif mode == "DEFAULT":
        at = i * ((size - size / count) / last)
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / count
        at = 0.5 * delta + i * delta
    else:  # UNALIGN_CORNERS
        at = (i + 0.5) * (size / count) - 0.5
    return np.clip(at, 0, size - 1)


def _along(x: F64, axis: int, at: F64) -> F64:
    """Linear interpolation along one axis at positions on it."""
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    shape = [1] * x.ndim
    shape[axis] = -1
    part = (at - low).reshape(shape)
    return np.asarray(np.take(x, low, axis) * (1 - part) + np.take(x, high, axis) * part)


def _linear(x: Array, places: dict[int, F64]) -> Array:
    """Interpolation along several axes in double precision, one rounding."""
    wide = x.astype(np.float64)
    for axis, at in places.items():
        wide = _along(wide, axis, at)
    return rounded(wide)


def _nearest(x: Array, places: dict[int, Array]) -> Array:
    for axis, index in sorted(
        places.items(), reverse=True
    ):  # the last axis first: rows are copied whole then
        x = np.take(x, _on_axis(index, x.shape[axis]), axis)
    return x


def _on_axis(index: Array, extent: int) -> Array:
    return np.clip(index.astype(np.int64), 0, extent - 1)


@kernel(
    "upsample_nearest_neighbor resize_nearest_neighbor",
    "exact",
    _ZERO + "; fractional factors assumed: floor(i in / out)",
)
def nearest(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Each result takes the element at floor(i * extent / new extent) of its row and column."""
    return _nearest(x, _places(call, x))


@kernel("upsample_bilinear resize_bilinear", "assumed", _RUNS)
def bilinear(ctx: EngineContext, call: Call, x: Array) -> Array:
    """Height and width interpolated at positions by `sampling_mode`.

    Of an upsampling with align_corners the ends lie on ends; else half_pixel_centers says (absent: the opposite of
    align_corners).
    """
    return _linear(x, _places(call, x))


@kernel("resize", "assumed", _RUNS)
def resize(ctx: EngineContext, call: Call, x: Array) -> Array:
    """The last `resized_dims` axes, LINEAR or NEAREST_NEIGHBOR (the element nearest below the position)."""
    return (_nearest if _picks(call) else _linear)(x, _places(call, x))


@writes("upsample_nearest_neighbor resize_nearest_neighbor upsample_bilinear resize_bilinear resize")
def resized_into(ctx: EngineContext, call: Call, outputs: list[Array], x: Array) -> Step:
    """Where height and width change, a compiled loop over images; any other axes take the kernel."""
    out, places, picks = outputs[0], _places(call, x), _picks(call)
    if out.dtype != np.float32 or x.ndim < 2 or any(axis < x.ndim - 2 for axis in places):
        kernel_of = KERNELS[call.op.kind].run
        return lambda: np.copyto(out, kernel_of(ctx, call, x))
    every = [np.arange(x.shape[axis], dtype=np.float64) for axis in (-2, -1)]
    rows, columns = (places.get(x.ndim - 2 + i, every[i]) for i in range(2))
    room = x if x.flags.c_contiguous else empty(x.shape)
    fill = [] if room is x else [copies([(room, x)], ctx.threads)]
    if picks:
        rows, columns = (_on_axis(at, n) for at, n in zip((rows, columns), x.shape[-2:], strict=True))
    return in_turn(*fill, (picking if picks else interpolation)(room, rows, columns, out, ctx.threads))


def _picks(call: Call) -> bool:
    """Elements are taken, not mixed."""
    kind = call.op.kind
    return "nearest" in kind or (kind == "resize" and call.text("interpolation_mode") == "NEAREST_NEIGHBOR")


def _places(call: Call, x: Array) -> dict[int, Array]:
    """Axis -> where the results lie on it (indices where elements are taken), for the axes that change."""
    kind, shape = call.op.kind, call.op.infer(call)[0].shape
    changed = range(x.ndim - (call.integer("resized_dims") if kind == "resize" else 2), x.ndim)
    sizes = {a: (x.shape[a], shape[a]) for a in changed if kind != "resize" or x.shape[a] != shape[a]}
    if "nearest" in kind:
        return {a: np.arange(new) * old // new for a, (old, new) in sizes.items()}
    mode = _mode(call)
    places = {a: positions(mode, old, new) for a, (old, new) in sizes.items()}
    return {a: _nearest_index(mode, at) for a, at in places.items()} if _picks(call) else places


def _mode(call: Call) -> str:
    if call.op.kind != "upsample_bilinear":
        return call.text("sampling_mode")
    aligned = call.flag("align_corners")
    centred = call.flag("half_pixel_centers") if call.has("half_pixel_centers") else not aligned
    return "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS" if centred else "DEFAULT"


def _nearest_index(mode: str, at: F64) -> Array:
    """Modes that start at the first element take the one below, the others the nearest."""
    return np.asarray(np.floor(at + (0.0 if mode == "DEFAULT" else 0.5)))


def _sampled(image: Array, rows: F64, columns: F64, outside: float | None) -> F64:
    """Bilinear samples of `[C, H, W]` at positions of one shape; beyond the image `outside`, None: the
    edge.
    """
    height, width = image.shape[-2:]
    total = np.zeros((image.shape[0], *rows.shape), np.float64)
    top, left = np.floor(rows), np.floor(columns)
    for dy in (0, 1):
        for dx in (0, 1):
            y, x = top + dy, left + dx
            weight = (1 - np.abs(rows - y)) * (1 - np.abs(columns - x))
            value = image[:, np.clip(y, 0, height - 1).astype(int), np.clip(x, 0, width - 1).astype(int)]
            if outside is not None:
                inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
                value = np.where(inside, value, outside)
            total += np.where(weight == 0, 0.0, weight * value)
    return total


@kernel("affine", "assumed", _RUNS)
def affine(ctx: EngineContext, call: Call, x: Array, matrix: Array) -> Array:
    """Result pixel (u, v) in -1..1 shows x at (a0 u + a1 v + a2, b0 u + b1 v + b2); zero outside.

    -1 and 1 are the centres of the outermost pixels with align_corners, else their outer edges.
    """
    (type_,) = call.op.infer(call)
    (height, width), (rows, columns) = x.shape[2:], type_.shape[2:]
    aligned = call.flag("align_corners")
    v, u = np.meshgrid(_unit(rows, aligned), _unit(columns, aligned), indexing="ij")
    out = np.empty(type_.shape, np.float64)
    for n in range(len(x)):
        a = matrix[n if len(matrix) > 1 else 0].astype(np.float64)
        across, down = a[0] * u + a[1] * v + a[2], a[3] * u + a[4] * v + a[5]
        out[n] = _sampled(x[n], _pixels(call, down, height), _pixels(call, across, width), 0.0)
    return rounded(out)


def _unit(count: int, aligned: bool) -> F64:
    """Centres of `count` pixels on -1..1, the ends being the outermost centres (aligned) or the outer edges."""
    if aligned:
        return np.linspace(-1.0, 1.0, count) if count > 1 else np.zeros(1)
    return (2.0 * np.arange(count) + 1.0) / count - 1.0


@kernel("resample", "assumed", _HOST)
def resample(ctx: EngineContext, call: Call, x: Array, coordinates: Array) -> Array:
    """x `[N, C, H, W]` at coordinates `[N, H', W', 2]` given as (across, down)."""
    sizes = (x.shape[3], x.shape[2])
    across, down = (
        _pixels(call, coordinates[..., i].astype(np.float64), size) for i, size in enumerate(sizes)
    )
    mode = call.text("padding_mode")
    outside = call.number("padding_value") if mode == "constant" else None
    if mode in ("reflection", "symmetric"):
        across, down = (_mirrored(at, size, mode) for at, size in zip((across, down), sizes, strict=True))
    elif mode == "border":
        across, down = (np.clip(at, 0, size - 1) for at, size in zip((across, down), sizes, strict=True))
    if call.text("sampling_mode") == "nearest":
        across, down = np.rint(across), np.rint(down)
    return rounded(np.stack([_sampled(x[n], down[n], across[n], outside) for n in range(len(x))]))


def _pixels(call: Call, at: F64, size: int) -> F64:
    """Coordinates as pixel positions."""
    mode = call.text("coordinates_mode")
    if mode == "unnormalized":
        return at
    part = (at + 1) / 2 if mode == "normalized_minus_one_to_one" else at
    return part * (size - 1) if call.flag("align_corners") else part * size - 0.5


def _mirrored(at: F64, size: int, mode: str) -> F64:
    """Positions folded back into the image, about its edge pixels or about its edges."""
    low, span = (0.0, size - 1.0) if mode == "reflection" else (-0.5, float(size))
    if span == 0:
        return np.zeros_like(at)
    turn = np.mod(at - low, 2 * span)
    return np.clip(np.where(turn > span, 2 * span - turn, turn) + low, 0, size - 1)


@kernel("crop_resize", "assumed", _HOST)
def crop_resize(
    ctx: EngineContext,
    call: Call,
    x: Array,
    boxes: Array | None,
    box_indices: Array | None,
    roi: Array | None,
) -> Array:
    """Boxes cut from images `[B, C, H, W]` and resized; boxes `[N, 4]` with indices, or roi `[N, 1, 4 or
    5, 1, 1]`.
    """
    (type_,) = call.op.infer(call)
    if roi is None:
        assert boxes is not None
        images = np.arange(len(boxes)) if box_indices is None else box_indices
        return _joined(
            [_crop(call, x[int(i)], box) for box, i in zip(boxes, images, strict=True)], type_.shape
        )
    flat = roi.reshape(len(roi), -1)
    if flat.shape[1] == 5:
        return _joined([_crop(call, x[int(r[0])], r[1:]) for r in flat], type_.shape)
    return _joined([[_crop(call, image, r) for image in x] for r in flat], type_.shape)


def _joined(samples: list[Any], shape: tuple[int, ...]) -> Array:
    return round_half_away(np.asarray(samples)).reshape(shape)


def _crop(call: Call, image: Array, box: Array) -> F64:
    """One box of one image `[C, H, W]` at the target size."""
    first, second, third, fourth = (float(v) * call.number("spatial_scale") for v in box)
    mode = call.text("box_coordinate_mode")
    if mode.startswith("CENTER"):
        first, second, third, fourth = (
            first - third / 2,
            second - fourth / 2,
            first + third / 2,
            second + fourth / 2,
        )
    if "WIDTH_FIRST" in mode:
        first, second, third, fourth = second, first, fourth, third
    heights, widths = (first, third), (second, fourth)
    if call.flag("normalized_coordinates"):
        heights = (heights[0] * (image.shape[1] - 1), heights[1] * (image.shape[1] - 1))
        widths = (widths[0] * (image.shape[2] - 1), widths[1] * (image.shape[2] - 1))
    rows = _box_positions(call.text("sampling_mode"), *heights, call.integer("target_height"))
    columns = _box_positions(call.text("sampling_mode"), *widths, call.integer("target_width"))
    down, across = np.meshgrid(rows, columns, indexing="ij")
    beyond = (down < 0) | (down > image.shape[1] - 1) | (across < 0) | (across > image.shape[2] - 1)
    return np.where(beyond, call.number("pad_value"), _sampled(image, down, across, None))


def _box_positions(mode: str, start: float, end: float, count: int) -> F64:
    """Sample positions within a box from `start` to `end` (both pixels are inside)."""
    i, span = np.arange(count, dtype=np.float64), end - start
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        return start + (
            i * span / (count - 1) if count > 1 else i + (span / 2 if mode == "ALIGN_CORNERS" else 0.0)
        )
    if mode == "DEFAULT":
        size = span + 1
        return start + (i * (size - size / count) / (count - 1) if count > 1 else i)
    delta = (max(1.0, span) if mode == "OFFSET_CORNERS" else span + 1) / count
    shift = 0.0 if mode == "OFFSET_CORNERS" else -0.5
    return np.clip(start + (i + 0.5) * delta + shift, start, end)
