"""Max and average pooling with their gradients; adaptive pooling.

Gradients work in channels-last layout, axis by axis (`windows.fold_axis`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ane_trainer.ane.lower import windows
from ane_trainer.ane.lower.context import Absent, Context, Operand, Shape, mil_shape, shape_of
from ane_trainer.ane.lower.registry import lowering
from ane_trainer.ane.lower.slicing import along

#: Stands for minus infinity in a padded border: the least finite fp16.
LOWEST = -65504.0

_NO_INDICES = Absent(
    "its indices are not computed on the engine.",
    "Use the pooled values only; unpooling needs another layer.",
)


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


@lowering("max_pool1d_with_indices.default max_pool2d_with_indices.default max_pool3d_with_indices.default")
def max_pool_with_indices(
    ctx: Context,
    x: Operand,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Operand, Absent]:
    """`max_pool2d_with_indices(x) -> max_pool(x, pad)`

    Dilated windows, and windows whose gradient is computed too `-> maximum` of shifted slices: the gradient
    needs the same slices and maxima, and equal ops are merged.
    """
    shape = mil_shape(ctx.meta[0])
    axes = len(kernel)
    pool = _pool(shape_of(x)[-axes:], shape[-axes:], kernel, stride, padding, dilation)
    batched = _batched(ctx, x, axes)
    if all(d == 1 for d in pool.dilations) and not _trained(ctx):
        return ctx.reshape(_native(ctx, "max_pool", batched, pool), shape), _NO_INDICES
    y = windows.pad_spatial(ctx, windows.to_last(ctx, batched), pool.borders, LOWEST)
    for i in reversed(range(axes)):
        y = _maximum(ctx, _taps(ctx, y, i, pool))
    return ctx.reshape(windows.to_first(ctx, y), shape), _NO_INDICES


def _trained(ctx: Context) -> bool:
    """Whether the node's indices go to a backward op."""
    assert ctx.node is not None
    indices = [user for user in ctx.node.users if user.args[1] == 1]
    return any("backward" in str(reader.target) for item in indices for reader in item.users)


def _taps(ctx: Context, x_last: Operand, axis: int, pool: Pool) -> list[Operand]:
    """The shifted slices of one spatial axis, one per window element."""
    d, n, s = pool.dilations[axis], pool.outputs[axis], pool.strides[axis]
    return [windows.tap(ctx, x_last, axis + 1, t * d, n, s) for t in range(pool.kernel[axis])]


def _maximum(ctx: Context, parts: Sequence[Operand]) -> Operand:
    best = parts[0]
    for part in parts[1:]:
        best = ctx.binary("maximum", best, part)
    return best


@lowering(
    "max_pool2d_with_indices_backward.default max_pool3d_with_indices_backward.default", accepts_absent=True
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
    folded back

    torch's tie rule (the first maximum in row-major order) separates: the first row of the window that holds
    the maximum, and in that row the first column. So the maxima are taken column-wise, then row-wise, and the
    gradient goes back the same way; per axis, each tap that equals the maximum takes what is left of g:

        e_t = select(equal(tap_t, best), rest, 0);  rest = sub(rest, e_t);  the last tap takes the rest
    """
    axes = len(kernel)
    pool = _pool(shape_of(x)[-axes:], shape_of(g)[-axes:], kernel, stride, padding, dilation)
    level = windows.pad_spatial(ctx, windows.to_last(ctx, _batched(ctx, x, axes)), pool.borders, LOWEST)
    levels = [level]
    for i in reversed(range(axes)):
        levels.append(_maximum(ctx, _taps(ctx, levels[-1], i, pool)))
    rest = windows.to_last(ctx, _batched(ctx, g, axes))
    for i in range(axes):
        best, below = levels[axes - i], levels[axes - i - 1]
        parts = _first_ties(ctx, _taps(ctx, below, i, pool), best, rest)
        rest = windows.fold_axis(
            ctx, parts, i + 1, pool.strides[i], pool.dilations[i], shape_of(below)[i + 1]
        )
    crop = [(-before, -after) for before, after in pool.borders]
    return ctx.reshape(windows.to_first(ctx, windows.pad_spatial(ctx, rest, crop)), ctx.shape)


def _first_ties(ctx: Context, taps: Sequence[Operand], best: Operand, g: Operand) -> list[Operand]:
    """g given to the first tap that equals `best`."""
    parts = []
    for tap in taps[:-1]:
        part = ctx.where(ctx.binary("equal", tap, best), g, 0.0)
        g = ctx.sub(g, part)
        parts.append(part)
    return [*parts, g]


@lowering("avg_pool1d.default avg_pool2d.default avg_pool3d.default")
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


@lowering("_adaptive_avg_pool2d.default _adaptive_avg_pool3d.default adaptive_avg_pool1d.default")
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
def adaptive_max_pool(ctx: Context, x: Operand, output_size: Sequence[int]) -> tuple[Operand, Absent]:
    """`adaptive_max_pool2d(x) -> max_pool(x)`; sizes must divide"""
    shape = mil_shape(ctx.meta[0])
    axes = len(output_size)
    kernel = _adaptive_kernel(ctx, shape_of(x)[-axes:], shape[-axes:])
    pool = _pool(shape_of(x)[-axes:], shape[-axes:], kernel, kernel, (0,))
    return ctx.reshape(_native(ctx, "max_pool", _batched(ctx, x, axes), pool), shape), _NO_INDICES


@lowering("adaptive_max_pool2d_backward.default adaptive_max_pool3d_backward.default", accepts_absent=True)
def adaptive_max_pool_backward(ctx: Context, g: Operand, x: Operand, indices: object) -> Operand:
    """`adaptive_max_pool2d_backward(g, x) -> ` as `max_pool2d_with_indices_backward`"""
    axes = 2 if ctx.node is None or "2d" in str(ctx.node.target) else 3
    kernel = _adaptive_kernel(ctx, shape_of(x)[-axes:], shape_of(g)[-axes:])
    return max_pool_backward(ctx, g, x, kernel, kernel, (0,), (1,), False, indices)


def _adaptive_kernel(ctx: Context, inputs: Shape, outputs: Shape) -> list[int]:
    if any(n % m for n, m in zip(inputs, outputs, strict=True)):
        raise ctx.refuse(
            f"needs an output size that divides the input size; got {outputs} from {inputs}.",
            "Choose a divisor.",
        )
    return [n // m for n, m in zip(inputs, outputs, strict=True)]
