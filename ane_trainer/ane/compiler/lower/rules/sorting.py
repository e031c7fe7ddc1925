"""Sorting by counting: the rank of an element is how many come before it, and one-hot ranks put it
in its place.

`n x n` comparisons per line of n elements: for the short axes of models (top-k of classes or experts); `long_axes` has
those of more than 2,048. The engine's own sort and topk are A14 and later, and topk refuses k of 3 and 4 (ANEForge
capabilities).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.indices import arithmetic as exact
from ane_trainer.ane.compiler.lower.indices.codes import EXACT_INTEGERS
from ane_trainer.ane.compiler.lower.operands import Encoded, Operand, as_tensor, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules import long_axes
from ane_trainer.ane.compiler.lower.rules.indexing import move_axis_back
from ane_trainer.ane.mil.program import MAX_FP16, Value

_Pair = tuple[Operand, Operand]


def _ordered(
    ctx: Context, x: Operand, dim: int, *, descending: bool, take: tuple[int, int] | None = None
) -> _Pair:
    """Values and indices along `dim` in order (of equal elements the first comes first), places `take` only.

    `rank_i = reduce_sum(x_j before x_i)`; `value_k = reduce_sum(select(equal(rank, k), x, 0))`
    """
    shape = shape_of(x)
    n, dim = shape[dim], dim % len(shape)
    if n > EXACT_INTEGERS and isinstance(x, Encoded):
        raise ctx.refuse("orders more than 2048 integers of which some are above 2048.", "Order fewer.")
    if n > EXACT_INTEGERS:
        return long_axes.ordered(ctx, x, dim, descending=descending, take=take or (0, n))
    order = [a for a in range(len(shape)) if a != dim] + [dim]
    moved = ctx.transpose(x, order)
    lead = shape_of(moved)[:-1]
    rows = 1
    for extent in lead:
        rows *= extent
    own, other = ctx.reshape(moved, (rows, n, 1)), ctx.reshape(moved, (rows, 1, n))
    if isinstance(other, Encoded):
        compared: _Pair = exact.order(ctx, other, own), torch.zeros(1)
    else:
        compared = other, own
    before = ctx.number(ctx.binary("greater" if descending else "less", *compared))
    tied = ctx.mul(ctx.number(ctx.binary("equal", *compared)), torch.ones(n, n).tril(-1))
    rank = ctx.sum(ctx.add(before, tied), [-1])  # [rows, n]
    start, stop = take or (0, n)
    places = torch.arange(start, stop, dtype=torch.float64).reshape(1, -1, 1)
    hit = ctx.binary("equal", ctx.reshape(rank, (rows, 1, n)), places)  # [rows, places, n]
    results = []
    for source in (other, torch.arange(n, dtype=torch.float64).reshape(1, 1, n)):
        results.append(_each(source, functools.partial(_picked, ctx, hit, (*lead, stop - start), dim)))
    return results[0], results[1]


def _picked(
    ctx: Context, hit: Operand, shape: tuple[int, ...], dim: int, source: Value | torch.Tensor
) -> Operand:
    """The elements [rows, 1, n] at the places [rows, places, n] that are hit."""
    chosen = ctx.sum(ctx.where(hit, source, 0.0), [-1])
    return move_axis_back(ctx, ctx.reshape(chosen, shape), dim)


@lowering("sort.default")
def sort(ctx: Context, x: Operand, dim: int = -1, descending: bool = False) -> _Pair:
    """`sort(x, d) -> ` comparisons, `reduce_sum`, one-hot `select` (see `_ordered`)"""
    return _ordered(ctx, x, dim, descending=descending)


@lowering("sort.stable")
def sort_stable(
    ctx: Context, x: Operand, *, stable: object = None, dim: int = -1, descending: bool = False
) -> _Pair:
    """`sort(x, d, stable) -> ` as `sort`, which is stable"""
    return _ordered(ctx, x, dim, descending=descending)


@lowering("topk.default")
def topk(ctx: Context, x: Operand, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> _Pair:
    """`topk(x, k, d) -> ` as `sort`, the first k places"""
    if shape_of(x)[dim] > EXACT_INTEGERS and k <= long_axes.MOST_FIRST:
        found = long_axes.first(ctx, "max" if largest else "min", x, dim, k)
        parts = [ctx.concat([place.parts[part] for _, place in found], dim) for part in (0, 1)]
        return ctx.concat([best for best, _ in found], dim), exact.pair(*parts)
    return _ordered(ctx, x, dim, descending=largest, take=(0, k))


@lowering("kthvalue.default")
def kthvalue(ctx: Context, x: Operand, k: int, dim: int = -1, keepdim: bool = False) -> _Pair:
    """`kthvalue(x, k, d) -> ` as `sort`, place k - 1"""
    if shape_of(x)[dim] > EXACT_INTEGERS and k <= long_axes.MOST_FIRST:
        shape = tuple(ctx.meta[0].shape) or (1,)
        value, place = long_axes.first(ctx, "min", x, dim, k)[-1]
        return ctx.reshape(value, shape), place.each(lambda part: ctx.reshape(part, shape))
    return _one(ctx, x, dim, k - 1)


@lowering("median.dim")
def median(ctx: Context, x: Operand, dim: int = -1, keepdim: bool = False) -> _Pair:
    """`median(x, d) -> ` as `sort`, place (n - 1) / 2"""
    return _one(ctx, x, dim, (shape_of(x)[dim] - 1) // 2)


def _one(ctx: Context, x: Operand, dim: int, place: int) -> _Pair:
    values, indices = _ordered(ctx, x, dim, descending=False, take=(place, place + 1))
    shape = tuple(ctx.meta[0].shape) or (1,)
    return _each(values, lambda part: ctx.reshape(part, shape)), _each(
        indices, lambda part: ctx.reshape(part, shape)
    )


@lowering("median.default")
def median_of_all(ctx: Context, x: Operand) -> Operand:
    """`median(x) -> ` as `sort` of all elements, place (n - 1) / 2"""
    n = torch.Size(shape_of(x)).numel()
    return _ordered(ctx, ctx.reshape(x, (n,)), 0, descending=False, take=((n - 1) // 2, (n - 1) // 2 + 1))[0]


@lowering("bucketize.Tensor")
def bucketize(
    ctx: Context, x: Operand, boundaries: Operand, *, out_int32: bool = False, right: bool = False
) -> Operand:
    """`bucketize(x, b) -> reduce_sum(less(b, reshape(x, [.., 1])))`, with `right` less_equal"""
    return _count_below(ctx, boundaries, x, right)


@lowering("searchsorted.Tensor")
def searchsorted(
    ctx: Context, ordered: Operand, x: Operand, *, out_int32: bool = False, right: bool = False,
    side: str | None = None, sorter: Operand | None = None,
) -> Operand:  # fmt: skip
    """`searchsorted(b, x) -> reduce_sum(less(reshape(b, [.., 1, n]), reshape(x, [.., 1])))`, as `bucketize`"""
    if sorter is not None:
        raise ctx.refuse(
            "needs an ordered sequence; got a sorter.", "Index the sequence with the sorter first."
        )
    shape = shape_of(ordered)
    rows = ctx.reshape(ordered, (*shape[:-1], 1, shape[-1])) if len(shape) > 1 else ordered
    return _count_below(ctx, rows, x, right or side == "right")


def _count_below(ctx: Context, boundaries: Operand, x: Operand, right: bool) -> Operand:
    """How many of the last axis' boundaries are below x (or equal to it)."""
    n = shape_of(boundaries)[-1]
    below = ctx.binary("less_equal" if right else "less", boundaries, ctx.reshape(x, (*shape_of(x), 1)))
    if n > EXACT_INTEGERS:
        return exact.total(ctx, below, [-1], 1.0).each(lambda part: ctx.reshape(part, ctx.shape))
    return ctx.reshape(ctx.sum(below, [-1]), ctx.shape)


