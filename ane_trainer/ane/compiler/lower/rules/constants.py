"""Constants that take only their shape from a runtime tensor."""

from __future__ import annotations

from typing import Any

import torch

from ane_trainer.ane.compiler.lower.context import Context
from ane_trainer.ane.compiler.lower.operands import Operand
from ane_trainer.ane.compiler.lower.registry import lowering


@lowering("full_like.default", accepts="encoded")
def full_like(ctx: Context, x: Operand, value: float, **_: Any) -> Operand:
    """`full_like(x, c) -> ` a constant"""
    return torch.full(ctx.shape, value)


@lowering("zeros_like.default new_zeros.default", accepts="encoded")
def zeros_like(ctx: Context, x: Operand, *_: Any, **__: Any) -> Operand:
    """`zeros_like(x) -> ` a constant"""
    return torch.zeros(ctx.shape)


@lowering("ones_like.default new_ones.default", accepts="encoded")
def ones_like(ctx: Context, x: Operand, *_: Any, **__: Any) -> Operand:
    """`ones_like(x) -> ` a constant"""
    return torch.ones(ctx.shape)


@lowering("empty_like.default new_empty.default", accepts="encoded")
def empty_like(ctx: Context, x: Operand, *_: Any, **__: Any) -> Operand:
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
