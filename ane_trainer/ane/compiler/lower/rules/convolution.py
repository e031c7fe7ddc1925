"""Convolutions and their gradients.

A weight that is a runtime value cannot go through `conv` (e5rt takes it for batch 1 only, ANEForge
capabilities; the direct path ignores it), so a trainable convolution is

    pad -> slices -> concat -> matmul        (im2col, channels last)

and so are its gradients: the input's is a convolution of the zero-inserted output gradient with the taps in
reverse order, the weight's is columns^T @ gradient. A constant weight uses the native `conv`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, Shape, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules import windows
from ane_trainer.ane.compiler.lower.rules.slicing import zero_insert
from ane_trainer.ane.mil.program import Value


@dataclass(frozen=True)
class Geometry:
    """A convolution from `inputs` to `outputs` (spatial extents), one number per spatial axis."""

    inputs: Shape
    outputs: Shape
    kernel: Shape
    strides: Shape
    pads: Shape
    dilations: Shape
    groups: int

    def after(self, axis: int) -> int:
        """Padding (or, negative, cropping) behind an axis that makes the windows end exactly at its end."""
        span = (
            (self.outputs[axis] - 1) * self.strides[axis] + (self.kernel[axis] - 1) * self.dilations[axis] + 1
        )
        return span - self.inputs[axis] - self.pads[axis]


def _geometry(
    inputs: Shape,
    outputs: Shape,
    kernel: Shape,
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry:
    """Fills lists of one number up to the spatial rank, as torch does."""

    def full(values: Sequence[int]) -> Shape:
        return tuple(values) * len(kernel) if len(values) == 1 else tuple(values)

    return Geometry(inputs, outputs, kernel, full(stride), full(pad), full(dilation), groups)


def columns(ctx: Context, x_last: Operand, geo: Geometry) -> Operand:
    """im2col: `[N, *inputs, C]` -> `[N, *outputs, taps * C]`."""
    axes = range(len(geo.kernel))
    padded = windows.pad_spatial(ctx, x_last, [(geo.pads[i], geo.after(i)) for i in axes])
    offsets = [[t * geo.dilations[i] for t in range(geo.kernel[i])] for i in axes]
    return windows.unfold(ctx, padded, offsets, geo.outputs, geo.strides)


def forward(ctx: Context, x: Operand, weight: Operand, geo: Geometry) -> Operand:
    """`[N, C, *inputs]`, `[O, C / G, *kernel]` -> `[N, O, *outputs]`

    `transpose -> pad -> slice, concat per axis -> reshape -> matmul(columns, weight) -> reshape -> transpose`
    """
    cols = columns(ctx, windows.to_last(ctx, x), geo)
    matrix = windows.weight_matrix(ctx, weight, geo.groups)
    y = windows.apply_weight(ctx, cols, matrix, geo.groups, shape_of(x)[1])
    return windows.to_first(ctx, y)


def input_gradient(ctx: Context, g: Operand, weight: Operand, geo: Geometry) -> Operand:
    """`[N, O, *outputs]`, `[O, C / G, *kernel]` -> `[N, C, *inputs]`

    Each axis: zeros between the gradient's elements (stride), pad (k-1) d - p in front, taps in reverse
    order.
    """
    g_last = windows.to_last(ctx, g)
    pads = []
    for i in range(len(geo.kernel)):
        reach = (geo.kernel[i] - 1) * geo.dilations[i]
        before = reach - geo.pads[i]
        g_last = zero_insert(ctx, g_last, i + 1, geo.strides[i])
        pads.append((before, geo.inputs[i] + reach - before - shape_of(g_last)[i + 1]))
    padded = windows.pad_spatial(ctx, g_last, pads)
    offsets = [[t * d for t in reversed(range(k))] for k, d in zip(geo.kernel, geo.dilations, strict=True)]
    cols = windows.unfold(ctx, padded, offsets, geo.inputs, (1,) * len(geo.kernel))
    matrix = windows.weight_matrix_transposed(ctx, weight, geo.groups)
    return windows.to_first(ctx, windows.apply_weight(ctx, cols, matrix, geo.groups, shape_of(g)[1]))


def kernel_gradient(ctx: Context, x: Operand, g: Operand, geo: Geometry, shape: Shape) -> Operand:
    """`[N, C, *inputs]`, `[N, O, *outputs]` -> the weight's `shape` `[O, C / G, *kernel]`

    `matmul(columns(x), g, transpose_x=True)`; the columns are the forward's own (equal ops are merged).
    """
    cols = columns(ctx, windows.to_last(ctx, x), geo)
    matrix = windows.weight_gradient(ctx, cols, windows.to_last(ctx, g), geo.groups, shape_of(x)[1])
    return windows.from_weight_matrix(ctx, matrix, shape, geo.groups)


def _native(ctx: Context, x: Operand, weight: torch.Tensor, bias: Operand | None, geo: Geometry) -> Operand:
    """`convolution(x, const w, b) -> conv(x, w, b, strides, pad, dilations, groups)`."""
    fused = bias if isinstance(bias, torch.Tensor) else None
    y = ctx.emit(
        "conv",
        x=ctx.value(x),
        weight=weight,
        bias=fused,
        strides=geo.strides,
        pad_type="custom",
        pad=tuple(n for p in geo.pads for n in (p, p)),
        dilations=geo.dilations,
        groups=geo.groups,
    )
    return y if bias is None or fused is not None else _add_bias(ctx, y, bias)


def _add_bias(ctx: Context, y: Operand, bias: Operand) -> Operand:
    shape = (shape_of(bias)[0],) + (1,) * (len(shape_of(y)) - 2)
    return ctx.add(y, ctx.reshape(bias, shape))


@lowering("convolution.default")
def convolution(
    ctx: Context,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Operand:
    """`convolution(x, w, b) -> ` im2col and `matmul` (`forward`), then `add`; constant w `-> conv`

    transposed: the input gradient of the convolution that goes the other way (`input_gradient`).
    """
    ins, outs, kernel = shape_of(x)[2:], ctx.shape[2:], shape_of(weight)[2:]
    if transposed:
        y = input_gradient(ctx, x, weight, _geometry(outs, ins, kernel, stride, padding, dilation, groups))
    else:
        geo = _geometry(ins, outs, kernel, stride, padding, dilation, groups)
        if isinstance(weight, torch.Tensor) and isinstance(x, Value):
            return _native(ctx, x, weight, bias, geo)
        y = forward(ctx, x, weight, geo)
    return y if bias is None else _add_bias(ctx, y, bias)


@lowering("convolution_backward.default")
def convolution_backward(
    ctx: Context,
    g: Operand,
    x: Operand,
    weight: Operand,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Operand | None, Operand | None, Operand | None]:
    """`convolution_backward -> input_gradient, kernel_gradient, reduce_sum(g)`; transposed swaps the roles of
    x and g
    """
    near, far = (shape_of(g)[2:], shape_of(x)[2:]) if transposed else (shape_of(x)[2:], shape_of(g)[2:])
    geo = _geometry(near, far, shape_of(weight)[2:], stride, padding, dilation, groups)
    dx = dw = db = None
    if output_mask[0]:
        dx = forward(ctx, g, weight, geo) if transposed else input_gradient(ctx, g, weight, geo)
    if output_mask[1]:
        source, target = (g, x) if transposed else (x, g)
        dw = kernel_gradient(ctx, source, target, geo, shape_of(weight))
    if output_mask[2]:
        db = ctx.sum(g, [0, *range(2, len(shape_of(g)))])
    return dx, dw, db


@lowering("im2col.default")
def im2col(
    ctx: Context,
    x: Operand,
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Operand:
    """`im2col(x)` (`nn.Unfold`) `-> ` columns, reordered from (taps, C) to (C, taps)"""
    n, channels, *size = shape_of(x)
    spans = [
        (s + 2 * p - d * (k - 1) - 1) // st + 1
        for s, p, d, k, st in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    geo = _geometry(tuple(size), tuple(spans), tuple(kernel), stride, padding, dilation, 1)
    cols = columns(ctx, windows.to_last(ctx, x), geo)
    taps = math.prod(kernel)
    split = ctx.reshape(cols, (n, math.prod(spans), taps, channels))
    return ctx.reshape(ctx.transpose(split, (0, 3, 2, 1)), ctx.shape)


@lowering("col2im.default")
def col2im(
    ctx: Context, x: Operand, size: Sequence[int], kernel: Sequence[int], dilation: Sequence[int],
    padding: Sequence[int], stride: Sequence[int],
) -> Operand:  # fmt: skip
    """`col2im(x)` (`nn.Fold`) `-> ` taps folded back axis by axis: pads and adds"""
    n = shape_of(x)[0]
    channels = shape_of(x)[1] // math.prod(kernel)
    kh, kw = kernel
    oh, ow = [
        (s + 2 * p - d * (k - 1) - 1) // st + 1
        for s, p, d, k, st in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    taps = ctx.transpose(ctx.reshape(x, (n * channels, kh, kw, oh * ow)), (1, 0, 2, 3))
    lines = []
    for i in range(kh):
        row = ctx.reshape(ctx.slice(taps, 0, i, i + 1), (n * channels, kw, oh, ow))
        parts = [ctx.reshape(ctx.slice(row, 1, j, j + 1), (n * channels, oh, ow, 1)) for j in range(kw)]
        lines.append(windows.fold_axis(ctx, parts, 2, stride[1], dilation[1], size[1] + 2 * padding[1]))
    image = windows.fold_axis(ctx, lines, 1, stride[0], dilation[0], size[0] + 2 * padding[0])
    cropped = windows.pad_spatial(ctx, image, [(-padding[0], -padding[0]), (-padding[1], -padding[1])])
    return ctx.reshape(cropped, ctx.shape)
