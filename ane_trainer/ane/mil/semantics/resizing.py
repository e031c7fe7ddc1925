"""Resampling of images in double precision: where samples lie is MIL's documentation (coremltools 9)."""

from __future__ import annotations

import numpy as np

from ane_trainer.ane.mil.opset import Call
from ane_trainer.ane.mil.semantics.registry import F64, meaning, result_type
from ane_trainer.ane.mil.weights import Array


def _places(mode: str, old: int, new: int) -> F64:
    """Where the new elements lie on an axis of `old` elements."""
    i = np.arange(new, dtype=np.float64)
    if mode == "STRICT_ALIGN_CORNERS" or (mode == "ALIGN_CORNERS" and new > 1):
        return i * (old - 1) / max(new - 1, 1)
    if mode == "ALIGN_CORNERS":
        return i + (old - 1) / 2
    if mode == "DEFAULT":
        return np.minimum(i * (old - old / new) / max(new - 1, 1), old - 1)
    if mode == "OFFSET_CORNERS":
        return np.clip((i + 0.5) * max(1, old - 1) / new, 0, old - 1)
    return np.clip((i + 0.5) * old / new - 0.5, 0, old - 1)


def _interpolated(x: Array, axis: int, at: F64) -> Array:
    """x along `axis` at positions between its elements."""
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    part = (at - low).reshape(-1, *(1,) * (x.ndim - 1 - axis % x.ndim))
    first = np.take(x, low, axis)
    return np.asarray(first + (np.take(x, high, axis) - first) * part)


def _to_size(call: Call, x: Array, mode: str) -> Array:
    """The last two axes interpolated to the result's extents."""
    for axis, new in zip((-2, -1), result_type(call).shape[-2:], strict=True):
        x = _interpolated(x, axis, _places(mode, x.shape[axis], new))
    return x