@lowering("cummax.default")
def cummax(ctx: Context, x: Operand, dim: int) -> _Pair:
    """`cummax(x, d) -> maximum(x, x shifted by 1, 2, 4, ...)`, log2(n) times, and where they are"""
    return _running_extremum(ctx, x, dim, "maximum", "greater", -MAX_FP16)


@lowering("cummin.default")
def cummin(ctx: Context, x: Operand, dim: int) -> _Pair:
    """`cummin(x, d) -> minimum(x, x shifted by 1, 2, 4, ...)`, log2(n) times, and where they are"""
    return _running_extremum(ctx, x, dim, "minimum", "less", MAX_FP16)


def _running_extremum(ctx: Context, x: Operand, dim: int, kind: str, beats: str, lowest: float) -> _Pair:
    """Of equal elements the last counts, as torch has it."""
    shape = shape_of(x)
    axis, n = dim % len(shape), shape[dim]
    place = long_axes.numbered(shape, axis)
    if n <= EXACT_INTEGERS:
        place = Encoded((as_tensor(exact.joined(ctx, place)),), "coded")  # in one number
    shift = 1
    while shift < n:
        behind = _behind(ctx, x, axis, shift, lowest)
        if isinstance(x, Encoded):
            test = ctx.binary(beats, exact.order(ctx, behind, x), 0.0)
        else:
            test = ctx.binary(beats, behind, x) if ctx.used(1) else False
        if ctx.used(1):
            place = place.each(functools.partial(_taken_from, ctx, test, axis, shift))
        x = exact.chosen(ctx, test, behind, x) if isinstance(x, Encoded) else ctx.binary(kind, x, behind)
        shift *= 2
    return x, place.parts[0] if n <= EXACT_INTEGERS else place


def _behind(ctx: Context, x: Operand, axis: int, shift: int, lowest: float) -> Operand:
    """Each element's neighbour `shift` before it; before the first is `lowest`, which nothing is beyond."""
    kept = shape_of(x)[axis] - shift
    if not isinstance(x, Encoded):
        return ctx.pad_axis(ctx.slice(x, axis, 0, kept), axis, shift, 0, lowest)
    ends = 0.0, math.copysign(EXACT_INTEGERS, lowest)
    parts = (
        ctx.pad_axis(ctx.slice(p, axis, 0, kept), axis, shift, 0, e)
        for p, e in zip(x.parts, ends, strict=True)
    )
    return exact.pair(*parts)


def _taken_from(ctx: Context, test: Operand, axis: int, shift: int, place: Operand) -> Operand:
    """The place that was found `shift` before where the test holds, else its own."""
    earlier = ctx.slice(place, axis, 0, shape_of(place)[axis] - shift)
    return ctx.where(test, ctx.pad_axis(earlier, axis, shift, 0), place)


def _each(x: Operand, function: Callable[[Operand], Operand]) -> Operand:
    return x.each(function) if isinstance(x, Encoded) else function(x)
