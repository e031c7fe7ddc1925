"""Convolutions, pooling and resizing of ANEForge's graph interface, against PyTorch in float32."""

from __future__ import annotations

from typing import Any

import aneforge as af
import numpy as np
import torch
import torch.nn.functional as F

from tests.interop.harness import Array, Case, values

X = values(1, 4, 9, 10)
W = values(6, 4, 3, 3, seed=1, low=-0.5, high=0.5)
BIAS = values(6, seed=2)
GROUPED = values(8, 2, 3, 3, seed=3, low=-0.5, high=0.5)
DEPTHWISE = values(4, 1, 3, 3, seed=4, low=-0.5, high=0.5)
UP = values(4, 6, 3, 3, seed=5, low=-0.5, high=0.5)


def t(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _conv(
    name: str, weight: Array, x: Array = X, torch_options: dict[str, Any] | None = None, **options: Any
) -> Case:
    given = torch_options or {{"pad": "padding"}.get(k, k): v for k, v in options.items()}
    bias = options.get("bias")
    given = {k: v for k, v in given.items() if k != "bias"}
    return Case(
        name,
        lambda x: af.conv(x, weight, **options),
        (x,),
        lambda x: F.conv2d(t(x), t(weight), None if bias is None else t(bias), **given),
        5e-3,
        5e-3,
    )


CONVOLUTIONS = [
    _conv("conv", W),
    _conv("conv padded", W, pad=1),
    _conv("conv strided", W, stride=2, pad=1),
    _conv("conv dilated", W, dilation=2),
    _conv("conv grouped", GROUPED, groups=2),
    _conv("conv depthwise", DEPTHWISE, groups=4, pad=1),
    _conv("conv with bias", W, bias=BIAS),
    _conv("conv 1x1", values(5, 4, 1, 1)),
    _conv("conv batch", W, values(3, 4, 7, 7), pad=1),
    _conv("conv wide kernel", values(2, 4, 1, 9), pad=0),
    _conv("conv tall kernel", values(2, 4, 9, 1, seed=3)),
    Case(
        "conv uneven pad",
        lambda x: af.conv(x, W, pad=(1, 0, 2, 1)),
        (X,),
        lambda x: F.conv2d(F.pad(t(x), (2, 1, 1, 0)), t(W)),
        5e-3,
        5e-3,
    ),
    Case(
        "conv int8",
        lambda x: af.conv(x, W),
        (X,),
        lambda x: F.conv2d(t(x), t(W)),
        2e-2,
        8e-2,
        {"compress": "int8"},
    ),
    *(
        Case(
            f"conv {name}, batch",
            lambda x: af.conv(x, W, pad=1),
            (values(3, 4, 7, 7),),
            lambda x: F.conv2d(t(x), t(W), padding=1),
            2e-2,
            8e-2,
            {"compress": name},
        )
        for name in ("int8", "blockwise")
    ),
    Case(
        "conv sparse",
        lambda x: af.conv(x, W * (W > 0.2)),
        (X,),
        lambda x: F.conv2d(t(x), t(W * (W > 0.2))),
        5e-3,
        5e-3,
        {"compress": "sparse"},
    ),
    Case("dynamic_conv", af.dynamic_conv, (X, W), lambda x, w: F.conv2d(t(x), t(w)), 5e-3, 5e-3),
    Case(
        "dynamic_conv options",
        lambda x, w: af.dynamic_conv(x, w, stride=2, pad=1, groups=2),
        (X, GROUPED),
        lambda x, w: F.conv2d(t(x), t(w), stride=2, padding=1, groups=2),
        5e-3,
        5e-3,
    ),
    Case(
        "conv_transpose",
        lambda x: af.conv_transpose(x, UP),
        (X,),
        lambda x: F.conv_transpose2d(t(x), t(UP)),
        5e-3,
        5e-3,
    ),
    Case(
        "conv_transpose strided",
        lambda x: af.conv_transpose(x, UP, stride=2, pad=1),
        (X,),
        lambda x: F.conv_transpose2d(t(x), t(UP), stride=2, padding=1),
        5e-3,
        5e-3,
    ),
    Case(
        "conv_transpose with bias",
        lambda x: af.conv_transpose(x, UP, bias=BIAS),
        (X,),
        lambda x: F.conv_transpose2d(t(x), t(UP), t(BIAS)),
        5e-3,
        5e-3,
    ),
    Case(
        "conv_transpose dilated",
        lambda x: af.conv_transpose(x, UP, dilation=2),
        (X,),
        lambda x: F.conv_transpose2d(t(x), t(UP), dilation=2),
        5e-3,
        5e-3,
    ),
]

POOLS = [
    Case("max_pool", lambda x: x.max_pool(2), (X,), lambda x: F.max_pool2d(t(x), 2), 0, 0),
    Case("max_pool padded", lambda x: x.max_pool(3, 2, 1), (X,), lambda x: F.max_pool2d(t(x), 3, 2, 1), 0, 0),
    Case(
        "max_pool ceil",
        lambda x: x.max_pool(2, 2, 0, True),
        (X,),
        lambda x: F.max_pool2d(t(x), 2, 2, 0, ceil_mode=True),
        0,
        0,
    ),
    Case("avg_pool", lambda x: x.avg_pool(2), (X,), lambda x: F.avg_pool2d(t(x), 2)),
    Case("avg_pool padded", lambda x: x.avg_pool(3, 2, 1), (X,), lambda x: F.avg_pool2d(t(x), 3, 2, 1)),
    Case(
        "avg_pool without pad",
        lambda x: x.avg_pool(3, 2, 1, exclude_pad=True),
        (X,),
        lambda x: F.avg_pool2d(t(x), 3, 2, 1, count_include_pad=False),
    ),
    Case(
        "avg_pool ceil",
        lambda x: x.avg_pool(2, 2, 0, True, True),
        (X,),
        lambda x: F.avg_pool2d(t(x), 2, 2, ceil_mode=True, count_include_pad=False),
    ),
]


def _resize(x: Array, size: tuple[int, int], mode: str, align: bool | None = None) -> torch.Tensor:
    return F.interpolate(t(x), size, mode=mode, align_corners=align)


def _from_first(x: Array, height: int, width: int) -> Array:
    """Samples at i * old / new (ONNX's `asymmetric`, which ANEForge's importer says the engine matches)."""
    for axis, new in ((2, height), (3, width)):
        at = np.minimum(np.arange(new) * x.shape[axis] / new, x.shape[axis] - 1)
        low = np.floor(at).astype(int)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        high = np.minimum(low + 1, x.shape[axis] - 1)
        x = x.take(low, axis) * (1 - part) + x.take(high, axis) * part
    return x


def _affine(x: Array, aligned: bool) -> torch.Tensor:
    theta = torch.tensor([[[0.75, 0.1, 0.05], [-0.1, 0.75, 0.0]]])
    grid = F.affine_grid(theta, [1, 4, 7, 8], align_corners=aligned)
    return F.grid_sample(t(x), grid, align_corners=aligned)


MATRIX = np.array([[0.75, 0.1, 0.05, -0.1, 0.75, 0.0]], np.float32)

RESIZES = [
    Case("upsample", lambda x: x.upsample(), (X,), lambda x: _resize(x, (18, 20), "nearest"), 0, 0),
    Case("upsample 3", lambda x: x.upsample(3), (X,), lambda x: _resize(x, (27, 30), "nearest"), 0, 0),
    Case(
        "resize_nearest_neighbor",
        lambda x: af.resize_nearest_neighbor(x, 18, 30),
        (X,),
        lambda x: _resize(x, (18, 30), "nearest"),
        0,
        0,
    ),
    Case(
        "resize_bilinear",
        lambda x: af.resize_bilinear(x, 18, 20),
        (X,),
        lambda x: _from_first(x, 18, 20),
        4e-3,
        4e-3,
    ),
    Case(
        "resize_bilinear corners",
        lambda x: af.resize_bilinear(x, 17, 19, True),
        (X,),
        lambda x: _resize(x, (17, 19), "bilinear", True),
        4e-3,
        4e-3,
    ),
    Case(
        "upsample_bilinear",
        lambda x: af.upsample_bilinear(x),
        (X,),
        lambda x: _resize(x, (18, 20), "bilinear", False),
        4e-3,
        4e-3,
    ),
    Case(
        "upsample_bilinear corners",
        lambda x: af.upsample_bilinear(x, 2, True),
        (X,),
        lambda x: _resize(x, (18, 20), "bilinear", True),
        4e-3,
        4e-3,
    ),
    Case("affine", lambda x: af.affine(x, MATRIX, 7, 8, True), (X,), lambda x: _affine(x, True), 1e-2, 1e-2),
    Case("affine edges", lambda x: af.affine(x, MATRIX, 7, 8), (X,), lambda x: _affine(x, False), 1e-2, 1e-2),
]

CASES = [*CONVOLUTIONS, *POOLS, *RESIZES]
