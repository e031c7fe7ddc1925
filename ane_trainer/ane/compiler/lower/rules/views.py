"""Shape changes that keep every element, concatenation, and constants that take their shape from a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering


@lowering("view.default view_copy.default")
def view(ctx: Context, x: Operand, *_: object) -> Operand:
    """`view(x, shape) -> reshape(x, shape)`"""
    return ctx.reshape(x, ctx.shape)


@lowering("unsqueeze.default squeeze.dims")
def reshaped(ctx: Context, x: Operand, *_: object) -> Operand:
    """`unsqueeze(x, d) -> reshape(x, shape)`: as every change of rank"""
    return ctx.reshape(x, ctx.shape)


@lowering("permute.default permute_copy.default")
def permute(ctx: Context, x: Operand, dims: Sequence[int]) -> Operand:
    """`permute(x, p) -> transpose(x, perm=p)`"""
    rank = len(dims)
    return ctx.transpose(x, [d % rank for d in dims]) if rank else x


@lowering("expand.default")
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


@lowering("cat.default")
def cat(ctx: Context, tensors: Sequence[Operand], dim: int = 0) -> Operand:
    """`cat(xs, d) -> concat(xs, axis=d)`"""
    rank = len(ctx.shape)
    return ctx.concat([x for x in tensors if len(shape_of(x)) == rank and 0 not in shape_of(x)], dim)


@lowering("full_like.default", accepts="encoded")
def full_like(ctx: Context, x: Operand, value: float, **_: object) -> Operand:
    """`full_like(x, c) -> ` a constant"""
    return torch.full(ctx.shape, value)
