"""Reductions over axes: sums, means, extrema, moments, norms, cumulative sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices import arithmetic as exact
from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS
from ane_trainer.ane.compiler.lower.operands import Operand, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules.slicing import along

Axes = Sequence[int] | int | None


def axes_of(dim: Axes) -> list[int] | None:
    """A `dim` argument as a list; None for all axes."""
    if dim is None:
        return None
    return [dim] if isinstance(dim, int) else list(dim) or None


def count(shape: Sequence[int], dim: Axes) -> int:
    """Number of elements that one result gathers."""
    axes = axes_of(dim)
    return math.prod(shape) if axes is None else math.prod(shape[a] for a in axes)


@lowering("sum.dim_IntList")
def sum_(
    ctx: Context, x: Operand, dim: Axes = None, keepdim: bool = False, *, dtype: object = None
) -> Operand:
    """`sum(x, d) -> reduce_sum(x, axes=d)`"""
    return ctx.reshape(ctx.sum(x, axes_of(dim), keep=keepdim), ctx.shape)


@lowering("mean.default mean.dim")
def mean(
    ctx: Context, x: Operand, dim: Axes = None, keepdim: bool = False, *, dtype: object = None
) -> Operand:
    """`mean(x, d) -> reduce_mean(x, axes=d)`"""
    return ctx.reshape(ctx.mean(x, axes_of(dim), keep=keepdim), ctx.shape)


@lowering("amax.default")
def amax(ctx: Context, x: Operand, dim: Axes = None, keepdim: bool = False) -> Operand:
    """`amax(x, d) -> reduce_max(x, axes=d)`"""
    return ctx.reshape(ctx.reduce("max", x, axes_of(dim), keep=keepdim), ctx.shape)


@lowering("max.default")
def max_all(ctx: Context, x: Operand) -> Operand:
    """`max(x) -> reduce_max(x)`"""
    return ctx.reduce("max", x, None)


@lowering("amin.default")
def amin(ctx: Context, x: Operand, dim: Axes = None, keepdim: bool = False) -> Operand:
    """`amin(x, d) -> reduce_min(x, axes=d)`"""
    return ctx.reshape(ctx.reduce("min", x, axes_of(dim), keep=keepdim), ctx.shape)


@lowering("min.default")
def min_all(ctx: Context, x: Operand) -> Operand:
    """`min(x) -> reduce_min(x)`"""
    return ctx.reduce("min", x, None)


def first_index(ctx: Context, x: Operand, best: Operand, dim: int) -> Operand:
    """The first index along `dim` at which x equals `best`, axis kept.

    `reduce_min(select(equal(x, best), arange, n))`: no `reduce_argmax` on the engine (ANEForge sweep, M5).
    """
    shape = shape_of(x)
    n = shape[dim]
    index = torch.arange(n, dtype=torch.float64).reshape(
        [n if i == dim % len(shape) else 1 for i in range(len(shape))]
    )
    candidates = ctx.where(ctx.binary("equal", x, best), index, float(n))
    return ctx.reduce("min", candidates, [dim], keep=True)


@lowering("max.dim")
def max_dim(ctx: Context, x: Operand, dim: int, keepdim: bool = False) -> tuple[Operand, Operand]:
    """`max(x, d) -> reduce_max(x), first_index(x, max)`"""
    return _extremum(ctx, "max", x, dim)


@lowering("min.dim")
def min_dim(ctx: Context, x: Operand, dim: int, keepdim: bool = False) -> tuple[Operand, Operand]:
    """`min(x, d) -> reduce_min(x), first_index(x, min)`"""
    return _extremum(ctx, "min", x, dim)


def _extremum(ctx: Context, kind: str, x: Operand, dim: int) -> tuple[Operand, Operand]:
    shape = tuple(int(n) for n in ctx.meta[0].shape) or (1,)
    best = ctx.reduce(kind, x, [dim], keep=True)
    if ctx.used(1) and shape_of(x)[dim] > EXACT_INTEGERS:
        place = exact.first_place(ctx, kind, x, dim)[1]
        return ctx.reshape(best, shape), place.each(lambda part: ctx.reshape(part, shape))
    index = first_index(ctx, x, best, dim) if ctx.used(1) else torch.zeros(shape)
    return ctx.reshape(best, shape), ctx.reshape(index, shape)


@lowering("argmax.default")
def argmax(ctx: Context, x: Operand, dim: int | None = None, keepdim: bool = False) -> Operand:
    """`argmax(x, d) -> reduce_min(select(equal(x, reduce_max(x)), arange, n))`"""
    return _arg(ctx, "max", x, dim)


@lowering("argmin.default")
def argmin(ctx: Context, x: Operand, dim: int | None = None, keepdim: bool = False) -> Operand:
    """`argmin(x, d) -> reduce_min(select(equal(x, reduce_min(x)), arange, n))`"""
    return _arg(ctx, "min", x, dim)


def _arg(ctx: Context, kind: str, x: Operand, dim: int | None) -> Operand:
    if dim is None:
        x, dim = ctx.reshape(x, (math.prod(shape_of(x)),)), 0
    if shape_of(x)[dim] > EXACT_INTEGERS:
        return exact.first_place(ctx, kind, x, dim)[1].each(lambda part: ctx.reshape(part, ctx.shape))
    best = ctx.reduce(kind, x, [dim], keep=True)
    return ctx.reshape(first_index(ctx, x, best, dim), ctx.shape)


def moments(ctx: Context, x: Operand, axes: list[int] | None, correction: float) -> tuple[Operand, Operand]:
    """Variance and mean with the axes kept: `d = x - mean(x)`, `mean(d d) * n / (n - correction)`."""
    average = ctx.mean(x, axes, keep=True)
    spread = ctx.mean(ctx.square(ctx.sub(x, average)), axes, keep=True)
    n = count(shape_of(x), axes)
    factor = n / (n - correction) if n > correction else math.inf
    return (spread if factor == 1 else ctx.mul(spread, factor)), average


@lowering("linalg_vector_norm.default")
def vector_norm(
    ctx: Context,
    x: Operand,
    order: float = 2,
    dim: Axes = None,
    keepdim: bool = False,
    *,
    dtype: object = None,
) -> Operand:
    """`vector_norm(x, p, d)`: 2 `-> reduce_l2_norm`, 1 `-> reduce_l1_norm`, inf `-> reduce_max(abs(x))`, 0
    counts
    """
    axes = axes_of(dim)
    if order == 2:
        y = ctx.reduce("l2_norm", x, axes, keep=keepdim)
    elif order == 1:
        y = ctx.reduce("l1_norm", x, axes, keep=keepdim)
    elif math.isinf(order):
        y = ctx.reduce("max" if order > 0 else "min", ctx.unary("abs", x), axes, keep=keepdim)
    elif order == 0:
        y = ctx.sum(ctx.binary("not_equal", x, 0.0), axes, keep=keepdim)
    else:
        powers = ctx.sum(ctx.binary("pow", ctx.unary("abs", x), float(order)), axes, keep=keepdim)
        y = ctx.binary("pow", powers, 1.0 / order)
    return ctx.reshape(y, ctx.shape)


@lowering("prod.default prod.dim_int")
def prod(
    ctx: Context, x: Operand, dim: int | None = None, keepdim: bool = False, *, dtype: object = None
) -> Operand:
    """`prod(x, d) -> mul` of halves of the axis, log2(n) times (no `reduce_prod` on the engine)"""
    if dim is None:
        x, dim = ctx.reshape(x, (math.prod(shape_of(x)), 1)), 0
    x = ctx.number(x)
    n = shape_of(x)[dim]
    while n > 1:
        half = n // 2
        product = ctx.mul(ctx.slice(x, dim, 0, half), ctx.slice(x, dim, half, 2 * half))
        x = ctx.concat([product, ctx.slice(x, dim, 2 * half, n)], dim) if n % 2 else product
        n = shape_of(x)[dim]
    return ctx.reshape(x, ctx.shape)


@lowering("cumsum.default")
def cumsum(ctx: Context, x: Operand, dim: int, *, dtype: object = None) -> Operand:
    """`cumsum(x, d) -> matmul` with a constant triangle of ones (no `cumsum` on the engine)"""
    if ctx.node is not None and not ctx.node.args[0].meta["val"].shape:  # type: ignore[union-attr]
        return x
    return _running_sum(ctx, x, dim % len(shape_of(x)))


#: Above the first, axes are summed in blocks of about the second.
_LONGEST_TRIANGLE, _BLOCK = 2048, 256


def _running_sum(ctx: Context, x: Operand, dim: int) -> Operand:
    """Sums within blocks, to which the running sum of the blocks before is added."""
    shape = shape_of(x)
    n, rank = shape[dim], len(shape)
    if n <= _LONGEST_TRIANGLE:
        return along(ctx, x, dim, torch.ones(n, n, dtype=torch.float64).tril())
    blocks = -(-n // _BLOCK)
    order = [*(a for a in range(rank) if a != dim), dim]
    lines = math.prod(shape) // n
    flat = ctx.reshape(ctx.transpose(x, order), (lines, n))
    rows = ctx.reshape(ctx.pad_axis(flat, 1, 0, blocks * _BLOCK - n), (lines, blocks, _BLOCK))
    within = along(ctx, rows, 2, torch.ones(_BLOCK, _BLOCK, dtype=torch.float64).tril())
    ends = ctx.reshape(ctx.slice(within, 2, _BLOCK - 1, _BLOCK), (lines, blocks))
    before = ctx.pad_axis(ctx.slice(_running_sum(ctx, ends, 1), 1, 0, blocks - 1), 1, 1, 0)
    whole = ctx.add(within, ctx.reshape(before, (lines, blocks, 1)))
    flat = ctx.slice(ctx.reshape(whole, (lines, blocks * _BLOCK)), 1, 0, n)
    back = ctx.reshape(flat, tuple(shape[a] for a in order))
    return ctx.transpose(back, [order.index(a) for a in range(rank)])


@lowering("cumprod.default")
def cumprod(ctx: Context, x: Operand, dim: int, *, dtype: object = None) -> Operand:
    """`cumprod(x, d) -> mul(x, pad(x shifted by 1, 2, 4, ..., with ones))`, log2(n) times"""
    shape, shift = shape_of(x), 1
    while shift < shape[dim]:
        behind = ctx.pad_axis(ctx.slice(x, dim, 0, shape[dim] - shift), dim, shift, 0, 1.0)
        x, shift = ctx.mul(x, behind), 2 * shift
    return x


@lowering("dist.default")
def dist(ctx: Context, x: Operand, y: Operand, p: float = 2) -> Operand:
    """`dist(x, y, p) -> ` the vector norm of `sub(x, y)`"""
    return vector_norm(ctx, ctx.sub(x, y), p)


@lowering("_cdist_forward.default")
def cdist(ctx: Context, x: Operand, y: Operand, p: float, compute_mode: int | None) -> Operand:
    """`cdist(x, y, p) -> ` norms of `sub(reshape(x, [.., M, 1, K]), reshape(y, [.., 1, N, K]))`"""
    a, b = shape_of(x), shape_of(y)
    rows = ctx.reshape(x, (*a[:-1], 1, a[-1]))
    return vector_norm(ctx, ctx.sub(rows, ctx.reshape(y, (*b[:-2], 1, *b[-2:]))), p, -1)


@lowering("_cdist_backward.default")
def cdist_backward(ctx: Context, g: Operand, x: Operand, y: Operand, p: float, distance: Operand) -> Operand:
    """`_cdist_backward(g, x, y, 2) -> reduce_sum(mul(sub(x, y), g / d))` over y's rows; 0 where d = 0"""
    if p not in (1, 2):
        raise ctx.refuse(f"needs p of 1 or 2 for the gradient; got {p}.", "Use another norm.")
    a, b = shape_of(x), shape_of(y)
    rows = ctx.reshape(x, (*a[:-1], 1, a[-1]))
    difference = ctx.sub(rows, ctx.reshape(y, (*b[:-2], 1, *b[-2:])))
    direction: Operand = difference
    slope = g
    if p == 1:
        direction = ctx.unary("sign", difference)
    else:
        near = ctx.binary("equal", distance, 0.0)
        slope = ctx.where(near, 0.0, ctx.div(g, ctx.where(near, 1.0, distance)))
    product = ctx.mul(direction, ctx.reshape(slope, (*shape_of(slope), 1)))
    return ctx.reshape(ctx.sum(product, [-2]), ctx.shape)
