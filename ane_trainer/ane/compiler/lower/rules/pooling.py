"""Max and average pooling with their gradients; adaptive pooling.

Gradients work in channels-last layout, axis by axis (`windows.fold_axis`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Absent, Operand, Shape, mil_shape, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules import windows
from ane_trainer.ane.compiler.lower.rules.scattering import scatter
from ane_trainer.ane.compiler.lower.rules.slicing import along
from ane_trainer.ane.compiler.lower.rules.windows import (
    Adaptive,
    Maxima,
    Places,
    Regular,
    give,
    highest,
    maxima,
    places,
)

_NO_INDICES = Absent("its indices are not computed, since nothing seemed to read them.")


@dataclass(frozen=True)
class Pool:
    """A pooling of spatial extents `inputs` to `outputs`, one number per axis."""

    inputs: Shape
    outputs: Shape
    kernel: Shape
    strides: Shape
    pads: Shape
    dilations: Shape

    @property
    def borders(self) -> tuple[tuple[int, int], ...]:
        """Padding per axis so that every window is whole; `after` also covers ceil_mode, and may crop."""
        spans = [
            (o - 1) * s + (k - 1) * d + 1
            for o, s, k, d in zip(self.outputs, self.strides, self.kernel, self.dilations, strict=True)
        ]
        return tuple((p, span - n - p) for p, span, n in zip(self.pads, spans, self.inputs, strict=True))


def _pool(
    inputs: Shape,
    outputs: Shape,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1,),
) -> Pool:
    def full(values: Sequence[int] | int) -> Shape:
        items = (values,) if isinstance(values, int) else tuple(values)
        return items * len(inputs) if len(items) == 1 else items

    return Pool(inputs, outputs, full(kernel), full(stride or kernel), full(padding), full(dilation))


def _batched(ctx: Context, x: Operand, axes: int) -> Operand:
    """Pooling takes `[C, *S]` as well: a batch axis of 1 in front."""
    shape = shape_of(x)
    return ctx.reshape(x, (1, *shape)) if len(shape) == axes + 1 else x


def _native(ctx: Context, kind: str, x: Operand, pool: Pool, **options: object) -> Operand:
    """`max_pool` / `avg_pool` with explicit padding; ceil_mode is padding, a cropped end is a slice."""
    crop = [(0, min(0, after)) for _, after in pool.borders]
    x = ctx.pad(x, [(0, 0), (0, 0), *crop])
    pad = tuple(n for before, after in pool.borders for n in (before, max(0, after)))
    return ctx.emit(
        kind,
        x=ctx.value(x),
        kernel_sizes=pool.kernel,
        strides=pool.strides,
        pad_type="custom",
        pad=pad,
        ceil_mode=False,
        **options,
    )


@lowering("max_pool2d_with_indices.default max_pool3d_with_indices.default")
def max_pool_with_indices(
    ctx: Context,
    x: Operand,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Operand, Operand | Absent]:
    """`max_pool2d_with_indices(x) -> max_pool(x, pad)`

    Dilated windows, and windows whose gradient or indices are needed too `-> maximum` of shifted slices: these
    need the same slices and maxima, and equal ops are merged. Indices `-> select` over constants (to 2048).
    """
    shape = mil_shape(ctx.meta[0])
    axes = len(kernel)
    pool = _pool(shape_of(x)[-axes:], shape[-axes:], kernel, stride, padding, dilation)
    batched = _batched(ctx, x, axes)
    if all(d == 1 for d in pool.dilations) and not ctx.used(1):
        return ctx.reshape(_native(ctx, "max_pool", batched, pool), shape), _NO_INDICES
    m = _maxima(ctx, batched, pool)
    return ctx.reshape(highest(ctx, m), shape), places(m, shape)


def _maxima(ctx: Context, x: Operand, pool: Pool) -> Maxima:
    numbers = zip(pool.outputs, pool.kernel, pool.strides, pool.dilations, strict=True)
    return maxima(ctx, x, [Regular(*each) for each in numbers], pool.borders)


@lowering(
    "max_pool2d_with_indices_backward.default max_pool3d_with_indices_backward.default", accepts="absent"
)
def max_pool_backward(
    ctx: Context,
    g: Operand,
    x: Operand,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: object,
) -> Operand:
    """`max_pool2d_with_indices_backward(g, x) -> ` per axis and tap: `equal, select, sub`, then the taps
    folded back (`windows.give`)
    """
    axes = len(kernel)
    pool = _pool(shape_of(x)[-axes:], shape_of(g)[-axes:], kernel, stride, padding, dilation)
    m = _maxima(ctx, _batched(ctx, x, axes), pool)
    return ctx.reshape(give(ctx, m, _batched(ctx, g, axes)), ctx.shape)


@lowering("avg_pool2d.default avg_pool3d.default")
def avg_pool(
    ctx: Context,
    x: Operand,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Operand:
    """`avg_pool2d(x) -> avg_pool(x, pad, exclude_padding_from_average)`

    Other divisors (ceil_mode's cut windows, divisor_override): `mul(avg_pool(x), k / divisor)`, a constant
    map.
    """
    axes = len(kernel)
    pool = _pool(shape_of(x)[-axes:], ctx.shape[-axes:], kernel, stride, padding)
    batched = _batched(ctx, x, axes)
    correction = _divisors(pool, count_include_pad, divisor_override).reciprocal() * math.prod(pool.kernel)
    if bool((correction == 1).all()):
        return ctx.reshape(
            _native(ctx, "avg_pool", batched, pool, exclude_padding_from_average=False), ctx.shape
        )
    excluding = _divisors(pool, False, None)
    if torch.equal(excluding, _divisors(pool, count_include_pad, divisor_override)):
        y = _native(ctx, "avg_pool", batched, pool, exclude_padding_from_average=True)
        return ctx.reshape(y, ctx.shape)
    y = _native(ctx, "avg_pool", batched, pool, exclude_padding_from_average=False)
    return ctx.reshape(ctx.mul(y, correction), ctx.shape)


def _divisors(pool: Pool, include_pad: bool, override: int | None) -> torch.Tensor:
    """torch's divisor of each output position, of the shape `outputs`."""
    if override:
        return torch.full(pool.outputs, float(override), dtype=torch.float64)
    result = torch.ones((1,) * len(pool.outputs), dtype=torch.float64)
    for i, (n, o, k, s, p) in enumerate(
        zip(pool.inputs, pool.outputs, pool.kernel, pool.strides, pool.pads, strict=True)
    ):
        start = torch.arange(o, dtype=torch.float64) * s - p
        end = (start + k).clamp(max=n + p)
        if not include_pad:
            start, end = start.clamp(min=0), end.clamp(max=n)
        result = result * (end - start).reshape([o if j == i else 1 for j in range(len(pool.outputs))])
    return result.expand(pool.outputs)


@lowering("avg_pool2d_backward.default avg_pool3d_backward.default")
def avg_pool_backward(
    ctx: Context,
    g: Operand,
    x: Operand,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Operand:
    """`avg_pool2d_backward(g) -> mul(g, 1 / divisor)`, given to every tap: interleaved, overlaps padded and
    added
    """
    axes = len(kernel)
    pool = _pool(shape_of(x)[-axes:], shape_of(g)[-axes:], kernel, stride, padding)
    scale = _divisors(pool, count_include_pad, divisor_override).reciprocal()
    share = windows.to_last(ctx, _batched(ctx, ctx.mul(g, scale), axes))
    for i in range(axes):
        before, after = pool.borders[i]
        extent = pool.inputs[i] + before + after
        share = windows.fold_axis(ctx, [share] * pool.kernel[i], i + 1, pool.strides[i], 1, extent)
    crop = [(-before, -after) for before, after in pool.borders]
    return ctx.reshape(windows.to_first(ctx, windows.pad_spatial(ctx, share, crop)), ctx.shape)


def _averaging(n: int, m: int) -> torch.Tensor:
    """The `[m, n]` matrix of adaptive average pooling: row i averages floor(i n / m) to ceil((i +
    1) n / m).
    """
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        start, end = i * n // m, -((-(i + 1) * n) // m)
        matrix[i, start:end] = 1.0 / (end - start)
    return matrix


@lowering("_adaptive_avg_pool2d.default _adaptive_avg_pool3d.default")
def adaptive_avg_pool(ctx: Context, x: Operand, output_size: Sequence[int]) -> Operand:
    """`_adaptive_avg_pool2d(x) -> avg_pool(x)` where sizes divide, `reduce_mean` for 1x1, else `matmul` per
    axis
    """
    axes = len(output_size)
    inputs, outputs = shape_of(x)[-axes:], ctx.shape[-axes:]
    if all(m == 1 for m in outputs):
        return ctx.mean(x, list(range(-axes, 0)), keep=True)
    if all(n % m == 0 for n, m in zip(inputs, outputs, strict=True)):
        kernel = [n // m for n, m in zip(inputs, outputs, strict=True)]
        return avg_pool(ctx, x, kernel, kernel)
    for i, (n, m) in enumerate(zip(inputs, outputs, strict=True)):
        x = along(ctx, x, i - axes, _averaging(n, m))
    return x


@lowering("_adaptive_avg_pool2d_backward.default _adaptive_avg_pool3d_backward.default")
def adaptive_avg_pool_backward(ctx: Context, g: Operand, x: Operand) -> Operand:
    """`_adaptive_avg_pool2d_backward(g) -> ` as `avg_pool2d_backward` where sizes divide, else `matmul` per
    axis
    """
    axes = 2 if ctx.node is None or "2d" in str(ctx.node.target) else 3
    inputs, outputs = shape_of(x)[-axes:], shape_of(g)[-axes:]
    if all(m == 1 for m in outputs):
        return ctx.broadcast(ctx.mul(g, 1.0 / math.prod(inputs)), shape_of(x))
    if all(n % m == 0 for n, m in zip(inputs, outputs, strict=True)):
        kernel = [n // m for n, m in zip(inputs, outputs, strict=True)]
        return avg_pool_backward(ctx, g, x, kernel, kernel, (0,), False, True, None)
    for i, (n, m) in enumerate(zip(inputs, outputs, strict=True)):
        g = along(ctx, g, i - axes, _averaging(n, m).T)
    return g


@lowering("adaptive_max_pool2d.default adaptive_max_pool3d.default")
def adaptive_max_pool(
    ctx: Context, x: Operand, output_size: Sequence[int]
) -> tuple[Operand, Operand | Absent]:
    """`adaptive_max_pool2d(x) -> max_pool(x)` where sizes divide, else `maximum` of the windows' elements,
    taken by constant indices
    """
    shape = mil_shape(ctx.meta[0])
    axes = len(output_size)
    inputs, outputs = shape_of(x)[-axes:], shape[-axes:]
    batched = _batched(ctx, x, axes)
    if _divides(inputs, outputs) and not ctx.used(1):
        kernel = [n // m for n, m in zip(inputs, outputs, strict=True)]
        pool = _pool(inputs, outputs, kernel, kernel, (0,))
        return ctx.reshape(_native(ctx, "max_pool", batched, pool), shape), _NO_INDICES
    m = _adaptive_maxima(ctx, batched, outputs)
    return ctx.reshape(highest(ctx, m), shape), places(m, shape)


def _adaptive_maxima(ctx: Context, x: Operand, outputs: Shape) -> Maxima:
    inputs = shape_of(x)[-len(outputs) :]
    layout: list[Regular | Adaptive] = [
        Adaptive(n, m) if n % m else Regular(m, n // m, n // m) for n, m in zip(inputs, outputs, strict=True)
    ]
    return maxima(ctx, x, layout, [(0, 0)] * len(outputs))


@lowering("adaptive_max_pool2d_backward.default adaptive_max_pool3d_backward.default", accepts="absent")
def adaptive_max_pool_backward(ctx: Context, g: Operand, x: Operand, indices: object) -> Operand:
    """`adaptive_max_pool2d_backward(g, x) -> ` as `max_pool2d_with_indices_backward`; windows of several
    lengths are folded back by one `matmul` per axis
    """
    axes = 2 if ctx.node is None or "2d" in str(ctx.node.target) else 3
    m = _adaptive_maxima(ctx, _batched(ctx, x, axes), shape_of(g)[-axes:])
    return ctx.reshape(give(ctx, m, _batched(ctx, g, axes)), ctx.shape)


@lowering("max_unpool2d.default max_unpool3d.default", accepts="absent")
def max_unpool(
    ctx: Context, x: Operand, indices: Operand | Absent, output_size: Sequence[int], *_: object
) -> Operand:
    """`max_unpool2d(x, i) -> ` as the pooling's gradient: each value at its window's first maximum

    Windows that overlap, or another size than was pooled, `-> ` as `scatter` with the indices' numbers.
    """
    axes = len(output_size)
    m = indices.maxima if isinstance(indices, Places) else None
    if m is not None and m.shape[2:] == tuple(output_size) and all(a.disjoint for a in m.axes):
        return ctx.reshape(give(ctx, m, _batched(ctx, x, axes)), ctx.shape)
    number = indices.numbers(ctx) if isinstance(indices, Places) else indices
    if number is None or isinstance(number, Absent):
        raise ctx.refuse(
            "needs windows that do not overlap and the size that was pooled, or at most 2048 places.",
            "Pass output_size=x.size() of the tensor before the pooling.",
        )
    lead, places_ = ctx.shape[:-axes], math.prod(output_size)
    flat = (*lead, math.prod(shape_of(x)[-axes:]))
    return ctx.reshape(
        scatter(ctx, torch.zeros(*lead, places_), -1, ctx.reshape(number, flat), ctx.reshape(x, flat)),
        ctx.shape,
    )


def _divides(inputs: Shape, outputs: Shape) -> bool:
    return all(n % m == 0 for n, m in zip(inputs, outputs, strict=True))
