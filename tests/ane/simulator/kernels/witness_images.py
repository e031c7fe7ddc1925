"""Resampling, quantisation and constants in double precision."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F

from tests.ane.simulator.kernels.witness import Drawn, Rng, moved, normal, op, sizes, wide

# --- images ---


def image(rng: Rng) -> np.ndarray:
    return normal(rng, 2, 3, *sizes(rng, 2, 2, 6))


@op("upsample_nearest_neighbor")
def upsample_nearest(rng: Rng) -> Drawn:
    x, (fh, fw) = image(rng), sizes(rng, 2, 1, 3)
    want = F.interpolate(wide(x), scale_factor=(fh, fw), mode="nearest").numpy()
    return Drawn({"x": x}, {"scale_factor_height": fh, "scale_factor_width": fw}, (want,))


@op("resize_nearest_neighbor")
def resize_nearest(rng: Rng) -> Drawn:
    x, target = image(rng), sizes(rng, 2, 1, 9)
    want = F.interpolate(wide(x), size=target, mode="nearest").numpy()
    return Drawn({"x": x}, {"target_size_height": target[0], "target_size_width": target[1]}, (want,))


@op("upsample_bilinear")
def upsample_bilinear(rng: Rng) -> Drawn:
    x, (fh, fw), aligned = image(rng), sizes(rng, 2, 1, 3), bool(rng.integers(2))
    target = (fh * x.shape[2], fw * x.shape[3])
    want = F.interpolate(wide(x), size=target, mode="bilinear", align_corners=aligned).numpy()
    params = {"scale_factor_height": fh, "scale_factor_width": fw, "align_corners": aligned}
    return Drawn({"x": x}, params, (want,), 0.51, 2.0**-24, 0.0)


@op("resize_bilinear")
def resize_bilinear(rng: Rng) -> Drawn:
    x, target = image(rng), sizes(rng, 2, 2, 9)
    mode, aligned = [("STRICT_ALIGN_CORNERS", True), ("ALIGN_CORNERS", True), ("UNALIGN_CORNERS", False)][
        rng.integers(3)
    ]
    want = F.interpolate(wide(x), size=target, mode="bilinear", align_corners=aligned).numpy()
    params = {"target_size_height": target[0], "target_size_width": target[1], "sampling_mode": mode}
    return Drawn({"x": x}, params, (want,), 0.51, 2.0**-24)


@op("resize")
def resize(rng: Rng) -> Drawn:
    x, target = image(rng), sizes(rng, 2, 2, 9)
    if rng.integers(2):
        want = F.interpolate(wide(x), size=target, mode="nearest").numpy()
        params = {"interpolation_mode": "NEAREST_NEIGHBOR", "sampling_mode": "DEFAULT"}
        if any(
            new > 1 and (np.arange(new) * (old - old / new) / (new - 1) % 1 > 1 - 1e-9).any()
            for old, new in zip(x.shape[2:], target, strict=True)
        ):
            return resize(rng)  # a position on the edge of two elements
    else:
        want = F.interpolate(wide(x), size=target, mode="bilinear", align_corners=False).numpy()
        params = {"interpolation_mode": "LINEAR", "sampling_mode": "UNALIGN_CORNERS"}
    return Drawn({"x": x}, {"shape": list(target), "resized_dims": 2, **params}, (want,), 0.51, 2.0**-24)


@op("affine")
def affine(rng: Rng) -> Drawn:
    x, matrix, target = image(rng), normal(rng, 2, 6, scale=0.5), sizes(rng, 2, 2, 5)
    aligned = bool(rng.integers(2))
    grid = F.affine_grid(wide(matrix).reshape(2, 2, 3), [2, 3, *target], align_corners=aligned)
    want = F.grid_sample(wide(x), grid, padding_mode="zeros", align_corners=aligned).numpy()
    params = {
        "output_height": target[0],
        "output_width": target[1],
        "sampling_mode": "bilinear",
        "padding_mode": "constant",
        "padding_value": 0.0,
        "coordinates_mode": "normalized_minus_one_to_one",
        "align_corners": aligned,
    }
    return Drawn({"x": x, "transform_matrix": matrix}, params, (want,), 0.51, 1e-7)


@op("resample")
def resample(rng: Rng) -> Drawn:
    x, grid = image(rng), (rng.uniform(-1.5, 1.5, (2, 3, 4, 2))).astype(np.float16)
    mode, theirs = [("constant", "zeros"), ("border", "border"), ("reflection", "reflection")][
        rng.integers(3)
    ]
    aligned = mode != "constant" or bool(rng.integers(2))
    want = F.grid_sample(wide(x), wide(grid), padding_mode=theirs, align_corners=aligned).numpy()
    params = {
        "sampling_mode": "bilinear",
        "padding_mode": mode,
        "padding_value": 0.0,
        "coordinates_mode": "normalized_minus_one_to_one",
        "align_corners": aligned,
    }
    return Drawn({"x": x, "coordinates": grid}, params, (want,), 0.51, 1e-6)


@op("crop_resize")
def crop_resize(rng: Rng) -> Drawn:
    """Corners on corners: a box's sub-image is interpolated with align_corners, as PyTorch does on whole
    pixels.
    """
    x = normal(rng, 2, 3, 7, 8)
    top, left = sizes(rng, 2, 0, 3)
    bottom, right = top + int(rng.integers(1, 4)), left + int(rng.integers(1, 4))
    target = sizes(rng, 2, 2, 5)
    part = wide(x)[:1, :, top : bottom + 1, left : right + 1]
    want = F.interpolate(part, size=target, mode="bilinear", align_corners=True).numpy()
    boxes = np.array([[top, left, bottom, right]], np.float16)
    params = {"target_height": target[0], "target_width": target[1], "sampling_mode": "STRICT_ALIGN_CORNERS"}
    return Drawn(
        {"x": x, "boxes": boxes, "box_indices": np.zeros(1, np.int32)}, params, (want,), 0.51, 2.0**-24
    )


# --- quantisation, constants ---


@op("quantize")
def quantize(rng: Rng) -> Drawn:
    x, scale, zero = (
        normal(rng, 4, 5, scale=3),
        np.float16(2.0 ** -int(rng.integers(0, 6))),
        np.int8(rng.integers(-20, 20)),
    )
    exact = wide(x).numpy() / float(scale)
    want = np.clip(np.sign(exact) * np.floor(np.abs(exact) + 0.5) + zero, -128, 127)
    params = {"scale": np.asarray(scale), "zero_point": np.asarray(zero), "output_dtype": "int8"}
    return Drawn({"input": x}, params, (want,))


@op("dequantize")
def dequantize(rng: Rng) -> Drawn:
    x = rng.integers(-128, 128, (4, 3)).astype(np.int8)
    scale, zero = np.abs(normal(rng, 3)) + np.float16(0.01), rng.integers(-9, 9, 3).astype(np.int8)
    want = (x.astype(np.float64) - zero) * scale.astype(np.float64)
    return Drawn({"input": x}, {"scale": scale, "zero_point": zero, "axis": 1}, (want,), 0.5)


@op("cast")
def cast(rng: Rng) -> Drawn:
    x = normal(rng, 5, scale=100)
    return Drawn({"x": x}, {"dtype": "int32"}, (np.trunc(x.astype(np.float64)),))


@op("identity")
def identity(rng: Rng) -> Drawn:
    x = moved(rng, 3)
    return Drawn({"x": x}, {}, (x.astype(np.float64),))


@op("fill_like")
def fill_like(rng: Rng) -> Drawn:
    return Drawn(
        {"ref_tensor": moved(rng, 2, 3)}, {"value": np.array(1.25, np.float16)}, (np.full((2, 3), 1.25),)
    )


@op("shape")
def shape(rng: Rng) -> Drawn:
    x = moved(rng, *sizes(rng, 3))
    return Drawn({"x": x}, {}, (np.array(x.shape),))
