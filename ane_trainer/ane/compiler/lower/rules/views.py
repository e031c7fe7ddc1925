"""Shape changes that keep every element, concatenation, and constants that take their shape from a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering


@lowering("view.default _unsafe_view.default reshape.default _reshape_alias.default view_copy.default")
def view(ctx: Context, x: Operand, *_: object) -> Operand:
    """`view(x, shape) -> reshape(x, shape)`"""
    return ctx.reshape(x, ctx.shape)


@lowering(
    "unsqueeze.default squeeze.default squeeze.dim squeeze.dims flatten.using_ints unflatten.int"
    " unsqueeze_copy.default squeeze_copy.default squeeze_copy.dim squeeze_copy.dims"
)
def reshaped(ctx: Context, x: Operand, *_: object) -> Operand:
    """`unsqueeze(x, d) -> reshape(x, shape)`: as every change of rank"""
    return ctx.reshape(x, ctx.shape)


@lowering("permute.default permute_copy.default")
def permute(ctx: Context, x: Operand, dims: Sequence[int]) -> Operand:
    """`permute(x, p) -> transpose(x, perm=p)`"""
    rank = len(dims)
    return ctx.transpose(x, [d % rank for d in dims]) if rank else x


@lowering("t.default t_copy.default numpy_T.default mT.default")
def t(ctx: Context, x: Operand) -> Operand:
    """`t(x) -> transpose(x, perm=[1, 0])`"""
    return ctx.swap(x, -1, -2) if len(shape_of(x)) > 1 else x


@lowering("transpose.int transpose_copy.int")
def transpose(ctx: Context, x: Operand, a: int, b: int) -> Operand:
    """`transpose(x, a, b) -> transpose(x, perm)`"""
    return ctx.swap(x, a, b)


@lowering("movedim.int movedim.intlist")
def movedim(ctx: Context, x: Operand, source: int | Sequence[int], target: int | Sequence[int]) -> Operand:
    """`movedim(x, s, d) -> transpose(x, perm)`"""
    rank = len(shape_of(x))
    sources = [a % rank for a in ([source] if isinstance(source, int) else source)]
    targets = [a % rank for a in ([target] if isinstance(target, int) else target)]
    rest = iter(a for a in range(rank) if a not in sources)
    return ctx.transpose(x, [sources[targets.index(i)] if i in targets else next(rest) for i in range(rank)])


@lowering("expand.default expand_copy.default")
def expand(ctx: Context, x: Operand, *_: object, **__: object) -> Operand:
    """`expand(x, shape) -> tile(x, reps)`; `passes.py` drops it where the reader broadcasts"""
    return ctx.broadcast(x, ctx.shape)


@lowering("repeat.default")
def repeat(ctx: Context, x: Operand, repeats: Sequence[int]) -> Operand:
    """`repeat(x, r) -> tile(reshape(x), reps=r)`"""
    if not repeats:
        return x
    old = shape_of(x)
    old = (1,) * (len(repeats) - len(old)) + old
    moved = ctx.reshape(x, old)
    whole = ctx.number(moved)
    if all(r == 1 for r in repeats):
        return moved
    return ctx.emit("tile", x=ctx.value(whole), reps=tuple(repeats))


@lowering("repeat_interleave.self_int")
def repeat_interleave(ctx: Context, x: Operand, repeats: int, dim: int | None = None, **_: object) -> Operand:
    """`repeat_interleave(x, r, d) -> reshape(tile(reshape(x, [..., n, 1, ...]), r))`"""
    flat = ctx.reshape(x, (-1,)) if dim is None else x
    shape = shape_of(flat)
    axis = 0 if dim is None else dim % len(shape)
    inserted = ctx.reshape(flat, (*shape[: axis + 1], 1, *shape[axis + 1 :]))
    return ctx.reshape(ctx.broadcast(inserted, (*shape[: axis + 1], repeats, *shape[axis + 1 :])), ctx.shape)


@lowering("pixel_shuffle.default")
def pixel_shuffle(ctx: Context, x: Operand, r: int) -> Operand:
    """`pixel_shuffle(x, r)`: [N, C r r, H, W] -> [N, C, H r, W r] by two interleavings of rank 5

    `reshape [NC, r, r, H, W] -> transpose [NC, r, H, W, r] -> reshape [NC, r, H, W r] -> transpose ->
    reshape`
    """
    *lead, channels, h, w = shape_of(x)
    n = channels // (r * r)
    for extent in lead:
        n *= extent
    columns = ctx.transpose(ctx.reshape(x, (n, r, r, h, w)), (0, 1, 3, 4, 2))
    rows = ctx.transpose(ctx.reshape(columns, (n, r, h, w * r)), (0, 2, 1, 3))
    return ctx.reshape(rows, ctx.shape)


@lowering("pixel_unshuffle.default")
def pixel_unshuffle(ctx: Context, x: Operand, r: int) -> Operand:
    """`pixel_unshuffle(x, r)`: [N, C, H r, W r] -> [N, C r r, H, W], `pixel_shuffle` backwards"""
    *lead, channels, height, width = shape_of(x)
    n, h, w = channels, height // r, width // r
    for extent in lead:
        n *= extent
    rows = ctx.transpose(ctx.reshape(x, (n, h, r, width)), (0, 2, 1, 3))
    columns = ctx.transpose(ctx.reshape(rows, (n, r, h, w, r)), (0, 1, 4, 2, 3))
    return ctx.reshape(columns, ctx.shape)


@lowering("channel_shuffle.default")
def channel_shuffle(ctx: Context, x: Operand, groups: int) -> Operand:
    """`channel_shuffle(x, g) -> reshape(transpose(reshape(x, [N, g, C/g, HW])))`"""
    n, c, *rest = shape_of(x)
    grouped = ctx.reshape(x, (n, groups, c // groups, -1))
    return ctx.reshape(ctx.swap(grouped, 1, 2), (n, c, *rest))


@lowering("cat.default concat.default")
def cat(ctx: Context, tensors: Sequence[Operand], dim: int = 0) -> Operand:
    """`cat(xs, d) -> concat(xs, axis=d)`"""
    rank = len(ctx.shape)
    return ctx.concat([x for x in tensors if len(shape_of(x)) == rank and 0 not in shape_of(x)], dim)


@lowering("stack.default")
def stack(ctx: Context, tensors: Sequence[Operand], dim: int = 0) -> Operand:
    """`stack(xs, d) -> concat(reshape(xs, [..., 1, ...]), axis=d)`"""
    shape = ctx.shape
    dim %= len(shape)
    one = tuple(1 if i == dim else n for i, n in enumerate(shape))
    return ctx.concat([ctx.reshape(x, one) for x in tensors], dim)


@lowering("full_like.default", accepts="encoded")
def full_like(ctx: Context, x: Operand, value: float, **_: object) -> Operand:
    """`full_like(x, c) -> ` a constant"""
    return torch.full(ctx.shape, value)


@lowering("zeros_like.default new_zeros.default", accepts="encoded")
def zeros_like(ctx: Context, x: Operand, *_: object, **__: object) -> Operand:
    """`zeros_like(x) -> ` a constant"""
    return torch.zeros(ctx.shape)


@lowering("ones_like.default new_ones.default", accepts="encoded")
def ones_like(ctx: Context, x: Operand, *_: object, **__: object) -> Operand:
    """`ones_like(x) -> ` a constant"""
    return torch.ones(ctx.shape)


@lowering("empty_like.default new_empty.default", accepts="encoded")
def empty_like(ctx: Context, x: Operand, *_: object, **__: object) -> Operand:
    """`empty_like(x) -> ` zeros (any content is allowed)"""
    return torch.zeros(ctx.shape)


@lowering("new_full.default fill.Scalar", accepts="encoded")
def new_full(ctx: Context, x: Operand, *arguments: Any, **_: Any) -> Operand:
    """`new_full(x, size, c) -> ` a constant"""
    return torch.full(ctx.shape, float(arguments[-1]))


@lowering("fill.Tensor")
def fill_tensor(ctx: Context, x: Operand, value: Operand) -> Operand:
    """`fill(x, value) -> tile(value)`"""
    return ctx.broadcast(value, ctx.shape)
