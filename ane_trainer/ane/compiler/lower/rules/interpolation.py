"""Resizing and border extension, as repeats or as constant matrices along each axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules.slicing import along, take


def _nearest(n: int, m: int, scale: float | None) -> torch.Tensor:
    """`[m, n]`: row i picks the element torch's nearest picks."""
    ratio = 1.0 / scale if scale else n / m
    index = (
        (torch.arange(m, dtype=torch.float32) * torch.tensor(ratio, dtype=torch.float32))
        .floor()
        .long()
        .clamp(max=n - 1)
    )
    return torch.nn.functional.one_hot(index, n).double()


@lowering(
    "upsample_nearest1d_backward.default upsample_nearest2d_backward.default"
    " upsample_nearest3d_backward.default"
)
def upsample_nearest_backward(
    ctx: Context, g: Operand, size: Sequence[int], input_size: Sequence[int], *scales: float | None
) -> Operand:
    """`upsample_nearest2d_backward(g) -> reduce_sum` over the repeats per axis, else `matmul`"""
    axes = len(size)
    scales = scales or (None,) * axes
    for i in range(axes):
        shape = shape_of(g)
        axis = len(shape) - axes + i
        n, m = int(input_size[len(input_size) - axes + i]), shape[axis]
        if n != m and m % n == 0 and (scales[i] is None or scales[i] == m / n):
            lead = torch.Size(shape[:axis]).numel()
            rest = torch.Size(shape[axis + 1 :]).numel()
            summed = ctx.sum(ctx.reshape(g, (lead, n, m // n, rest)), [2])
            g = ctx.reshape(summed, (*shape[:axis], n, *shape[axis + 1 :]))
        elif n != m or scales[i] not in (None, 1.0):
            g = along(ctx, g, axis, _nearest(n, m, scales[i]).T)
    return g


def _linear(n: int, m: int, align_corners: bool, scale: float | None) -> torch.Tensor:
    """`[m, n]`: rows of linear interpolation weights."""
    position = torch.arange(m, dtype=torch.float64)
    if align_corners:
        source = position * ((n - 1) / (m - 1) if m > 1 else 0.0)
    else:
        ratio = 1.0 / scale if scale else n / m
        source = ((position + 0.5) * ratio - 0.5).clamp(min=0.0)
    low = source.floor().long().clamp(max=n - 1)
    high = (low + 1).clamp(max=n - 1)
    weight = source - low
    matrix = torch.zeros(m, n, dtype=torch.float64)
    rows = torch.arange(m)
    matrix[rows, low] += 1 - weight
    matrix[rows, high] += weight
    return matrix


@lowering("upsample_bilinear2d.default upsample_trilinear3d.default")
def upsample_linear(
    ctx: Context, x: Operand, size: Sequence[int], align_corners: bool, *scales: float | None
) -> Operand:
    """`upsample_bilinear2d(x) -> matmul` with constant weights per axis"""
    axes = len(size)
    scales = scales or (None,) * axes
    for i in range(axes):
        axis = len(shape_of(x)) - axes + i
        x = along(ctx, x, axis, _linear(shape_of(x)[axis], int(size[i]), align_corners, scales[i]))
    return x


@lowering(
    "upsample_linear1d_backward.default upsample_bilinear2d_backward.default"
    " upsample_trilinear3d_backward.default"
)
def upsample_linear_backward(
    ctx: Context,
    g: Operand,
    size: Sequence[int],
    input_size: Sequence[int],
    align_corners: bool,
    *scales: float | None,
) -> Operand:
    """`upsample_bilinear2d_backward(g) -> matmul` with the transposed weights per axis"""
    axes = len(size)
    scales = scales or (None,) * axes
    for i in range(axes):
        axis = len(shape_of(g)) - axes + i
        n = int(input_size[len(input_size) - axes + i])
        g = along(ctx, g, axis, _linear(n, shape_of(g)[axis], align_corners, scales[i]).T)
    return g


def _border_index(n: int, before: int, after: int, mode: str) -> torch.Tensor:
    """Which of n elements stands at each place of the extended axis."""
    index = torch.arange(-before, n + after)
    if mode == "replicate":
        return index.clamp(0, n - 1)
    index = index.abs()
    return (n - 1) - ((n - 1) - index).abs()


def _extend(
    ctx: Context, x: Operand, padding: Sequence[int], mode: str, *, transposed: bool = False
) -> Operand:
    """Borders on the last axes; transposed: the gradient, each border element added to its source."""
    for i in range(len(padding) // 2):
        axis = len(shape_of(x)) - 1 - i
        before, after = int(padding[2 * i]), int(padding[2 * i + 1])
        if before == after == 0:
            continue
        n = shape_of(x)[axis] - (before + after if transposed else 0)
        index = _border_index(n, before, after, mode)
        if transposed:
            x = along(ctx, x, axis, torch.nn.functional.one_hot(index, n).double().T)
        else:
            x = take(ctx, x, axis, index)
    return x


@lowering("reflection_pad1d.default reflection_pad2d.default reflection_pad3d.default")
def reflection_pad(ctx: Context, x: Operand, padding: Sequence[int]) -> Operand:
    """`reflection_pad2d(x) -> ` slices and `concat` per axis; many `-> matmul` with a one-hot constant"""
    return _extend(ctx, x, padding, "reflect")


@lowering("replication_pad1d.default replication_pad2d.default replication_pad3d.default")
def replication_pad(ctx: Context, x: Operand, padding: Sequence[int]) -> Operand:
    """`replication_pad2d(x) -> ` slices and `concat` per axis; many `-> matmul` with a one-hot constant"""
    return _extend(ctx, x, padding, "replicate")


@lowering(
    "reflection_pad1d_backward.default reflection_pad2d_backward.default reflection_pad3d_backward.default"
)
def reflection_pad_backward(ctx: Context, g: Operand, x: object, padding: Sequence[int]) -> Operand:
    """`reflection_pad2d_backward(g) -> matmul` with the transposed one-hot constant per axis"""
    return _extend(ctx, g, padding, "reflect", transposed=True)


@lowering(
    "replication_pad1d_backward.default replication_pad2d_backward.default replication_pad3d_backward.default"
)
def replication_pad_backward(ctx: Context, g: Operand, x: object, padding: Sequence[int]) -> Operand:
    """`replication_pad2d_backward(g) -> matmul` with the transposed one-hot constant per axis"""
    return _extend(ctx, g, padding, "replicate", transposed=True)


def _cubic(n: int, m: int, align_corners: bool, scale: float | None) -> torch.Tensor:
    """`[m, n]`: rows of torch's bicubic weights (A = -0.75), clamped at the border."""
    position = torch.arange(m, dtype=torch.float64)
    if align_corners:
        source = position * ((n - 1) / (m - 1) if m > 1 else 0.0)
    else:
        source = (position + 0.5) * (1.0 / scale if scale else n / m) - 0.5
    base = source.floor()
    t, a = source - base, -0.75
    near = [(a + 2) * d**3 - (a + 3) * d**2 + 1 for d in (t, 1 - t)]
    far = [a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a for d in (t + 1, 2 - t)]
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for offset, weight in zip((-1, 0, 1, 2), (far[0], near[0], near[1], far[1]), strict=True):
        column = (base + offset).long().clamp(0, n - 1)
        matrix.index_put_((torch.arange(m), column), weight, accumulate=True)
    return matrix


@lowering("upsample_bicubic2d.default")
def upsample_cubic(
    ctx: Context, x: Operand, size: Sequence[int], align_corners: bool, *scales: float | None
) -> Operand:
    """`upsample_bicubic2d(x) -> matmul` with constant weights per axis"""
    scales = scales or (None, None)
    for i in range(2):
        axis = len(shape_of(x)) - 2 + i
        x = along(ctx, x, axis, _cubic(shape_of(x)[axis], int(size[i]), align_corners, scales[i]))
    return x


@lowering("upsample_bicubic2d_backward.default")
def upsample_cubic_backward(
    ctx: Context, g: Operand, size: Sequence[int], input_size: Sequence[int], align_corners: bool,
    *scales: float | None,
) -> Operand:  # fmt: skip
    """`upsample_bicubic2d_backward(g) -> matmul` with the transposed weights per axis"""
    scales = scales or (None, None)
    for i in range(2):
        axis = len(shape_of(g)) - 2 + i
        g = along(ctx, g, axis, _cubic(int(input_size[2 + i]), shape_of(g)[axis], align_corners, scales[i]).T)
    return g


_ANTIALIASED = {
    "linear": torch.ops.aten._upsample_bilinear2d_aa.default, "cubic": torch.ops.aten._upsample_bicubic2d_aa.default
}  # fmt: skip


def _antialiased(kind: str, n: int, m: int, align_corners: bool, scale: float | None) -> torch.Tensor:
    """`[m, n]`: the weights of torch's antialiased filter, which is linear: those that it gives unit vectors."""
    unit = torch.eye(n, dtype=torch.float64)[None, None]
    matrix: torch.Tensor = _ANTIALIASED[kind](unit, [m, n], align_corners, scale, None)
    return matrix[0, 0]


def _antialiased_rules(kind: str) -> None:
    name = f"_upsample_bi{kind}2d_aa"

    @lowering(f"{name}.default")
    def forward(
        ctx: Context, x: Operand, size: Sequence[int], align_corners: bool, *scales: float | None
    ) -> Operand:
        """`_upsample_bilinear2d_aa(x) -> matmul` with constant weights per axis; bicubic alike"""
        for i, scale in enumerate(scales or (None, None)):
            axis = len(shape_of(x)) - 2 + i
            x = along(ctx, x, axis, _antialiased(kind, shape_of(x)[axis], int(size[i]), align_corners, scale))
        return x

    @lowering(f"{name}_backward.default")
    def backward(
        ctx: Context, g: Operand, size: Sequence[int], input_size: Sequence[int], align_corners: bool,
        *scales: float | None,
    ) -> Operand:  # fmt: skip
        """`_upsample_bilinear2d_aa_backward(g) -> matmul` with the transposed weights per axis; bicubic alike"""
        for i, scale in enumerate(scales or (None, None)):
            axis, n = len(shape_of(g)) - 2 + i, int(input_size[2 + i])
            g = along(ctx, g, axis, _antialiased(kind, n, shape_of(g)[axis], align_corners, scale).T)
        return g


for _kind in _ANTIALIASED:
    _antialiased_rules(_kind)


def _nearest_exact(n: int, m: int, scale: float | None) -> torch.Tensor:
    """`[m, n]`: row i picks floor((i + 0.5) n / m)."""
    ratio = torch.tensor(1.0 / scale if scale else n / m, dtype=torch.float32)
    index = ((torch.arange(m, dtype=torch.float32) + 0.5) * ratio).floor().long().clamp(max=n - 1)
    return torch.nn.functional.one_hot(index, n).double()


@lowering(
    "_upsample_nearest_exact1d_backward.default _upsample_nearest_exact2d_backward.default"
    " _upsample_nearest_exact3d_backward.default"
)
def upsample_nearest_exact_backward(
    ctx: Context, g: Operand, size: Sequence[int], input_size: Sequence[int], *scales: float | None
) -> Operand:
    """`_upsample_nearest_exact2d_backward(g) -> matmul` with the transposed one-hot constant per axis"""
    scales = scales or (None,) * len(size)
    for i in range(len(size)):
        axis = len(shape_of(g)) - len(size) + i
        n = int(input_size[len(input_size) - len(size) + i])
        g = along(ctx, g, axis, _nearest_exact(n, shape_of(g)[axis], scales[i]).T)
    return g