@meaning("upsample_nearest_neighbor resize_nearest_neighbor")
def nearest(call: Call, x: Array) -> Array:
    """The element at floor(i * old / new) of each row and column."""
    for axis, new in zip((-2, -1), result_type(call).shape[-2:], strict=True):
        x = np.take(x, np.arange(new) * x.shape[axis] // new, axis)
    return x


@meaning("upsample_bilinear")
def upsample_bilinear(call: Call, x: Array) -> Array:
    """align_corners puts ends on ends; else centres on centres unless half_pixel_centers is off."""
    if call.flag("align_corners"):
        return _to_size(call, x, "STRICT_ALIGN_CORNERS")
    centred = call.flag("half_pixel_centers") if call.has("half_pixel_centers") else True
    return _to_size(call, x, "UNALIGN_CORNERS" if centred else "DEFAULT")


@meaning("resize_bilinear")
def resize_bilinear(call: Call, x: Array) -> Array:
    """Positions by `sampling_mode`."""
    return _to_size(call, x, call.text("sampling_mode"))


@meaning("resize")
def resize(call: Call, x: Array) -> Array:
    """The last `resized_dims` axes, LINEAR or NEAREST_NEIGHBOR."""
    mode, shape = call.text("sampling_mode"), result_type(call).shape
    for axis in range(x.ndim - call.integer("resized_dims"), x.ndim):
        old, new = x.shape[axis], shape[axis]
        if old == new:
            continue
        at = _places(mode, old, new)
        if call.text("interpolation_mode") == "LINEAR":
            x = _interpolated(x, axis, at)
        else:
            index = np.floor(at if mode == "DEFAULT" else at + 0.5).astype(np.int64)
            x = np.take(x, np.clip(index, 0, old - 1), axis)
    return x


def _sampled(image: Array, down: F64, across: F64, outside: float | None) -> Array:
    """Bilinear samples of `[C, H, W]`; elements beyond the image are `outside`, or the edge's for None."""
    height, width = image.shape[1:]
    padded = image
    if outside is not None:
        padded = np.pad(image, [(0, 0), (1, 1), (1, 1)], constant_values=outside)
        down, across = np.clip(down + 1, 0, height + 1), np.clip(across + 1, 0, width + 1)
    down = np.clip(down, 0, padded.shape[1] - 1)
    across = np.clip(across, 0, padded.shape[2] - 1)
    y, x = np.floor(down).astype(int), np.floor(across).astype(int)
    y1, x1 = np.minimum(y + 1, padded.shape[1] - 1), np.minimum(x + 1, padded.shape[2] - 1)
    dy, dx = down - y, across - x
    top = padded[:, y, x] * (1 - dx) + padded[:, y, x1] * dx
    bottom = padded[:, y1, x] * (1 - dx) + padded[:, y1, x1] * dx
    return np.asarray(top * (1 - dy) + bottom * dy)


@meaning("affine")
def affine(call: Call, x: Array, matrix: Array) -> Array:
    """Result pixel (u, v) in -1..1 shows x at (a0 u + a1 v + a2, b0 u + b1 v + b2); zero outside."""
    (rows, columns), (height, width) = result_type(call).shape[2:], x.shape[2:]
    aligned = call.flag("align_corners")
    v, u = np.meshgrid(_unit(rows, aligned), _unit(columns, aligned), indexing="ij")
    out = []
    for image, a in zip(x, np.broadcast_to(matrix, (len(x), 6)), strict=True):
        across, down = a[0] * u + a[1] * v + a[2], a[3] * u + a[4] * v + a[5]
        at = [
            (place + 1) / 2 * (size - 1) if aligned else (place + 1) / 2 * size - 0.5
            for place, size in ((down, height), (across, width))
        ]
        out.append(_sampled(image, at[0], at[1], 0.0))
    return np.stack(out)


def _unit(count: int, aligned: bool) -> F64:
    """Positions of `count` pixels on -1..1, whose ends are pixel centres if aligned, else pixel edges."""
    if aligned:
        return np.linspace(-1.0, 1.0, count) if count > 1 else np.zeros(1)
    return np.linspace(-1.0, 1.0, 2 * count + 1)[1::2]


@meaning("resample")
def resample(call: Call, x: Array, coordinates: Array) -> Array:
    """x `[N, C, H, W]` at coordinates `[N, H', W', 2]` given as (across, down)."""
    mode = call.text("padding_mode")
    at = [_pixels(call, coordinates[..., i], x.shape[3 - i], mode) for i in (0, 1)]
    if call.text("sampling_mode") == "nearest":
        at = [np.rint(a) for a in at]
    outside = call.number("padding_value") if mode == "constant" else None
    return np.stack([_sampled(x[n], at[1][n], at[0][n], outside) for n in range(len(x))])


def _pixels(call: Call, at: F64, size: int, padding: str) -> F64:
    """Coordinates as pixel positions, clamped or mirrored into the image as the padding mode says."""
    mode = call.text("coordinates_mode")
    if mode != "unnormalized":
        part = (at + 1) / 2 if mode == "normalized_minus_one_to_one" else at
        at = part * (size - 1) if call.flag("align_corners") else part * size - 0.5
    if padding in ("reflection", "symmetric"):
        start, span = (0.0, size - 1.0) if padding == "reflection" else (-0.5, float(size))
        turn = np.mod(at - start, 2 * span) if span else np.zeros_like(at)
        at = np.minimum(turn, 2 * span - turn) + start
    return at if padding == "constant" else np.clip(at, 0, size - 1)


@meaning("crop_resize")
def crop_resize(
    call: Call, x: Array, boxes: Array | None, box_indices: Array | None, roi: Array | None
) -> Array:
    """Boxes cut from images and resized: boxes `[N, 4]` with indices, or roi `[N, 1, 4 or 5, 1, 1]`."""
    shape = result_type(call).shape
    if roi is None:
        assert boxes is not None
        images = np.arange(len(boxes)) if box_indices is None else box_indices
        pairs = [(x[int(i)], box) for i, box in zip(images, boxes, strict=True)]
    elif roi.shape[2] == 5:
        pairs = [(x[int(r[0])], r[1:]) for r in roi.reshape(len(roi), -1)]
    else:
        pairs = [(image, r) for r in roi.reshape(len(roi), -1) for image in x]
    return np.stack([_cropped(call, image, box) for image, box in pairs]).reshape(shape)


def _cropped(call: Call, image: Array, box: Array) -> Array:
    """One box of one image at the target size; `pad_value` where it lies outside."""
    a, b, c, d = (float(v) * call.number("spatial_scale") for v in box)
    mode = call.text("box_coordinate_mode")
    if mode.startswith("CENTER"):
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    (top, bottom), (left, right) = ((b, d), (a, c)) if "WIDTH_FIRST" in mode else ((a, c), (b, d))
    height, width = image.shape[1:]
    if call.flag("normalized_coordinates"):
        top, bottom, left, right = (
            top * (height - 1),
            bottom * (height - 1),
            left * (width - 1),
            right * (width - 1),
        )
    sampling = call.text("sampling_mode")
    rows = _in_box(sampling, top, bottom, call.integer("target_height"))
    columns = _in_box(sampling, left, right, call.integer("target_width"))
    down, across = np.meshgrid(rows, columns, indexing="ij")
    inside = (down >= 0) & (down <= height - 1) & (across >= 0) & (across <= width - 1)
    return np.where(inside, _sampled(image, down, across, None), call.number("pad_value"))


def _in_box(mode: str, start: float, end: float, count: int) -> F64:
    """Positions from `start` to `end`, both pixels of the box."""
    i, span = np.arange(count, dtype=np.float64), end - start
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count > 1:
            return start + i * span / (count - 1)
        return start + i + (span / 2 if mode == "ALIGN_CORNERS" else 0.0)
    if mode == "DEFAULT":
        return start + i * ((span + 1) * (1 - 1 / count) / max(count - 1, 1))
    if mode == "OFFSET_CORNERS":
        return np.clip(start + (i + 0.5) * max(1.0, span) / count, start, end)
    return np.clip(start + (i + 0.5) * (span + 1) / count - 0.5, start, end)
