"""Negative log-likelihood with class weights and ignored labels, by one-hot."""

from __future__ import annotations

import math

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Absent, Operand, mil_shape, shape_of
from ane_trainer.ane.compiler.lower.registry import lowering
from ane_trainer.ane.compiler.lower.rules.indexing import one_hot

NONE, MEAN, SUM = 0, 1, 2

_NO_TOTAL = Absent("its total weight is not computed.", "Use the loss only.")


def _picks(ctx: Context, x: Operand, target: Operand, weight: Operand | None, ignore_index: int) -> Operand:
    """One-hot labels along the class axis, times the class weights; ignored labels are rows of zeros."""
    shape = shape_of(x)
    axis = 1 if len(shape) > 1 else 0
    picks = one_hot(ctx, target, shape[axis], axis, skip=ignore_index)
    if weight is None:
        return picks
    return ctx.mul(picks, ctx.reshape(weight, tuple(n if i == axis else 1 for i, n in enumerate(shape))))


def _per_item(ctx: Context, x: Operand, picks: Operand) -> Operand:
    """`reduce_sum(mul(x, picks))` over the class axis, shaped as the labels."""
    return ctx.sum(ctx.mul(x, picks), [1 if len(shape_of(x)) > 1 else 0])


def _inverse_share(ctx: Context, picks: Operand, items: int) -> Operand:
    """items / (sum of the label weights), `[1]`: exactly 1 when all labels count with weight 1.

    The mean of the weights is formed first: it is at most 1 where the count would leave fp16's integers,
    and its inverse is exact at 1. Without any counted label it is inf, and the loss 0 (inf * 0 on the
    engine).
    """
    axis = 1 if len(shape_of(picks)) > 1 else 0
    return ctx.inverse(ctx.mean(ctx.sum(picks, [axis])))


@lowering("nll_loss_forward.default nll_loss2d_forward.default", accepts="encoded")
def nll_loss_forward(
    ctx: Context, x: Operand, target: Operand, weight: Operand | None, reduction: int, ignore_index: int
) -> tuple[Operand, Operand | Absent]:
    """`nll_loss_forward(x, t) -> mul(reduce_mean(reduce_sum(mul(x, onehot), axes=1)), -1)`

    "mean" is also multiplied by items / total weight; `onehot = select(equal(t, classes), 1, 0)`
    """
    picks = _picks(ctx, x, target, weight, ignore_index)
    shape = mil_shape(ctx.meta[0])
    losses = ctx.mul(_per_item(ctx, x, picks), -1.0)
    if reduction == NONE:
        return ctx.reshape(losses, shape), _NO_TOTAL
    if reduction == SUM:
        return ctx.sum(losses), _NO_TOTAL
    items = math.prod(shape_of(losses))
    return ctx.mul(ctx.mean(losses), _inverse_share(ctx, picks, items)), _NO_TOTAL


@lowering("nll_loss_backward.default nll_loss2d_backward.default", accepts="absent encoded")
def nll_loss_backward(
    ctx: Context,
    g: Operand,
    x: Operand,
    target: Operand,
    weight: Operand | None,
    reduction: int,
    ignore_index: int,
    total_weight: object,
) -> Operand:
    """`nll_loss_backward(g, t) -> mul(onehot, mul(g, -1))`, for "mean" also divided by the total weight"""
    picks = _picks(ctx, x, target, weight, ignore_index)
    shape = shape_of(x)
    axis = 1 if len(shape) > 1 else 0
    if reduction == NONE:
        g = ctx.reshape(g, tuple(1 if i == axis else n for i, n in enumerate(shape)))
        return ctx.mul(picks, ctx.mul(g, -1.0))
    if reduction == MEAN:
        items = math.prod(n for i, n in enumerate(shape) if i != axis)
        g = ctx.mul(ctx.mul(g, 1.0 / items), _inverse_share(ctx, picks, items))
    return ctx.mul(picks, ctx.mul(g, -1.0))
