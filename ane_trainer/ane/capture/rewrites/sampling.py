"""`grid_sample` and its gradients as products: two one-hot columns per axis and point instead of look-ups.

A point between two rows takes the lower one and a share of the difference to the upper one: a matrix
`[points, rows]` of ones and one of differences, for each axis. The last axis is contracted by matmuls, the others by
products and sums; the gradients likewise. An axis of extent S costs S numbers per point; in fp16 a place beyond
16 is known to 1/64 of a pixel.

Legend: N batch, C channels, S extents of the image, P points (the output's positions), A axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ane_trainer.ane.capture.trace.torch_private import OperatorBase

aten = torch.ops.aten
BILINEAR, NEAREST = 0, 1
ZEROS, BORDER, REFLECTION = 0, 1, 2


@dataclass(frozen=True)
class _Axis:
    """Along one axis: `at` and `step` `[N, P, S]`, `share` and `factor` `[N, P]`.

    A point's number is `x @ at + share * (x @ step)`: the lower neighbour, and its share of the way to the upper
    one, which leaves equal numbers as they are. `factor` is the place's derivative by the grid.
    """

    at: Tensor
    step: Tensor
    share: Tensor
    factor: Tensor

    def weights(self) -> Tensor:
        """`[N, P, S]`"""
        return self.at + self.step * self.share.unsqueeze(-1)


def _place(grid: Tensor, extent: int, padding: int, aligned: bool) -> tuple[Tensor, Tensor, int]:
    """Places in pixels from a middle pixel on, of grid values in [-1, 1]; their derivative; the middle pixel.

    Outside as the padding mode says. Counted from the middle, places are half as large, and twice as exact in fp16.
    """
    scale = (extent - 1) / 2 if aligned else extent / 2
    middle = (extent - 1) // 2
    place = grid * scale + ((extent - 1) / 2 - middle)
    factor = torch.full_like(grid, scale)
    if padding == REFLECTION:
        low, span = (0.0, extent - 1.0) if aligned else (-0.5, float(extent))
        if span == 0:
            return torch.zeros_like(place), torch.zeros_like(factor), middle
        low -= middle
        sign = torch.where(place < low, -1.0, 1.0)
        away = (place - low).abs()
        turns = torch.floor(away / span)
        rest = away - turns * span
        odd = turns - 2 * torch.floor(turns / 2) > 0.5
        place = torch.where(odd, span - rest, rest) + low
        factor = factor * sign * torch.where(odd, -1.0, 1.0)
    if padding != ZEROS:
        first, last = -middle, extent - 1 - middle
        inside = (place > first) & (place < last)
        place, factor = place.clamp(first, last), torch.where(inside, factor, torch.zeros_like(factor))
    return place, factor, middle


def _axis(grid: Tensor, extent: int, mode: int, padding: int, aligned: bool) -> _Axis:
    place, factor, middle = _place(grid, extent, padding, aligned)
    rows = torch.arange(extent, dtype=place.dtype) - middle
    if mode == NEAREST:
        nearest, none = (_round(place, middle).unsqueeze(-1) == rows).to(place.dtype), torch.zeros_like(place)
        return _Axis(nearest, torch.zeros_like(nearest), none, none)
    lower = torch.floor(place)
    at_lower = (lower.unsqueeze(-1) == rows).to(place.dtype)
    at_upper = (lower.unsqueeze(-1) + 1 == rows).to(place.dtype)
    return _Axis(at_lower, at_upper - at_lower, place - lower, factor)


def _round(place: Tensor, middle: int) -> Tensor:
    """The nearest pixel; halves to the even one of all pixels, as torch does."""
    even = middle % 2
    return torch.round(place + even) - even


def _axes(x: Tensor, grid: Tensor, mode: int, padding: int, aligned: bool) -> list[_Axis]:
    """In the order of the image's axes; the grid's last axis begins with the last one (x, y, z)."""
    count = x.dim() - 2
    flat = grid.reshape(grid.shape[0], -1, count)
    return [_axis(flat[..., count - 1 - i], x.shape[2 + i], mode, padding, aligned) for i in range(count)]


def _contract(x: Tensor, axes: list[_Axis], by: int | None = None) -> Tensor:
    """`[N, C, *S]` -> `[N, C, P]`, or its derivative by the place along axis `by`."""
    batch, points = x.shape[0], axes[0].share.shape[1]
    total = x.unsqueeze(-1)  # [N, C, *S, P or 1]
    for i in reversed(range(len(axes))):
        axis, extent = axes[i], x.shape[2 + i]
        if i == len(axes) - 1:
            flat = x.reshape(batch, -1, extent)
            at, step = flat @ axis.at.transpose(1, 2), flat @ axis.step.transpose(1, 2)
        else:
            rows = total.reshape(batch, -1, extent, points)
            at, step = ((rows * m.transpose(1, 2).unsqueeze(1)).sum(2) for m in (axis.at, axis.step))
        total = step if i == by else at + step * axis.share.unsqueeze(1)
    return total.reshape(batch, x.shape[1], points)


def _spread(g: Tensor, matrices: list[Tensor], shape: torch.Size) -> Tensor:
    """`[N, C, P]` -> `[N, C, *S]`: each point's number at its places."""
    batch, points = g.shape[0], g.shape[2]
    total = g.reshape(batch, -1, 1, points)
    for matrix in matrices[:-1]:
        total = (total * matrix.transpose(1, 2).unsqueeze(1)).reshape(batch, -1, 1, points)
    return (total.reshape(batch, -1, points) @ matrices[-1]).reshape(shape)


def grid_sampler(x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool) -> Tensor:
    """`[N, C, *S]` at `[N, *O, A]` -> `[N, C, *O]`; bilinear and nearest."""
    if mode not in (BILINEAR, NEAREST):
        return NotImplemented  # type: ignore[no-any-return]
    axes = _axes(x, grid, mode, padding, align_corners)
    return _contract(x, axes).reshape(*x.shape[:2], *grid.shape[1:-1])


def grid_sampler_backward(
    g: Tensor, x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the image and the grid."""
    if mode not in (BILINEAR, NEAREST):
        return NotImplemented  # type: ignore[no-any-return]
    axes = _axes(x, grid, mode, padding, align_corners)
    flat = g.reshape(*g.shape[:2], math.prod(g.shape[2:]))
    image = _spread(flat, [a.weights() for a in axes], x.shape) if output_mask[0] else None
    if not output_mask[1]:
        return image, None
    columns = [(flat * _contract(x, axes, i)).sum(1) * axis.factor for i, axis in enumerate(axes)]
    return image, torch.stack(columns[::-1], -1).reshape(grid.shape)


SAMPLING: dict[OperatorBase, Callable[..., object]] = {
    aten.grid_sampler_2d.default: grid_sampler,
    aten.grid_sampler_3d.default: grid_sampler,
    aten.grid_sampler_2d_backward.default: grid_sampler_backward,
    aten.grid_sampler_3d_backward.default: grid_sampler_backward,
}
